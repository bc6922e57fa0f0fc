//! Headers of a tunnelled packet and the pure functions over them: what encapsulation writes ([`outer`]), what
//! decapsulation accepts ([`accept`]), what every hop changes in the inner header ([`hop`]).
//!
//! One source for all tiers: the same functions run under the verifier (XDP, tc), in the agent's user-space path and
//! in plain unit tests. They take and return fixed-size structs, are inlined, and cannot panic. All structs have
//! alignment 1, so they may be borrowed straight from a packet.

mod accept;
mod checksum;
mod dress;
mod hop;
mod outer;

use bytemuck::{Pod, Zeroable};

pub use accept::{Arrival, Delivery, NO_PEER, Verdict, admit, decapsulate};
pub use checksum::{fold, replace_word};
pub use dress::{
    DRESS_DESTINATION, DRESS_GROWTH, DRESS_MAC, DRESS_PORT, DRESS_SOURCE, DRESS_VNI, Dress, dress,
};
pub use hop::{Rewrite, hop};
pub use outer::{Datagram, outer, source_port};

/// EtherType of IPv4, host order.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// Length of an Ethernet header without VLAN tag.
pub const ETHERNET: usize = 14;
/// IP protocol number of TCP.
pub const PROTOCOL_TCP: u8 = 6;
/// IP protocol number of UDP.
pub const PROTOCOL_UDP: u8 = 17;
/// The two ECN bits of the TOS byte (RFC 3168 §5).
pub const ECN_MASK: u8 = 0b11;

/// First byte of an IPv4 header without options.
const VERSION_4_NO_OPTIONS: u8 = 0x45;
/// "More fragments" and the fragment offset; DF and the reserved bit left out. Host order.
const FRAGMENT_BITS: u16 = 0x3FFF;

/// The fixed part of an IPv4 header as it stands in a packet (RFC 791 §3.1).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Ipv4 {
    /// Version (4) and header length in 32-bit words.
    pub version_ihl: u8,
    /// DSCP and ECN.
    pub tos: u8,
    pub total_length: [u8; 2],
    pub id: [u8; 2],
    /// Flags and fragment offset.
    pub fragment: [u8; 2],
    pub ttl: u8,
    pub protocol: u8,
    pub checksum: [u8; 2],
    pub source: [u8; 4],
    pub destination: [u8; 4],
}

impl Ipv4 {
    /// Source in network byte order, to be compared with [`Settings`](crate::tunnel::Settings) and
    /// [`Peer`](crate::peer::Peer).
    #[inline(always)]
    #[must_use]
    pub const fn source(&self) -> u32 {
        u32::from_ne_bytes(self.source)
    }

    /// Destination in network byte order.
    #[inline(always)]
    #[must_use]
    pub const fn destination(&self) -> u32 {
        u32::from_ne_bytes(self.destination)
    }

    /// Header and payload in bytes, as the header says. Not checked against anything.
    #[inline(always)]
    #[must_use]
    pub const fn total_length(&self) -> u16 {
        u16::from_be_bytes(self.total_length)
    }

    /// Header length in bytes, 0 to 60, as the header says.
    #[inline(always)]
    #[must_use]
    pub const fn header_length(&self) -> u8 {
        (self.version_ihl & 0x0F) << 2
    }

    /// Version 4, at least 20 bytes of header, and a total length that holds them.
    #[inline(always)]
    #[must_use]
    pub const fn is_valid(&self) -> bool {
        self.version_ihl.wrapping_sub(VERSION_4_NO_OPTIONS) <= 0x0F - 0x05
            && self.total_length() >= self.header_length() as u16
    }

    /// First, middle or last fragment of a packet.
    #[inline(always)]
    #[must_use]
    pub const fn is_fragment(&self) -> bool {
        u16::from_be_bytes(self.fragment) & FRAGMENT_BITS != 0
    }

    /// What the checksum field of this header must be when it has no options. Network byte order.
    #[must_use]
    pub fn computed_checksum(&self) -> [u8; 2] {
        let words: [[u8; 2]; 10] = bytemuck::cast(Self { checksum: [0; 2], ..*self });
        let sum = words.iter().fold(0, |sum: u32, word| sum + u32::from(u16::from_ne_bytes(*word)));
        fold(sum).to_ne_bytes()
    }
}

/// An Ethernet header without VLAN tag.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Ethernet {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    pub ethertype: [u8; 2],
}

