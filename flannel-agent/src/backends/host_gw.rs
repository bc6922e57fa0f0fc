//! The `host-gw` backend: a route to every peer's subnet with the peer as gateway (contract §8.3).
//!
//! Needs all nodes on one link. IPv4 and IPv6 are one loop.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use super::{Backend, BackendError, published};
use crate::domain::host_state::{HostItem, HostState, Route};
use crate::domain::interface::ExternalInterface;
use crate::domain::lease::{Lease, LeaseAttrs};
use crate::domain::path_mtu::PathMtus;
use crate::domain::peers::Peers;

/// `BackendType` of leases; others' leases are not for us.
const TYPE: &str = "host-gw";

pub(super) struct HostGw {
    interface: ExternalInterface,
    /// Its name, shared by all routes.
    device: Arc<str>,
}

impl HostGw {
    pub(super) fn new(interface: ExternalInterface) -> Result<Self, BackendError> {
        let elsewhere = |public: IpAddr, address: IpAddr| BackendError::PublicAddressElsewhere {
            public,
            address,
            interface: interface.name.clone(),
        };
        for (public, address) in interface.public_addresses().zip(interface.addresses()) {
            if public != address {
                return Err(elsewhere(public, address));
            }
        }
        let device = interface.name.as_str().into();
        Ok(Self { interface, device })
    }

    fn route(&self, destination: IpNet, via: IpAddr) -> HostItem {
        HostItem::Route(Route {
            destination,
            via: Some(via),
            device: self.device.clone(),
            onlink: false,
            source: None,
            mtu: None,
        })
    }
}

impl Backend for HostGw {
    fn lease_attrs(&self) -> LeaseAttrs {
        published(&self.interface, TYPE)
    }

    fn mtu(&self) -> u32 {
        self.interface.mtu
    }

    fn mtu_reason(&self) -> String {
        format!("MTU of {}", self.interface.name)
    }

    fn desired(&self, _own: &Lease, peers: &Peers, _paths: &PathMtus) -> HostState {
        peers
            .iter()
            .filter(|peer| peer.attrs.backend_type == TYPE)
            .flat_map(|peer| {
                let v4 = peer.subnets.v4.map(|net| self.route(net.into(), peer.attrs.public_ip.into()));
                let v6 = peer
                    .subnets
                    .v6
                    .zip(peer.attrs.public_ipv6)
                    .map(|(net, via)| self.route(net.into(), via.into()));
                v4.into_iter().chain(v6)
            })
            .collect()
    }

    fn devices(&self) -> Vec<String> {
        Vec::new()
    }
}
