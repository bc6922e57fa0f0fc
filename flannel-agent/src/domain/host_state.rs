//! What a host should look like, as data, and the steps from one state to another.
//!
//! A backend returns a [`HostState`]; [`HostState::changes_to`] compares two of them. The variant order of
//! [`HostItem`] is creation order: everything is put after what it hangs on, and removal runs backwards. A new
//! kind of item breaks the build in exactly the places that must know it.
//!
//! `Display` prints lines as `ip` would take them; logs, tests and `--dry-run` share that text.

mod tunnel_options;

#[cfg(test)]
mod tests;

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};

pub use tunnel_options::{Datapath, SourceCheck, SourcePort, TunnelOptions};

/// A network device the agent creates and owns by name and kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    pub name: String,
    pub kind: LinkKind,
    /// Bytes of the largest packet, without link-layer header.
    pub mtu: u32,
}

/// Device kinds the agent can create.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    /// A persistent TUN (IFF_TUN | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE): it outlives the process, and with
    /// it the pinned programs on it.
    Tun,
}

/// One value under `/proc/sys`, `key` in slash form (`net/ipv6/conf/flannel0/disable_ipv6`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sysctl {
    pub key: String,
    pub value: String,
}

/// An address on a device that is ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    pub device: String,
    /// Address with prefix length (`10.244.3.0/32`), host bits kept.
    pub net: IpNet,
}

/// The udp tunnel on [`Tunnel::device`]: programs, maps, socket and user-space path as one thing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// The TUN device packets are routed to.
    pub device: String,
    /// The interface that carries the datagrams.
    pub underlay: String,
    /// Address the UDP socket is bound to and datagrams are sent from.
    pub local: Ipv4Addr,
    /// UDP port of every node.
    pub port: u16,
    /// The whole overlay network.
    pub network: Ipv4Net,
    /// The subnet leased to this node. All leases have its prefix length.
    pub own_subnet: Ipv4Net,
    /// MTU of the device; datagrams are 28 bytes longer.
    pub mtu: u32,
    pub options: TunnelOptions,
}

/// One remote node of the tunnel on `device`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelPeer {
    /// Shared by all peers.
    pub device: Arc<str>,
    pub subnet: Ipv4Net,
    pub node: Ipv4Addr,
}

/// A unicast route in the main table with the agent's own protocol number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub destination: IpNet,
    pub via: Option<IpAddr>,
    /// Shared by all routes over it.
    pub device: Arc<str>,
    /// Treat `via` as reachable on `device` whatever the other routes say.
    pub onlink: bool,
    /// Preferred source address of packets this host sends.
    pub source: Option<IpAddr>,
    /// Path MTU in bytes, when it is below the device's.
    pub mtu: Option<u32>,
}

/// One thing on the host. The order of the variants is the order of creation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostItem {
    Link(Link),
    Sysctl(Sysctl),
    Address(Address),
    Tunnel(Tunnel),
    TunnelPeer(TunnelPeer),
    Route(Route),
}

/// What identifies an item: two items with one key can't exist side by side, putting the second replaces the first.
/// `Ord` is creation order first, so that a map of keys is walked in the right sequence.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    Link(String),
    Sysctl(String),
    Address(String, IpNet),
    Tunnel(String),
    TunnelPeer(Arc<str>, Ipv4Net),
    Route(IpNet),
}

