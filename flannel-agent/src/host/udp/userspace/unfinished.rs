//! Packets that arrive with work left that the sender's kernel meant for an interface.
//!
//! A kernel sender (the BPF programs) encapsulates packets as the stack hands them over: the TCP or UDP checksum field
//! holds only the sum of the pseudo header (`CHECKSUM_PARTIAL`), and a super-packet of up to 64 KiB is still to be cut
//! (GSO). A physical card finishes both before the wire. A virtual underlay (a veth pair, a bridge, virtio between
//! guests of one host) is none and promises to carry the kernel's notes along with the packet; they are lost when a
//! socket receives it, and only the bytes remain. Delivered like that, the stack drops the packet for its wrong checksum,
//! or it is larger than the device's MTU. The original flanneld as receiver has this defect with every kernel sender on
//! such an underlay; there, and for anything not recognised here (SCTP, tunnels within the pods' packets),
//! `ethtool -K <underlay> tx off` on the sender helps: its kernel then cuts and finishes packets itself.
//!
//! Here the notes are made up again from the bytes: a checksum that equals the pseudo header's sum is an unfinished one,
//! and the device is told so with a virtio header. A finished checksum can equal that sum by chance, one in 65,536; then
//! finishing it "again" gives the same number, so nothing is verified first and the check reads headers only.
//!
//! What can't be known is the sender's segment size for TCP. The largest that fits the device is taken: it matters only
//! when the packet is cut again on its way to a pod, whose MTU is the device's. A pod with a smaller MTU gets its bulk data
//! slowly, by retransmitted single segments.

use flannel_common::header::{PROTOCOL_TCP, PROTOCOL_UDP};

use super::{
    packet::{IPV4, UDP_HEADER, pseudo_header, whole},
    segment::Transport,
    vnet,
};

/// A whole TCP or UDP packet, no fragment, whose checksum is the pseudo header's sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unfinished {
    transport: Transport,
    ip_head: u16,
    /// Bytes of both headers.
    head: u16,
}

/// More than one packet in one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SuperPacket {
    pub(super) transport: Transport,
    /// Bytes of both headers.
    head: u16,
    ip_head: u16,
    /// Payload bytes of every packet but the last, which may be shorter.
    pub(super) size: u16,
}

impl Unfinished {
    /// `packet` is one IPv4 packet without anything behind it.
    pub(super) fn of(packet: &[u8]) -> Option<Self> {
        let (ip, all) = whole(packet)?;
        let (protocol, fragment) = (ip.protocol, ip.is_fragment());
        let ip_head = usize::from(ip.header_length());
        if fragment || all.len() != packet.len() {
            return None;
        }
        let data = packet.get(ip_head..)?;
        let length = u16::try_from(data.len()).ok()?;
        let (transport, head, checksum) = match protocol {
            PROTOCOL_TCP => {
                let tcp = data.first_chunk::<20>()?;
                let tcp_head = usize::from(tcp[12] >> 4) * 4;
                if tcp_head < tcp.len() || tcp_head > data.len() {
                    return None;
                }
                (Transport::Tcp, tcp_head, [tcp[16], tcp[17]])
            }
            PROTOCOL_UDP => {
                let udp = data.first_chunk::<UDP_HEADER>()?;
                let checksum = [udp[6], udp[7]];
                // Zero is no checksum at all, which is as finished as can be (RFC 768).
                if u16::from_be_bytes([udp[4], udp[5]]) != length || checksum == [0, 0] {
                    return None;
                }
                (Transport::Udp, UDP_HEADER, checksum)
            }
            _ => return None,
        };
        let pseudo = pseudo_header(packet.first_chunk::<IPV4>()?, length).folded();
        // Address translation updates the sum, and may leave the other form of zero.
        let same = pseudo == checksum || (pseudo == [0xff, 0xff] && checksum == [0, 0]);
        same.then_some(Self {
            transport,
            ip_head: u16::try_from(ip_head).ok()?,
            head: u16::try_from(ip_head + head).ok()?,
        })
    }

    /// What the device has to be told about a packet that needs no cutting.
    pub(super) fn virtio_header(self) -> [u8; vnet::LEN] {
        vnet::unfinished(self.ip_head, self.transport)
    }

