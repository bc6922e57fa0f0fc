//! The map of remote nodes: overlay subnet → node.

use bytemuck::{Pod, Zeroable};

/// Key of `PEERS`: the subnet's base address as it stands in the packet (network byte order).
pub type PeerKey = u32;

/// Value of `PEERS`. Addresses are in network byte order, as they stand in the packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Peer {
    /// Address of the node: outer destination, and the only outer source its packets may come from.
    pub node: u32,
    /// The node itself when it is on-link, else the gateway towards it.
    pub next_hop: u32,
    /// Interface the datagram leaves by.
    pub ifindex: u32,
    /// Index into `PEER_COUNTERS`.
    pub index: u32,
}

/// Value of `PEER_COUNTERS`, one per CPU, in the units of [`Count`](crate::counter::Count). Received packets count when
/// their source lies in the peer's subnet and they came from its node.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct PeerCount {
    pub tx_packets: u64,
    pub tx_bytes: u64,
    pub rx_packets: u64,
    pub rx_bytes: u64,
}

/// Entries of `PEERS` and `PEER_COUNTERS`.
pub const MAX_PEERS: u32 = 16384;

#[cfg(feature = "user")]
mod user {
    // SAFETY: repr(C), no padding, every bit pattern is valid (bytemuck checks all three).
    unsafe impl aya::Pod for super::Peer {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::PeerCount {}
}