/// A [`Key`] that borrows its names. The order of the variants is [`Key`]'s.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum KeyRef<'a> {
    Link(&'a str),
    Sysctl(&'a str),
    Address(&'a str, IpNet),
    Tunnel(&'a str),
    TunnelPeer(&'a str, Ipv4Net),
    Route(IpNet),
}

/// What has a key: lets a set of items be asked by key without keeping the keys beside them.
trait Keyed {
    fn key_ref(&self) -> KeyRef<'_>;
}

impl Keyed for Key {
    fn key_ref(&self) -> KeyRef<'_> {
        match self {
            Self::Link(name) => KeyRef::Link(name),
            Self::Sysctl(key) => KeyRef::Sysctl(key),
            Self::Address(device, net) => KeyRef::Address(device, *net),
            Self::Tunnel(device) => KeyRef::Tunnel(device),
            Self::TunnelPeer(device, subnet) => KeyRef::TunnelPeer(device, *subnet),
            Self::Route(destination) => KeyRef::Route(*destination),
        }
    }
}

/// An item, found by its key.
#[derive(Clone, Debug)]
struct ByKey(HostItem);

impl Keyed for ByKey {
    fn key_ref(&self) -> KeyRef<'_> {
        match &self.0 {
            HostItem::Link(link) => KeyRef::Link(&link.name),
            HostItem::Sysctl(sysctl) => KeyRef::Sysctl(&sysctl.key),
            HostItem::Address(address) => KeyRef::Address(&address.device, address.net),
            HostItem::Tunnel(tunnel) => KeyRef::Tunnel(&tunnel.device),
            HostItem::TunnelPeer(peer) => KeyRef::TunnelPeer(&peer.device, peer.subnet),
            HostItem::Route(route) => KeyRef::Route(route.destination),
        }
    }
}

impl PartialEq for ByKey {
    fn eq(&self, other: &Self) -> bool {
        self.key_ref() == other.key_ref()
    }
}

impl Eq for ByKey {}

impl PartialOrd for ByKey {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for ByKey {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key_ref().cmp(&other.key_ref())
    }
}

impl<'a> Borrow<dyn Keyed + 'a> for ByKey {
    fn borrow(&self) -> &(dyn Keyed + 'a) {
        self
    }
}

impl PartialEq for dyn Keyed + '_ {
    fn eq(&self, other: &Self) -> bool {
        self.key_ref() == other.key_ref()
    }
}

impl Eq for dyn Keyed + '_ {}

impl PartialOrd for dyn Keyed + '_ {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for dyn Keyed + '_ {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key_ref().cmp(&other.key_ref())
    }
}

impl HostItem {
    pub fn key(&self) -> Key {
        match self {
            Self::Link(link) => Key::Link(link.name.clone()),
            Self::Sysctl(sysctl) => Key::Sysctl(sysctl.key.clone()),
            Self::Address(address) => Key::Address(address.device.clone(), address.net),
            Self::Tunnel(tunnel) => Key::Tunnel(tunnel.device.clone()),
            Self::TunnelPeer(peer) => Key::TunnelPeer(peer.device.clone(), peer.subnet),
            Self::Route(route) => Key::Route(route.destination),
        }
    }
}

impl HostItem {
    /// The device that must carry packets before this may be put; `None` for what makes a device.
    pub fn device(&self) -> Option<&str> {
        match self {
            Self::Link(_) | Self::Sysctl(_) | Self::Address(_) | Self::Tunnel(_) => None,
            Self::TunnelPeer(peer) => Some(&peer.device),
            Self::Route(route) => Some(&route.device),
        }
    }

    /// The device that carries packets only once this is in place.
    pub fn makes(&self) -> Option<&str> {
        match self {
            Self::Link(link) => Some(&link.name),
            Self::Tunnel(tunnel) => Some(&tunnel.device),
            Self::Sysctl(_) | Self::Address(_) | Self::TunnelPeer(_) | Self::Route(_) => None,
        }
    }
}

/// One step towards a wanted state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Create the item, or make the existing one with its key equal to it.
    Put(HostItem),
    /// Remove the item; that it is already gone is a success.
    Remove(HostItem),
}

impl Change {
    pub fn item(&self) -> &HostItem {
        match self {
            Self::Put(item) | Self::Remove(item) => item,
        }
    }
}

/// A set of items, at most one per [`Key`].
#[derive(Clone, Debug, Default)]
pub struct HostState {
    items: BTreeSet<ByKey>,
}

impl PartialEq for HostState {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for HostState {}

impl HostState {
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds or replaces.
    pub fn insert(&mut self, item: HostItem) {
        self.items.replace(ByKey(item));
    }

