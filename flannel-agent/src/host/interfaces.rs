//! The host's interfaces as the domain wants them to choose from (contract §7), and the routes that decide.
//!
//! Only reading; the choice is `domain::interface`'s.

use std::net::IpAddr;

use super::HostError;
use super::netlink::{AddressEntry, LinkInfo, Netlink, RouteEntry};
use crate::domain::interface::{HostFacts, Interface, InterfaceAddress, RouteLookup, Selector};

/// An IP version, where the question is the same for both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    fn is_of(self, address: IpAddr) -> bool {
        address.is_ipv4() == (self == Self::V4)
    }
}

/// What the choice of an interface depends on.
///
/// # Errors
/// The kernel does not answer.
pub async fn facts(netlink: &Netlink, selectors: &[Selector]) -> Result<HostFacts, HostError> {
    let mut can_reach = Vec::new();
    for selector in selectors {
        if let Selector::CanReach(address) = selector {
            match reach(netlink, *address).await {
                Ok(route) => can_reach.push((*address, route)),
                Err(error) => tracing::debug!("{error}"),
            }
        }
    }
    // The table may be long, and flags that name an interface do not ask for it.
    let routes = if selectors.is_empty() { netlink.routes(None).await? } else { Vec::new() };
    Ok(HostFacts {
        interfaces: interfaces(netlink).await?,
        default_route_v4: first_default(&routes, Family::V4),
        default_route_v6: first_default(&routes, Family::V6),
        can_reach,
    })
}

/// Every interface with its addresses, both in the kernel's order.
///
/// # Errors
/// The kernel does not answer.
pub async fn interfaces(netlink: &Netlink) -> Result<Vec<Interface>, HostError> {
    let links = netlink.links().await?;
    let addresses = netlink.addresses().await?;
    Ok(join(links, &addresses))
}

/// The way towards `to` and the address this host would send from (`--iface-can-reach`).
///
/// # Errors
/// No route leads there.
pub async fn reach(netlink: &Netlink, to: IpAddr) -> Result<RouteLookup, HostError> {
    let found = netlink.route_to(to).await?;
    Ok(RouteLookup { index: found.ifindex, source: found.source })
}

fn join(links: Vec<LinkInfo>, addresses: &[AddressEntry]) -> Vec<Interface> {
    links
        .into_iter()
        .map(|link| Interface {
            addresses: addresses.iter().filter(|a| a.ifindex == link.index).map(interface_address).collect(),
            name: link.name,
            index: link.index,
            mtu: link.mtu,
            up: link.up,
        })
        .collect()
}

fn interface_address(entry: &AddressEntry) -> InterfaceAddress {
    InterfaceAddress {
        address: entry.net.addr(),
        prefix_len: entry.net.prefix_len(),
        dynamic: entry.dynamic,
        temporary: entry.temporary,
        deprecated: entry.deprecated,
    }
}

/// Interface index of the first default route: the one with the lowest metric, since the kernel lists them so. A default
/// route that leads nowhere (unreachable, as IPv6 has one) is none.
fn first_default(routes: &[RouteEntry], family: Family) -> Option<u32> {
    routes
        .iter()
        .filter(|route| route.unicast && route.destination.prefix_len() == 0)
        .filter(|route| family.is_of(route.destination.addr()))
        .find_map(|route| route.ifindex)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(destination: &str, ifindex: Option<u32>, metric: u32) -> RouteEntry {
        RouteEntry {
            destination: destination.parse().unwrap(),
            via: None,
            ifindex,
            protocol: 3,
            onlink: false,
            source: None,
            mtu: None,
            metric,
            plain: true,
            unicast: true,
        }
    }

    #[test]
    fn the_first_default_route_of_the_family_decides() {
        let unreachable = RouteEntry { unicast: false, ..route("::/0", Some(1), 0) };
        let routes = [
            route("10.0.0.0/8", Some(9), 0),
            route("0.0.0.0/0", Some(3), 100),
            route("0.0.0.0/0", Some(4), 200),
            unreachable,
            route("::/0", None, 0),
            route("::/0", Some(5), 1024),
        ];
        assert_eq!(first_default(&routes, Family::V4), Some(3));
        assert_eq!(first_default(&routes, Family::V6), Some(5));
        assert_eq!(first_default(&routes[..1], Family::V4), None);
    }
}
