//! The map of remote nodes: overlay subnet → node.

use bytemuck::{Pod, Zeroable};

/// Key of `PEERS`: the subnet's base address as it stands in the packet (network byte order).
pub type PeerKey = u32;

/// Value of `PEERS`. Addresses are in network byte order, as they stand in the packet. In every layout version `node` is
/// first.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Peer {
    /// Address of the node: outer destination, and the only outer source its packets may come from.
    pub node: u32,
    /// Interface the datagram leaves by.
    pub ifindex: u32,
    /// Which part of `PEER_COUNTERS` is its ([`place`]).
    pub index: u32,
}

/// Value of `PEER_COUNTERS`, one per peer and CPU ([`place`]), in the units of [`Count`](crate::counter::Count). Received packets count when
/// their source lies in the peer's subnet and they came from its node.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct PeerCount {
    pub tx_packets: u64,
    pub tx_bytes: u64,
    pub rx_packets: u64,
    pub rx_bytes: u64,
    /// When the last packet was received, in nanoseconds of CLOCK_MONOTONIC at the resolution of the kernel's tick; 0 for
    /// never.
    pub last_seen: u64,
    /// The kernel's tick at which `last_seen` was set: within one tick, the clock need not be read again.
    pub tick: u64,
}

impl PeerCount {
    /// What two CPUs, or two tiers, counted together.
    #[must_use]
    pub fn and(self, other: &Self) -> Self {
        Self {
            tx_packets: self.tx_packets.wrapping_add(other.tx_packets),
            tx_bytes: self.tx_bytes.wrapping_add(other.tx_bytes),
            rx_packets: self.rx_packets.wrapping_add(other.rx_packets),
            rx_bytes: self.rx_bytes.wrapping_add(other.rx_bytes),
            last_seen: self.last_seen.max(other.last_seen),
            tick: self.tick.max(other.tick),
        }
    }
}

/// Key of `PEER_DROPS`, whose value is a number of packets. Sent packets count for the peer they were meant for, received
/// ones for the peer in whose subnet their source lies, whoever sent them.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct PeerDrop {
    /// [`Peer::index`]
    pub peer: u32,
    /// [`Counter`](crate::counter::Counter): one that is a drop, or would be if the source check enforced.
    pub reason: u32,
}

/// Entries of `PEER_DROPS`; allocated as they are needed, most peers have none.
pub const MAX_PEER_DROPS: u32 = 16384;

/// Entries of `PEERS`, and of `PEER_COUNTERS` for each CPU.
pub const MAX_PEERS: u32 = 16384;

/// Subnets of a network that `SUBNETS` has places for: the /24s of a /8.
pub const MAX_SUBNETS: u32 = 65536;

/// Entries of `SUBNETS`: behind the places is one that says in which order they are ([`Settings::order`]).
///
/// [`Settings::order`]: crate::tunnel::Settings::order
pub const SUBNETS_AND_ORDER: u32 = MAX_SUBNETS + 1;

/// Where `PEER_COUNTERS` has what this CPU counts for the peer of this [`Peer::index`]; `None` for an index that can't be.
///
/// An array with a part for each CPU, because making a per-CPU array takes an allocation per entry: 10 ms of a node's start.
#[inline(always)]
#[must_use]
pub const fn place(index: u32, cpu: u32) -> Option<u32> {
    if index < MAX_PEERS { Some(cpu.wrapping_mul(MAX_PEERS).wrapping_add(index)) } else { None }
}

#[cfg(feature = "user")]
mod user {
    // SAFETY: repr(C), no padding, every bit pattern is valid (bytemuck checks all three).
    unsafe impl aya::Pod for super::Peer {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::PeerCount {}
    // SAFETY: as above.
    unsafe impl aya::Pod for super::PeerDrop {}
}
