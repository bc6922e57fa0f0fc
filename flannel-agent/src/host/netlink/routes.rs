//! Routes of the main table, and the question which way a packet would take.
//!
//! The agent's routes are unicast routes with its own protocol number, scope universe and no metric (contract §8).
//! Putting replaces whatever has the same destination and metric in one step, so that a route whose gateway moves,
//! or that another program had put, is never missing in between. Removing names the protocol, so that it can only
//! ever hit our own.

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
    RouteScope, RouteType, RouteVia,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Answer, Failure, Message, Netlink, OnDevice, Verb, request};
use crate::domain::host_state::{HostItem, Route};
use crate::host::HostError;

/// `rtm_protocol` of every route the agent puts: whose a route is decides who may sweep it, and the kernel keeps
/// that mark for us. 85 is named by neither linux/rtnetlink.h nor iproute2's rt_protos, and is beyond
/// `RTPROT_STATIC`, so the kernel itself never touches such a route. (flanneld's routes are `boot`, as a user's are.)
pub const ROUTE_PROTOCOL: u8 = 85;

/// The metric the kernel gives an IPv6 route that asks for none (`IP6_RT_PRIO_USER`); IPv4's is 0.
const IPV6_DEFAULT_METRIC: u32 = 1024;

/// A route the kernel lists in the main table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteEntry {
    pub destination: IpNet,
    pub via: Option<IpAddr>,
    /// Outgoing interface; of the first hop when there are several.
    pub ifindex: Option<u32>,
    /// `rtm_protocol`: 2 kernel, 3 boot, [`ROUTE_PROTOCOL`] ours.
    pub protocol: u8,
    pub onlink: bool,
    pub source: Option<IpAddr>,
    pub mtu: Option<u32>,
    pub metric: u32,
    /// One way and no encapsulation: the only shape the agent puts.
    pub plain: bool,
    /// Not blackhole, unreachable, local, …
    pub unicast: bool,
}

/// The way a packet to an address would take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouteLookup {
    /// The gateway, `None` when the address is on the interface's own network.
    pub via: Option<IpAddr>,
    pub ifindex: u32,
    /// The address this host would send from.
    pub source: Option<IpAddr>,
}

/// [`RouteLookup`] for IPv4 only, as the tunnel's peers need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NextHop {
    /// The gateway, `None` when the address is on the interface's own network.
    pub via: Option<Ipv4Addr>,
    pub ifindex: u32,
    /// The address this host would send from.
    pub source: Option<Ipv4Addr>,
}

impl Netlink {
    /// The main table's routes, IPv4 first, in the kernel's order; with `protocol`, only that one's.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub async fn routes(&self, protocol: Option<u8>) -> Result<Vec<RouteEntry>, HostError> {
        let mut entries = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            message.header.table = RouteHeader::RT_TABLE_MAIN;
            message.header.protocol = protocol.map_or(RouteProtocol::Unspec, RouteProtocol::from);
            let messages = match self.dump(RouteNetlinkMessage::GetRoute(message)).await {
                Ok(messages) => messages,
                // The table comes into being with its first route.
                Err(failure) if failure.is(libc::ENOENT) => continue,
                Err(failure) => return Err(failure.while_doing("list the routes")),
            };
            // Older kernels don't filter, and one without IPv6 answers for IPv6 with what it has.
            entries.extend(
                messages
                    .iter()
                    .filter_map(|message| match message {
                        RouteNetlinkMessage::NewRoute(route) if route.header.address_family == family => {
                            route_entry(route)
                        }
                        _ => None,
                    })
                    .filter(|entry| protocol.is_none_or(|protocol| protocol == entry.protocol)),
            );
        }
        Ok(entries)
    }

    /// Puts each route, in place of one with its destination if there is one. One result per route.
    pub async fn put_routes(&self, routes: &[&Route]) -> Vec<Result<(), HostError>> {
        self.change_all(Verb::Put, routes).await
    }

    /// Removes the routes of [`ROUTE_PROTOCOL`] to these destinations; that there is none is a success. One result
    /// per route.
    pub async fn remove_routes(&self, routes: &[&Route]) -> Vec<Result<(), HostError>> {
        self.change_all(Verb::Remove, routes).await
    }

    /// The way a packet from this host to `to` would take now.
    ///
    /// # Errors
    /// No route, a route that refuses (unreachable, blackhole), or `to` is an address of this host.
    pub async fn route_to(&self, to: IpAddr) -> Result<RouteLookup, HostError> {
        let answer = self.exchange(vec![lookup(to)]).await.pop().unwrap_or(Err(Failure::Closed));
        route_lookup(to, answer)
    }

    /// [`Netlink::route_to`] for an IPv4 address.
    ///
    /// # Errors
    /// As there, and when the way leads through an IPv6 gateway.
    pub async fn next_hop(&self, to: Ipv4Addr) -> Result<NextHop, HostError> {
        next_hop(to, self.route_to(to.into()).await?)
    }

    /// [`Netlink::next_hop`] for many addresses without a round trip for each. One result per address.
    pub async fn next_hops(&self, to: &[Ipv4Addr]) -> Vec<Result<NextHop, HostError>> {
        let answers = self.exchange(to.iter().map(|to| lookup((*to).into())).collect()).await;
        to.iter()
            .zip(answers)
            .map(|(to, answer)| next_hop(*to, route_lookup((*to).into(), answer)?))
            .collect()
    }
}