impl Ethernet {
    /// Whether an IPv4 header follows directly.
    #[inline(always)]
    #[must_use]
    pub const fn is_ipv4(&self) -> bool {
        u16::from_be_bytes(self.ethertype) == ETHERTYPE_IPV4
    }

    /// The same bytes as three words. To be moved about so: a struct without alignment is copied byte by byte.
    #[inline(always)]
    #[must_use]
    pub fn to_words(&self) -> (u64, u32, u16) {
        let words: &Words = bytemuck::cast_ref(self);
        (u64::from_ne_bytes(words.first), u32::from_ne_bytes(words.second), u16::from_ne_bytes(words.third))
    }

    /// The inverse of [`Self::to_words`].
    #[inline(always)]
    pub fn set_words(&mut self, (first, second, third): (u64, u32, u16)) {
        let words: &mut Words = bytemuck::cast_mut(self);
        words.first = first.to_ne_bytes();
        words.second = second.to_ne_bytes();
        words.third = third.to_ne_bytes();
    }
}

/// An Ethernet header by lengths a machine can move.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Words {
    first: [u8; 8],
    second: [u8; 4],
    third: [u8; 2],
}

/// A UDP header as it stands in a packet (RFC 768).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Udp {
    pub source: [u8; 2],
    pub destination: [u8; 2],
    pub length: [u8; 2],
    /// 0: not computed, legal over IPv4.
    pub checksum: [u8; 2],
}

/// What the tunnel puts in front of an inner packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Outer {
    pub ip: Ipv4,
    pub udp: Udp,
}

/// The 48 bytes that decide about a received datagram.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Tunnelled {
    pub outer: Outer,
    pub inner: Ipv4,
}

/// [`Tunnelled`] behind its Ethernet header.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Received {
    pub ethernet: Ethernet,
    pub packet: Tunnelled,
}

/// An inner packet behind the Ethernet header it came with.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Delivered {
    pub ethernet: Ethernet,
    pub inner: Ipv4,
}

const _: () = assert!(size_of::<Ethernet>() == ETHERNET && align_of::<Ethernet>() == 1);
const _: () = assert!(size_of::<Ipv4>() == 20 && align_of::<Ipv4>() == 1);
const _: () = assert!(size_of::<Outer>() == crate::OVERHEAD as usize && align_of::<Outer>() == 1);
const _: () = assert!(size_of::<Tunnelled>() == 48 && align_of::<Tunnelled>() == 1);
const _: () = assert!(size_of::<Received>() == ETHERNET + 48 && align_of::<Received>() == 1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_valid_from_five_words_up_to_fifteen_when_its_length_holds_them() {
        for (version_ihl, total_length, valid) in [
            (0x45, 20, true),
            (0x45, 19, false),
            (0x46, 24, true),
            (0x46, 23, false),
            (0x4F, 60, true),
            (0x4F, 59, false),
            (0x44, 100, false),
            (0x40, 100, false),
            (0x35, 100, false),
            (0x55, 100, false),
            (0x60, 100, false),
            (0x00, 0, false),
            (0xFF, 65535, false),
        ] {
            let header =
                Ipv4 { version_ihl, total_length: u16::to_be_bytes(total_length), ..Ipv4::default() };
            assert_eq!(header.is_valid(), valid, "{version_ihl:#04x} with total length {total_length}");
        }
    }

    #[test]
    fn every_fragment_is_one_and_df_alone_is_not() {
        for (bits, fragment) in [
            (0x0000_u16, false),
            (0x4000, false),
            (0x8000, false),
            (0x2000, true),
            (0x2001, true),
            (0x0001, true),
        ] {
            let header = Ipv4 { fragment: bits.to_be_bytes(), ..Ipv4::default() };
            assert_eq!(header.is_fragment(), fragment, "{bits:#06x}");
        }
    }

    #[test]
    fn the_checksum_is_the_one_of_a_captured_packet() {
        // 0.7.0's first ping through the tunnel, contract §8.1.
        let bytes: [u8; 20] = [
            0x45, 0x00, 0x00, 0x54, 0x20, 0x58, 0x40, 0x00, 0x3F, 0x01, 0x8D, 0x46, 0x0A, 0x05, 0x44, 0x00,
            0x0A, 0x05, 0x36, 0x01,
        ];
        let header: Ipv4 = bytemuck::cast(bytes);
        assert_eq!(header.computed_checksum(), header.checksum);
    }
}
