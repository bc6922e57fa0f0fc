//! Which of the host's interfaces carries the overlay, and which addresses it is known by (contract §7).
//!
//! The list of interfaces is an argument: the choice is pure, reading the kernel is `host/`'s part.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An interface of the host, as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub index: u32,
    pub mtu: u32,
    pub up: bool,
    pub addresses: Vec<InterfaceAddress>,
}

/// An address with the facts that decide its rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InterfaceAddress {
    pub address: IpAddr,
    pub prefix_len: u8,
    /// Lifetime ends (DHCP, router advertisement).
    pub dynamic: bool,
    pub temporary: bool,
    pub deprecated: bool,
}

/// The chosen interface and the addresses that go with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalInterface {
    pub name: String,
    pub index: u32,
    pub mtu: u32,
    /// Address on the interface: sockets bind to it.
    pub address: Ipv4Addr,
    /// Published in the lease; differs from `address` behind NAT.
    pub public_ip: Ipv4Addr,
    pub address_v6: Option<Ipv6Addr>,
    pub public_ipv6: Option<Ipv6Addr>,
}
