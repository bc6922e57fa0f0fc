//! The host this runs on: each [`HostItem`] goes to the file that knows it, and what of ours is there is read back.
//!
//! Whether a thing is ours is decided here and nowhere else, by these rules; in doubt it is not:
//!
//! | thing | ours when |
//! |---|---|
//! | device | its name is in the [`Scope`], it is a TUN made as the agent makes it, and it is up |
//! | address | on such a name, and not an automatic link-local one |
//! | sysctl | this process has put it |
//! | route | carries [`ROUTE_PROTOCOL`], has the shape the agent puts, and leaves by a device of the scope or leads into its networks |
//! | tunnel, peers | pinned by us or running here (`host/udp`) |
//!
//! A device that is down counts as missing, so that putting it again brings it up. A route of someone else with a
//! wanted destination is replaced in place when the wanted one is put (this is how the routes of a former flanneld are
//! taken over) and never removed otherwise. The kernel's own routes, which belong to addresses, are not replaced.

use std::collections::{BTreeSet, HashMap};
use std::mem::discriminant;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use ipnet::{IpNet, Ipv4Net};

use super::netlink::{AddressEntry, Events, LinkInfo, Netlink, ROUTE_PROTOCOL, RouteEntry};
use super::udp::{TunnelReport, Tunnels, userspace};
use super::{Host, HostError, News, interfaces, sysctl};
use crate::domain::host_state::{
    Address, Change, HostItem, HostState, Link, LinkKind, Route, Sysctl, Tunnel, TunnelPeer,
};
use crate::domain::interface::{HostFacts, Selector};
use crate::domain::path_mtu::Probe;

/// What the agent may take for its own.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// Names of devices it makes (`flannel0`).
    pub devices: Vec<String>,
    /// The overlay's networks, IPv4 and IPv6.
    pub networks: Vec<IpNet>,
}

/// Where a [`LinuxHost`] finds what is not in the kernel's tables.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinuxHostOptions {
    /// Mount point of the bpffs that holds the tunnel's pins (`/sys/fs/bpf`).
    pub bpffs: PathBuf,
}

/// The network namespace of the thread that made it.
pub struct LinuxHost {
    scope: Scope,
    netlink: Netlink,
    events: Events,
    tunnels: Tunnels,
    /// Keys of the sysctls that were put.
    sysctls: BTreeSet<String>,
}

impl LinuxHost {
    /// Connects to the kernel in the calling thread's network namespace, and to nothing else; changes nothing. Must
    /// be called on a tokio runtime.
    ///
    /// # Errors
    /// No netlink socket to be had. A missing capability shows when something is put, and is named then.
    pub fn new(scope: Scope, options: LinuxHostOptions) -> Result<Self, HostError> {
        let netlink = Netlink::new()?;
        let events = netlink.events(scope.networks.clone())?;
        let tunnels = Tunnels::new(netlink.clone(), options.bpffs);
        Ok(Self { scope, netlink, events, tunnels, sysctls: BTreeSet::new() })
    }

    /// The connection this host uses, for questions that are not about its state.
    pub fn netlink(&self) -> &Netlink {
        &self.netlink
    }

    /// Changes of one kind in one direction.
    async fn apply_run(&mut self, run: &[Change]) -> Vec<Result<(), HostError>> {
        let Some(first) = run.first() else { return Vec::new() };
        match first {
            Change::Put(HostItem::Link(_)) => self.put_links(&items(run, as_link)).await,
            Change::Put(HostItem::Sysctl(_)) => self.put_sysctls(&items(run, as_sysctl)),
            Change::Put(HostItem::Address(_)) => self.netlink.put_addresses(&items(run, as_address)).await,
            Change::Put(HostItem::Tunnel(_)) => self.put_tunnels(&items(run, as_tunnel)).await,
            Change::Put(HostItem::TunnelPeer(_)) => self.tunnels.put_peers(&owned(run, as_peer)).await,
            Change::Put(HostItem::Route(_)) => self.put_routes(&items(run, as_route)).await,
            Change::Remove(HostItem::Link(_)) => self.remove_links(&items(run, as_link)).await,
            Change::Remove(HostItem::Sysctl(_)) => self.forget_sysctls(&items(run, as_sysctl)),
            Change::Remove(HostItem::Address(_)) => {
                self.netlink.remove_addresses(&items(run, as_address)).await
            }
            Change::Remove(HostItem::Tunnel(_)) => self.remove_tunnels(&items(run, as_tunnel)).await,
            Change::Remove(HostItem::TunnelPeer(_)) => self.tunnels.remove_peers(&owned(run, as_peer)).await,
            Change::Remove(HostItem::Route(_)) => self.netlink.remove_routes(&items(run, as_route)).await,
        }
    }

