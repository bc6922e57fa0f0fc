//! The answer to a packet whose destination no node leases: ICMP "net unreachable", written to the device.
//!
//! Byte for byte what flanneld writes (contract §8.1), but only for offenders that RFC 1122 §3.2.2 allows an answer
//! to, and with the offender's own bytes. Most kernels drop it because its source is a local address; it shows in
//! a capture on the device.

use std::net::Ipv4Addr;

use super::{
    checksum::Sum,
    packet::{ICMP, IPV4, IPV4_MAX, head, is_later_fragment},
};

const NET_UNREACHABLE: [u8; 8] = [3, 0, 0, 0, 0, 0, 0, 0];
/// Bytes quoted behind the offender's IPv4 header (RFC 792).
const QUOTED: usize = 8;

/// The answer from `device` (its address) to `offender` (at least its headers), or `None` where none is due.
pub(super) fn net_unreachable(device: Ipv4Addr, offender: &[u8]) -> Option<Vec<u8>> {
    let ip = head(offender)?;
    let header_len = usize::from(ip.header_length());
    let answerable = ip.protocol != ICMP
        && !is_later_fragment(ip)
        && header_len < IPV4_MAX
        && is_one_host(ip.source.into())
        && is_one_host(ip.destination.into());
    if !answerable {
        return None;
    }
    let quote = offender.get(..header_len + QUOTED)?;
    let total = u16::try_from(IPV4 + NET_UNREACHABLE.len() + quote.len()).ok()?;

    let mut header = [0; IPV4];
    header[0] = 0x45;
    header[2..4].copy_from_slice(&total.to_be_bytes());
    header[8] = 8;
    header[9] = ICMP;
    header[12..16].copy_from_slice(&device.octets());
    header[16..20].copy_from_slice(&ip.source);
    let checksum = Sum::default().bytes(&header).checksum();
    header[10..12].copy_from_slice(&checksum);

    let mut icmp = NET_UNREACHABLE;
    let checksum = Sum::default().bytes(&icmp).bytes(quote).checksum();
    icmp[2..4].copy_from_slice(&checksum);
    Some([header.as_slice(), &icmp, quote].concat())
}

fn is_one_host(address: Ipv4Addr) -> bool {
    !(address.is_unspecified()
        || address.is_loopback()
        || address.is_multicast()
        || address.octets()[0] >= 240)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::host::udp::userspace::packet::samples;

    type Change = fn(&mut Vec<u8>);

    const DEVICE: Ipv4Addr = Ipv4Addr::new(10, 5, 68, 0);

    #[test]
    fn a_udp_packet_is_answered_as_flanneld_answers() {
        let offender = samples::udp(b"nobody there");
        let answer = net_unreachable(DEVICE, &offender).unwrap();
        assert_eq!(answer.len(), 56);
        assert_eq!(
            answer[..10],
            [0x45, 0, 0, 56, 0, 0, 0, 0, 8, 1],
            "TOS 0, identification 0, no DF, TTL 8, ICMP"
        );
        assert_eq!(answer[12..16], DEVICE.octets());
        assert_eq!(answer[16..20], samples::SOURCE.octets());
        assert!(Sum::default().bytes(&answer[..20]).is_valid());
        assert_eq!(answer[20..22], [3, 0]);
        assert_eq!(answer[24..28], [0; 4]);
        assert!(Sum::default().bytes(&answer[20..]).is_valid());
        assert_eq!(answer[28..], offender[..28]);
    }

    #[test]
    fn only_sane_offenders_are_answered() {
        let cases: &[(&str, Change)] = &[
            ("ICMP", |p| p[9] = 1),
            ("later fragment", |p| p[7] = 9),
            ("60-byte header", |p| {
                p.splice(20..20, [1; 40]);
                p[0] = 0x4f;
            }),
            ("header length below 20", |p| p[0] = 0x44),
            ("IPv6", |p| p[0] = 0x60),
            ("fewer than 8 bytes behind the header", |p| p.truncate(27)),
            ("multicast source", |p| p[12] = 224),
            ("no source", |p| p[12..16].copy_from_slice(&[0; 4])),
            ("multicast destination", |p| p[16] = 239),
            ("broadcast destination", |p| p[16..20].copy_from_slice(&[255; 4])),
        ];
        for (name, change) in cases {
            let mut offender = samples::udp(b"nobody there");
            change(&mut offender);
            assert_eq!(net_unreachable(DEVICE, &offender), None, "{name}");
        }
    }

    #[test]
    fn options_are_quoted_whole() {
        let mut offender = samples::udp(b"nobody there");
        offender.splice(20..20, [0x94, 4, 0, 0]);
        offender[0] = 0x46;
        let answer = net_unreachable(DEVICE, &offender).unwrap();
        assert_eq!(answer[28..], offender[..32]);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_answer_panic(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            if let Some(answer) = net_unreachable(DEVICE, &bytes) {
                prop_assert!(answer.len() <= 20 + 8 + 56 + 8);
            }
        }
    }
}
