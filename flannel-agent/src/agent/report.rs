//! What the loop answers to those who ask how it is.

use std::net::Ipv4Addr;

use super::{Agent, networks, now};
use crate::backends::BackendContext;
use crate::domain::lease::Subnets;
use crate::host::Host;
use crate::status::{InterfaceStatus, PeerStatus, RefusedStatus, Status};

use super::Node;

impl<H: Host> Agent<H> {
    pub(super) fn status(&self) -> Status {
        let Node { config, context: BackendContext { interface, .. }, lease, .. } = &self.node;
        let not_ready = self.health.reasons();
        Status {
            version: crate::cli::VERSION.to_owned(),
            pid: std::process::id(),
            interface: InterfaceStatus {
                name: interface.name.clone(),
                address: interface.addresses().next().unwrap_or(Ipv4Addr::UNSPECIFIED.into()),
                public_ip: interface.public_addresses().next().unwrap_or(Ipv4Addr::UNSPECIFIED.into()),
                mtu: interface.mtu,
                away: self.underlay.away().map(str::to_owned),
                preferred: self.underlay.preferred().map(str::to_owned),
            },
            network: cidr(networks(config)),
            lease: lease.subnets.to_string(),
            subnet: cidr(lease.subnets),
            lease_expires_in: lease.expires.map(|expires| expires.saturating_duration_since(now()).as_secs()),
            lease_held_for: self.tenure.held_for(now()).as_secs(),
            lease_renewed_ago: self.tenure.renewed_ago(now()).as_secs(),
            backend: config.backend.name().to_owned(),
            mtu: self.node.backend.mtu(),
            mtu_reason: self.node.backend.mtu_reason(),
            ready: not_ready.is_empty(),
            not_ready,
            peers: self
                .peers
                .iter()
                .map(|peer| PeerStatus {
                    subnet: cidr(peer.subnets),
                    public_ip: peer.attrs.node().unwrap_or(peer.attrs.public_ip.into()),
                })
                .collect(),
            refused: self
                .peers
                .refused()
                .map(|refused| RefusedStatus {
                    key: refused.lease.subnets.to_string(),
                    reason: refused.reason.to_string(),
                })
                .chain(
                    self.peers
                        .unreadable()
                        .map(|entry| RefusedStatus { key: entry.key.clone(), reason: entry.reason.clone() }),
                )
                .collect(),
            tunnels: self.tunnels(),
        }
    }
}

/// The IPv4 part, else the IPv6 part, as `address/length`.
fn cidr(subnets: Subnets) -> String {
    let v4 = subnets.v4.map(|net| net.to_string());
    v4.or_else(|| subnets.v6.map(|net| net.to_string())).unwrap_or_default()
}