    async fn put_links(&self, links: &[&Link]) -> Vec<Result<(), HostError>> {
        let mut results = Vec::with_capacity(links.len());
        for link in links {
            results.push(self.put_link(link).await);
        }
        results
    }

    async fn put_link(&self, link: &Link) -> Result<(), HostError> {
        match link.kind {
            // A running tunnel's device is not opened once more: packets would go to the queue that nobody reads.
            LinkKind::Tun => {
                if !self.netlink.link(&link.name).await?.is_some_and(|found| is_as_made(&found)) {
                    userspace::ensure_device(&link.name)?;
                }
            }
        }
        self.netlink.set_mtu(&link.name, link.mtu).await?;
        self.netlink.set_up(&link.name).await
    }

    async fn remove_links(&self, links: &[&Link]) -> Vec<Result<(), HostError>> {
        let mut results = Vec::with_capacity(links.len());
        for link in links {
            results.push(self.remove_link(link).await);
        }
        results
    }

    /// Only what is still of the kind we made: the name may have been given to something else since.
    async fn remove_link(&self, link: &Link) -> Result<(), HostError> {
        match self.netlink.link(&link.name).await? {
            None => Ok(()),
            Some(found) if found.tun.is_some() => self.netlink.delete_link(&link.name).await,
            Some(found) => {
                let kind = found.kind.as_deref().unwrap_or("hardware");
                Err(HostError::new(
                    format!("remove {}", HostItem::Link((*link).clone())),
                    format!("{} is of kind {kind} now, so it is not ours", link.name),
                ))
            }
        }
    }

    fn put_sysctls(&mut self, sysctls: &[&Sysctl]) -> Vec<Result<(), HostError>> {
        sysctls
            .iter()
            .map(|wanted| {
                sysctl::write(wanted)?;
                self.sysctls.insert(wanted.key.clone());
                Ok(())
            })
            .collect()
    }

    /// There is no such thing as removing a value; what it was before is not ours to restore.
    fn forget_sysctls(&mut self, sysctls: &[&Sysctl]) -> Vec<Result<(), HostError>> {
        sysctls
            .iter()
            .map(|sysctl| {
                self.sysctls.remove(&sysctl.key);
                Ok(())
            })
            .collect()
    }

    async fn put_tunnels(&mut self, tunnels: &[&Tunnel]) -> Vec<Result<(), HostError>> {
        let mut results = Vec::with_capacity(tunnels.len());
        for tunnel in tunnels {
            results.push(self.tunnels.put(tunnel).await);
        }
        results
    }

    async fn remove_tunnels(&mut self, tunnels: &[&Tunnel]) -> Vec<Result<(), HostError>> {
        let mut results = Vec::with_capacity(tunnels.len());
        for tunnel in tunnels {
            results.push(self.tunnels.remove(tunnel).await);
        }
        results
    }

    async fn put_routes(&self, routes: &[&Route]) -> Vec<Result<(), HostError>> {
        let kernels = match self.kernel_routes().await {
            Ok(kernels) => kernels,
            Err(error) => return vec![Err(error); routes.len()],
        };
        let conflict = |route: &Route| kernels.get(&route.destination);
        let free: Vec<&Route> = routes.iter().copied().filter(|route| conflict(route).is_none()).collect();
        let mut results = self.netlink.put_routes(&free).await.into_iter();
        routes
            .iter()
            .map(|route| {
                let doing = || format!("put {}", HostItem::Route((*route).clone()));
                match conflict(route) {
                    None => {
                        results.next().unwrap_or_else(|| Err(HostError::new(doing(), "it was not tried")))
                    }
                    Some(device) => Err(HostError::new(
                        doing(),
                        format!(
                            "{} is the network of an address on {device}, whose route stays",
                            route.destination
                        ),
                    )),
                }
            })
            .collect()
    }

    /// Destinations of the routes that the kernel made for addresses on devices that are not ours, and those
    /// devices. Ours would replace them; the addresses would be cut off.
    async fn kernel_routes(&self) -> Result<HashMap<IpNet, Arc<str>>, HostError> {
        const RTPROT_KERNEL: u8 = 2;
        let routes = self.netlink.routes(Some(RTPROT_KERNEL)).await?;
        let names = names(&self.netlink.links().await?);
        Ok(routes
            .into_iter()
            .filter(|route| route.unicast && route.has_default_metric())
            .filter_map(|route| Some((route.destination, names.get(&route.ifindex?)?.clone())))
            .filter(|(_, device)| !self.scope.has_device(device))
            .collect())
    }
}

#[async_trait]
impl Host for LinuxHost {
    fn reports(&self) -> Vec<TunnelReport> {
        self.tunnels.reports()
    }

