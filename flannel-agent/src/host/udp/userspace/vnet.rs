//! The virtio-net header in front of every packet read from and written to the TUN device.
//!
//! It lets the kernel hand over packets as large as 64 KiB with their checksums left to us, and take such packets
//! back (virtio 1.2 §5.1.6; `include/uapi/linux/virtio_net.h`). The legacy form of 10 bytes, in the machine's byte
//! order, is what every kernel speaks.

use super::segment::Transport;

/// Bytes of the header.
pub(super) const LEN: usize = 10;

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_UDP_L4: u8 = 5;
/// Flag beside the type: the TCP packet has CWR set. Splitting treats every packet that way.
const GSO_ECN: u8 = 0x80;
/// Where the checksum stands in a TCP and in a UDP header.
const TCP_CHECKSUM: u16 = 16;
const UDP_CHECKSUM: u16 = 6;

/// What the kernel left to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Offload {
    /// Nothing: the packet can go out as it is.
    None,
    /// The checksum at `start + offset` covers everything from `start` on and holds the pseudo header's sum.
    Checksum { start: u16, offset: u16 },
    /// A TCP packet to be cut into segments of `size` payload bytes.
    Tcp { size: u16 },
    /// A UDP packet to be cut into datagrams of `size` payload bytes.
    Udp { size: u16 },
    /// Something the device was never told it may send.
    Unknown,
}

impl Offload {
    pub(super) fn of(header: [u8; LEN]) -> Self {
        let [flags, kind, _, _, size @ .., s0, s1, o0, o1] = header;
        let size = u16::from_ne_bytes(size);
        match kind & !GSO_ECN {
            GSO_NONE if flags & NEEDS_CSUM == 0 => Self::None,
            GSO_NONE => {
                Self::Checksum { start: u16::from_ne_bytes([s0, s1]), offset: u16::from_ne_bytes([o0, o1]) }
            }
            GSO_TCPV4 => Self::Tcp { size },
            GSO_UDP_L4 => Self::Udp { size },
            _ => Self::Unknown,
        }
    }
}

/// Header of a packet that is complete.
pub(super) const PLAIN: [u8; LEN] = [0; LEN];

/// Header of several TCP/IPv4 segments written as one: `head` bytes of headers, `ip_head` of them IPv4, `size`
/// payload bytes per segment, checksum left to whoever splits it again.
pub(super) fn merged_tcp(head: u16, ip_head: u16, size: u16) -> [u8; LEN] {
    let [h0, h1] = head.to_ne_bytes();
    let [z0, z1] = size.to_ne_bytes();
    let [s0, s1] = ip_head.to_ne_bytes();
    let [o0, o1] = TCP_CHECKSUM.to_ne_bytes();
    [NEEDS_CSUM, GSO_TCPV4, h0, h1, z0, z1, s0, s1, o0, o1]
}

/// Header of a TCP or UDP packet whose checksum field holds the pseudo header's sum, behind `ip_head` bytes of IPv4.
pub(super) fn unfinished(ip_head: u16, transport: Transport) -> [u8; LEN] {
    let offset = match transport {
        Transport::Tcp => TCP_CHECKSUM,
        Transport::Udp => UDP_CHECKSUM,
    };
    let [s0, s1] = ip_head.to_ne_bytes();
    let [o0, o1] = offset.to_ne_bytes();
    [NEEDS_CSUM, GSO_NONE, 0, 0, 0, 0, s0, s1, o0, o1]
}

/// Packets in one of `bytes` bytes that is written behind `header`.
pub(super) fn packets(header: &[u8], bytes: usize) -> usize {
    match header.first_chunk::<LEN>() {
        Some(&[_, GSO_TCPV4, h0, h1, z0, z1, ..]) => {
            let head = usize::from(u16::from_ne_bytes([h0, h1]));
            let size = usize::from(u16::from_ne_bytes([z0, z1]));
            bytes.saturating_sub(head).div_ceil(size.max(1)).max(1)
        }
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_merged_packet_asks_for_what_the_kernel_asks_of_us() {
        assert_eq!(Offload::of(merged_tcp(52, 20, 1420)), Offload::Tcp { size: 1420 });
        assert_eq!(Offload::of(PLAIN), Offload::None);
    }

    #[test]
    fn a_merged_packet_counts_as_what_it_was_made_of() {
        for (bytes, count) in [(52 + 1420, 1), (52 + 1421, 2), (52 + 64 * 1420, 64), (10, 1)] {
            assert_eq!(packets(&merged_tcp(52, 20, 1420), bytes), count, "{bytes}");
        }
        assert_eq!(packets(&PLAIN, 60000), 1);
        assert_eq!(packets(&unfinished(20, Transport::Udp), 1400), 1);
    }

    #[test]
    fn each_kind_of_header_is_told_apart() {
        let header = |flags: u8, kind: u8| {
            let mut header = [flags, kind, 0, 0, 0, 0, 0, 0, 0, 0];
            header[4..6].copy_from_slice(&1000u16.to_ne_bytes());
            header[6..8].copy_from_slice(&20u16.to_ne_bytes());
            header[8..10].copy_from_slice(&6u16.to_ne_bytes());
            Offload::of(header)
        };
        assert_eq!(header(NEEDS_CSUM, GSO_NONE), Offload::Checksum { start: 20, offset: 6 });
        assert_eq!(header(NEEDS_CSUM, GSO_TCPV4 | GSO_ECN), Offload::Tcp { size: 1000 });
        assert_eq!(header(NEEDS_CSUM, GSO_UDP_L4), Offload::Udp { size: 1000 });
        assert_eq!(header(NEEDS_CSUM, 4), Offload::Unknown, "TCP over IPv6");
        assert_eq!(header(0, 3), Offload::Unknown, "UFO");
    }
}
