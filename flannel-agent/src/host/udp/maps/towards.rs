//! Where a peer's datagrams go: what its entry in the map says, and what the routing table says now.

use std::net::Ipv4Addr;

use flannel_common::peer::Peer;

use super::from_wire;
use crate::host::HostError;
use crate::host::netlink::NextHop;

/// Where a peer's datagrams go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Towards {
    pub node: Ipv4Addr,
    /// Interface they leave by.
    pub ifindex: u32,
}

impl Towards {
    /// As the routing table was asked.
    ///
    /// # Errors
    /// No way leads there.
    pub fn by(node: Ipv4Addr, next_hop: &Result<NextHop, HostError>) -> Result<Self, String> {
        match next_hop {
            Ok(hop) => Ok(Self { node, ifindex: hop.ifindex }),
            Err(e) => Err(e.to_string()),
        }
    }
}

impl From<Peer> for Towards {
    fn from(peer: Peer) -> Self {
        Self { node: from_wire(peer.node), ifindex: peer.ifindex }
    }
}
