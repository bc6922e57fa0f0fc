//! From what the configuration says about a family to the range leases are taken from (contract §2.2).
//!
//! Both families follow one rule in numbers of different width, so the arithmetic is done once, on 128 bits: nothing
//! wraps at the end of the address space, as it did in 0.7.0 (contract §14, T39).

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

use super::{ConfigError, SubnetRange};

/// A family's keys and numbers.
pub(super) struct Family {
    network: &'static str,
    network_example: &'static str,
    subnet_len: &'static str,
    subnet_min: &'static str,
    subnet_max: &'static str,
    pub(super) network_format: &'static str,
    pub(super) address_format: &'static str,
    /// Bits of an address.
    width: u8,
    /// Length of a lease where the network is large enough for it.
    usual_len: u8,
    /// Longest prefix of a lease: shorter than this leaves no room for a gateway and a pod.
    longest: u8,
}

pub(super) const V4: Family = Family {
    network: "Network",
    network_example: "give the IPv4 network pods live in, such as \"10.244.0.0/16\"",
    subnet_len: "SubnetLen",
    subnet_min: "SubnetMin",
    subnet_max: "SubnetMax",
    network_format: "must be an IPv4 network with prefix length, such as \"10.244.0.0/16\"",
    address_format: "must be an IPv4 address, such as \"10.244.1.0\"",
    width: 32,
    usual_len: 24,
    longest: 30,
};

pub(super) const V6: Family = Family {
    network: "IPv6Network",
    network_example: "give the IPv6 network pods live in, such as \"fd00:244::/48\"",
    subnet_len: "IPv6SubnetLen",
    subnet_min: "IPv6SubnetMin",
    subnet_max: "IPv6SubnetMax",
    network_format: "must be an IPv6 network with prefix length, such as \"fd00:244::/48\"",
    address_format: "must be an IPv6 address, such as \"fd00:244:0:1::\"",
    width: 128,
    usual_len: 64,
    longest: 126,
};

/// What stands in the text, of the right type but not checked.
pub(super) struct Given<Net, Addr> {
    pub(super) network: Option<Net>,
    /// 0 is as good as not given.
    pub(super) subnet_len: Option<u64>,
    /// The unspecified address is as good as not given.
    pub(super) subnet_min: Option<Addr>,
    pub(super) subnet_max: Option<Addr>,
}

/// An address as a number.
pub(super) trait Address: Copy + fmt::Display {
    fn number(self) -> u128;
    fn from_number(number: u128) -> Self;
}

impl Address for Ipv4Addr {
    fn number(self) -> u128 {
        u128::from(self.to_bits())
    }

    fn from_number(number: u128) -> Self {
        // Only numbers inside an IPv4 network get here.
        Self::from_bits(u32::try_from(number).unwrap_or(u32::MAX))
    }
}

impl Address for Ipv6Addr {
    fn number(self) -> u128 {
        self.to_bits()
    }

    fn from_number(number: u128) -> Self {
        Self::from_bits(number)
    }
}

/// A network of either family.
pub(super) trait Network: Copy + fmt::Display {
    type Address: Address;
    const FAMILY: Family;

    fn base(self) -> Self::Address;
    fn length(self) -> u8;
    /// Without host bits.
    fn masked(self) -> Self;
}

impl Network for Ipv4Net {
    type Address = Ipv4Addr;
    const FAMILY: Family = V4;

    fn base(self) -> Ipv4Addr {
        self.network()
    }

    fn length(self) -> u8 {
        self.prefix_len()
    }

    fn masked(self) -> Self {
        self.trunc()
    }
}

impl Network for Ipv6Net {
    type Address = Ipv6Addr;
    const FAMILY: Family = V6;

    fn base(self) -> Ipv6Addr {
        self.network()
    }

    fn length(self) -> u8 {
        self.prefix_len()
    }

    fn masked(self) -> Self {
        self.trunc()
    }
}

impl<Net: Network> Given<Net, Net::Address> {
    /// Applies the defaults and the rules.
    pub(super) fn checked(self) -> Result<SubnetRange<Net, Net::Address>, ConfigError> {
        let family = &Net::FAMILY;
        let missing = ConfigError::Missing { field: family.network, expected: family.network_example };
        let network = self.network.ok_or(missing)?.masked();
        let base = network.base().number();
        if base == 0 && network.length() == 0 {
            return Err(ConfigError::Invalid {
                field: family.network,
                value: format!("\"{network}\""),
                expected: format!("every address there is can't be leased: {}", family.network_example),
            });
        }
        let subnet_len = subnet_len(network, self.subnet_len)?;

        // At least four subnets fit, so the second exists, and the last begins inside the network.
        let subnet = 1_u128 << (family.width - subnet_len);
        let last_address = base | ones(family.width - network.length());
        let default_min = base + subnet;
        let default_max = last_address & !(subnet - 1);

        let edge = |field, given: Option<Net::Address>, default| {
            let Some(given) = given.filter(|address| address.number() != 0) else {
                return Ok(default);
            };
            let number = given.number();
            let expected = if !(base..=last_address).contains(&number) {
                format!("must be the first address of a subnet of {} {network}", family.network)
            } else if number & (subnet - 1) != 0 {
                let below = Net::Address::from_number(number & !(subnet - 1));
                format!("must begin a /{subnet_len}: the one it lies in begins at {below}")
            } else {
                return Ok(number);
            };
            Err(ConfigError::Invalid { field, value: given.to_string(), expected })
        };
        let min = edge(family.subnet_min, self.subnet_min, default_min)?;
        let max = edge(family.subnet_max, self.subnet_max, default_max)?;
        if min > max {
            return Err(ConfigError::Invalid {
                field: family.subnet_min,
                value: Net::Address::from_number(min).to_string(),
                expected: format!(
                    "must not be above {} {}, or no subnet is left to lease",
                    family.subnet_max,
                    Net::Address::from_number(max)
                ),
            });
        }
        Ok(SubnetRange {
            network,
            subnet_len,
            subnet_min: Net::Address::from_number(min),
            subnet_max: Net::Address::from_number(max),
        })
    }
}

/// The length of a lease: what was given, the family's usual one, or a quarter of a small network.
fn subnet_len<Net: Network>(network: Net, given: Option<u64>) -> Result<u8, ConfigError> {
    let family = &Net::FAMILY;
    let shortest = network.length().saturating_add(2);
    let Some(given) = given.filter(|length| *length != 0) else {
        if shortest > family.longest {
            return Err(ConfigError::Invalid {
                field: family.network,
                value: format!("\"{network}\""),
                expected: format!("too small: the longest useful prefix is /{}", family.longest - 2),
            });
        }
        return Ok(shortest.max(family.usual_len));
    };
    let invalid =
        |expected| ConfigError::Invalid { field: family.subnet_len, value: given.to_string(), expected };
    match u8::try_from(given) {
        Ok(length) if (shortest..=family.longest).contains(&length) => Ok(length),
        Ok(length) if length <= family.longest => Err(invalid(format!(
            "{} {network} must hold at least four subnets, so it must be {shortest} or more",
            family.network
        ))),
        _ => Err(invalid(format!("must be {} or less", family.longest))),
    }
}

/// A number whose lowest `bits` bits are set.
fn ones(bits: u8) -> u128 {
    u128::MAX.checked_shr(128 - u32::from(bits)).unwrap_or(0)
}
