//! What the host should look like, as pure functions of our lease and the peers'.
//!
//! A backend has no side effects: [`crate::agent`] applies what `desired` returns and keeps it so. A new backend is
//! one file here, one variant of [`BackendConfig`], and one arm in [`choose`].

mod alloc;
mod host_gw;
mod udp;

use std::net::{IpAddr, Ipv4Addr};

use crate::domain::config::{BackendConfig, NetworkConfig};
use crate::domain::host_state::{HostState, TunnelOptions};
use crate::domain::interface::ExternalInterface;
use crate::domain::lease::{Lease, LeaseAttrs};
use crate::domain::path_mtu::PathMtus;
use crate::domain::peers::Peers;

/// One way to make other nodes' subnets reachable.
pub trait Backend: Send + Sync {
    /// What the others must know of us.
    fn lease_attrs(&self) -> LeaseAttrs;

    /// MTU for pods in bytes, as written to `FLANNEL_MTU`.
    fn mtu(&self) -> u32;

    /// Where [`Self::mtu`] comes from, for people.
    fn mtu_reason(&self) -> String;

    /// The MTU above which a path to a peer is not worth asking about; `None` when none is to be asked about.
    fn probed_mtu(&self) -> Option<u32> {
        None
    }

    /// Everything of ours that should be on the host. `paths` is what is known of the ways to the peers.
    fn desired(&self, own: &Lease, peers: &Peers, paths: &PathMtus) -> HostState;

    /// Devices the backend creates; what hangs on them is ours.
    fn devices(&self) -> Vec<String>;
}

/// What a backend may know of the host it runs on.
#[derive(Clone, Debug)]
pub struct BackendContext {
    pub interface: ExternalInterface,
    /// Name for a tunnel device, `flannel0` unless another agent has it.
    pub tunnel_device: String,
    pub tunnel: TunnelOptions,
    /// `--udp-mtu`: goes before the configuration's `Backend.MTU`.
    pub tunnel_mtu: Option<u32>,
}

/// Why a backend can't work on this host.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BackendError {
    #[error(
        "backend host-gw needs the public address on the interface itself: public address {public} is not {address}, \
         the address of {interface}; leave --public-ip out or choose another backend"
    )]
    PublicAddressElsewhere { public: IpAddr, address: IpAddr, interface: String },
    #[error(
        "interface {interface} has MTU {mtu}, too small for the {backend} backend: {overhead} bytes of headers leave \
         less than {least} (RFC 791)"
    )]
    MtuTooSmall { backend: &'static str, interface: String, mtu: u32, overhead: u32, least: u32 },
    #[error(
        "{field} is {value}: {interface} has MTU {mtu}, of which 28 bytes are the tunnel's own headers; it must be \
         from {least} to {}, or left out to follow the interface",
        mtu.saturating_sub(28)
    )]
    MtuNotPossible { field: &'static str, value: u32, interface: String, mtu: u32, least: u32 },
    #[error(
        "backend {backend} needs an IPv4 network: set EnableIPv4 and Network in the network configuration"
    )]
    NeedsIpv4 { backend: &'static str },
}

/// The backend that the configuration asks for, when an agent starts.
///
/// # Errors
/// This host can't carry it as it is asked for.
pub fn choose(config: &NetworkConfig, context: BackendContext) -> Result<Box<dyn Backend>, BackendError> {
    if matches!(config.backend, BackendConfig::Udp { .. }) {
        udp::check_mtu(config, &context)?;
    }
    rebuild(config, context)
}

/// The same for an agent that runs and whose interface has changed: a fixed MTU that no longer fits is cut to what does,
/// since packets larger than the interface takes would be lost.
///
/// # Errors
/// This host can't carry the backend any more.
pub fn rebuild(config: &NetworkConfig, context: BackendContext) -> Result<Box<dyn Backend>, BackendError> {
    Ok(match config.backend {
        BackendConfig::Udp { port, .. } => Box::new(udp::Udp::new(config, context, port)?),
        BackendConfig::HostGw => Box::new(host_gw::HostGw::new(context.interface)?),
        BackendConfig::Alloc => Box::new(alloc::Alloc::new(context.interface)),
    })
}

/// What every backend publishes; `backend_type` is flanneld's constant, empty for udp and alloc (contract §3.2).
fn published(interface: &ExternalInterface, backend_type: &str) -> LeaseAttrs {
    LeaseAttrs {
        public_ip: interface.public_ip.unwrap_or(Ipv4Addr::UNSPECIFIED),
        public_ipv6: interface.public_ipv6,
        backend_type: backend_type.to_owned(),
        backend_data: None,
        backend_v6_data: None,
        unknown: Vec::new(),
    }
}
