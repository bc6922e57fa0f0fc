//! When to look again: notifications about links, addresses and routes, boiled down to "something changed".
//!
//! Nothing is learned from a notification but that it came: what the host looks like is read anew. So a lost one
//! (`ENOBUFS`) is a change like any other, and only the head of each message is looked at.
//!
//! One thing is urgent: a device whose MTU is not what it was. Until the tunnel above it follows, the kernel takes packets
//! that no longer fit and loses them.
//!
//! Left out are the echoes of our own requests (they carry our port), in the kernel already: nobody reads while thousands of
//! routes are put, and once a listener's buffer is half full the kernel gives the CPU away after each change
//! (netlink_broadcast_filtered in net/netlink/af_netlink.c), which on a busy machine made seconds of milliseconds. And what can't concern an agent: other tables,
//! the neighbour discovery's route clones, IPv6 routes of others outside the watched networks, addresses that a
//! router advertisement refreshes.

use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use ipnet::IpNet;
use netlink_packet_core::NetlinkBuffer;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressFlags, AddressHeader, AddressScope};
use netlink_packet_route::link::LinkHeader;
use netlink_packet_route::route::{RouteFlags, RouteHeader, RouteType};
use netlink_proto::sys::{AsyncSocket, SocketAddr, TokioSocket};
use tokio::time::Instant;

use super::{Netlink, ROUTE_PROTOCOL, attributes_of, describe_io, open_socket};
use crate::host::HostError;

/// How long to let a burst go on before waking anyone.
const DEBOUNCE: Duration = Duration::from_millis(50);

/// Wake-ups are at least this far apart, so that an endless storm can't keep the agent comparing. Repairs are to
/// be done within a second.
const SPACING: Duration = Duration::from_millis(400);

/// The same for what is urgent.
const URGENT_SPACING: Duration = Duration::from_millis(20);

/// Room for the kernel's largest notification datagram.
const DATAGRAM: usize = 64 << 10;

/// A subscription to changes in the network namespace it was made in.
pub struct Events {
    socket: TokioSocket,
    /// Port of the socket our own requests come from.
    own_port: u32,
    networks: Vec<IpNet>,
    /// Of each device, by index, as it was when somebody looked.
    mtus: HashMap<u32, u32>,
    buffer: Vec<u8>,
    /// Something changed, and this is when to say so.
    due: Option<Instant>,
    last: Option<Instant>,
    /// The socket failed; there is nothing to wait for.
    broken: bool,
}

impl Netlink {
    /// Subscribes in the calling thread's network namespace. Links, addresses and IPv4 routes of anyone count;
    /// of the IPv6 routes ours and those within `networks`.
    ///
    /// # Errors
    /// No socket to be had.
    pub fn events(&self, networks: Vec<IpNet>) -> Result<Events, HostError> {
        let failed = |e: io::Error| HostError::new("subscribe to network changes", describe_io(&e));
        let mut socket = open_socket().map_err(failed)?;
        keep_echoes_out(&socket, self.connection.port);
        let groups = libc::RTMGRP_LINK
            | libc::RTMGRP_IPV4_IFADDR
            | libc::RTMGRP_IPV4_ROUTE
            | libc::RTMGRP_IPV6_IFADDR
            | libc::RTMGRP_IPV6_ROUTE;
        socket.socket_mut().bind(&SocketAddr::new(0, groups.cast_unsigned())).map_err(failed)?;
        Ok(Events {
            socket,
            own_port: self.connection.port,
            networks,
            mtus: HashMap::new(),
            buffer: Vec::with_capacity(DATAGRAM),
            due: None,
            last: None,
            broken: false,
        })
    }
}

