//! What is read from and changed in an inner packet. Every byte of it may come from anyone.

use flannel_common::header::Ipv4;

use super::checksum::Sum;

/// IPv4 header without options.
pub(super) const IPV4: usize = 20;
/// Longest IPv4 header.
pub(super) const IPV4_MAX: usize = 60;
/// Longest TCP header.
pub(super) const TCP_MAX: usize = 60;
pub(super) const UDP_HEADER: usize = 8;
pub(super) const ICMP: u8 = 1;

/// The header of the IPv4 packet that begins here, when it is there with all its options. The packet itself may be
/// longer than `bytes`. Checksums are not looked at: the kernel does that where the packet arrives, as for flanneld.
pub(super) fn head(bytes: &[u8]) -> Option<&Ipv4> {
    let header: &Ipv4 = bytemuck::cast_ref(bytes.first_chunk::<IPV4>()?);
    (header.is_valid() && usize::from(header.header_length()) <= bytes.len()).then_some(header)
}

/// The same for a packet that is there to its end: the header, and the packet without what follows it.
pub(super) fn whole(bytes: &[u8]) -> Option<(&Ipv4, &[u8])> {
    let header = head(bytes)?;
    Some((header, bytes.get(..usize::from(header.total_length()))?))
}

/// The fixed header at the beginning of a packet, to be changed.
pub(super) fn head_mut(bytes: &mut [u8]) -> Option<&mut Ipv4> {
    Some(bytemuck::cast_mut(bytes.first_chunk_mut::<IPV4>()?))
}

/// A fragment other than the first: what stands behind its header is not a transport header.
pub(super) fn is_later_fragment(header: &Ipv4) -> bool {
    u16::from_be_bytes(header.fragment) & 0x1fff != 0
}

/// Version in the first byte, whatever follows it.
pub(super) fn ip_version(bytes: &[u8]) -> Option<u8> {
    bytes.first().map(|first| first >> 4)
}

/// Sum of the pseudo header (RFC 9293 §3.1, RFC 768) of `length` bytes of transport data behind `header`.
pub(super) fn pseudo_header(header: &[u8; IPV4], length: u16) -> Sum {
    Sum::default().bytes(&header[12..20]).word(u16::from(header[9])).word(length)
}

/// Finishes a checksum the kernel left to us. `false`: it lies outside the packet, nothing was changed.
pub(super) fn finish_checksum(packet: &mut [u8], start: u16, offset: u16) -> bool {
    let (start, offset) = (usize::from(start), usize::from(offset));
    let Some(covered) = packet.get_mut(start..) else { return false };
    let checksum = Sum::default().bytes(covered).nonzero_checksum();
    match covered.get_mut(offset..offset + 2) {
        Some(field) => {
            field.copy_from_slice(&checksum);
            true
        }
        None => false,
    }
}

#[cfg(test)]
pub(super) mod samples {
    //! Packets for the tests of this folder.

    use std::net::Ipv4Addr;

    use flannel_common::header::{PROTOCOL_TCP, PROTOCOL_UDP};

    use super::*;

    pub(in super::super) const SOURCE: Ipv4Addr = Ipv4Addr::new(10, 5, 68, 2);
    pub(in super::super) const DESTINATION: Ipv4Addr = Ipv4Addr::new(10, 5, 54, 3);

    /// A valid IPv4 packet with identification 0x1234, DF and TTL 64.
    pub(in super::super) fn ipv4(protocol: u8, payload: &[u8]) -> Vec<u8> {
        let total = (IPV4 + payload.len()) as u16;
        let mut packet = vec![0x45, 0, 0, 0, 0x12, 0x34, 0x40, 0, 64, protocol, 0, 0];
        packet[2..4].copy_from_slice(&total.to_be_bytes());
        packet.extend(SOURCE.octets());
        packet.extend(DESTINATION.octets());
        let checksum = Sum::default().bytes(&packet).checksum();
        packet[10..12].copy_from_slice(&checksum);
        packet.extend(payload);
        packet
    }

    /// A valid TCP packet: ACK set, a timestamp option, 32 bytes of TCP header.
    pub(in super::super) fn tcp(sequence: u32, flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut segment = vec![0x13, 0x88, 0xc0, 0x01];
        segment.extend(sequence.to_be_bytes());
        segment.extend([0, 0, 0x30, 0x39, 0x80, 0x10 | flags, 1, 0xf6, 0, 0, 0, 0]);
        segment.extend([1, 1, 8, 10, 0, 0, 0, 7, 0, 0, 0, 9]);
        segment.extend(payload);
        let mut packet = ipv4(PROTOCOL_TCP, &segment);
        finish_transport(&mut packet, 16);
        packet
    }