impl OnDevice for Route {
    fn device(&self) -> &str {
        &self.device
    }

    fn item(&self) -> HostItem {
        HostItem::Route(self.clone())
    }

    fn request(&self, verb: Verb, index: u32) -> Message {
        match verb {
            Verb::Put => request(
                RouteNetlinkMessage::NewRoute(route_message(self, index)),
                NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE,
            ),
            Verb::Remove => request(RouteNetlinkMessage::DelRoute(removal(self.destination)), NLM_F_ACK),
        }
    }

    fn says_gone(failure: &Failure) -> bool {
        failure.is(libc::ESRCH) || failure.is(libc::ENODEV)
    }

    fn cause(&self, failure: &Failure) -> Option<String> {
        let unreachable = failure.is(libc::ENETUNREACH) || failure.is(libc::EHOSTUNREACH);
        match self.via {
            Some(via) if unreachable => {
                Some(format!("gateway {via} must be on a network of {} itself", self.device))
            }
            _ if failure.is(libc::ENETDOWN) => Some(format!("{} is down", self.device)),
            _ if failure.is(libc::EACCES) && self.destination.addr().is_ipv6() => {
                Some(format!("IPv6 is switched off on {}", self.device))
            }
            _ => None,
        }
    }
}

/// Destination, main table, our protocol.
fn route_header(destination: IpNet) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family_of(destination.addr());
    message.header.destination_prefix_length = destination.prefix_len();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
    message.attributes.push(RouteAttribute::Destination(destination.network().into()));
    message
}

fn route_message(route: &Route, index: u32) -> RouteMessage {
    let mut message = route_header(route.destination);
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    message.attributes.push(RouteAttribute::Oif(index));
    match (route.via, route.destination) {
        // RFC 8950: an IPv4 destination behind an IPv6 gateway.
        (Some(IpAddr::V6(via)), IpNet::V4(_)) => {
            message.attributes.push(RouteAttribute::Via(RouteVia::Inet6(via)));
        }
        (Some(via), _) => message.attributes.push(RouteAttribute::Gateway(via.into())),
        (None, _) => {}
    }
    if route.onlink {
        message.header.flags |= RouteFlags::Onlink;
    }
    if let Some(source) = route.source {
        message.attributes.push(RouteAttribute::PrefSource(source.into()));
    }
    if let Some(mtu) = route.mtu {
        message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]));
    }
    message
}

/// Any route of ours to `destination`, whatever its way.
fn removal(destination: IpNet) -> RouteMessage {
    let mut message = route_header(destination);
    message.header.scope = RouteScope::NoWhere;
    message
}

