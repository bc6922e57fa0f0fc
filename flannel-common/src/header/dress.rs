//! The dress of a packet for the kernel's own tunnel receiver: vxlan (RFC 7348) around an inner packet.
//!
//! A super-packet that crossed a veth whole carries tunnel marks that no BPF helper takes off, and devices without tunnel
//! offloads (a bridge) split such a packet in software. The kernel's vxlan takes them off as it receives
//! (`iptunnel_pull_offloads`, include/net/ip_tunnels.h). So the outer header is exchanged for one that vxlan understands,
//! in a network namespace of its own that holds nothing but this receiver. None of this is ever on a wire.

use bytemuck::{Pod, Zeroable};

use super::{Ethernet, Ipv4, Outer, PROTOCOL_UDP, Udp, VERSION_4_NO_OPTIONS, fold};
use crate::OVERHEAD;

/// The receiver's address (RFC 5737, TEST-NET-1): the namespace has no other and reaches nobody.
pub const DRESS_DESTINATION: [u8; 4] = [192, 0, 2, 1];
/// The sender's address.
pub const DRESS_SOURCE: [u8; 4] = [192, 0, 2, 2];
/// The receiver's UDP port, vxlan's own.
pub const DRESS_PORT: u16 = 4789;
/// The receiver's network identifier.
pub const DRESS_VNI: u32 = 1;
/// MAC address of the devices that receive.
pub const DRESS_MAC: [u8; 6] = [0x02, 0xF1, 0xA7, 0x00, 0x00, 0x01];

/// Everything between the outer Ethernet header and the inner packet.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Dress {
    pub outer: Outer,
    pub vxlan: [u8; 8],
    pub ethernet: Ethernet,
}

/// By how many bytes a dressed packet is longer than one in the tunnel's own datagram.
pub const DRESS_GROWTH: u32 = size_of::<Dress>() as u32 - OVERHEAD;

const TTL: u8 = 64;
/// Flags: the network identifier is valid.
const VNI_IS_VALID: u8 = 0x08;

/// The dress of an inner packet of this length; `None` when that does not fit a datagram. Flows keep the source port that
/// tells them apart. The inner Ethernet header may be any, so it is the frame's own: one of constants would become a
/// constant section of the object, which no loader knows what to do with.
#[inline(always)]
#[must_use]
pub const fn dress(length: u16, source: [u8; 2], ethernet: Ethernet) -> Option<Dress> {
    const MORE: u32 = size_of::<Dress>() as u32;
    let total = length as u32 + MORE;
    if total > 0xFFFF {
        return None;
    }
    let udp = (total as u16 - size_of::<Ipv4>() as u16).to_be_bytes();
    let total = (total as u16).to_be_bytes();
    let first = u16::from_ne_bytes([VERSION_4_NO_OPTIONS, 0]);
    let ttl_protocol = u16::from_ne_bytes([TTL, PROTOCOL_UDP]);
    let sum = first as u32
        + u16::from_ne_bytes(total) as u32
        + ttl_protocol as u32
        + halves(DRESS_SOURCE)
        + halves(DRESS_DESTINATION);
    let vni = DRESS_VNI.to_be_bytes();
    Some(Dress {
        outer: Outer {
            ip: Ipv4 {
                version_ihl: VERSION_4_NO_OPTIONS,
                // What the outer header said of congestion is in the inner one by now.
                tos: 0,
                total_length: total,
                id: [0; 2],
                fragment: [0; 2],
                ttl: TTL,
                protocol: PROTOCOL_UDP,
                checksum: fold(sum).to_ne_bytes(),
                source: DRESS_SOURCE,
                destination: DRESS_DESTINATION,
            },
            udp: Udp { source, destination: DRESS_PORT.to_be_bytes(), length: udp, checksum: [0; 2] },
        },
        vxlan: [VNI_IS_VALID, 0, 0, 0, vni[1], vni[2], vni[3], 0],
        ethernet,
    })
}

