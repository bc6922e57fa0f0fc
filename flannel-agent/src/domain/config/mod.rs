//! The network configuration (`net-conf.json`, contract §2): parsed once, never re-checked.
//!
//! The text comes from the datastore, so its size is bounded and whatever of it is repeated in an error or a warning
//! is escaped and cut. Where releases differ the rules are today's flanneld's.

mod object;
mod range;
#[cfg(test)]
mod tests;

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use ipnet::{Ipv4Net, Ipv6Net};

use self::object::Object;
use self::range::{Given, V4, V6};
use super::wording::{nearest, quoted};

/// Bytes of configuration that are read; a real one has a few hundred.
pub const MAX_TEXT: usize = 64 * 1024;

/// A configuration that works, for errors that have to show one.
pub const EXAMPLE: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}"#;

/// Port of the udp backend when `Backend.Port` is missing. All nodes need the same: it is not part of the lease.
pub const DEFAULT_UDP_PORT: u16 = 8285;

/// What a tunnel's MTU can be. RFC 791: every link carries 68 bytes whole, a packet has at most 65535; the outer IPv4
/// and UDP header take 28 of them.
pub const TUNNEL_MTUS: RangeInclusive<u32> = 68..=65507;

/// Backends of this version by their `Backend.Type`.
const BUILT: [&str; 3] = ["udp", "host-gw", "alloc"];

/// Backends that flanneld has or had and this version does not.
const NOT_BUILT: [&str; 9] =
    ["vxlan", "ipip", "wireguard", "ipsec", "extension", "aws-vpc", "gce", "ali-vpc", "tencent-vpc"];

const KEYS: [&str; 12] = [
    "Network",
    "SubnetLen",
    "SubnetMin",
    "SubnetMax",
    "EnableIPv4",
    "EnableIPv6",
    "IPv6Network",
    "IPv6SubnetLen",
    "IPv6SubnetMin",
    "IPv6SubnetMax",
    "EnableNFTables",
    "Backend",
];

/// A configuration that obeys every rule of contract §2.
///
/// `Display` prints it as JSON with every default filled in; parsing that text gives the same configuration.
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
    Udp {
        port: u16,
        /// The tunnel's MTU in bytes, when it is not to follow the interface.
        mtu: Option<u32>,
    },
    HostGw,
    Alloc,
}

