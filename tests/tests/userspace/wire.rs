//! Packets as bytes: what crosses an interface, and packets no socket would send.

use std::{
    ffi::CString,
    io,
    net::Ipv4Addr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use etherparse::PacketBuilder;

use crate::rig::Namespace;

/// A packet socket on one interface: takes and gives packets without their link-layer header.
pub(crate) struct Tap {
    fd: OwnedFd,
    index: i32,
}

/// Which way a captured packet went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    In,
    Out,
}

impl Tap {
    pub(crate) fn open(node: &Namespace, interface: &'static str) -> Result<Self> {
        let tap = node.run(move || -> io::Result<Self> {
            let name = CString::new(interface)?;
            // SAFETY: a NUL-terminated string.
            let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
            let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
            // SAFETY: plain socket creation.
            let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
            if index == 0 || fd < 0 {
                return Err(io::Error::last_os_error());
            }
            // SAFETY: just created, owned by nobody else.
            let tap = Self { fd: unsafe { OwnedFd::from_raw_fd(fd) }, index: index.cast_signed() };
            let address = tap.address(libc::ETH_P_ALL);
            let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            // SAFETY: a sockaddr_ll and its length.
            let bound = unsafe { libc::bind(fd, (&raw const address).cast(), length) };
            if bound < 0 { Err(io::Error::last_os_error()) } else { Ok(tap) }
        });
        tap.with_context(|| format!("a packet socket on {interface}"))
    }

    fn address(&self, protocol: i32) -> libc::sockaddr_ll {
        // SAFETY: all zeroes is a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (protocol as u16).to_be();
        address.sll_ifindex = self.index;
        address
    }

    /// Puts an IPv4 packet on the interface's transmit queue, as if it had been routed there.
    pub(crate) fn send(&self, packet: &[u8]) -> Result<()> {
        let address = self.address(libc::ETH_P_IP);
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the buffer and the address are valid for their lengths.
        let sent = unsafe {
            libc::sendto(
                self.fd.as_raw_fd(),
                packet.as_ptr().cast(),
                packet.len(),
                0,
                (&raw const address).cast(),
                length,
            )
        };
        if sent < 0 { Err(io::Error::last_os_error()).context("sending a raw packet") } else { Ok(()) }
    }

    fn next(&self) -> Option<(Way, Vec<u8>)> {
        let mut buffer = vec![0; 70_000];
        let mut address = self.address(0);
        let mut length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the buffer and the address are valid for writing up to their lengths.
        let received = unsafe {
            libc::recvfrom(
                self.fd.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                libc::MSG_DONTWAIT,
                (&raw mut address).cast(),
                &raw mut length,
            )
        };
        buffer.truncate(usize::try_from(received).ok()?);
        let way = if address.sll_pkttype == libc::PACKET_OUTGOING { Way::Out } else { Way::In };
        Some((way, buffer))
    }

    /// IPv4 packets that go `way` and match, until `wanted` came or a second passed.
    pub(crate) fn packets(&self, way: Way, wanted: usize, matches: impl Fn(&[u8]) -> bool) -> Vec<Vec<u8>> {
        let deadline = Instant::now() + Duration::from_secs(1);
        let mut found = Vec::new();
        while found.len() < wanted && Instant::now() < deadline {
            match self.next() {
                Some((went, packet)) if went == way && packet[0] >> 4 == 4 && matches(&packet) => {
                    found.push(packet);
                }
                Some(_) => {}
                None => std::thread::sleep(Duration::from_millis(2)),
            }
        }
        found
    }

    /// Whether that packet is among those captured since the last look.
    pub(crate) fn has_seen(&self, way: Way, packet: &[u8]) -> bool {
        std::iter::from_fn(|| self.next()).any(|(went, seen)| went == way && seen == packet)
    }

    /// IPv4 packets that go `way` before `marker` does. The marker must come within a second.
    pub(crate) fn until(&self, way: Way, marker: &[u8]) -> Result<Vec<Vec<u8>>> {
        let deadline = Instant::now() + Duration::from_secs(1);
        let mut found = Vec::new();
        loop {
            match self.next() {
                Some((went, packet)) if went == way && packet == marker => return Ok(found),
                Some((went, packet)) if went == way && packet[0] >> 4 == 4 => found.push(packet),
                Some(_) => {}
                None if Instant::now() > deadline => {
                    bail!("the marker did not come; before it: {found:02x?}")
                }
                None => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

/// A UDP packet with TTL 64, identification 0 and DF.
pub(crate) fn udp(source: Ipv4Addr, destination: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let builder = PacketBuilder::ipv4(source.octets(), destination.octets(), 64).udp(40000, 40001);
    let mut packet = Vec::with_capacity(builder.size(payload.len()));
    builder.write(&mut packet, payload).unwrap();
    packet
}

/// The packet with one change, its header checksum right again.
pub(crate) fn changed(packet: &[u8], change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut packet = packet.to_vec();
    change(&mut packet);
    fix_header(&mut packet);
    packet
}

pub(crate) fn fix_header(packet: &mut [u8]) {
    let length = usize::from(packet[0] & 15) * 4;
    packet[10..12].copy_from_slice(&[0, 0]);
    let Some(header) = packet.get(..length) else { return };
    let mut sum: u32 = header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    packet[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
}

/// The packet after one end of the tunnel: TTL lower by one, checksum to match.
pub(crate) fn one_hop_on(packet: &[u8]) -> Vec<u8> {
    changed(packet, |p| p[8] -= 1)
}

/// Checksum of the transport data of a UDP or TCP packet, with the pseudo header: 0 when it is right.
pub(crate) fn transport_residue(packet: &[u8]) -> u16 {
    let data = &packet[usize::from(packet[0] & 15) * 4..];
    let pseudo = [&packet[12..20], &[0, packet[9]], &(data.len() as u16).to_be_bytes()[..]].concat();
    let mut sum: u32 = 0;
    for pair in pseudo.chunks(2).chain(data.chunks(2)) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}
