//! What the host should look like, as pure functions of our lease and the peers'.

pub mod alloc;
pub mod host_gw;
pub mod udp;

use crate::domain::host_state::HostState;
use crate::domain::lease::{Lease, LeaseAttrs};
use crate::domain::peers::Peers;

/// One way to make other nodes' subnets reachable. Without side effects: the agent applies what `desired` returns.
pub trait Backend: Send + Sync {
    /// What the others must know of us.
    fn lease_attrs(&self) -> LeaseAttrs;

    /// MTU for pods in bytes, as written to `FLANNEL_MTU`.
    fn mtu(&self) -> u32;

    /// Everything of ours that should be on the host.
    fn desired(&self, own: &Lease, peers: &Peers) -> HostState;
}