/// Why a text is not a configuration: the field, its value and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    #[error("the network configuration has {size} bytes; at most {MAX_TEXT} are read")]
    TooLong { size: usize },
    #[error("the network configuration is not JSON: {reason}; it should look like {EXAMPLE}")]
    NotJson { reason: String },
    #[error("the network configuration is {found}, not an object; it should look like {EXAMPLE}")]
    NotAnObject { found: &'static str },
    #[error("{field} is missing: {expected}")]
    Missing { field: &'static str, expected: &'static str },
    /// `value` is quoted as it stands in the text, or as it was understood.
    #[error("{field} is {value}: {expected}")]
    Invalid { field: &'static str, value: String, expected: String },
    #[error("EnableIPv4 and EnableIPv6 are both false: at least one of them must be true")]
    NoFamily,
    #[error(
        "EnableIPv4 is false: backend {backend} carries IPv4 only; set EnableIPv4 and Network, or Backend.Type to \
         \"host-gw\" or \"alloc\""
    )]
    NeedsIpv4 { backend: &'static str },
    #[error("Backend.Type {name} is a backend this version does not have yet; it has {}", BUILT.join(", "))]
    BackendNotBuilt { name: &'static str },
    #[error("Backend.Type is {name}, which is no backend{}; this version has {}", did_you_mean(*.nearest), BUILT.join(", "))]
    UnknownBackend { name: String, nearest: Option<&'static str> },
}

impl NetworkConfig {
    /// Reads and checks a configuration.
    ///
    /// Keys match in any case, the last of several wins, unknown ones become warnings (contract §2.1).
    ///
    /// # Errors
    /// Names the first field that breaks a rule.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        Self::read(text, BackendConfig::parse)
    }

    /// Reads what leases are made of and does not look at `Backend`: who gives out leases need not know what carries
    /// the nodes' packets.
    ///
    /// # Errors
    /// As [`Self::parse`].
    pub fn parse_ranges(text: &str) -> Result<Self, ConfigError> {
        Self::read(text, |_, _| Ok(BackendConfig::Alloc))
    }

    fn read(
        text: &str,
        backend: impl FnOnce(&Object, &mut Vec<String>) -> Result<BackendConfig, ConfigError>,
    ) -> Result<Self, ConfigError> {
        let object = Object::parse(text)?;
        let mut warnings = object.unknown_keys("", &KEYS);

        // Every value is decoded, also those of a family that is off: a wrong type is always an error.
        let enable_v4 = object.boolean("EnableIPv4")?.unwrap_or(true);
        let enable_v6 = object.boolean("EnableIPv6")?.unwrap_or(false);
        let enable_nftables = object.boolean("EnableNFTables")?.unwrap_or(false);
        let given_v4 = Given {
            network: object.required_text::<Ipv4Net>("Network", V4.network_format)?,
            subnet_len: object.unsigned("SubnetLen")?,
            subnet_min: object.required_text::<Ipv4Addr>("SubnetMin", V4.address_format)?,
            subnet_max: object.required_text::<Ipv4Addr>("SubnetMax", V4.address_format)?,
        };
        let given_v6 = Given {
            network: object.required_text::<Ipv6Net>("IPv6Network", V6.network_format)?,
            subnet_len: object.unsigned("IPv6SubnetLen")?,
            subnet_min: object.nullable_text::<Ipv6Addr>("IPv6SubnetMin", V6.address_format)?,
            subnet_max: object.nullable_text::<Ipv6Addr>("IPv6SubnetMax", V6.address_format)?,
        };
        let backend = backend(&object, &mut warnings)?;

        if !enable_v4 && !enable_v6 {
            return Err(ConfigError::NoFamily);
        }
        if given_v4.network.is_some() && !enable_v4 {
            warnings.push("Network has no effect: EnableIPv4 is false".to_owned());
        }
        if given_v6.network.is_some() && !enable_v6 {
            warnings.push("IPv6Network has no effect: EnableIPv6 is not true".to_owned());
        }
        let v4 = if enable_v4 { Some(given_v4.checked()?) } else { None };
        let v6 = if enable_v6 { Some(given_v6.checked()?) } else { None };
        if let Some(range) = &v4
            && let Some(reason) = not_routable(range.network)
        {
            warnings.push(format!("Network is {}: {reason}", range.network));
        }
        Ok(Self { v4, v6, enable_nftables, backend, warnings })
    }

    /// Whether the network has a family that its backend carries. A datagram of udp is a bare IPv4 packet, where flanneld
    /// crashes without IPv4 (contract §14, T17).
    ///
    /// # Errors
    /// [`ConfigError::NeedsIpv4`] for udp when `EnableIPv4` is false.
    pub fn require_family_of_backend(&self) -> Result<(), ConfigError> {
        match self.backend {
            BackendConfig::Udp { .. } if self.v4.is_none() => {
                Err(ConfigError::NeedsIpv4 { backend: self.backend.name() })
            }
            _ => Ok(()),
        }
    }
}

impl BackendConfig {
    /// The backend's name, as `Backend.Type` spells it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Udp { .. } => "udp",
            Self::HostGw => "host-gw",
            Self::Alloc => "alloc",
        }
    }

    /// No `Backend` at all is udp, in every release and whatever flannel's documentation says (contract §14, T1).
    fn parse(config: &Object, warnings: &mut Vec<String>) -> Result<Self, ConfigError> {
        const TYPE: &str = "Backend.Type";
        let Some(object) = config.object("Backend")? else {
            return Ok(Self::Udp { port: DEFAULT_UDP_PORT, mtu: None });
        };
        let name = object.string("Type", TYPE)?.unwrap_or_default();
        if name.is_empty() {
            return Err(ConfigError::Missing {
                field: TYPE,
                expected: r#"name a backend, such as "udp", or leave Backend out, which is udp"#,
            });
        }
        let lower = name.to_lowercase();
        let (backend, keys): (Self, &[&str]) = match lower.as_str() {
            "udp" => {
                let port = object.port("Port", "Backend.Port")?;
                let mtu = object.tunnel_mtu("MTU", "Backend.MTU")?;
                (Self::Udp { port, mtu }, &["Type", "Port", "MTU"])
            }
            "host-gw" => (Self::HostGw, &["Type"]),
            "alloc" => (Self::Alloc, &["Type"]),
            _ => {
                return Err(match NOT_BUILT.iter().find(|known| **known == lower) {
                    Some(name) => ConfigError::BackendNotBuilt { name },
                    None => ConfigError::UnknownBackend {
                        name: quoted(&name),
                        nearest: nearest(&lower, BUILT.into_iter().chain(NOT_BUILT)),
                    },
                });
            }
        };
        warnings.extend(object.unknown_keys("Backend.", keys));
        Ok(backend)
    }
}

/// Networks a pod can have an address in, but no packet can be routed to.
fn not_routable(network: Ipv4Net) -> Option<&'static str> {
    let base = network.network();
    if base.is_loopback() {
        Some("packets to loopback addresses never leave a host")
    } else if base.is_multicast() {
        Some("multicast addresses can't be given to a pod")
    } else if base.is_link_local() {
        Some("link-local addresses are not routed")
    } else {
        None
    }
}

fn did_you_mean(nearest: Option<&str>) -> String {
    nearest.map(|word| format!(" (did you mean {word}?)")).unwrap_or_default()
}

impl fmt::Display for BackendConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Udp { port, mtu: None } => write!(f, r#"{{"Type":"udp","Port":{port}}}"#),
            Self::Udp { port, mtu: Some(mtu) } => {
                write!(f, r#"{{"Type":"udp","Port":{port},"MTU":{mtu}}}"#)
            }
            Self::HostGw => f.write_str(r#"{"Type":"host-gw"}"#),
            Self::Alloc => f.write_str(r#"{"Type":"alloc"}"#),
        }
    }
}

impl fmt::Display for NetworkConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, r#"{{"EnableIPv4":{},"#, self.v4.is_some())?;
        if let Some(SubnetRange { network, subnet_len, subnet_min, subnet_max }) = self.v4 {
            write!(f, r#""Network":"{network}","SubnetLen":{subnet_len},"#)?;
            write!(f, r#""SubnetMin":"{subnet_min}","SubnetMax":"{subnet_max}","#)?;
        }
        write!(f, r#""EnableIPv6":{},"#, self.v6.is_some())?;
        if let Some(SubnetRange { network, subnet_len, subnet_min, subnet_max }) = self.v6 {
            write!(f, r#""IPv6Network":"{network}","IPv6SubnetLen":{subnet_len},"#)?;
            write!(f, r#""IPv6SubnetMin":"{subnet_min}","IPv6SubnetMax":"{subnet_max}","#)?;
        }
        write!(f, r#""EnableNFTables":{},"Backend":{}}}"#, self.enable_nftables, self.backend)
    }
}