/// Notifications that carry this port take no room in the socket. Where a kernel refuses that, they are read and left out.
fn keep_echoes_out(socket: &TokioSocket, port: u32) {
    /// Where `nlmsg_pid` is in a notification, of which the kernel puts one in a datagram (netlink(7)).
    const PORT: u32 = 12;
    let step = |code: u32, k: u32, jump: (u8, u8)| libc::sock_filter {
        code: u16::try_from(code).unwrap_or_default(),
        jt: jump.0,
        jf: jump.1,
        k,
    };
    let mut steps = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, PORT, (0, 0)),
        // Loaded as a number of the network's order, in which it is not.
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, u32::from_be_bytes(port.to_ne_bytes()), (0, 1)),
        step(libc::BPF_RET | libc::BPF_K, 0, (0, 0)),
        step(libc::BPF_RET | libc::BPF_K, u32::MAX, (0, 0)),
    ];
    let program = libc::sock_fprog { len: 4, filter: steps.as_mut_ptr() };
    let size = libc::socklen_t::try_from(size_of::<libc::sock_fprog>()).unwrap_or_default();
    // SAFETY: the kernel copies the program and its four steps, which live until it has.
    let done = unsafe {
        libc::setsockopt(
            socket.socket_ref().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size,
        )
    };
    if done != 0 {
        let error = io::Error::last_os_error();
        tracing::debug!("echoes of our own changes can't be kept out: {}", describe_io(&error));
    }
}

impl Events {
    /// The MTUs of all devices are these: index and bytes. A change of one of them is told at once.
    pub fn know_mtus(&mut self, mtus: impl Iterator<Item = (u32, u32)>) {
        self.mtus = mtus.collect();
    }

    /// Returns once per burst of changes, [`DEBOUNCE`] after its first, or at once when one is urgent. Cancel-safe: what
    /// was seen before a cancelled call makes the next one return.
    pub async fn changed(&mut self) {
        loop {
            if let Some(due) = self.due
                && due <= Instant::now()
            {
                self.drain();
                self.due = None;
                self.last = Some(due);
                return;
            }
            if self.broken {
                match self.due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
                continue;
            }
            self.buffer.clear();
            let (socket, buffer) = (&self.socket, &mut self.buffer);
            let receive = poll_fn(|cx| socket.poll_recv_from(cx, buffer));
            let received = match self.due {
                Some(due) => match tokio::time::timeout_at(due, receive).await {
                    Ok(received) => received,
                    Err(_) => continue,
                },
                None => receive.await,
            };
            match received {
                Ok(_) => self.note(concern(&self.buffer, self.own_port, &self.networks, &self.mtus)),
                Err(e) => self.failed(&e),
            }
        }
    }

    fn note(&mut self, concern: Concern) {
        let (wait, spacing) = match concern {
            Concern::None => return,
            Concern::Look => (DEBOUNCE, SPACING),
            Concern::LookNow => (Duration::ZERO, URGENT_SPACING),
        };
        let now = Instant::now();
        let due = (now + wait).max(self.last.map_or(now, |last| last + spacing));
        self.due = Some(self.due.map_or(due, |sooner| sooner.min(due)));
    }

    /// Takes what has come in since the change that is about to be reported: the caller looks at everything now.
    fn drain(&mut self) {
        loop {
            self.buffer.clear();
            match self.socket.socket_ref().recv(&mut self.buffer, libc::MSG_DONTWAIT) {
                Ok(_) => {}
                // Whether more was lost than was read makes no difference.
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(e) => {
                    if e.kind() != io::ErrorKind::WouldBlock {
                        self.failed(&e);
                    }
                    return;
                }
            }
        }
    }

    fn failed(&mut self, error: &io::Error) {
        match error.raw_os_error() {
            Some(libc::ENOBUFS) => {
                tracing::debug!("more network changes than the socket could hold; looking at everything");
                self.note(Concern::Look);
            }
            Some(libc::EINTR | libc::EAGAIN) => {}
            _ => {
                tracing::warn!(error = %describe_io(error), "no more news of network changes; relying on the interval");
                self.broken = true;
            }
        }
    }
}

/// What news is to an agent; the more urgent, the greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Concern {
    None,
    Look,
    LookNow,
}

impl Concern {
    fn look_if(it_may_concern: bool) -> Self {
        if it_may_concern { Self::Look } else { Self::None }
    }
}