    fn coming(&self) -> Option<&'static str> {
        self.tunnels.await_kernel().then_some("user space carries packets until the kernel does")
    }

    async fn observe(&mut self) -> Result<HostState, HostError> {
        let links = self.netlink.links().await?;
        let addresses = self.netlink.addresses().await?;
        let routes = self.netlink.routes(Some(ROUTE_PROTOCOL)).await?;
        let names = names(&links);
        let mut state: HostState = links.iter().filter_map(|link| self.scope.link(link)).collect();
        for item in addresses.iter().filter_map(|address| self.scope.address(address, &names)) {
            state.insert(item);
        }
        for item in routes.iter().filter_map(|route| self.scope.route(route, &names)) {
            state.insert(item);
        }
        // A sysctl that can't be read is gone with its device.
        for key in &self.sysctls {
            if let Ok(value) = sysctl::read(key) {
                state.insert(HostItem::Sysctl(Sysctl { key: key.clone(), value }));
            }
        }
        for item in self.tunnels.observe().await {
            state.insert(item);
        }
        Ok(state)
    }

    async fn apply(&mut self, changes: &[Change]) -> Vec<Result<(), HostError>> {
        let mut results = Vec::with_capacity(changes.len());
        for run in changes.chunk_by(same_kind) {
            results.extend(self.apply_run(run).await);
        }
        results
    }

    async fn facts(&mut self, selectors: &[Selector]) -> Result<HostFacts, HostError> {
        let facts = interfaces::facts(&self.netlink, selectors).await?;
        self.events.know_mtus(facts.interfaces.iter().map(|interface| (interface.index, interface.mtu)));
        Ok(facts)
    }

    async fn news(&mut self) -> News {
        tokio::select! {
            () = self.events.changed() => News::Disturbed,
            news = self.tunnels.news() => news,
        }
    }

    async fn probe(&mut self, probes: &[Probe]) -> Result<(), HostError> {
        self.tunnels.probe(probes)
    }

    async fn sent(&mut self, subnets: &[Ipv4Net]) -> Vec<u64> {
        self.tunnels.sent(subnets)
    }
}

impl Scope {
    fn has_device(&self, name: &str) -> bool {
        self.devices.iter().any(|device| device == name)
    }

    fn link(&self, link: &LinkInfo) -> Option<HostItem> {
        let tun = link.tun?;
        let as_made = tun.persistent && tun.multi_queue && tun.vnet_header;
        (self.has_device(&link.name) && as_made && link.up)
            .then(|| HostItem::Link(Link { name: link.name.clone(), kind: LinkKind::Tun, mtu: link.mtu }))
    }

    fn address(&self, address: &AddressEntry, names: &HashMap<u32, Arc<str>>) -> Option<HostItem> {
        let device = names.get(&address.ifindex)?;
        let automatic = match address.net {
            IpNet::V4(_) => false,
            IpNet::V6(net) => net.addr().is_unicast_link_local(),
        };
        (self.has_device(device) && !automatic)
            .then(|| HostItem::Address(Address { device: device.to_string(), net: address.net }))
    }

    fn route(&self, route: &RouteEntry, names: &HashMap<u32, Arc<str>>) -> Option<HostItem> {
        let device = names.get(&route.ifindex?)?;
        let in_scope = self.has_device(device)
            || self.networks.iter().any(|network| network.contains(&route.destination));
        let as_put =
            route.protocol == ROUTE_PROTOCOL && route.unicast && route.plain && route.has_default_metric();
        (in_scope && as_put).then(|| {
            HostItem::Route(Route {
                destination: route.destination,
                via: route.via,
                device: device.clone(),
                onlink: route.onlink,
                source: route.source,
                mtu: route.mtu,
            })
        })
    }
}

/// A TUN with the flags that [`LinkKind::Tun`] stands for.
fn is_as_made(link: &LinkInfo) -> bool {
    link.tun.is_some_and(|tun| tun.persistent && tun.multi_queue && tun.vnet_header)
}

fn names(links: &[LinkInfo]) -> HashMap<u32, Arc<str>> {
    links.iter().map(|link| (link.index, link.name.as_str().into())).collect()
}

fn same_kind(a: &Change, b: &Change) -> bool {
    discriminant(a) == discriminant(b) && discriminant(a.item()) == discriminant(b.item())
}

fn items<T>(run: &[Change], pick: impl Fn(&HostItem) -> Option<&T>) -> Vec<&T> {
    run.iter().filter_map(|change| pick(change.item())).collect()
}

fn owned<T: Clone>(run: &[Change], pick: impl Fn(&HostItem) -> Option<&T>) -> Vec<T> {
    items(run, pick).into_iter().cloned().collect()
}

macro_rules! pickers {
    ($($name:ident: $variant:ident;)*) => {$(
        fn $name(item: &HostItem) -> Option<&$variant> {
            match item {
                HostItem::$variant(item) => Some(item),
                _ => None,
            }
        }
    )*};
}