    /// The same packet when it is larger than `mtu`, the device's: a TCP packet is then a super-packet.
    pub(super) fn above(self, mtu: usize) -> Option<SuperPacket> {
        let size = u16::try_from(mtu.min(usize::from(u16::MAX))).ok()?.checked_sub(self.head)?;
        (self.transport == Transport::Tcp && size > 0).then_some(self.segments_of(size))
    }

    /// The same packet when `size` is known, as it is for UDP where the kernel tells with `UDP_GRO`.
    pub(super) fn datagrams_of(self, size: usize) -> Option<SuperPacket> {
        let size = u16::try_from(size).ok()?;
        (self.transport == Transport::Udp && size > 0).then_some(self.segments_of(size))
    }

    fn segments_of(self, size: u16) -> SuperPacket {
        SuperPacket { transport: self.transport, head: self.head, ip_head: self.ip_head, size }
    }
}

impl SuperPacket {
    /// Packets in a super-packet of `total` bytes.
    pub(super) fn count(&self, total: usize) -> usize {
        total.saturating_sub(usize::from(self.head)).div_ceil(usize::from(self.size).max(1)).max(1)
    }

    /// Bytes of the largest packet in it.
    pub(super) fn packet_len(&self) -> usize {
        usize::from(self.head) + usize::from(self.size)
    }