/// The most urgent of the datagram's messages. What can't be read is worth a look.
fn concern(mut datagram: &[u8], own_port: u32, networks: &[IpNet], mtus: &HashMap<u32, u32>) -> Concern {
    let mut most = Concern::None;
    while !datagram.is_empty() {
        let Ok(message) = NetlinkBuffer::new_checked(datagram) else { return most.max(Concern::Look) };
        if message.port_number() != own_port {
            most = most.max(concern_of(message.message_type(), message.payload(), networks, mtus));
        }
        let length = usize::try_from(message.length()).unwrap_or(usize::MAX);
        datagram = length.checked_next_multiple_of(4).and_then(|end| datagram.get(end..)).unwrap_or_default();
    }
    most
}

fn concern_of(kind: u16, payload: &[u8], networks: &[IpNet], mtus: &HashMap<u32, u32>) -> Concern {
    match kind {
        libc::RTM_NEWLINK => match LinkHeader::parse(payload) {
            // Bridges report their ports' state under their own family.
            Ok(header) if header.interface_family != AddressFamily::Unspec => Concern::None,
            Ok(header) => match (mtus.get(&header.index), mtu(payload)) {
                (Some(known), Some(mtu)) if *known != mtu => Concern::LookNow,
                _ => Concern::Look,
            },
            Err(_) => Concern::Look,
        },
        libc::RTM_DELLINK => Concern::look_if(
            LinkHeader::parse(payload).map_or(true, |h| h.interface_family == AddressFamily::Unspec),
        ),
        libc::RTM_NEWADDR => Concern::look_if(AddressHeader::parse(payload).map_or(true, |h| {
            let lasting = u32::from(h.flags.bits()) & AddressFlags::Permanent.bits() != 0;
            h.family == AddressFamily::Inet || (lasting && h.scope != AddressScope::Link)
        })),
        libc::RTM_DELADDR => {
            Concern::look_if(AddressHeader::parse(payload).map_or(true, |h| h.scope != AddressScope::Link))
        }
        libc::RTM_NEWROUTE | libc::RTM_DELROUTE => Concern::look_if(route_concerns(payload, networks)),
        _ => Concern::None,
    }
}

/// `IFLA_MTU` of a message about a link.
fn mtu(payload: &[u8]) -> Option<u32> {
    const HEADER: usize = 16;
    const IFLA_MTU: u16 = 4;
    let (_, value) = attributes_of(payload.get(HEADER..)?).find(|(kind, _)| *kind == IFLA_MTU)?;
    Some(u32::from_ne_bytes(value.try_into().ok()?))
}

