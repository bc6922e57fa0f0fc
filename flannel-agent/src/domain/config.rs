//! The network configuration (`net-conf.json`, contract §2): parsed once, never re-checked.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

/// A configuration that obeys every rule of contract §2.
#[derive(Clone, Debug, PartialEq)]
pub struct NetworkConfig {
    /// `None` when `EnableIPv4` is false.
    pub v4: Option<SubnetRange<Ipv4Net, Ipv4Addr>>,
    /// `Some` when `EnableIPv6` is true.
    pub v6: Option<SubnetRange<Ipv6Net, Ipv6Addr>>,
    pub enable_nftables: bool,
    pub backend: BackendConfig,
    /// What an operator should be told, such as unknown keys with the nearest known one.
    pub warnings: Vec<String>,
}

/// Where subnets are taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SubnetRange<Net, Addr> {
    pub network: Net,
    /// Prefix length of every lease.
    pub subnet_len: u8,
    /// First and last subnet that may be given out, both by their base address and inclusive.
    pub subnet_min: Addr,
    pub subnet_max: Addr,
}

/// The `Backend` object.
#[derive(Clone, Debug, PartialEq)]
pub enum BackendConfig {
    Udp { port: u16 },
    HostGw,
    Alloc,
}