impl Dress {
    /// What putting this on instead of `outer` adds to the Internet checksum over the packet, in words of the machine's
    /// order. Both IPv4 headers sum up to nothing by their own checksums.
    #[inline(always)]
    #[must_use]
    pub fn change_of_sum(&self, outer: &Outer) -> u32 {
        let old = &outer.udp;
        let less = [old.source, old.destination, old.length, old.checksum];
        let udp = &self.outer.udp;
        let [a, b, c, d, e, f, g, h] = self.vxlan;
        let more = [udp.source, udp.destination, udp.length, udp.checksum, [a, b], [c, d], [e, f], [g, h]];
        let (first, second, third) = self.ethernet.to_words();
        let mut sum =
            u32::from(third) + halves_of(second) + halves_of(first as u32) + halves_of((first >> 32) as u32);
        for word in less {
            sum += u32::from(!u16::from_ne_bytes(word));
        }
        for word in more {
            sum += u32::from(u16::from_ne_bytes(word));
        }
        sum
    }
}

#[inline(always)]
const fn halves_of(word: u32) -> u32 {
    (word & 0xFFFF) + (word >> 16)
}

#[inline(always)]
const fn halves(address: [u8; 4]) -> u32 {
    u16::from_ne_bytes([address[0], address[1]]) as u32 + u16::from_ne_bytes([address[2], address[3]]) as u32
}

const _: () = assert!(size_of::<Dress>() == 50 && align_of::<Dress>() == 1 && DRESS_GROWTH == 22);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dress_is_vxlan_byte_for_byte() {
        let ethernet = Ethernet { destination: [1; 6], source: [2; 6], ethertype: [0x08, 0x00] };
        let got = dress(84, [0xE4, 0xC2], ethernet).unwrap();
        let want = [
            0x45, 0x00, 0x00, 0x86, 0x00, 0x00, 0x00, 0x00, 0x40, 0x11, 0xF6, 0x63, 192, 0, 2, 2, 192, 0, 2,
            1, // IPv4
            0xE4, 0xC2, 0x12, 0xB5, 0x00, 0x72, 0x00, 0x00, // UDP
            0x08, 0, 0, 0, 0, 0, 1, 0, // vxlan
            1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 0x08, 0x00, // Ethernet
        ];
        assert_eq!(bytemuck::bytes_of(&got), want);
    }

    #[test]
    fn the_sum_over_the_packet_changes_as_told() {
        let sum = |bytes: &[u8]| {
            fold(bytes.chunks(2).map(|word| u32::from(u16::from_ne_bytes([word[0], word[1]]))).sum())
        };
        let local = u32::from_ne_bytes([172, 31, 0, 1]);
        let settings = crate::tunnel::Settings { local, port: 8285_u16.to_be(), ..Default::default() };
        let datagram =
            crate::header::Datagram { node: 0x0201_A8C0, length: 1472, tos: 2, id: 77, hash: 0xBEEF };
        let outer = crate::header::outer(&settings, &datagram);
        let ethernet = Ethernet { destination: [3; 6], source: [0xA5; 6], ethertype: [0x08, 0x00] };
        let dress = dress(1472, outer.udp.source, ethernet).unwrap();
        let before = !sum(bytemuck::bytes_of(&outer));
        assert_eq!(fold(u32::from(before) + dress.change_of_sum(&outer)), sum(bytemuck::bytes_of(&dress)));
    }

    #[test]
    fn every_dress_has_a_right_checksum_and_none_is_longer_than_a_datagram() {
        for length in [20, 84, 1472, 1473, 32_768, 65_484, 65_485] {
            let dress = dress(length, [0; 2], Ethernet::default()).unwrap();
            assert_eq!(dress.outer.ip.checksum, dress.outer.ip.computed_checksum(), "{length}");
            assert_eq!(dress.outer.ip.total_length(), length + 50);
            assert_eq!(dress.outer.udp.length, (length + 30).to_be_bytes());
        }
        assert_eq!(dress(65_486, [0; 2], Ethernet::default()), None);
        assert_eq!(dress(u16::MAX, [0; 2], Ethernet::default()), None);
    }
}