fn route_concerns(payload: &[u8], networks: &[IpNet]) -> bool {
    const HEADER: usize = 12;
    const RTA_DST: u16 = 1;
    let Ok(header) = RouteHeader::parse(payload) else { return true };
    if header.table != RouteHeader::RT_TABLE_MAIN
        || header.flags.contains(RouteFlags::Cloned)
        || matches!(
            header.kind,
            RouteType::Local | RouteType::Broadcast | RouteType::Multicast | RouteType::Anycast
        )
    {
        return false;
    }
    // Any IPv4 route may be the way to a peer.
    if header.address_family == AddressFamily::Inet || u8::from(header.protocol) == ROUTE_PROTOCOL {
        return true;
    }
    let mut attributes = attributes_of(payload.get(HEADER..).unwrap_or_default());
    let destination = attributes.find(|(kind, _)| *kind == RTA_DST).and_then(|(_, value)| address(value));
    let destination = destination.and_then(|ip| IpNet::new(ip, header.destination_prefix_length).ok());
    destination.is_some_and(|destination| networks.iter().any(|network| network.contains(&destination)))
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into()),
        16 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use netlink_packet_core::NetlinkMessage;
    use netlink_packet_route::RouteNetlinkMessage;
    use netlink_packet_route::address::AddressMessage;
    use netlink_packet_route::link::{LinkAttribute, LinkMessage};
    use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol};

    use super::*;

    const OWN: u32 = 77;

    fn bytes(message: RouteNetlinkMessage, port: u32) -> Vec<u8> {
        let mut message = NetlinkMessage::from(message);
        message.header.port_number = port;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        bytes
    }

    fn route(destination: &str, protocol: u8, table: u8) -> RouteMessage {
        let destination: IpNet = destination.parse().unwrap();
        let mut route = RouteMessage::default();
        route.header.address_family =
            if destination.addr().is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        route.header.destination_prefix_length = destination.prefix_len();
        route.header.protocol = RouteProtocol::from(protocol);
        route.header.table = table;
        route.header.kind = RouteType::Unicast;
        route.attributes.push(RouteAttribute::Destination(destination.addr().into()));
        route
    }

    #[test]
    fn only_what_may_concern_an_agent_wakes_it() {
        let new = |r| RouteNetlinkMessage::NewRoute(r);
        let link = |family| {
            let mut link = LinkMessage::default();
            link.header.interface_family = family;
            RouteNetlinkMessage::NewLink(link)
        };
        let v6_address = |scope, flags: u8| {
            let mut address = AddressMessage::default();
            address.header.family = AddressFamily::Inet6;
            address.header.scope = scope;
            address.header.flags = netlink_packet_route::address::AddressHeaderFlags::from_bits_retain(flags);
            RouteNetlinkMessage::NewAddress(address)
        };
        let rows = [
            ("an IPv4 route of the main table", new(route("192.0.2.0/24", 3, 254)), true),
            ("a local route", new(route("192.0.2.1/32", 2, 255)), false),
            ("another table's", new(route("192.0.2.0/24", 3, 100)), false),
            ("an IPv6 route elsewhere", new(route("2001:db8::/64", 9, 254)), false),
            ("an IPv6 route in our network", new(route("fd00:5::/64", 3, 254)), true),
            ("our IPv6 route anywhere", new(route("2001:db8::/64", ROUTE_PROTOCOL, 254)), true),
            ("a removed route", RouteNetlinkMessage::DelRoute(route("10.5.1.0/24", 85, 254)), true),
            ("a link", link(AddressFamily::Unspec), true),
            ("a bridge port", link(AddressFamily::Bridge), false),
            ("an advertised address's refresh", v6_address(AddressScope::Universe, 0), false),
            ("a lasting IPv6 address", v6_address(AddressScope::Universe, 0x80), true),
            ("a link-local address", v6_address(AddressScope::Link, 0x80), false),
        ];
        let networks = ["10.5.0.0/16".parse().unwrap(), "fd00:5::/48".parse().unwrap()];
        for (name, message, expected) in rows {
            let expected = Concern::look_if(expected);
            assert_eq!(of(&bytes(message.clone(), 1), &networks), expected, "{name}");
            assert_eq!(of(&bytes(message, OWN), &networks), Concern::None, "our own echo: {name}");
        }
    }

    fn of(datagram: &[u8], networks: &[IpNet]) -> Concern {
        concern(datagram, OWN, networks, &HashMap::from([(2, 1500)]))
    }

    #[test]
    fn a_device_whose_mtu_is_not_what_it_was_is_urgent() {
        let link = |index, mtu| {
            let mut link = LinkMessage::default();
            link.header.index = index;
            link.attributes.push(LinkAttribute::Mtu(mtu));
            bytes(RouteNetlinkMessage::NewLink(link), 1)
        };
        let rows = [
            ("as known", link(2, 1500), Concern::Look),
            ("smaller", link(2, 1400), Concern::LookNow),
            ("larger", link(2, 9000), Concern::LookNow),
            ("another device's", link(3, 1400), Concern::Look),
            ("the second of two messages", [link(2, 1500), link(2, 1400)].concat(), Concern::LookNow),
        ];
        for (name, datagram, expected) in rows {
            assert_eq!(of(&datagram, &[]), expected, "{name}");
        }
    }

    #[test]
    fn every_message_of_a_datagram_is_looked_at() {
        let boring = bytes(RouteNetlinkMessage::NewRoute(route("192.0.2.1/32", 2, 255)), 1);
        let vital = bytes(RouteNetlinkMessage::DelRoute(route("10.5.1.0/24", ROUTE_PROTOCOL, 254)), 0);
        assert_eq!(of(&[boring.clone(), vital].concat(), &[]), Concern::Look);
        assert_eq!(of(&[boring.clone(), boring].concat(), &[]), Concern::None);
        assert_eq!(of(&[1, 2, 3], &[]), Concern::Look, "what can't be read is worth a look");
    }
}
