//! Which of the host's interfaces carries the overlay, and which addresses it is known by (contract §7).
//!
//! The list of interfaces and the kernel's answers to route lookups are arguments: the choice is pure, reading the
//! kernel is `host/`'s part. The rules are those of today's flanneld.

mod choice;
mod follow;
#[cfg(test)]
mod tests;
mod tunnel_device;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use regex::{Regex, RegexBuilder};

pub use self::choice::choose;
pub use self::follow::{Followed, Selection, follow, preferred};
pub use self::tunnel_device::{ExistingLink, tunnel_device_name};
use super::config::NetworkConfig;

/// Bytes a compiled `--iface-regex` may take.
const MAX_PATTERN: usize = 1 << 20;

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
    /// Address on the interface: sockets bind to it. `None` where the network is of only IPv6.
    pub address: Option<Ipv4Addr>,
    /// Published in the lease; differs from `address` behind NAT.
    pub public_ip: Option<Ipv4Addr>,
    pub address_v6: Option<Ipv6Addr>,
    pub public_ipv6: Option<Ipv6Addr>,
}

/// One way to say which interface is meant. They are tried in the order given; the first that works is taken.
#[derive(Clone, Debug, PartialEq)]
pub enum Selector {
    /// `--iface` with an address: the interface that has exactly it.
    Address(IpAddr),
    /// `--iface` with a name.
    Name(String),
    /// `--iface-regex`.
    Pattern(Pattern),
    /// `--iface-can-reach`: the interface the kernel would send from.
    CanReach(IpAddr),
}

/// A pattern for addresses or, when no address matches, names; not anchored.
#[derive(Clone, Debug)]
pub struct Pattern(Regex);

/// `--public-ip` and `--public-ipv6`: what other nodes send to, when it is not the interface's address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PublicAddresses {
    pub v4: Option<Ipv4Addr>,
    pub v6: Option<Ipv6Addr>,
}

/// The families the overlay carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Families {
    V4,
    V6,
    Dual,
}

/// What the choice depends on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFacts {
    /// In index order.
    pub interfaces: Vec<Interface>,
    /// Output interface of the main table's first default route.
    pub default_route_v4: Option<u32>,
    pub default_route_v6: Option<u32>,
    /// The kernel's answer for the address of every [`Selector::CanReach`]; an address without a route is missing.
    pub can_reach: Vec<(IpAddr, RouteLookup)>,
}

/// How the kernel would send to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteLookup {
    pub index: u32,
    /// Source address it would take.
    pub source: Option<IpAddr>,
}

/// No interface could be chosen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no interface to use: {}; this host has {present}", tried.join("; "))]
pub struct InterfaceError {
    /// Each selector that was tried, with what was wrong with it.
    pub tried: Vec<String>,
    /// `name:[addresses]` of the host's interfaces.
    pub present: String,
}

impl Selector {
    /// The meaning of an `--iface` value: an address when it is one, else a name.
    pub fn from_iface(text: &str) -> Self {
        text.parse().map_or_else(|_| Self::Name(text.to_owned()), Self::Address)
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "--iface={address}"),
            Self::Name(name) => write!(f, "--iface={}", name.escape_debug()),
            Self::Pattern(pattern) => write!(f, "--iface-regex={}", pattern.as_str().escape_debug()),
            Self::CanReach(address) => write!(f, "--iface-can-reach={address}"),
        }
    }
}

impl Pattern {
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }

    fn matches(&self, text: &str) -> bool {
        self.0.is_match(text)
    }
}

impl FromStr for Pattern {
    type Err = String;

    /// # Errors
    /// Says what is wrong with the expression, without a copy of it.
    fn from_str(text: &str) -> Result<Self, String> {
        RegexBuilder::new(text).size_limit(MAX_PATTERN).build().map(Self).map_err(|error| match error {
            regex::Error::CompiledTooBig(limit) => format!("takes more than {limit} bytes when compiled"),
            // The parser draws the place under a copy of the pattern; the last line says what is wrong.
            error => {
                let text = error.to_string();
                let reason = text.lines().last().unwrap_or_default().trim_start_matches("error: ");
                format!("not a regular expression: {reason}")
            }
        })
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.as_str() == other.as_str()
    }
}

impl From<&NetworkConfig> for Families {
    fn from(config: &NetworkConfig) -> Self {
        match (&config.v4, &config.v6) {
            (_, None) => Self::V4,
            (None, Some(_)) => Self::V6,
            (Some(_), Some(_)) => Self::Dual,
        }
    }
}

impl fmt::Display for ExternalInterface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let both = |v4: Option<Ipv4Addr>, v6: Option<Ipv6Addr>| {
            let texts: Vec<String> =
                v4.iter().map(ToString::to_string).chain(v6.iter().map(ToString::to_string)).collect();
            texts.join(" and ")
        };
        let Self { name, index, mtu, .. } = self;
        let (address, public) = (both(self.address, self.address_v6), both(self.public_ip, self.public_ipv6));
        write!(f, "{name} (index {index}, mtu {mtu}), address {address}, public address {public}")
    }
}

impl Families {
    pub fn has_v4(self) -> bool {
        self != Self::V6
    }

    pub fn has_v6(self) -> bool {
        self != Self::V4
    }
}

impl ExternalInterface {
    /// Its addresses on the interface, IPv4 first.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.address.map(IpAddr::from).into_iter().chain(self.address_v6.map(IpAddr::from))
    }

    /// What is published of it, IPv4 first.
    pub fn public_addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.public_ip.map(IpAddr::from).into_iter().chain(self.public_ipv6.map(IpAddr::from))
    }
}
