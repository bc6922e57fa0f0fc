//! The header encapsulation writes: like flanneld's but for DF, id, source port, ECN bits and the
//! UDP checksum (contract §8.1).

use super::{ECN_MASK, Ipv4, Outer, PROTOCOL_UDP, Udp, VERSION_4_NO_OPTIONS, fold};
use crate::{
    OVERHEAD,
    tunnel::{FIXED_SOURCE_PORT, OUTER_DF, Settings},
};

/// TTL of the outer header.
const TTL: u8 = 64;
/// "Don't fragment", host order.
const DF: u16 = 0x4000;
/// The dynamic ports (RFC 6335 §6) start here; the 14 bits below carry the flow's hash.
const DYNAMIC_PORTS: u16 = 0xC000;
const HASH_BITS: u32 = 0x3FFF;

/// What differs from datagram to datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Address of the peer's node, network byte order.
    pub node: u32,
    /// Bytes of the inner packet. A GSO packet longer than a datagram can be gets length 0, which segmentation
    /// replaces.
    pub length: u32,
    /// TOS byte of the inner packet: its ECN bits are copied, its DSCP is not.
    pub tos: u8,
    /// Identification, any value.
    pub id: u16,
    /// Hash of the inner flow: one flow keeps one source port, so its packets stay in order on multipath.
    pub hash: u32,
}

/// Source port of a flow in network byte order: 0xC000 and 14 bits of its hash, or the tunnel's own port.
#[inline(always)]
#[must_use]
pub const fn source_port(settings: &Settings, hash: u32) -> u16 {
    if settings.flags & FIXED_SOURCE_PORT != 0 {
        settings.port
    } else {
        (DYNAMIC_PORTS | ((hash ^ (hash >> 16)) & HASH_BITS) as u16).to_be()
    }
}

/// The outer header of one datagram.
#[inline(always)]
#[must_use]
pub const fn outer(settings: &Settings, datagram: &Datagram) -> Outer {
    let inner = datagram.length;
    let total = if inner + OVERHEAD > 0xFFFF { 0 } else { (inner + OVERHEAD) as u16 };
    let udp = if inner + 8 > 0xFFFF { 0 } else { (inner + 8) as u16 };

    // One word each, in the machine's order; written out because a loop over the finished header costs more.
    let first = u16::from_ne_bytes([VERSION_4_NO_OPTIONS, datagram.tos & ECN_MASK]);
    let total = total.to_be();
    let fragment = if settings.flags & OUTER_DF != 0 { DF.to_be() } else { 0 };
    let ttl_protocol = u16::from_ne_bytes([TTL, PROTOCOL_UDP]);
    let sum = first as u32
        + total as u32
        + datagram.id as u32
        + fragment as u32
        + ttl_protocol as u32
        + halves(settings.local)
        + halves(datagram.node);

    Outer {
        ip: Ipv4 {
            version_ihl: VERSION_4_NO_OPTIONS,
            tos: datagram.tos & ECN_MASK,
            total_length: total.to_ne_bytes(),
            id: datagram.id.to_ne_bytes(),
            fragment: fragment.to_ne_bytes(),
            ttl: TTL,
            protocol: PROTOCOL_UDP,
            checksum: fold(sum).to_ne_bytes(),
            source: settings.local.to_ne_bytes(),
            destination: datagram.node.to_ne_bytes(),
        },
        udp: Udp {
            source: source_port(settings, datagram.hash).to_ne_bytes(),
            destination: settings.port.to_ne_bytes(),
            length: udp.to_be_bytes(),
            checksum: [0; 2],
        },
    }
}

#[inline(always)]
const fn halves(address: u32) -> u32 {
    (address & 0xFFFF) + (address >> 16)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const OWN: [u8; 4] = [172, 31, 0, 1];
    const NODE: [u8; 4] = [172, 31, 0, 2];

    fn settings(flags: u16) -> Settings {
        Settings { local: u32::from_ne_bytes(OWN), port: 8285_u16.to_be(), flags, ..Settings::default() }
    }

    fn datagram(length: u32) -> Datagram {
        Datagram {
            node: u32::from_ne_bytes(NODE),
            length,
            tos: 0xBA,
            id: 0x1234_u16.to_be(),
            hash: 0xABCD_0F0F,
        }
    }

    #[test]
    fn the_header_is_written_byte_for_byte() {
        let got: [u8; 28] = bytemuck::cast(outer(&settings(0), &datagram(84)));
        // 0xABCD ^ 0x0F0F = 0xA4C2, of which 14 bits: 0x24C2, in the dynamic range: 0xE4C2.
        let want = [
            0x45, 0x02, 0, 112, 0x12, 0x34, 0, 0, 64, 17, 0x10, 0x06, 172, 31, 0, 1, 172, 31, 0, 2, 0xE4,
            0xC2, 0x20, 0x5D, 0, 92, 0, 0,
        ];
        assert_eq!(got, want);
    }

    #[test]
    fn flags_set_df_and_the_fixed_source_port_and_nothing_else() {
        let plain = outer(&settings(0), &datagram(84));
        let like_flanneld = outer(&settings(OUTER_DF | FIXED_SOURCE_PORT), &datagram(84));
        assert_eq!(like_flanneld.ip.fragment, [0x40, 0]);
        assert_eq!(like_flanneld.udp.source, 8285_u16.to_be_bytes());
        let undone = Outer {
            ip: Ipv4 { fragment: [0, 0], checksum: plain.ip.checksum, ..like_flanneld.ip },
            udp: Udp { source: plain.udp.source, ..like_flanneld.udp },
        };
        assert_eq!(undone, plain);
    }

    #[test]
    fn a_gso_packet_longer_than_a_datagram_gets_length_zero() {
        for (inner, total, udp) in
            [(65507, 65535, 65515), (65508, 0, 65516), (65527, 0, 65535), (65528, 0, 0), (512 * 1024, 0, 0)]
        {
            let header = outer(&settings(0), &datagram(inner));
            assert_eq!(header.ip.total_length(), total, "inner {inner}");
            assert_eq!(u16::from_be_bytes(header.udp.length), udp, "inner {inner}");
        }
    }

    proptest! {
        #[test]
        fn the_checksum_is_right_and_the_port_dynamic(
            local: u32, node: u32, length in 20_u32..70_000, tos: u8, id: u16, hash: u32, df: bool,
        ) {
            let settings = Settings { local, ..settings(if df { OUTER_DF } else { 0 }) };
            let header = outer(&settings, &Datagram { node, length, tos, id, hash });
            prop_assert_eq!(header.ip.checksum, header.ip.computed_checksum());
            prop_assert!(u16::from_be_bytes(header.udp.source) >= 0xC000);
        }
    }
}
