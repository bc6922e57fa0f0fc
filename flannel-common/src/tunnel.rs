//! Settings of one tunnel, a read-only global of the programs (`SETTINGS`).
//!
//! The verifier folds them into the code; a change means loading anew and replacing the links atomically.

use bytemuck::{Pod, Zeroable};

use crate::peer::{Peer, PeerKey};

/// Addresses, masks and port are in network byte order, as they stand in the packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Settings {
    /// Own node address: outer source, and the only outer destination that is decapsulated.
    pub local: u32,
    /// The overlay network.
    pub network: u32,
    pub network_mask: u32,
    /// Mask of every lease (SubnetLen).
    pub subnet_mask: u32,
    /// The subnet leased to this node.
    pub own_subnet: u32,
    /// Interface index of the underlay.
    pub underlay: u32,
    /// Interface index of the tunnel device (`flannel0`).
    pub device: u32,
    /// Interface index of the GRO pair's sending end (`flannel0p`), of the door to the receiver's room (`flannel0d`) with
    /// [`DRESSED`]; 0 without either.
    pub gro_pair: u32,
    /// UDP port of every node.
    pub port: u16,
    /// `flags` bits below.
    pub flags: u16,
    /// Bits of an address behind the subnet's (32 − SubnetLen).
    pub host_bits: u32,
}

impl Settings {
    /// Key of the subnet an address lies in: all leases of a network share their length.
    #[inline(always)]
    #[must_use]
    pub const fn peer_key(&self, address: u32) -> PeerKey {
        address & self.subnet_mask
    }

    /// Where `SUBNETS` has the subnet that begins at `key`: its number within the network. Above every place there is for
    /// one outside, as far as the network has as many ([`SUBNETS_IN_ORDER`]).
    #[inline(always)]
    #[must_use]
    pub const fn place_of(&self, key: PeerKey) -> u32 {
        u32::from_be(key).wrapping_sub(u32::from_be(self.network)) >> (self.host_bits & 31)
    }

    /// The inverse of [`Self::place_of`].
    #[inline(always)]
    #[must_use]
    pub const fn key_of(&self, place: u32) -> PeerKey {
        u32::from_be(self.network).wrapping_add(place << (self.host_bits & 31)).to_be()
    }

    /// How many subnets the network has.
    #[inline(always)]
    #[must_use]
    pub const fn subnets(&self) -> u32 {
        (!u32::from_be(self.network_mask) >> (self.host_bits & 31)).wrapping_add(1)
    }

    /// The last entry of `SUBNETS`. No packet can be sent by it: it has no node.
    #[inline(always)]
    #[must_use]
    pub const fn order(&self) -> Peer {
        Peer { node: 0, ifindex: self.network, index: self.host_bits }
    }

    /// Whether an address lies in the overlay network.
    #[inline(always)]
    #[must_use]
    pub const fn is_in_network(&self, address: u32) -> bool {
        address & self.network_mask == self.network
    }
}

/// Packets from a node that does not lease their source, or not meant for our subnet: drop them.
pub const SOURCE_CHECK_ENFORCE: u16 = 1 << 0;
/// The same packets: count them and deliver. Neither bit: no check.
pub const SOURCE_CHECK_OBSERVE: u16 = 1 << 1;
/// Outer source port = `port` instead of the flow's hash.
pub const FIXED_SOURCE_PORT: u16 = 1 << 2;
/// Set DF on the outer header; only for comparing with the original in tests.
pub const OUTER_DF: u16 = 1 << 3;
/// XDP marks packets of the tunnel but leaves them whole, so that tc can prove that marks arrive.
pub const XDP_PROBE: u16 = 1 << 4;

/// This kernel has `bpf_ktime_get_coarse_ns` (5.11); without it the precise clock is read, which takes longer.
pub const COARSE_CLOCK: u16 = 1 << 5;

/// TCP leaves by `gro_pair` dressed as vxlan ([`dress`](crate::header::dress)) for the kernel's own receiver.
pub const DRESSED: u16 = 1 << 6;

/// The network has no more subnets than `SUBNETS` has places: peers are looked up there, not in `PEERS`.
pub const SUBNETS_IN_ORDER: u16 = 1 << 7;

/// Metadata XDP puts in front of a decapsulated packet for tc ingress ("this came through the tunnel").
pub const XDP_MARK: u32 = 0xF1A7_8285;
/// Metadata of a packet that `XDP_PROBE` left whole.
pub const XDP_PROBE_MARK: u32 = 0xF1A7_8286;

#[cfg(feature = "user")]
// SAFETY: repr(C), no padding, every bit pattern is valid (bytemuck checks all three).
unsafe impl aya::Pod for Settings {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mask(length: u32) -> u32 {
        (!0_u32).checked_shl(32 - length).unwrap_or(0)
    }

    proptest! {
        /// The places of a network's subnets are 0, 1, 2 and so on; those of all other addresses lie behind them.
        #[test]
        fn a_subnet_s_place_is_its_number_in_the_network(
            length in 8_u32..=24, more in 1_u32..=16, address: u32, other: u32, number: u32,
        ) {
            let subnet_length = (length + more).min(30);
            let settings = Settings {
                network: (address & mask(length)).to_be(),
                network_mask: mask(length).to_be(),
                subnet_mask: mask(subnet_length).to_be(),
                host_bits: 32 - subnet_length,
                ..Settings::default()
            };
            prop_assert_eq!(settings.subnets(), 1 << (subnet_length - length));
            let place = number % settings.subnets();
            let key = settings.key_of(place);
            prop_assert_eq!(settings.place_of(key), place);
            prop_assert!(settings.is_in_network(key) && settings.peer_key(key) == key);
            let other = settings.peer_key(other.to_be());
            prop_assert_eq!(settings.place_of(other) < settings.subnets(), settings.is_in_network(other));
        }
    }
}
