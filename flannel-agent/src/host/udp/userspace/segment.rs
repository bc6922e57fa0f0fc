//! Cuts a packet of up to 64 KiB, as the kernel hands it over, into the packets that go on the wire.
//!
//! What the kernel's own segmentation does (`tcp_gso_segment`, `__udp_gso_segment`, `inet_gso_segment`): the
//! identification counts up, PSH and FIN stay on the last TCP segment, CWR on the first, lengths and both checksums
//! are each segment's own. Payload is never copied: a segment is a new head and a slice.

use flannel_common::header::{PROTOCOL_TCP, PROTOCOL_UDP};

use super::{
    checksum::Sum,
    packet::{IPV4, IPV4_MAX, TCP_MAX, UDP_HEADER, pseudo_header, whole},
};

/// Longest IPv4 and TCP header together.
const HEAD_MAX: usize = IPV4_MAX + TCP_MAX;
/// Largest UDP payload of an IPv4 datagram: 65535 − 20 − 8.
pub(super) const DATAGRAM_MAX: usize = 65507;
const FIN_PSH: u8 = 0x09;
const CWR: u8 = 0x80;

/// IPv4 and transport header of one segment.
#[derive(Clone, Copy)]
pub(super) struct Head {
    bytes: [u8; HEAD_MAX],
    len: usize,
}

impl Head {
    pub(super) const EMPTY: Self = Self { bytes: [0; HEAD_MAX], len: 0 };

    fn copy_of(bytes: &[u8]) -> Option<Self> {
        let mut head = Self { bytes: [0; HEAD_MAX], len: bytes.len() };
        head.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(head)
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

/// Transport protocol of the packet to cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    Tcp,
    Udp,
}

/// The segments of one packet that are still to come.
pub(super) struct Segments<'p> {
    transport: Transport,
    template: Head,
    /// Bytes of IPv4 header within the template.
    ip_len: usize,
    identification: u16,
    sequence: u32,
    rest: &'p [u8],
    size: usize,
    first: bool,
    finished: bool,
}

impl<'p> Segments<'p> {
    /// `None`: the packet is not a whole one of that protocol, or a segment would not fit into a datagram.
    pub(super) fn of(packet: &'p [u8], transport: Transport, size: u16) -> Option<Self> {
        let (ip, all) = whole(packet)?;
        let ip_len = usize::from(ip.header_length());
        let data = packet.get(ip_len..)?;
        let (protocol, transport_len, sequence) = match transport {
            Transport::Tcp => {
                let fixed = data.first_chunk::<20>()?;
                let sequence = u32::from_be_bytes([fixed[4], fixed[5], fixed[6], fixed[7]]);
                (PROTOCOL_TCP, usize::from(fixed[12] >> 4) * 4, sequence)
            }
            Transport::Udp => (PROTOCOL_UDP, UDP_HEADER, 0),
        };
        let head_len = ip_len + transport_len;
        let short_header = transport == Transport::Tcp && transport_len < 20;
        if ip.protocol != protocol
            || ip.is_fragment()
            || all.len() != packet.len()
            || short_header
            || size == 0
            || head_len + usize::from(size) > DATAGRAM_MAX
        {
            return None;
        }
        let (head, rest) = packet.split_at_checked(head_len)?;
        Some(Self {
            transport,
            template: Head::copy_of(head)?,
            ip_len,
            identification: u16::from_be_bytes(ip.id),
            sequence,
            rest,
            size: usize::from(size),
            first: true,
            finished: false,
        })
    }

    /// Length of every segment but the last, which may be shorter.
    pub(super) fn segment_len(&self) -> usize {
        self.template.len + self.size.min(self.rest.len())
    }

    /// Segments still to come.
    pub(super) fn count(&self) -> usize {
        if self.finished { 0 } else { self.rest.len().div_ceil(self.size).max(1) }
    }

