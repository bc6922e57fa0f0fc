//! Leases in etcd: one file per API, both of them a [`Registry`].
//!
//! Connects when first used, and again whenever it must: etcd may be down when a node boots.

mod options;
mod v3;

use std::sync::Arc;

pub use self::options::{EtcdOptions, EtcdOptionsError};
use super::registry::{Registry, RegistryNetworks};

/// The networks below `--etcd-prefix`.
///
/// # Errors
/// An option can't be right. The process needs rustls's ring provider, installed or compiled in as the only one.
pub fn open(options: &EtcdOptions) -> Result<RegistryNetworks, EtcdOptionsError> {
    let checked = options::check(options)?;
    let (prefix, resync) = (checked.prefix.clone(), checked.resync);
    let registry: Arc<dyn Registry> = Arc::new(v3::V3::new(checked));
    Ok(RegistryNetworks::new(registry, prefix, resync))
}
