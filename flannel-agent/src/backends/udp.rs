//! The `udp` backend: every inner IPv4 packet bare in a UDP datagram (contract §8.1).
//!
//! Says only what should be there: a TUN device with the subnet's base address, a route for the whole network to
//! it, the tunnel, one peer per lease, and a route of its own to a peer whose path carries less than the tunnel. Which tier carries the packets is the host's part.

use std::net::Ipv4Addr;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};

use super::{Backend, BackendContext, BackendError, published};
use crate::domain::config::{BackendConfig, NetworkConfig};
use crate::domain::host_state::{Address, HostItem, HostState, Link, LinkKind, Route, Tunnel, TunnelPeer};
use crate::domain::lease::{Lease, LeaseAttrs};
use crate::domain::path_mtu::PathMtus;
use crate::domain::peers::Peers;

/// Outer IPv4 and UDP header.
const OVERHEAD: u32 = 28;
/// Every IPv4 host must be able to take a packet of this size whole (RFC 791 §3.1: 68 is the least a link may have).
const LEAST_MTU: u32 = 68;
/// Largest MTU of a TUN device, and largest IPv4 packet.
const MOST_MTU: u32 = 65535;

pub(super) struct Udp {
    context: BackendContext,
    local: Ipv4Addr,
    network: Ipv4Net,
    port: u16,
    mtu: u32,
    fixed: Option<FixedMtu>,
}

/// An MTU that the operator has chosen.
#[derive(Clone, Copy)]
struct FixedMtu {
    /// Where.
    field: &'static str,
    value: u32,
}

fn fixed_mtu(config: &NetworkConfig, context: &BackendContext) -> Option<FixedMtu> {
    let configured = match config.backend {
        BackendConfig::Udp { mtu, .. } => mtu,
        BackendConfig::HostGw | BackendConfig::Alloc => None,
    };
    let by_flag = context.tunnel_mtu.map(|value| FixedMtu { field: "--udp-mtu", value });
    by_flag.or(configured.map(|value| FixedMtu { field: "Backend.MTU", value }))
}

/// Whether a fixed MTU fits the interface.
pub(super) fn check_mtu(config: &NetworkConfig, context: &BackendContext) -> Result<(), BackendError> {
    let interface = &context.interface;
    match fixed_mtu(config, context) {
        Some(FixedMtu { field, value }) if value + OVERHEAD > interface.mtu => {
            Err(BackendError::MtuNotPossible {
                field,
                value,
                interface: interface.name.clone(),
                mtu: interface.mtu,
                least: LEAST_MTU,
            })
        }
        _ => Ok(()),
    }
}

impl Udp {
    pub(super) fn new(
        config: &NetworkConfig,
        context: BackendContext,
        port: u16,
    ) -> Result<Self, BackendError> {
        let needs_v4 = BackendError::NeedsIpv4 { backend: "udp" };
        let (Some(range), Some(local)) = (&config.v4, context.interface.address) else {
            return Err(needs_v4);
        };
        let network = range.network;
        let underlay = context.interface.mtu.min(MOST_MTU);
        let fixed = fixed_mtu(config, &context);
        let most = underlay.checked_sub(OVERHEAD).filter(|mtu| *mtu >= LEAST_MTU).ok_or_else(|| {
            BackendError::MtuTooSmall {
                backend: "udp",
                interface: context.interface.name.clone(),
                mtu: context.interface.mtu,
                overhead: OVERHEAD,
                least: LEAST_MTU,
            }
        })?;
        let mtu = fixed.map_or(most, |fixed| fixed.value.min(most));
        Ok(Self { context, local, network, port, mtu, fixed })
    }
}

impl Backend for Udp {
    fn lease_attrs(&self) -> LeaseAttrs {
        published(&self.context.interface, "")
    }

    fn mtu(&self) -> u32 {
        self.mtu
    }

    fn mtu_reason(&self) -> String {
        let interface = &self.context.interface;
        let follows = format!("MTU {} of {} less {OVERHEAD}", interface.mtu, interface.name);
        match self.fixed {
            None => follows,
            Some(FixedMtu { field, value }) if value == self.mtu => format!("fixed by {field}"),
            Some(FixedMtu { field, value }) => {
                format!("{follows}: the {value} of {field} do not fit the interface any more")
            }
        }
    }

    /// Who fixes the MTU has measured the paths.
    fn probed_mtu(&self) -> Option<u32> {
        self.fixed.is_none().then_some(self.mtu)
    }

    fn desired(&self, own: &Lease, peers: &Peers, paths: &PathMtus) -> HostState {
        let Some(own_subnet) = own.subnets.v4 else { return HostState::new() };
        let device = &self.context.tunnel_device;
        let shared: Arc<str> = device.as_str().into();
        let fixed = [
            HostItem::Link(Link { name: device.clone(), kind: LinkKind::Tun, mtu: self.mtu }),
            HostItem::Address(Address {
                device: device.clone(),
                // Base address of the subnet as a /32, as today's flanneld; the route below is explicit.
                net: IpNet::V4(Ipv4Net::from(own_subnet.network())),
            }),
            HostItem::Tunnel(Tunnel {
                device: device.clone(),
                underlay: self.context.interface.name.clone(),
                local: self.local,
                port: self.port,
                network: self.network,
                own_subnet,
                mtu: self.mtu,
                options: self.context.tunnel,
            }),
            HostItem::Route(Route {
                destination: self.network.into(),
                via: None,
                device: shared.clone(),
                onlink: false,
                source: None,
                mtu: None,
            }),
        ];
        // Whatever backend a peer names, it gets our datagrams: flanneld does not look either (contract T6).
        let peers = peers.iter().filter_map(|peer| {
            Some(HostItem::TunnelPeer(TunnelPeer {
                device: shared.clone(),
                subnet: peer.subnets.v4?,
                node: peer.attrs.public_ip,
            }))
        });
        // The kernel tells whoever sends more (RFC 1191), for this peer alone.
        let narrow = paths.lowered().map(|(subnet, mtu)| {
            HostItem::Route(Route {
                destination: subnet.into(),
                via: None,
                device: shared.clone(),
                onlink: false,
                source: None,
                mtu: Some(mtu),
            })
        });
        fixed.into_iter().chain(peers).chain(narrow).collect()
    }

    fn devices(&self) -> Vec<String> {
        vec![self.context.tunnel_device.clone()]
    }
}