    /// Writes the next segment's headers to `head` and returns its payload.
    pub(super) fn next_into(&mut self, head: &mut Head) -> Option<&'p [u8]> {
        if self.finished {
            return None;
        }
        let (payload, rest) = self.rest.split_at_checked(self.size).unwrap_or((self.rest, &[]));
        self.rest = rest;
        self.finished = rest.is_empty();
        *head = self.template;
        self.write_head(head, payload)?;
        self.identification = self.identification.wrapping_add(1);
        self.sequence = self.sequence.wrapping_add(u32::try_from(payload.len()).ok()?);
        self.first = false;
        Some(payload)
    }

    fn write_head(&self, head: &mut Head, payload: &[u8]) -> Option<()> {
        let total = u16::try_from(head.len + payload.len()).ok()?;
        let (ip, transport) = head.bytes.get_mut(..head.len)?.split_at_mut_checked(self.ip_len)?;
        let transport_len = u16::try_from(transport.len() + payload.len()).ok()?;

        let fixed = ip.first_chunk_mut::<IPV4>()?;
        fixed[2..4].copy_from_slice(&total.to_be_bytes());
        fixed[4..6].copy_from_slice(&self.identification.to_be_bytes());
        fixed[10..12].copy_from_slice(&[0, 0]);
        let pseudo = pseudo_header(fixed, transport_len);
        let checksum = Sum::default().bytes(ip).checksum();
        ip.first_chunk_mut::<IPV4>()?[10..12].copy_from_slice(&checksum);

        match self.transport {
            Transport::Tcp => {
                let tcp = transport.first_chunk_mut::<20>()?;
                tcp[4..8].copy_from_slice(&self.sequence.to_be_bytes());
                if !self.finished {
                    tcp[13] &= !FIN_PSH;
                }
                if !self.first {
                    tcp[13] &= !CWR;
                }
                tcp[16..18].copy_from_slice(&[0, 0]);
                let checksum = pseudo.bytes(transport).bytes(payload).checksum();
                transport.first_chunk_mut::<20>()?[16..18].copy_from_slice(&checksum);
            }
            Transport::Udp => {
                let udp = transport.first_chunk_mut::<UDP_HEADER>()?;
                udp[4..6].copy_from_slice(&transport_len.to_be_bytes());
                udp[6..8].copy_from_slice(&[0, 0]);
                let checksum = pseudo.bytes(transport).bytes(payload).nonzero_checksum();
                transport.first_chunk_mut::<UDP_HEADER>()?[6..8].copy_from_slice(&checksum);
            }
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::host::udp::userspace::packet::samples;

    fn cut(packet: &[u8], transport: Transport, size: u16) -> Option<Vec<Vec<u8>>> {
        let mut segments = Segments::of(packet, transport, size)?;
        let mut head = Head::EMPTY;
        let mut packets = Vec::new();
        let announced = segments.count();
        while let Some(payload) = segments.next_into(&mut head) {
            packets.push([head.as_slice(), payload].concat());
        }
        assert_eq!((packets.len(), segments.count()), (announced, 0));
        Some(packets)
    }

    #[test]
    fn tcp_is_cut_as_the_kernel_would_cut_it() {
        let payload: Vec<u8> = (0..2500u32).map(|i| i as u8).collect();
        let whole = samples::tcp(u32::MAX - 999, 0x89, &payload);
        let packets = cut(&whole, Transport::Tcp, 1000).unwrap();
        let facts: Vec<_> = packets
            .iter()
            .map(|p| {
                assert!(samples::is_valid(p));
                let sequence = u32::from_be_bytes([p[24], p[25], p[26], p[27]]);
                (p.len(), u16::from_be_bytes([p[4], p[5]]), sequence, p[33])
            })
            .collect();
        assert_eq!(
            facts,
            [(1052, 0x1234, u32::MAX - 999, 0x90), (1052, 0x1235, 0, 0x10), (552, 0x1236, 1000, 0x19),],
            "length, identification, sequence, flags"
        );
        let together: Vec<u8> = packets.iter().flat_map(|p| p[52..].to_vec()).collect();
        assert_eq!(together, payload);
    }

    #[test]
    fn udp_is_cut_into_datagrams_with_their_own_length() {
        let packets = cut(&samples::udp(&[7; 250]), Transport::Udp, 100).unwrap();
        let lengths: Vec<_> = packets
            .iter()
            .map(|p| {
                assert!(samples::is_valid(p));
                (p.len(), u16::from_be_bytes([p[24], p[25]]))
            })
            .collect();
        assert_eq!(lengths, [(128, 108), (128, 108), (78, 58)]);
    }

    #[test]
    fn ip_options_are_copied_to_every_segment() {
        let mut packet = samples::udp(&[7; 250]);
        packet.splice(20..20, [0x94, 4, 0, 0]);
        packet[0] = 0x46;
        let total = (packet.len() as u16).to_be_bytes();
        packet[2..4].copy_from_slice(&total);
        samples::finish_header(&mut packet);
        for segment in cut(&packet, Transport::Udp, 200).unwrap() {
            assert!(samples::is_valid(&segment));
            assert_eq!(segment[20..24], [0x94, 4, 0, 0]);
        }
    }

    #[test]
    fn what_fits_one_segment_stays_one_segment() {
        let whole = samples::tcp(1, 8, b"short");
        assert_eq!(cut(&whole, Transport::Tcp, 1000).unwrap(), [whole]);
    }

    #[test]
    fn a_packet_of_the_wrong_protocol_or_size_is_not_cut() {
        let tcp = samples::tcp(1, 0, b"payload");
        assert!(cut(&tcp, Transport::Udp, 100).is_none());
        assert!(cut(&tcp, Transport::Tcp, 0).is_none(), "endless");
        assert!(cut(&tcp, Transport::Tcp, 65535).is_none(), "larger than a datagram");
        let mut fragment = tcp.clone();
        fragment[6] = 0x20;
        assert!(cut(&fragment, Transport::Tcp, 100).is_none());
        let mut short_header = tcp;
        short_header[32] = 0x40;
        assert!(cut(&short_header, Transport::Tcp, 100).is_none());
    }

    proptest! {
        #[test]
        fn every_segment_is_valid_and_no_payload_is_lost(
            payload in proptest::collection::vec(any::<u8>(), 1..20000), size in 48u16..9000, flags: u8,
        ) {
            let whole = samples::tcp(0xffff_f000, flags & 0xc9, &payload);
            let packets = cut(&whole, Transport::Tcp, size).unwrap();
            prop_assert_eq!(packets.len(), payload.len().div_ceil(usize::from(size)));
            prop_assert!(packets.iter().all(|p| samples::is_valid(p)));
            let together: Vec<u8> = packets.iter().flat_map(|p| p[52..].to_vec()).collect();
            prop_assert_eq!(together, payload);
        }

        #[test]
        fn no_bytes_make_cutting_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), size: u16) {
            let _ = cut(&bytes, Transport::Tcp, size);
            let _ = cut(&bytes, Transport::Udp, size);
        }

        #[test]
        fn no_change_of_a_real_packet_makes_cutting_panic(at in 0usize..52, value: u8, size: u16) {
            let mut packet = samples::tcp(1, 0, &[5; 300]);
            packet[at] = value;
            let _ = cut(&packet, Transport::Tcp, size);
        }
    }
}
