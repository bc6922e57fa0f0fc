//! Packets and settings of the rows, written down without the header code under test.

use std::net::Ipv4Addr;

use flannel_common::{
    peer::Peer,
    tunnel::{SUBNETS_IN_ORDER, Settings},
};

pub(crate) const OWN: [u8; 4] = [172, 31, 0, 1];
pub(crate) const NODE: [u8; 4] = [172, 31, 0, 2];
pub(crate) const STRANGER: [u8; 4] = [172, 31, 0, 9];
pub(crate) const POD: [u8; 4] = [10, 244, 1, 5];
pub(crate) const REMOTE_POD: [u8; 4] = [10, 244, 2, 7];
pub(crate) const PORT: u16 = 8285;
/// Index of the only peer.
pub(crate) const PEER: u32 = 41;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ETHERNET: usize = 14;
pub(crate) const OVERHEAD: usize = 28;

/// The subnet of `REMOTE_POD`.
pub(crate) fn peer_subnet() -> Ipv4Addr {
    Ipv4Addr::new(10, 244, 2, 0)
}

pub(crate) fn peer(ifindex: u32) -> Peer {
    Peer { node: u32::from_ne_bytes(NODE), ifindex, index: PEER }
}

pub(crate) fn settings(flags: u16) -> Settings {
    Settings { flags: flags | SUBNETS_IN_ORDER, ..hashed(flags) }
}

/// The same for a network with more subnets than there are places.
pub(crate) fn hashed(flags: u16) -> Settings {
    Settings {
        local: u32::from_ne_bytes(OWN),
        network: u32::from_ne_bytes([10, 244, 0, 0]),
        network_mask: u32::from_ne_bytes([255, 255, 0, 0]),
        subnet_mask: u32::from_ne_bytes([255, 255, 255, 0]),
        own_subnet: u32::from_ne_bytes([10, 244, 1, 0]),
        underlay: 2,
        device: 3,
        gro_pair: 0,
        port: PORT.to_be(),
        flags,
        host_bits: 8,
    }
}

/// An IPv4 packet; `Default` is 20 bytes of UDP payload from the remote pod to ours.
#[derive(Clone, Debug)]
pub(crate) struct Ip {
    pub(crate) source: [u8; 4],
    pub(crate) destination: [u8; 4],
    pub(crate) protocol: u8,
    pub(crate) tos: u8,
    pub(crate) ttl: u8,
    pub(crate) id: u16,
    /// Flags and fragment offset.
    pub(crate) fragment: u16,
    /// A multiple of 4 bytes.
    pub(crate) options: Vec<u8>,
    pub(crate) payload: Vec<u8>,
}

impl Default for Ip {
    fn default() -> Self {
        Self {
            source: REMOTE_POD,
            destination: POD,
            protocol: UDP,
            tos: 0,
            ttl: 64,
            id: 0x2058,
            fragment: 0x4000,
            options: Vec::new(),
            payload: transport(20),
        }
    }
}

impl Ip {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let header = 20 + self.options.len();
        let mut bytes = vec![0x40 | (header / 4) as u8, self.tos];
        bytes.extend(((header + self.payload.len()) as u16).to_be_bytes());
        bytes.extend(self.id.to_be_bytes());
        bytes.extend(self.fragment.to_be_bytes());
        bytes.extend([self.ttl, self.protocol, 0, 0]);
        bytes.extend(self.source);
        bytes.extend(self.destination);
        bytes.extend(&self.options);
        let checksum = checksum(&bytes);
        bytes[10..12].copy_from_slice(&checksum.to_be_bytes());
        bytes.extend(&self.payload);
        bytes
    }
}

/// A header that starts like UDP and TCP do (ports), and recognisable bytes behind it.
pub(crate) fn transport(length: usize) -> Vec<u8> {
    let mut bytes = vec![0x9C, 0x40, 0x00, 0x50];
    bytes.extend((4..length).map(|i| i as u8 ^ 0xA5));
    bytes.truncate(length);
    bytes
}

/// A UDP header with a zero checksum, and the payload.
pub(crate) fn udp(source: u16, destination: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [source, destination, (payload.len() + 8) as u16, 0] {
        bytes.extend(word.to_be_bytes());
    }
    bytes.extend(payload);
    bytes
}

/// The tunnel's datagram from one node to the other, source port as a peer would choose it.
pub(crate) fn datagram(from: [u8; 4], to: [u8; 4], inner: &[u8]) -> Ip {
    Ip { source: from, destination: to, fragment: 0, payload: udp(0xC123, PORT, inner), ..Ip::default() }
}

pub(crate) fn ethernet(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x02, 0, 0, 0, 0, 0x01, 0x02, 0, 0, 0, 0, 0x02];
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame
}

/// The usual frame: an inner packet in a datagram from the peer to us.
pub(crate) fn frame(inner: &Ip) -> Vec<u8> {
    ethernet(0x0800, &datagram(NODE, OWN, &inner.bytes()).bytes())
}

/// What is left of [`frame`] after decapsulation, inner TTL lowered.
pub(crate) fn delivered(inner: &Ip) -> Vec<u8> {
    ethernet(0x0800, &Ip { ttl: inner.ttl.wrapping_sub(1), ..inner.clone() }.bytes())
}

/// The Internet checksum over all of `bytes`.
pub(crate) fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = bytes
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])))
        .sum();
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    !(sum as u16)
}

/// Fills in the checksum of the UDP header in front of `ip.payload`.
pub(crate) fn with_udp_checksum(mut ip: Ip) -> Ip {
    let mut pseudo = Vec::from(ip.source);
    pseudo.extend(ip.destination);
    pseudo.extend([0, UDP]);
    pseudo.extend((ip.payload.len() as u16).to_be_bytes());
    pseudo.extend(&ip.payload);
    let sum = match checksum(&pseudo) {
        0 => 0xFFFF,
        sum => sum,
    };
    ip.payload[6..8].copy_from_slice(&sum.to_be_bytes());
    ip
}
