//! The `alloc` backend: takes a lease and leaves the traffic to somebody else (contract §8.4).

use super::{Backend, published};
use crate::domain::host_state::HostState;
use crate::domain::interface::ExternalInterface;
use crate::domain::lease::{Lease, LeaseAttrs};
use crate::domain::path_mtu::PathMtus;
use crate::domain::peers::Peers;

pub(super) struct Alloc {
    interface: ExternalInterface,
}

impl Alloc {
    pub(super) fn new(interface: ExternalInterface) -> Self {
        Self { interface }
    }
}

impl Backend for Alloc {
    fn lease_attrs(&self) -> LeaseAttrs {
        published(&self.interface, "")
    }

    fn mtu(&self) -> u32 {
        self.interface.mtu
    }

    fn mtu_reason(&self) -> String {
        format!("MTU of {}", self.interface.name)
    }

    fn desired(&self, _own: &Lease, _peers: &Peers, _paths: &PathMtus) -> HostState {
        HostState::new()
    }

    fn devices(&self) -> Vec<String> {
        Vec::new()
    }
}
