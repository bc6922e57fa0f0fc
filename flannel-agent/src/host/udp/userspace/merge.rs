//! Puts consecutive TCP segments of one flow back together, so that the kernel gets one packet of up to 64 KiB
//! instead of 45 small ones: what GRO does for a NIC, done by hand because a TUN device has none.
//!
//! A packet is merged only when cutting the result again (in `segment.rs`, or in the kernel on its way to a pod)
//! gives the same packets back. Anything else ends what is being collected and goes out behind it: the order of
//! packets never changes. Whose checksum is unfinished (`unfinished.rs`) goes alone, too: there is nothing to verify.
//! The one exception is the identification of packets with DF whose sender keeps it constant:
//! it may count up afterwards, which RFC 6864 §4.1 allows for packets that can't be fragments.

use std::io::IoSlice;

use flannel_common::header::PROTOCOL_TCP;

use super::{
    checksum::Sum,
    packet::{IPV4, TCP_MAX, pseudo_header},
    unfinished::Unfinished,
    vnet,
};

/// Segments in one packet: what one datagram aggregate of the kernel can hold.
const SEGMENTS_MAX: usize = 64;
/// Largest IPv4 packet.
const PACKET_MAX: usize = 65535;
const HEAD_MAX: usize = IPV4 + TCP_MAX;
const ACK: u8 = 0x10;
const PSH: u8 = 0x08;

/// A segment that may be merged: no IP options, no fragment, only ACK and PSH set, payload, both checksums right.
#[derive(Clone, Copy)]
struct Segment<'p> {
    packet: &'p [u8],
    head: &'p [u8],
    payload: &'p [u8],
    sequence: u32,
    identification: u16,
    dont_fragment: bool,
    push: bool,
}

impl<'p> Segment<'p> {
    fn of(packet: &'p [u8]) -> Option<Self> {
        let (ip, data) = packet.split_first_chunk::<IPV4>()?;
        let tcp = data.first_chunk::<20>()?;
        let flags = u16::from_be_bytes([ip[6], ip[7]]);
        let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
        let tcp_len = usize::from(tcp[12] >> 4) * 4;
        let (head, payload) = packet.split_at_checked(IPV4 + tcp_len)?;
        let mergeable = ip[0] == 0x45
            && ip[9] == PROTOCOL_TCP
            && flags & 0xbfff == 0
            && total == packet.len()
            && tcp_len >= 20
            && !payload.is_empty()
            && tcp[13] & !PSH == ACK;
        if !mergeable || !Sum::default().bytes(ip).is_valid() {
            return None;
        }
        if !pseudo_header(ip, u16::try_from(data.len()).ok()?).bytes(data).is_valid() {
            return None;
        }
        Some(Self {
            packet,
            head,
            payload,
            sequence: u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]),
            identification: u16::from_be_bytes([ip[4], ip[5]]),
            dont_fragment: flags & 0x4000 != 0,
            push: tcp[13] & PSH != 0,
        })
    }

    /// Headers equal but for lengths, identification, sequence, PSH and checksums.
    fn same_flow(&self, other: &Self) -> bool {
        let fixed = |head: &'p [u8]| {
            let (ip, tcp) = head.split_first_chunk::<IPV4>()?;
            let (tcp, options) = tcp.split_first_chunk::<20>()?;
            let ports: [u8; 4] = [tcp[0], tcp[1], tcp[2], tcp[3]];
            let acknowledged: [u8; 5] = [tcp[8], tcp[9], tcp[10], tcp[11], tcp[12]];
            let window_and_urgent: [u8; 4] = [tcp[14], tcp[15], tcp[18], tcp[19]];
            let addresses: &[u8] = &ip[12..20];
            Some((ip[1], ip[6], ip[8], addresses, ports, acknowledged, window_and_urgent, options))
        };
        fixed(self.head) == fixed(other.head)
    }
}

/// How the identification goes on from one segment to the next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Numbering {
    Counting,
    /// Only with DF.
    Constant,
}