    pub fn remove(&mut self, key: &Key) -> Option<HostItem> {
        self.items.take(key as &dyn Keyed).map(|found| found.0)
    }

    pub fn get(&self, key: &Key) -> Option<&HostItem> {
        self.items.get(key as &dyn Keyed).map(|found| &found.0)
    }

    pub fn contains(&self, item: &HostItem) -> bool {
        self.get(&item.key()) == Some(item)
    }

    /// In creation order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &HostItem> {
        self.items.iter().map(|item| &item.0)
    }

    pub fn len(&self) -> usize {
        self.items.len()
    }

    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Takes over what a change did.
    pub fn record(&mut self, change: &Change) {
        match change {
            Change::Put(item) => self.insert(item.clone()),
            Change::Remove(item) => {
                self.remove(&item.key());
            }
        }
    }

    /// The steps that turn `self` into `wanted`: first every put in creation order, then every removal in reverse
    /// order. Puts come first so that a thing that moves is replaced and never missing.
    pub fn changes_to(&self, wanted: &Self) -> Vec<Change> {
        let (mut puts, mut removals) = (Vec::new(), Vec::new());
        // Side by side, since both are in order: a pass is made for every change among thousands of items.
        let (mut present, mut wanted) = (self.items.iter().peekable(), wanted.items.iter().peekable());
        loop {
            let order = match (present.peek(), wanted.peek()) {
                (None, None) => break,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(present), Some(wanted)) => present.cmp(wanted),
            };
            let present = if order.is_le() { present.next() } else { None };
            let wanted = if order.is_ge() { wanted.next() } else { None };
            match (present, wanted) {
                (Some(ByKey(present)), None) => removals.push(Change::Remove(present.clone())),
                (present, Some(ByKey(wanted))) if present.is_none_or(|ByKey(present)| present != wanted) => {
                    puts.push(Change::Put(wanted.clone()));
                }
                _ => {}
            }
        }
        puts.extend(removals.into_iter().rev());
        puts
    }
}

impl FromIterator<HostItem> for HostState {
    /// Of two items with one key the last stays.
    fn from_iter<I: IntoIterator<Item = HostItem>>(items: I) -> Self {
        Self { items: items.into_iter().map(ByKey).collect() }
    }
}

impl fmt::Display for HostState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for item in self.iter() {
            writeln!(f, "{item}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Put(item) => write!(f, "put {item}"),
            Self::Remove(item) => write!(f, "remove {item}"),
        }
    }
}

impl fmt::Display for HostItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link(Link { name, kind: LinkKind::Tun, mtu }) => {
                write!(f, "link {name} type tun mtu {mtu}")
            }
            Self::Sysctl(Sysctl { key, value }) => write!(f, "sysctl {key}={value}"),
            Self::Address(Address { device, net }) => write!(f, "addr {net} dev {device}"),
            Self::Tunnel(t) => write!(
                f,
                "tunnel {} via {} local {}:{} network {} subnet {} mtu {} datapath {} source-check {} source-port {}",
                t.device,
                t.underlay,
                t.local,
                t.port,
                t.network,
                t.own_subnet,
                t.mtu,
                t.options.datapath,
                t.options.source_check,
                t.options.source_port,
            ),
            Self::TunnelPeer(TunnelPeer { device, subnet, node }) => {
                write!(f, "peer {subnet} at {node} dev {device}")
            }
            Self::Route(route) => {
                write!(f, "route {}", route.destination)?;
                if let Some(via) = route.via {
                    write!(f, " via {via}")?;
                }
                write!(f, " dev {}", route.device)?;
                if let Some(source) = route.source {
                    write!(f, " src {source}")?;
                }
                if route.onlink {
                    f.write_str(" onlink")?;
                }
                if let Some(mtu) = route.mtu {
                    write!(f, " mtu {mtu}")?;
                }
                Ok(())
            }
        }
    }
}
