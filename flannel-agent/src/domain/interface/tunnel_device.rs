//! The name of the udp tunnel's device: `flannel0` where it is free, and the same one again after a restart.
//!
//! The device outlives the process and carries traffic meanwhile, so it is recognised by what only our own device
//! has: it is a TUN and holds our subnet's first address. A second daemon on the host gets the next number, as the
//! kernel gave it to flanneld by the template `flannel%d` (contract §8.1).

use std::net::Ipv4Addr;

use ipnet::{IpNet, Ipv4Net};

const PREFIX: &str = "flannel";

/// A network device of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExistingLink {
    pub name: String,
    /// By its kind, not by its name.
    pub is_tun: bool,
    pub addresses: Vec<IpNet>,
}

/// The `flannelN` that is a TUN with `own_base`/32 on it, else the first one no device has.
pub fn tunnel_device_name(links: &[ExistingLink], own_base: Ipv4Addr) -> String {
    let own_address = IpNet::V4(Ipv4Net::from(own_base));
    let ours = links
        .iter()
        .filter(|link| link.is_tun && link.addresses.contains(&own_address))
        .filter_map(|link| number(&link.name))
        .min();
    let free = || (0_u32..).find(|n| links.iter().all(|link| number(&link.name) != Some(*n)));
    format!("{PREFIX}{}", ours.or_else(free).unwrap_or(0))
}

/// N of `flannelN`, in the one way the kernel writes it.
fn number(name: &str) -> Option<u32> {
    let number = name.strip_prefix(PREFIX)?.parse().ok()?;
    (format!("{PREFIX}{number}") == name).then_some(number)
}