/// The segments collected so far, none or one flow's.
pub(super) struct Merger<'p> {
    first: Option<Segment<'p>>,
    numbering: Option<Numbering>,
    payloads: [&'p [u8]; SEGMENTS_MAX],
    count: usize,
    /// Bytes of the merged packet.
    total: usize,
    next_sequence: u32,
    pushed: bool,
}

impl<'p> Merger<'p> {
    pub(super) fn new() -> Self {
        Self {
            first: None,
            numbering: None,
            payloads: [&[]; SEGMENTS_MAX],
            count: 0,
            total: 0,
            next_sequence: 0,
            pushed: false,
        }
    }

    /// Takes one whole IPv4 packet. `out` gets what is ready: a virtio header and a packet, in pieces.
    pub(super) fn push(&mut self, packet: &'p [u8], out: &mut impl FnMut(&[IoSlice<'_>])) {
        let Some(segment) = Segment::of(packet) else {
            let header = Unfinished::of(packet).map_or(vnet::PLAIN, Unfinished::virtio_header);
            self.pass(header, &[packet], out);
            return;
        };
        if !self.append(&segment) {
            self.flush(out);
            self.start(&segment);
        }
        let full = self.first.is_some_and(|first| segment.payload.len() < first.payload.len());
        if full || segment.push {
            self.flush(out);
        }
    }

    /// Lets a packet, in at most two pieces, pass behind what was collected.
    pub(super) fn pass(
        &mut self,
        header: [u8; vnet::LEN],
        packet: &[&[u8]],
        out: &mut impl FnMut(&[IoSlice<'_>]),
    ) {
        self.flush(out);
        let mut pieces = [IoSlice::new(&header), IoSlice::new(&[]), IoSlice::new(&[])];
        for (piece, part) in pieces.iter_mut().skip(1).zip(packet) {
            *piece = IoSlice::new(part);
        }
        out(pieces.get(..=packet.len()).unwrap_or_default());
    }

    /// Hands out what was collected.
    pub(super) fn flush(&mut self, out: &mut impl FnMut(&[IoSlice<'_>])) {
        let Some(first) = self.first.take() else { return };
        if self.count < 2 {
            out(&[IoSlice::new(&vnet::PLAIN), IoSlice::new(first.packet)]);
            return;
        }
        let mut head = [0; HEAD_MAX];
        let Some(vnet) = self.merged_head(&first, &mut head) else { return };
        let head = head.get(..first.head.len()).unwrap_or_default();
        let mut pieces = [IoSlice::new(&[]); SEGMENTS_MAX + 2];
        let parts = [vnet.as_slice(), head].into_iter().chain(self.payloads.iter().copied().take(self.count));
        for (piece, part) in pieces.iter_mut().zip(parts) {
            *piece = IoSlice::new(part);
        }
        out(pieces.get(..self.count + 2).unwrap_or_default());
    }

    fn start(&mut self, segment: &Segment<'p>) {
        self.first = Some(*segment);
        self.numbering = None;
        self.count = 0;
        self.total = segment.head.len();
        self.pushed = false;
        self.add(segment);
    }

    fn append(&mut self, segment: &Segment<'p>) -> bool {
        let Some(first) = &self.first else { return false };
        let counted = first.identification.wrapping_add(self.count as u16) == segment.identification;
        let constant = first.identification == segment.identification && segment.dont_fragment;
        let numbering = match self.numbering {
            None if counted => Numbering::Counting,
            None if constant => Numbering::Constant,
            Some(Numbering::Counting) if counted => Numbering::Counting,
            Some(Numbering::Constant) if constant => Numbering::Constant,
            _ => return false,
        };
        let fits = self.count < SEGMENTS_MAX
            && self.total + segment.payload.len() <= PACKET_MAX
            && segment.payload.len() <= first.payload.len();
        if !fits || segment.sequence != self.next_sequence || !segment.same_flow(first) {
            return false;
        }
        self.numbering = Some(numbering);
        self.add(segment);
        true
    }

    fn add(&mut self, segment: &Segment<'p>) {
        if let Some(slot) = self.payloads.get_mut(self.count) {
            *slot = segment.payload;
        }
        self.count += 1;
        self.total += segment.payload.len();
        self.next_sequence = segment.sequence.wrapping_add(segment.payload.len() as u32);
        self.pushed |= segment.push;
    }

    /// The first segment's head with the merged length, PSH of the last segment, and the sum of the pseudo header
    /// in place of the TCP checksum.
    fn merged_head(&self, first: &Segment<'p>, head: &mut [u8; HEAD_MAX]) -> Option<[u8; vnet::LEN]> {
        head.get_mut(..first.head.len())?.copy_from_slice(first.head);
        let total = u16::try_from(self.total).ok()?;
        let (ip, tcp) = head.split_first_chunk_mut::<IPV4>()?;
        ip[2..4].copy_from_slice(&total.to_be_bytes());
        ip[10..12].copy_from_slice(&[0, 0]);
        let checksum = Sum::default().bytes(ip).checksum();
        ip[10..12].copy_from_slice(&checksum);
        let tcp = tcp.first_chunk_mut::<20>()?;
        if self.pushed {
            tcp[13] |= PSH;
        }
        tcp[16..18].copy_from_slice(&pseudo_header(ip, total.checked_sub(IPV4 as u16)?).folded());
        let head_len = u16::try_from(first.head.len()).ok()?;
        Some(vnet::merged_tcp(head_len, IPV4 as u16, u16::try_from(first.payload.len()).ok()?))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::host::udp::userspace::{
        packet::samples,
        segment::{Head, Segments, Transport},
        vnet::Offload,
    };

    type Change = fn(&mut Vec<u8>);

    /// What is written to the device, each with its virtio header.
    fn merge(packets: &[Vec<u8>]) -> Vec<(Offload, Vec<u8>)> {
        let mut written = Vec::new();
        let mut out = |parts: &[IoSlice<'_>]| {
            let header = Offload::of((&*parts[0]).try_into().unwrap());
            written.push((header, parts[1..].iter().flat_map(|part| part.to_vec()).collect()));
        };
        let mut merger = Merger::new();
        for packet in packets {
            merger.push(packet, &mut out);
        }
        merger.flush(&mut out);
        written
    }

    /// What the kernel makes of that.
    fn split((offload, packet): &(Offload, Vec<u8>)) -> Vec<Vec<u8>> {
        match offload {
            Offload::Tcp { size } => {
                let mut segments = Segments::of(packet, Transport::Tcp, *size).unwrap();
                let mut head = Head::EMPTY;
                let mut packets = Vec::new();
                while let Some(payload) = segments.next_into(&mut head) {
                    packets.push([head.as_slice(), payload].concat());
                }
                packets
            }
            _ => vec![packet.clone()],
        }
    }

    fn numbered(mut packet: Vec<u8>, identification: u16) -> Vec<u8> {
        packet[4..6].copy_from_slice(&identification.to_be_bytes());
        samples::finish_header(&mut packet);
        packet
    }

    /// Segments of 100 bytes that follow each other.
    fn stream(count: u32) -> Vec<Vec<u8>> {
        (0..count).map(|i| numbered(samples::tcp(i * 100, 0, &[i as u8; 100]), i as u16)).collect()
    }

    #[test]
    fn segments_of_one_flow_become_one_packet() {
        let packets = stream(20);
        let written = merge(&packets);
        assert_eq!(written.len(), 1);
        assert_eq!(written[0].0, Offload::Tcp { size: 100 });
        assert_eq!(written[0].1.len(), 52 + 2000);
        assert!(Sum::default().bytes(&written[0].1[..20]).is_valid());
        assert_eq!(split(&written[0]), packets);
    }

    #[test]
    fn a_short_or_pushed_segment_ends_the_packet() {
        let mut packets = stream(3);
        packets.push(numbered(samples::tcp(300, 8, &[3; 50]), 3));
        packets.push(numbered(samples::tcp(350, 0, &[4; 100]), 4));
        let written = merge(&packets);
        assert_eq!(written.iter().map(|(_, p)| p.len()).collect::<Vec<_>>(), [52 + 350, 152]);
        assert_eq!(written[0].1[33], 0x18, "PSH of the last segment");
        assert_eq!(written.iter().flat_map(split).collect::<Vec<_>>(), packets);
    }

    #[test]
    fn no_packet_grows_beyond_64_segments_or_64_kib() {
        assert_eq!(merge(&stream(130)).iter().map(|(_, p)| p.len()).collect::<Vec<_>>(), [6452, 6452, 252]);
        let large: Vec<_> =
            (0..10u32).map(|i| numbered(samples::tcp(i * 8000, 0, &[1; 8000]), i as u16)).collect();
        assert_eq!(merge(&large).iter().map(|(_, p)| p.len()).collect::<Vec<_>>(), [64052, 16052]);
    }

    #[test]
    fn a_segment_that_would_not_come_back_the_same_is_left_alone() {
        let changes: &[(&str, Change)] = &[
            ("other source", |p| p[15] = 99),
            ("other destination", |p| p[19] = 99),
            ("other TOS", |p| p[1] = 4),
            ("congestion experienced", |p| p[1] = 3),
            ("other TTL", |p| p[8] = 9),
            ("DF missing", |p| p[6] = 0),
            ("reserved bit", |p| p[6] = 0xc0),
            ("fragment", |p| p[6] = 0x20),
            ("gap in identification", |p| p[5] = 77),
            ("other source port", |p| p[21] = 99),
            ("other destination port", |p| p[23] = 99),
            ("gap in sequence", |p| p[27] = 99),
            ("other acknowledgement", |p| p[31] = 99),
            ("reserved TCP bit", |p| p[32] |= 1),
            ("FIN", |p| p[33] |= 1),
            ("SYN", |p| p[33] |= 2),
            ("RST", |p| p[33] |= 4),
            ("no ACK", |p| p[33] = 0),
            ("URG", |p| p[33] |= 0x20),
            ("ECE", |p| p[33] |= 0x40),
            ("CWR", |p| p[33] |= 0x80),
            ("other window", |p| p[35] ^= 1),
            ("urgent pointer", |p| p[39] = 1),
            ("other timestamp", |p| p[47] = 99),
            ("longer than the first", |p| p.push(0)),
            ("no payload", |p| p.truncate(52)),
        ];
        for (name, change) in changes {
            let mut packets = stream(2);
            change(&mut packets[1]);
            let total = (packets[1].len() as u16).to_be_bytes();
            packets[1][2..4].copy_from_slice(&total);
            samples::finish_header(&mut packets[1]);
            samples::finish_transport(&mut packets[1], 16);
            assert!(samples::is_valid(&packets[1]), "{name}");
            let written: Vec<_> = merge(&packets).into_iter().map(|(_, p)| p).collect();
            assert_eq!(written, packets, "{name}");
        }
    }

    #[test]
    fn a_damaged_segment_is_never_repaired_by_merging() {
        for at in [10, 60] {
            let mut packets = stream(3);
            packets[1][at] ^= 0x40;
            let written: Vec<_> = merge(&packets).into_iter().map(|(_, p)| p).collect();
            assert_eq!(written, packets, "byte {at}");
        }
    }

    #[test]
    fn an_unfinished_segment_goes_alone_and_is_announced() {
        let mut packets = stream(5);
        packets[2] = samples::unfinished(&packets[2]);
        packets.push(samples::unfinished(&samples::udp(b"behind")));
        let written = merge(&packets);
        let checksum = |offset| Offload::Checksum { start: 20, offset };
        let kinds: Vec<_> = written.iter().map(|(offload, _)| *offload).collect();
        let merged = Offload::Tcp { size: 100 };
        assert_eq!(kinds, [merged, checksum(16), merged, checksum(6)]);
        assert_eq!(written.iter().flat_map(split).collect::<Vec<_>>(), packets);
    }

    #[test]
    fn a_checksum_that_comes_to_zero_stays_zero() {
        let mut packets = stream(3);
        // What is added to the last word of the payload comes off the checksum.
        let end = packets[1].len();
        packets[1][end - 2..].fill(0);
        samples::finish_transport(&mut packets[1], 16);
        let rest = [packets[1][36], packets[1][37]];
        packets[1][end - 2..].copy_from_slice(&rest);
        samples::finish_transport(&mut packets[1], 16);
        assert_eq!(packets[1][36..38], [0, 0]);
        let written = merge(&packets);
        assert_eq!(written.len(), 1);
        assert_eq!(split(&written[0]), packets);
    }

    #[test]
    fn a_constant_identification_merges_only_with_df() {
        let constant: Vec<_> = (0..4).map(|i| samples::tcp(i * 100, 0, &[i as u8; 100])).collect();
        assert_eq!(merge(&constant).len(), 1);
        let fragmentable: Vec<_> = constant
            .into_iter()
            .map(|mut p| {
                p[6] = 0;
                samples::finish_header(&mut p);
                p
            })
            .collect();
        assert_eq!(merge(&fragmentable).len(), 4);
    }

    #[test]
    fn other_packets_keep_their_place() {
        let mut packets = stream(2);
        packets.push(samples::udp(b"between"));
        packets.extend((2..4u32).map(|i| numbered(samples::tcp(i * 100, 0, &[i as u8; 100]), i as u16)));
        let written = merge(&packets);
        assert_eq!(written.len(), 3);
        assert_eq!(written.iter().flat_map(split).collect::<Vec<_>>(), packets);
    }

    proptest! {
        #[test]
        fn what_is_split_and_merged_is_the_same_packet(
            payload in proptest::collection::vec(any::<u8>(), 1..30000), size in 500u16..2000, push: bool,
        ) {
            let mut whole = samples::tcp(0xffff_f000, if push { 8 } else { 0 }, &payload);
            let packets = split(&(Offload::Tcp { size }, whole.clone()));
            let written = merge(&packets);
            prop_assert_eq!(written.len(), 1);
            if packets.len() > 1 {
                prop_assert_eq!(written[0].0, Offload::Tcp { size });
                let length = (whole.len() - IPV4) as u16;
                let pseudo = pseudo_header(whole.first_chunk().unwrap(), length).folded();
                whole[36..38].copy_from_slice(&pseudo);
            }
            prop_assert_eq!(&written[0].1, &whole);
        }

        #[test]
        fn what_is_merged_and_split_are_the_same_packets(
            sizes in proptest::collection::vec((1usize..400, any::<bool>(), 0u8..8), 1..150),
        ) {
            let mut sequence = 7u32;
            let packets: Vec<_> = sizes
                .iter()
                .enumerate()
                .map(|(i, (size, push, kind))| {
                    let payload = vec![i as u8; *size];
                    let packet = match kind {
                        0 => samples::udp(&payload),
                        1 => samples::tcp(sequence.wrapping_add(9), 0, &payload),
                        _ => samples::tcp(sequence, if *push { 8 } else { 0 }, &payload),
                    };
                    if *kind > 0 {
                        sequence = sequence.wrapping_add(*size as u32);
                    }
                    numbered(packet, i as u16)
                })
                .collect();
            let again: Vec<_> = merge(&packets).iter().flat_map(split).collect();
            prop_assert_eq!(again, packets);
        }

        #[test]
        fn no_bytes_make_merging_panic(
            packets in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..80), 0..20),
        ) {
            let written: Vec<_> = merge(&packets).into_iter().map(|(_, p)| p).collect();
            prop_assert_eq!(written, packets);
        }

        #[test]
        fn no_change_of_a_real_stream_makes_merging_panic(at in 0usize..152, value: u8, which in 0usize..3) {
            let mut packets = stream(3);
            packets[which][at] = value;
            let _ = merge(&packets);
        }
    }
}