fn family_of(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

fn lookup(to: IpAddr) -> Message {
    let mut message = RouteMessage::default();
    message.header.address_family = family_of(to);
    message.header.destination_prefix_length = if to.is_ipv4() { 32 } else { 128 };
    message.attributes.push(RouteAttribute::Destination(to.into()));
    request(RouteNetlinkMessage::GetRoute(message), 0)
}

fn route_lookup(to: IpAddr, answer: Answer) -> Result<RouteLookup, HostError> {
    let doing = || format!("look up the route to {to}");
    let messages = answer.map_err(|failure| {
        let cause = (failure.is(libc::ENETUNREACH) || failure.is(libc::EHOSTUNREACH))
            .then(|| "no route of this host leads there".to_owned());
        failure.because(doing(), cause)
    })?;
    let route = messages
        .into_iter()
        .filter_map(super::inner)
        .find_map(|message| match message {
            RouteNetlinkMessage::NewRoute(route) => Some(route),
            _ => None,
        })
        .ok_or_else(|| Failure::Lost.while_doing(doing()))?;
    match route.header.kind {
        RouteType::Unicast => {}
        RouteType::Local => return Err(HostError::new(doing(), format!("{to} is an address of this host"))),
        kind => return Err(HostError::new(doing(), format!("its route is of type {kind:?}, not unicast"))),
    }
    let mut found = RouteLookup { via: None, ifindex: 0, source: None };
    for attribute in route.attributes {
        match attribute {
            RouteAttribute::Gateway(via) => found.via = ip(&via),
            RouteAttribute::Via(via) => found.via = ip_via(&via),
            RouteAttribute::Oif(index) => found.ifindex = index,
            RouteAttribute::PrefSource(source) => found.source = ip(&source),
            _ => {}
        }
    }
    if found.ifindex == 0 {
        return Err(HostError::new(doing(), "the kernel names no interface for it"));
    }
    Ok(found)
}

fn next_hop(to: Ipv4Addr, found: RouteLookup) -> Result<NextHop, HostError> {
    let via = match found.via {
        None => None,
        Some(IpAddr::V4(via)) => Some(via),
        Some(IpAddr::V6(via)) => {
            return Err(HostError::new(
                format!("look up the route to {to}"),
                format!("it leads through the IPv6 gateway {via}; an IPv4 one is needed"),
            ));
        }
    };
    let source = found.source.and_then(|source| match source {
        IpAddr::V4(source) => Some(source),
        IpAddr::V6(_) => None,
    });
    Ok(NextHop { via, ifindex: found.ifindex, source })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

fn ip_via(via: &RouteVia) -> Option<IpAddr> {
    match via {
        RouteVia::Inet(v4) => Some((*v4).into()),
        RouteVia::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

/// `None` for what is not a route of the main table (cache entries, other tables).
fn route_entry(message: &RouteMessage) -> Option<RouteEntry> {
    let header = &message.header;
    let unspecified: IpAddr = match header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let mut destination = unspecified;
    let mut table = u32::from(header.table);
    let mut entry = RouteEntry {
        destination: IpNet::new(unspecified, 0).ok()?,
        via: None,
        ifindex: None,
        protocol: header.protocol.into(),
        onlink: header.flags.contains(RouteFlags::Onlink),
        source: None,
        mtu: None,
        metric: 0,
        plain: header.tos == 0 && header.source_prefix_length == 0,
        unicast: header.kind == RouteType::Unicast,
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip(address)?,
            RouteAttribute::Gateway(via) => entry.via = ip(via),
            RouteAttribute::Via(via) => entry.via = ip_via(via),
            RouteAttribute::Oif(index) => entry.ifindex = Some(*index),
            RouteAttribute::PrefSource(source) => entry.source = ip(source),
            RouteAttribute::Priority(metric) => entry.metric = *metric,
            RouteAttribute::Table(id) => table = *id,
            RouteAttribute::Metrics(metrics) => {
                entry.mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
            }
            RouteAttribute::MultiPath(hops) => {
                entry.plain = false;
                entry.ifindex = entry.ifindex.or_else(|| hops.first().map(|hop| hop.interface_index));
            }
            RouteAttribute::Encap(_) | RouteAttribute::NhId(_) => entry.plain = false,
            _ => {}
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) || header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    entry.destination = IpNet::new(destination, header.destination_prefix_length).ok()?;
    Some(entry)
}

impl RouteEntry {
    /// The metric is the one a route gets that asks for none.
    pub fn has_default_metric(&self) -> bool {
        self.metric == if self.destination.addr().is_ipv4() { 0 } else { IPV6_DEFAULT_METRIC }
    }
}