    /// What the device has to be told about a TCP super-packet, so that it takes it whole.
    pub(super) fn virtio_header(&self) -> [u8; vnet::LEN] {
        vnet::merged_tcp(self.head, self.ip_head, self.size)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::host::udp::userspace::{
        packet::{finish_checksum, samples},
        vnet::Offload,
    };

    type Change = fn(&mut Vec<u8>);

    fn offset(packet: &[u8]) -> usize {
        usize::from(packet[0] & 15) * 4 + if packet[9] == PROTOCOL_TCP { 16 } else { 6 }
    }

    #[test]
    fn the_pseudo_header_s_sum_is_an_unfinished_checksum_and_the_finished_one_is_not() {
        for (whole, transport, head) in [
            (samples::tcp(1, 8, b"payload"), Transport::Tcp, 52),
            (samples::tcp(1, 0, b""), Transport::Tcp, 52),
            (samples::udp(b"odd"), Transport::Udp, 28),
        ] {
            assert_eq!(Unfinished::of(&whole), None, "{transport:?}");
            let partial = samples::unfinished(&whole);
            let found = Unfinished::of(&partial).unwrap();
            assert_eq!(found, Unfinished { transport, ip_head: 20, head });
            let offset = offset(&partial) as u16 - 20;
            assert_eq!(Offload::of(found.virtio_header()), Offload::Checksum { start: 20, offset });
            // What the kernel does with that header.
            let mut again = partial;
            assert!(finish_checksum(&mut again, 20, offset));
            assert_eq!(again, whole, "{transport:?}");
        }
    }

    #[test]
    fn options_of_the_ip_header_move_the_checksum() {
        let mut packet = samples::udp(b"payload");
        packet.splice(20..20, [0x94, 4, 0, 0]);
        packet[0] = 0x46;
        let total = (packet.len() as u16).to_be_bytes();
        packet[2..4].copy_from_slice(&total);
        let header = Unfinished::of(&samples::unfinished(&packet)).unwrap().virtio_header();
        assert_eq!(Offload::of(header), Offload::Checksum { start: 24, offset: 6 });
    }

    #[test]
    fn what_is_not_the_kernel_s_is_left_alone() {
        let changes: &[(&str, Change)] = &[
            ("a checksum off by one", |p| p[27] ^= 1),
            ("no UDP checksum", |p| p[26..28].fill(0)),
            ("a UDP length of its own", |p| p[25] -= 1),
            ("a first fragment", |p| p[6] = 0x20),
            ("a later fragment", |p| p[7] = 1),
            ("ICMP", |p| p[9] = 1),
            ("bytes behind the packet", |p| p.push(0)),
            ("IPv6", |p| p[0] = 0x65),
        ];
        let good = samples::unfinished(&samples::udp(b"payload"));
        assert!(Unfinished::of(&good).is_some());
        for (name, change) in changes {
            let mut packet = good.clone();
            change(&mut packet);
            assert_eq!(Unfinished::of(&packet), None, "{name}");
        }
        for header in [0x40, 0xf0] {
            let mut packet = samples::unfinished(&samples::tcp(1, 0, b""));
            packet[32] = header;
            assert_eq!(Unfinished::of(&packet), None, "TCP header of {:#x} words", header >> 4);
        }
    }

    #[test]
    fn both_forms_of_zero_are_the_same_sum() {
        let mut packet = samples::unfinished(&samples::tcp(1, 0, b"payload"));
        // An address that brings the sum to all ones.
        let sum = u16::from_be_bytes([packet[36], packet[37]]);
        let (last, rest) = (u16::from_be_bytes([packet[18], packet[19]]), 0xffff - sum);
        let address = last.checked_add(rest).unwrap_or_else(|| last.wrapping_add(rest) + 1);
        packet[18..20].copy_from_slice(&address.to_be_bytes());
        for form in [[0xff, 0xff], [0, 0]] {
            packet[36..38].copy_from_slice(&form);
            assert!(Unfinished::of(&packet).is_some(), "{form:?}");
        }
    }

    #[test]
    fn a_tcp_packet_above_the_mtu_is_to_be_cut_to_it() {
        let packet = samples::unfinished(&samples::tcp(1, 8, &[7; 30000]));
        let large = Unfinished::of(&packet).unwrap().above(1472).unwrap();
        assert_eq!((large.size, large.packet_len()), (1420, 1472));
        assert_eq!(large.count(packet.len()), 30000usize.div_ceil(1420));
        assert_eq!(Offload::of(large.virtio_header()), Offload::Tcp { size: 1420 });
        assert_eq!(Unfinished::of(&packet).unwrap().above(52), None, "no room for payload");
        assert_eq!(Unfinished::of(&packet).unwrap().datagrams_of(1000), None);
    }

    #[test]
    fn a_udp_packet_is_cut_only_to_a_size_that_is_known() {
        let packet = samples::unfinished(&samples::udp(&[7; 3500]));
        let found = Unfinished::of(&packet).unwrap();
        assert_eq!(found.above(1472), None);
        assert_eq!(found.datagrams_of(0), None);
        let large = found.datagrams_of(1000).unwrap();
        assert_eq!((large.packet_len(), large.count(packet.len())), (1028, 4));
    }

    proptest! {
        #[test]
        fn every_finished_checksum_survives_being_taken_for_an_unfinished_one(
            payload in proptest::collection::vec(any::<u8>(), 2..200),
        ) {
            // The payload's last word brings the finished checksum to the pseudo header's sum.
            let mut payload = payload;
            payload.truncate(payload.len() & !1);
            let at = 28 + payload.len() - 2;
            payload[at - 28..].fill(0);
            let mut packet = samples::udp(&payload);
            let wanted = samples::unfinished(&packet);
            let (finished, pseudo) = (
                u16::from_be_bytes([packet[26], packet[27]]), u16::from_be_bytes([wanted[26], wanted[27]]),
            );
            let (word, borrow) = finished.overflowing_sub(pseudo);
            packet[at..at + 2].copy_from_slice(&word.wrapping_sub(u16::from(borrow)).to_be_bytes());
            samples::finish_transport(&mut packet, 6);
            prop_assume!(Unfinished::of(&packet).is_some());
            let mut again = packet.clone();
            prop_assert!(finish_checksum(&mut again, 20, 6));
            prop_assert_eq!(again, packet);
        }

        #[test]
        fn no_bytes_make_detection_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = Unfinished::of(&bytes);
        }

        #[test]
        fn no_change_of_a_real_packet_makes_detection_panic(at in 0usize..52, value: u8, mtu in 0usize..70000) {
            let mut packet = samples::unfinished(&samples::tcp(1, 0, &[5; 300]));
            packet[at] = value;
            let _ = Unfinished::of(&packet).and_then(|found| found.above(mtu));
        }
    }
}
