//! The virtio-net header in front of every packet read from and written to the TUN device.
//!
//! It lets the kernel hand over packets as large as 64 KiB with their checksums left to us, and take such packets
//! back (virtio 1.2 §5.1.6; `include/uapi/linux/virtio_net.h`). The legacy form of 10 bytes, in the machine's byte
//! order, is what every kernel speaks.

use flannel_common::header::{PROTOCOL_TCP, PROTOCOL_UDP};

use super::packet::{pseudo_header, whole};

/// Bytes of the header.
pub(super) const LEN: usize = 10;

const NEEDS_CSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_UDP_L4: u8 = 5;
/// Flag beside the type: the TCP packet has CWR set. Splitting treats every packet that way.
const GSO_ECN: u8 = 0x80;
/// Where the checksum stands in a TCP header.
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

/// Header of one packet as it came out of a datagram, for a device of `mtu` bytes; or `None` for a packet it can't take.
///
/// A node on our own machine (a container joined by veth, a virtual machine of the same hypervisor) leaves checksums,
/// and the cutting of large TCP packets, to a NIC that its packets never meet. The kernel remembers that beside the
/// packet, and a UDP socket hands out bytes only: the checksum field still holds the pseudo header's sum. Told so, the
/// kernel treats the packet as it would have without a tunnel. A complete checksum equals that sum once in 65,536 times;
/// then the kernel trusts it unseen, or completes it to the same.
pub(super) fn single(packet: &[u8], mtu: usize) -> Option<[u8; LEN]> {
    let unfinished = unfinished(packet);
    if packet.len() <= mtu {
        return Some(unfinished.map_or(PLAIN, |(start, offset)| {
            let [s0, s1] = start.to_ne_bytes();
            let [o0, o1] = offset.to_ne_bytes();
            [NEEDS_CSUM, GSO_NONE, 0, 0, 0, 0, s0, s1, o0, o1]
        }));
    }
    let (ip_head, TCP_CHECKSUM) = unfinished? else { return None };
    // The sender's segment size is not told; what fits the device is no smaller.
    let tcp_head = u16::from(*packet.get(usize::from(ip_head) + 12)? >> 4) * 4;
    let head = ip_head.checked_add(tcp_head)?;
    let size = u16::try_from(mtu).ok()?.checked_sub(head).filter(|size| *size > 0)?;
    Some(merged_tcp(head, ip_head, size))
}

/// Where an unfinished TCP or UDP checksum covers from, and where it stands behind that.
fn unfinished(packet: &[u8]) -> Option<(u16, u16)> {
    let (header, packet) = whole(packet)?;
    if u16::from_be_bytes(header.fragment) & 0x3fff != 0 {
        return None;
    }
    let offset = match header.protocol {
        PROTOCOL_TCP => TCP_CHECKSUM,
        PROTOCOL_UDP => UDP_CHECKSUM,
        _ => return None,
    };
    let start = u16::from(header.header_length());
    let data = packet.get(usize::from(start)..)?;
    let field = data.get(usize::from(offset)..)?.first_chunk::<2>()?;
    let sum = pseudo_header(packet.first_chunk()?, u16::try_from(data.len()).ok()?);
    (*field == sum.folded()).then_some((start, offset))
}

/// Header of several TCP/IPv4 segments written as one: `head` bytes of headers, `ip_head` of them IPv4, `size`
/// payload bytes per segment, checksum left to whoever splits it again.
pub(super) fn merged_tcp(head: u16, ip_head: u16, size: u16) -> [u8; LEN] {
    let [h0, h1] = head.to_ne_bytes();
    let [z0, z1] = size.to_ne_bytes();
    let [s0, s1] = ip_head.to_ne_bytes();
    let [o0, o1] = TCP_CHECKSUM.to_ne_bytes();
    [NEEDS_CSUM, GSO_TCPV4, h0, h1, z0, z1, s0, s1, o0, o1]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::udp::userspace::packet::{IPV4, samples};

    #[test]
    fn a_merged_packet_asks_for_what_the_kernel_asks_of_us() {
        assert_eq!(Offload::of(merged_tcp(52, 20, 1420)), Offload::Tcp { size: 1420 });
        assert_eq!(Offload::of(PLAIN), Offload::None);
    }

    #[test]
    fn an_unfinished_checksum_is_left_to_the_kernel_and_a_finished_one_is_not() {
        let finished = [samples::tcp(1, 0, b"data"), samples::udp(b"data")];
        for (packet, offset) in finished.into_iter().zip([TCP_CHECKSUM, UDP_CHECKSUM]) {
            assert_eq!(single(&packet, 1472), Some(PLAIN));
            let mut packet = packet;
            let ip: [u8; IPV4] = *packet.first_chunk().unwrap();
            let sum = pseudo_header(&ip, (packet.len() - IPV4) as u16).folded();
            let at = IPV4 + usize::from(offset);
            packet[at..at + 2].copy_from_slice(&sum);
            let wanted = Offload::Checksum { start: IPV4 as u16, offset };
            assert_eq!(single(&packet, 1472).map(Offload::of), Some(wanted));
            // The first fragment of a larger packet: the sum covers what is not here.
            packet[6] |= 0x20;
            assert_eq!(single(&packet, 1472), Some(PLAIN));
        }
    }

    #[test]
    fn a_packet_above_the_mtu_is_taken_only_as_tcp_that_was_left_to_be_cut() {
        let payload = [7; 5000];
        let mut tcp = samples::tcp(1, 0, &payload);
        assert_eq!(single(&tcp, 1472), None);
        let ip: [u8; IPV4] = *tcp.first_chunk().unwrap();
        let sum = pseudo_header(&ip, (tcp.len() - IPV4) as u16).folded();
        let at = IPV4 + usize::from(TCP_CHECKSUM);
        tcp[at..at + 2].copy_from_slice(&sum);
        assert_eq!(single(&tcp, 1472).map(Offload::of), Some(Offload::Tcp { size: 1472 - 52 }));
        assert_eq!(single(&samples::udp(&payload), 1472), None);
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