    /// A valid UDP packet.
    pub(in super::super) fn udp(payload: &[u8]) -> Vec<u8> {
        let mut datagram = vec![0x13, 0x88, 0xc0, 0x01];
        datagram.extend(((payload.len() + 8) as u16).to_be_bytes());
        datagram.extend([0, 0]);
        datagram.extend(payload);
        let mut packet = ipv4(PROTOCOL_UDP, &datagram);
        finish_transport(&mut packet, 6);
        packet
    }

    /// The packet as it leaves a kernel that expects an interface to finish its checksum.
    pub(in super::super) fn unfinished(packet: &[u8]) -> Vec<u8> {
        let mut packet = packet.to_vec();
        let header_len = usize::from(packet[0] & 0x0f) * 4;
        let at = header_len + if packet[9] == PROTOCOL_TCP { 16 } else { 6 };
        let length = (packet.len() - header_len) as u16;
        let sum = pseudo_header(packet.first_chunk().unwrap(), length).folded();
        packet[at..at + 2].copy_from_slice(&sum);
        packet
    }

    /// Recomputes the checksum that stands `offset` bytes into the transport header.
    pub(in super::super) fn finish_transport(packet: &mut [u8], offset: usize) {
        packet[IPV4 + offset..IPV4 + offset + 2].copy_from_slice(&[0, 0]);
        let length = (packet.len() - IPV4) as u16;
        let checksum = pseudo_header(packet.first_chunk().unwrap(), length).bytes(&packet[IPV4..]);
        // As everything in this folder and the kernel: only UDP has no use for a zero.
        let checksum =
            if packet[9] == PROTOCOL_UDP { checksum.nonzero_checksum() } else { checksum.checksum() };
        packet[IPV4 + offset..IPV4 + offset + 2].copy_from_slice(&checksum);
    }

    /// Recomputes the IPv4 header's checksum.
    pub(in super::super) fn finish_header(packet: &mut [u8]) {
        let header_len = usize::from(packet[0] & 0x0f) * 4;
        packet[10..12].copy_from_slice(&[0, 0]);
        let checksum = Sum::default().bytes(&packet[..header_len]).checksum();
        packet[10..12].copy_from_slice(&checksum);
    }

    /// Both checksums of a whole TCP or UDP packet are right.
    pub(in super::super) fn is_valid(packet: &[u8]) -> bool {
        let Some((ip, all)) = whole(packet) else { return false };
        let (header, data) = packet.split_at(usize::from(ip.header_length()));
        all.len() == packet.len()
            && Sum::default().bytes(header).is_valid()
            && pseudo_header(header.first_chunk().unwrap(), data.len() as u16).bytes(data).is_valid()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lengths_that_disagree_are_not_a_packet() {
        let good = samples::udp(b"hello");
        assert!(whole(&good).is_some());
        for (name, at, value) in [
            ("IPv6", 0, 0x65),
            ("header of 16 bytes", 0, 0x44),
            ("header longer than the packet", 0, 0x4f),
            ("total length above what came", 3, 200),
            ("total length below the header", 3, 19),
        ] {
            let mut bad = good.clone();
            bad[at] = value;
            assert_eq!(whole(&bad), None, "{name}");
        }
        for cut in 0..good.len() {
            assert_eq!(whole(&good[..cut]), None, "cut to {cut}");
        }
    }

    #[test]
    fn trailing_bytes_are_not_part_of_the_packet() {
        let mut packet = samples::udp(b"hello");
        let total = packet.len();
        packet.extend([1, 2, 3, 4]);
        assert_eq!(whole(&packet).unwrap().1.len(), total);
    }

    #[test]
    fn a_checksum_left_to_us_is_finished() {
        let whole = samples::udp(b"hello");
        let mut partial = whole.clone();
        let length = (whole.len() - IPV4) as u16;
        let pseudo = pseudo_header(whole.first_chunk().unwrap(), length).folded();
        partial[26..28].copy_from_slice(&pseudo);
        assert!(finish_checksum(&mut partial, 20, 6));
        assert_eq!(partial, whole);
    }

    proptest! {
        #[test]
        fn no_bytes_make_parsing_or_checksums_panic(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..100), start: u16, offset: u16,
        ) {
            let _ = whole(&bytes);
            let before = bytes.clone();
            if !finish_checksum(&mut bytes, start % 128, offset % 128) {
                prop_assert_eq!(bytes, before);
            }
        }
    }
}
