//! Leases in etcd: one file per API, both of them a [`Registry`].
//!
//! Connects when first used, and again whenever it must: etcd may be down when a node boots.

mod auto;
mod options;
mod v2;
mod v3;

use std::sync::Arc;

pub use self::options::{EtcdOptions, EtcdOptionsError};
pub use super::registry::{Fate, FollowEnd, Mirror, Planned};
use super::registry::{Registry, RegistryNetworks};
pub use crate::domain::etcd::EtcdApi;

/// The networks below `--etcd-prefix`.
///
/// # Errors
/// An option can't be right. The process needs rustls's ring provider, installed or compiled in as the only one.
pub fn open(options: &EtcdOptions) -> Result<RegistryNetworks, EtcdOptionsError> {
    let checked = options::check(options)?;
    let (prefix, resync) = (checked.prefix.clone(), checked.resync);
    let registry: Arc<dyn Registry> = match options.api {
        EtcdApi::Auto => Arc::new(auto::Auto::new(checked)),
        EtcdApi::V2 => {
            Arc::new(v2::V2::new(checked).map_err(|error| EtcdOptionsError::Tls(error.to_string()))?)
        }
        EtcdApi::V3 => Arc::new(v3::V3::new(checked)),
    };
    Ok(RegistryNetworks::new(registry, prefix, resync))
}

/// Both keyspaces below `--etcd-prefix`: v2's, which is old, and v3's.
///
/// # Errors
/// An option can't be right.
pub fn keyspaces(options: &EtcdOptions) -> Result<Mirror, EtcdOptionsError> {
    let checked = options::check(options)?;
    let prefix = checked.prefix.clone();
    let v3 = Arc::new(v3::V3::new(checked.clone()));
    let v2 = v2::V2::new(checked).map_err(|error| EtcdOptionsError::Tls(error.to_string()))?;
    Ok(Mirror::new(Arc::new(v2), v3, &prefix))
}
