//! Echo requests that find out what a path carries, and the answers to them. Pure.
//!
//! The inner packet is an ordinary ping from this node's tunnel address to the peer's: flanneld's host answers it as
//! well as ours (contract §8.1), with its kernel. Answers are told from others' by an identifier and a number nobody
//! else knows.

use std::net::Ipv4Addr;

use flannel_common::header::Ipv4;

use crate::host::udp::checksum::Sum;

/// IPv4 and ICMP header, and the secret.
pub(super) const SHORTEST: usize = IPV4 + ICMP + SECRET;

const IPV4: usize = 20;
const ICMP: usize = 8;
const SECRET: usize = 8;
const PROTOCOL_ICMP: u8 = 1;
// RFC 792
const ECHO_REPLY: u8 = 0;
const ECHO: u8 = 8;

/// What this node's probes have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mark {
    pub(super) identifier: u16,
    /// Sent along and expected back.
    pub(super) secret: [u8; SECRET],
}

impl Mark {
    /// An echo request of `size` bytes, at least [`SHORTEST`].
    pub(super) fn request(
        self,
        source: Ipv4Addr,
        destination: Ipv4Addr,
        (size, number): (u16, u16),
    ) -> Vec<u8> {
        let size = usize::from(size).max(SHORTEST);
        let mut header = Ipv4 {
            version_ihl: 0x45,
            total_length: u16::try_from(size).unwrap_or(u16::MAX).to_be_bytes(),
            id: number.to_be_bytes(),
            ttl: 64,
            protocol: PROTOCOL_ICMP,
            source: source.octets(),
            destination: destination.octets(),
            ..Ipv4::default()
        };
        header.checksum = header.computed_checksum();
        let mut icmp = vec![0; size - IPV4];
        let [id, number] = [self.identifier.to_be_bytes(), number.to_be_bytes()];
        let head = [&[ECHO, 0, 0, 0], id.as_slice(), &number, &self.secret].concat();
        for (to, from) in icmp.iter_mut().zip(&head) {
            *to = *from;
        }
        let checksum = Sum::default().bytes(&icmp).checksum();
        if let Some(field) = icmp.get_mut(2..4) {
            field.copy_from_slice(&checksum);
        }
        [bytemuck::bytes_of(&header), &icmp].concat()
    }

    /// The number of the request that `packet` answers, and who answers. The rest of the packet may be cut off or in
    /// another fragment.
    pub(super) fn answer(self, packet: &[u8]) -> Option<(u16, Ipv4Addr)> {
        let header: Ipv4 = bytemuck::try_pod_read_unaligned(packet.get(..IPV4)?).ok()?;
        let later_fragment = u16::from_be_bytes(header.fragment) & 0x1FFF != 0;
        if !header.is_valid() || header.protocol != PROTOCOL_ICMP || later_fragment {
            return None;
        }
        let icmp = packet.get(usize::from(header.header_length())..)?;
        let [kind, 0, _, _, id0, id1, number0, number1] = *icmp.first_chunk::<ICMP>()? else { return None };
        let secret = icmp.get(ICMP..ICMP + SECRET)?;
        let ours = kind == ECHO_REPLY
            && u16::from_be_bytes([id0, id1]) == self.identifier
            && secret == self.secret.as_slice();
        ours.then(|| (u16::from_be_bytes([number0, number1]), header.source.into()))
    }

    /// A classic BPF program that lets only packets pass that may be answers: ICMP, echo reply, identifier. It is
    /// only shown IPv4.
    pub(super) fn filter(self) -> [libc::sock_filter; 9] {
        const LOAD_BYTE: u16 = (libc::BPF_LD | libc::BPF_B | libc::BPF_ABS) as u16;
        const LOAD_BYTE_AT_X: u16 = (libc::BPF_LD | libc::BPF_B | libc::BPF_IND) as u16;
        const LOAD_HALF_AT_X: u16 = (libc::BPF_LD | libc::BPF_H | libc::BPF_IND) as u16;
        const HEADER_TO_X: u16 = (libc::BPF_LDX | libc::BPF_B | libc::BPF_MSH) as u16;
        const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
        const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
        /// Bytes that are looked at: the longest header, ICMP's and the secret.
        const TAKE: u32 = 128;
        let op = |code: u16, jt: u8, jf: u8, k: u32| libc::sock_filter { code, jt, jf, k };
        [
            op(LOAD_BYTE, 0, 0, 9),
            op(IF_EQUAL, 0, 6, PROTOCOL_ICMP.into()),
            op(HEADER_TO_X, 0, 0, 0),
            op(LOAD_BYTE_AT_X, 0, 0, 0),
            op(IF_EQUAL, 0, 3, ECHO_REPLY.into()),
            op(LOAD_HALF_AT_X, 0, 0, 4),
            op(IF_EQUAL, 0, 1, self.identifier.into()),
            op(RETURN, 0, 0, TAKE),
            op(RETURN, 0, 0, 0),
        ]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MARK: Mark = Mark { identifier: 0xbeef, secret: *b"8 bytes!" };
    const HERE: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 0);
    const THERE: Ipv4Addr = Ipv4Addr::new(10, 244, 2, 0);

    /// As a kernel answers.
    fn reply(request: &[u8]) -> Vec<u8> {
        let mut reply = request.to_vec();
        reply[12..16].copy_from_slice(&THERE.octets());
        reply[16..20].copy_from_slice(&HERE.octets());
        reply[20] = ECHO_REPLY;
        reply
    }

    #[test]
    fn a_request_is_a_whole_ping_of_the_asked_size() {
        for size in [36_u16, 548, 1471, 1472, 65507] {
            let packet = MARK.request(HERE, THERE, (size, 77));
            assert_eq!(packet.len(), usize::from(size));
            assert_eq!(&packet[..2], [0x45, 0]);
            assert_eq!(packet[2..4], size.to_be_bytes());
            assert!(Sum::default().bytes(&packet[..20]).is_valid(), "header");
            assert!(Sum::default().bytes(&packet[20..]).is_valid(), "ICMP");
            assert_eq!(MARK.answer(&reply(&packet)), Some((77, THERE)));
            assert_eq!(MARK.answer(&packet), None, "a request is no answer");
        }
        assert_eq!(MARK.request(HERE, THERE, (0, 1)).len(), SHORTEST);
    }

    #[test]
    fn only_answers_to_our_own_requests_count() {
        let good = reply(&MARK.request(HERE, THERE, (600, 9)));
        assert_eq!(MARK.answer(&good[..36]), Some((9, THERE)), "the rest is not needed");
        let first_of_two = [&good[..6], &[0x20, 0], &good[8..]].concat();
        assert_eq!(MARK.answer(&first_of_two), Some((9, THERE)), "a first fragment says it all");
        let changes: [(&str, usize, u8); 6] = [
            ("version", 0, 0x65),
            ("protocol", 9, 17),
            ("a later fragment", 7, 9),
            ("type", 20, 3),
            ("identifier", 24, 1),
            ("secret", 30, b'x'),
        ];
        for (name, at, value) in changes {
            let mut packet = good.clone();
            packet[at] = value;
            assert_eq!(MARK.answer(&packet), None, "{name}");
        }
        for cut in 0..36 {
            assert_eq!(MARK.answer(&good[..cut]), None, "{cut} bytes");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = MARK.answer(&bytes);
        }
    }
}