pickers! {
    as_link: Link;
    as_sysctl: Sysctl;
    as_address: Address;
    as_tunnel: Tunnel;
    as_peer: TunnelPeer;
    as_route: Route;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::netlink::TunInfo;

    fn scope() -> Scope {
        Scope {
            devices: vec!["flannel0".into()],
            networks: vec!["10.5.0.0/16".parse().unwrap(), "fd00:5::/32".parse().unwrap()],
        }
    }

    fn names() -> HashMap<u32, Arc<str>> {
        [(2, "eth0".into()), (7, "flannel0".into())].into()
    }

    #[test]
    fn a_device_is_ours_by_name_kind_and_make() {
        let made = TunInfo { persistent: true, multi_queue: true, vnet_header: true };
        let tun = LinkInfo {
            name: "flannel0".into(),
            index: 7,
            mtu: 1472,
            up: true,
            carrier: true,
            kind: Some("tun".into()),
            tun: Some(made),
            xdp: None,
        };
        let rows = [
            ("as made", tun.clone(), true),
            ("down", LinkInfo { up: false, ..tun.clone() }, false),
            ("another name", LinkInfo { name: "tun0".into(), ..tun.clone() }, false),
            ("a bridge", LinkInfo { kind: Some("bridge".into()), tun: None, ..tun.clone() }, false),
            (
                "flanneld's",
                LinkInfo { tun: Some(TunInfo { persistent: false, ..made }), ..tun.clone() },
                false,
            ),
        ];
        for (name, link, ours) in rows {
            assert_eq!(scope().link(&link).is_some(), ours, "{name}");
        }
        assert_eq!(scope().link(&tun).unwrap().to_string(), "link flannel0 type tun mtu 1472");
    }

    #[test]
    fn an_address_is_ours_by_its_device_unless_it_is_automatic() {
        let rows = [
            ("10.5.3.0/32", 7, true),
            ("10.9.0.2/24", 2, false),
            ("fd00:5:3::/128", 7, true),
            ("fe80::1/64", 7, false),
            ("10.5.3.0/32", 99, false),
        ];
        for (net, ifindex, ours) in rows {
            let entry = AddressEntry {
                ifindex,
                net: net.parse().unwrap(),
                dynamic: false,
                temporary: false,
                deprecated: false,
            };
            assert_eq!(scope().address(&entry, &names()).is_some(), ours, "{net} on {ifindex}");
        }
    }

    #[test]
    fn a_route_is_ours_by_protocol_shape_and_place() {
        let route = |destination: &str, ifindex| RouteEntry {
            destination: destination.parse().unwrap(),
            via: None,
            ifindex: Some(ifindex),
            protocol: ROUTE_PROTOCOL,
            onlink: false,
            source: None,
            mtu: None,
            metric: if destination.contains(':') { 1024 } else { 0 },
            plain: true,
            unicast: true,
        };
        let rows = [
            ("in the network", route("10.5.9.0/24", 2), true),
            ("the network itself", route("10.5.0.0/16", 7), true),
            ("elsewhere, by our device", route("192.0.2.0/24", 7), true),
            ("elsewhere, by another", route("192.0.2.0/24", 2), false),
            ("wider than the network", route("10.0.0.0/8", 2), false),
            ("IPv6 in the network", route("fd00:5:9::/64", 2), true),
            ("user's", RouteEntry { protocol: 3, ..route("10.5.9.0/24", 7) }, false),
            ("with a metric", RouteEntry { metric: 50, ..route("10.5.9.0/24", 7) }, false),
            ("a blackhole", RouteEntry { unicast: false, ..route("10.5.9.0/24", 7) }, false),
            ("several ways", RouteEntry { plain: false, ..route("10.5.9.0/24", 7) }, false),
            ("on a device that is gone", route("10.5.9.0/24", 99), false),
        ];
        for (name, route, ours) in rows {
            assert_eq!(scope().route(&route, &names()).is_some(), ours, "{name}");
        }
    }

    #[test]
    fn runs_break_where_kind_or_direction_changes() {
        let sysctl = |key: &str| HostItem::Sysctl(Sysctl { key: key.into(), value: "1".into() });
        let address =
            |net: &str| HostItem::Address(Address { device: "flannel0".into(), net: net.parse().unwrap() });
        let changes = [
            Change::Put(sysctl("a/b")),
            Change::Put(sysctl("a/c")),
            Change::Put(address("10.5.3.0/32")),
            Change::Remove(address("10.5.4.0/32")),
            Change::Remove(sysctl("a/d")),
        ];
        let runs: Vec<usize> = changes.chunk_by(same_kind).map(<[Change]>::len).collect();
        assert_eq!(runs, [2, 1, 1, 1]);
    }
}
