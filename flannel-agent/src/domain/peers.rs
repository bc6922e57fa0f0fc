//! The other nodes' leases, folded from the store's events.
//!
//! Everything in the store is a claim by someone else. A claim that can't be true next to the others, or next to us,
//! is refused with a reason and kept aside; the rest works on. Who wins is decided by who was known first, so that a
//! new claim can never take traffic from a lease that already works; a refused claim is looked at again when what
//! stood in its way is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::domain::config::{BackendConfig, NetworkConfig};
use crate::domain::lease::{Lease, LeaseEvent, Subnets, Unreadable};

/// The other nodes' leases as far as they are known and believed. Our own is never among them.
#[derive(Clone, Debug)]
pub struct Peers {
    own: Lease,
    own_present: bool,
    own_addresses: Vec<IpAddr>,
    rules: Rules,
    known: bool,
    accepted: BTreeMap<Subnets, Lease>,
    /// First address of every accepted subnet of either family → its last address and the lease it belongs to.
    /// Accepted subnets are disjoint, so the neighbour below an address is the only one that can contain it.
    occupied: BTreeMap<IpAddr, (IpAddr, Subnets)>,
    refused: BTreeMap<Subnets, (Lease, Refusal)>,
    unreadable: BTreeMap<String, Unreadable>,
}

/// What [`Peers::fold`] changed.
#[derive(Clone, Debug, PartialEq)]
pub struct Folded {
    /// Whether [`Peers::iter`], or [`Peers::is_known`], now gives something else.
    pub peers: Changed,
    /// News of our own lease.
    pub own: Option<OwnLease>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    Yes,
    No,
}

/// What the store says about the lease we hold.
#[derive(Clone, Debug, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "there is one at a time, on the stack")]
pub enum OwnLease {
    /// Deleted, expired, or held by a node with another public address. Said once until it is back.
    Gone,
    /// Written again, by us or by an operator: its expiry, revision or attributes are these now.
    Changed(Lease),
}

/// Why a lease is not believed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("it overlaps our own subnet {0}")]
    OverlapsOwn(Subnets),
    #[error("it overlaps {subnets}, leased by {by}, which was known first")]
    Overlaps { subnets: Subnets, by: IpAddr },
    #[error("{subnet} is not inside the network {network}")]
    OutsideNetwork { subnet: IpNet, network: IpNet },
    #[error("{0} belongs to a family the network does not use")]
    FamilyOff(IpNet),
    #[error("the udp backend needs every subnet to be a /{wanted}, this is a /{found}")]
    PrefixLength { wanted: u8, found: u8 },
    #[error("it names our own address {0}")]
    NamesUs(IpAddr),
    #[error("{0} can't be the address of a node")]
    UnusableAddress(IpAddr),
}

/// A lease that is not believed, and why.
#[derive(Clone, Copy, Debug)]
pub struct Refused<'a> {
    pub lease: &'a Lease,
    pub reason: &'a Refusal,
}

impl fmt::Display for Refused<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lease {} of {} is refused: {}", self.lease.subnets, node_of(self.lease), self.reason)
    }
}

/// What the configuration says about leases.
#[derive(Clone, Debug)]
struct Rules {
    v4: Option<(Ipv4Net, u8)>,
    v6: Option<(Ipv6Net, u8)>,
    one_length: bool,
}

impl Peers {
    /// Nobody is known until the first snapshot. `own_addresses` are all addresses this node answers to (public and
    /// interface address): a lease that names one would send our own packets back to us.
    pub fn new(own: &Lease, config: &NetworkConfig, own_addresses: &[IpAddr]) -> Self {
        // The in-kernel tunnel finds a peer by `destination & mask`: one mask for all.
        let one_length = match config.backend {
            BackendConfig::Udp { .. } => true,
            BackendConfig::HostGw | BackendConfig::Alloc => false,
        };
        let mut own_addresses = own_addresses.to_vec();
        own_addresses.push(own.attrs.public_ip.into());
        own_addresses.extend(own.attrs.public_ipv6.map(IpAddr::from));
        own_addresses.retain(|address| !address.is_unspecified());
        Self {
            own: own.clone(),
            own_present: true,
            own_addresses,
            rules: Rules {
                v4: config.v4.map(|range| (range.network, range.subnet_len)),
                v6: config.v6.map(|range| (range.network, range.subnet_len)),
                one_length,
            },
            known: false,
            accepted: BTreeMap::new(),
            occupied: BTreeMap::new(),
            refused: BTreeMap::new(),
            unreadable: BTreeMap::new(),
        }
    }

    /// Takes one event over.
    pub fn fold(&mut self, event: LeaseEvent) -> Folded {
        match event {
            LeaseEvent::Snapshot(leases, unreadable) => self.snapshot(leases, unreadable),
            LeaseEvent::Added(lease) => {
                self.unreadable.retain(|_, entry| subnets_of(entry) != Some(lease.subnets));
                if lease.subnets == self.own.subnets {
                    Folded { peers: Changed::No, own: self.own_seen(lease) }
                } else {
                    Folded { peers: self.put(lease), own: None }
                }
            }
            LeaseEvent::Removed(subnets) => {
                self.unreadable.retain(|_, entry| subnets_of(entry) != Some(subnets));
                if subnets == self.own.subnets {
                    Folded { peers: Changed::No, own: self.own_gone() }
                } else {
                    Folded { peers: self.remove(&subnets), own: None }
                }
            }
            LeaseEvent::Unreadable(entry) => {
                self.unreadable.insert(entry.key.clone(), entry);
                Folded { peers: Changed::No, own: None }
            }
            // What was known is still the best guess: traffic flows on while the store is away.
            LeaseEvent::Interrupted(_) => Folded { peers: Changed::No, own: None },
        }
    }

    /// Whether a snapshot was seen. Before that an empty list means nothing, and nothing may be removed for it.
    pub fn is_known(&self) -> bool {
        self.known
    }

    /// The believed leases of the other nodes, ordered by subnet; disjoint, inside the network, none of them ours.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &Lease> {
        self.accepted.values()
    }

    pub fn len(&self) -> usize {
        self.accepted.len()
    }

    pub fn is_empty(&self) -> bool {
        self.accepted.is_empty()
    }

    /// The leases that are not believed, ordered by subnet.
    pub fn refused(&self) -> impl ExactSizeIterator<Item = Refused<'_>> {
        self.refused.values().map(|(lease, reason)| Refused { lease, reason })
    }

    /// The store's entries that are no leases. A lease whose entry became unreadable stays as it was last known.
    pub fn unreadable(&self) -> impl ExactSizeIterator<Item = &Unreadable> {
        self.unreadable.values()
    }

    /// Our own lease as the store last showed it.
    pub fn own(&self) -> &Lease {
        &self.own
    }

    fn snapshot(&mut self, leases: Vec<Lease>, unreadable: Vec<Unreadable>) -> Folded {
        let mut changed = if self.known { Changed::No } else { Changed::Yes };
        self.known = true;
        self.unreadable = unreadable.into_iter().map(|entry| (entry.key.clone(), entry)).collect();
        // An entry that is there and can't be read right now is not an entry that is gone.
        let undecided: BTreeSet<Subnets> = self.unreadable.values().filter_map(subnets_of).collect();

        let mut own = None;
        let mut listed = BTreeMap::new();
        for lease in leases {
            if lease.subnets == self.own.subnets {
                own = Some(lease);
            } else {
                listed.insert(lease.subnets, lease);
            }
        }
        let gone: Vec<Subnets> = (self.accepted.keys().chain(self.refused.keys()))
            .filter(|subnets| !listed.contains_key(*subnets) && !undecided.contains(subnets))
            .copied()
            .collect();
        for subnets in gone {
            changed = changed.or(self.remove(&subnets));
        }
        // In a list nobody was first. Leases of the configured length go before others, so that one wide claim can't
        // push out the many it covers when an agent starts.
        let (regular, odd): (Vec<_>, Vec<_>) =
            listed.into_values().partition(|lease| self.rules.has_configured_length(&lease.subnets));
        for lease in regular.into_iter().chain(odd) {
            changed = changed.or(self.put(lease));
        }
        let own = match own {
            Some(lease) => self.own_seen(lease),
            None if undecided.contains(&self.own.subnets) => None,
            None => self.own_gone(),
        };
        Folded { peers: changed, own }
    }

    fn own_seen(&mut self, lease: Lease) -> Option<OwnLease> {
        if lease.attrs.public_ip != self.own.attrs.public_ip {
            return self.own_gone();
        }
        let news = !self.own_present || lease != self.own;
        self.own_present = true;
        self.own = lease.clone();
        news.then_some(OwnLease::Changed(lease))
    }

    fn own_gone(&mut self) -> Option<OwnLease> {
        std::mem::replace(&mut self.own_present, false).then_some(OwnLease::Gone)
    }

    /// Adds or replaces a lease that is not ours.
    fn put(&mut self, lease: Lease) -> Changed {
        if let Some(known) = self.accepted.get_mut(&lease.subnets)
            && known.attrs == lease.attrs
        {
            // A renewal.
            *known = lease;
            return Changed::No;
        }
        let was_accepted = self.vacate(&lease.subnets).is_some();
        self.refused.remove(&lease.subnets);
        match self.examine(&lease) {
            Ok(()) => {
                self.occupy(lease);
                Changed::Yes
            }
            Err(refusal) => {
                self.refused.insert(lease.subnets, (lease, refusal));
                if was_accepted { Changed::Yes.or(self.examine_refused_again()) } else { Changed::No }
            }
        }
    }

    fn remove(&mut self, subnets: &Subnets) -> Changed {
        self.refused.remove(subnets);
        match self.vacate(subnets) {
            Some(_) => Changed::Yes.or(self.examine_refused_again()),
            None => Changed::No,
        }
    }

    fn examine_refused_again(&mut self) -> Changed {
        let mut changed = Changed::No;
        for (subnets, (lease, _)) in std::mem::take(&mut self.refused) {
            match self.examine(&lease) {
                Ok(()) => {
                    self.occupy(lease);
                    changed = Changed::Yes;
                }
                Err(refusal) => {
                    self.refused.insert(subnets, (lease, refusal));
                }
            }
        }
        changed
    }

    fn occupy(&mut self, lease: Lease) {
        for (first, last) in spans(&lease.subnets) {
            self.occupied.insert(first, (last, lease.subnets));
        }
        self.accepted.insert(lease.subnets, lease);
    }

    fn vacate(&mut self, subnets: &Subnets) -> Option<Lease> {
        let lease = self.accepted.remove(subnets)?;
        for (first, _) in spans(subnets) {
            self.occupied.remove(&first);
        }
        Some(lease)
    }

    fn examine(&self, lease: &Lease) -> Result<(), Refusal> {
        self.rules.check(&lease.subnets)?;
        if lease.subnets.overlaps(&self.own.subnets) {
            return Err(Refusal::OverlapsOwn(self.own.subnets));
        }
        let v4 = lease.subnets.v4.map(|_| IpAddr::from(lease.attrs.public_ip));
        let v6 = lease.attrs.public_ipv6.map(IpAddr::from);
        if v4.is_none() && v6.is_none() {
            return Err(Refusal::UnusableAddress(lease.attrs.public_ip.into()));
        }
        for address in v4.into_iter().chain(v6) {
            if !is_usable(address) {
                return Err(Refusal::UnusableAddress(address));
            }
            if self.own_addresses.contains(&address) {
                return Err(Refusal::NamesUs(address));
            }
        }
        for (first, last) in spans(&lease.subnets) {
            let below = self.occupied.range(..=last).next_back();
            if let Some((_, (end, subnets))) = below
                && *end >= first
                && end.is_ipv4() == first.is_ipv4()
                && let Some(holder) = self.accepted.get(subnets)
            {
                return Err(Refusal::Overlaps { subnets: *subnets, by: node_of(holder) });
            }
        }
        Ok(())
    }
}

impl Rules {
    fn check(&self, subnets: &Subnets) -> Result<(), Refusal> {
        let v4 = subnets.v4.map(|net| (IpNet::V4(net), self.v4.map(|(network, len)| (network.into(), len))));
        let v6 = subnets.v6.map(|net| (IpNet::V6(net), self.v6.map(|(network, len)| (network.into(), len))));
        for (subnet, rule) in v4.into_iter().chain(v6) {
            let Some((network, wanted)): Option<(IpNet, u8)> = rule else {
                return Err(Refusal::FamilyOff(subnet));
            };
            if !network.contains(&subnet) {
                return Err(Refusal::OutsideNetwork { subnet, network });
            }
            if self.one_length && subnet.prefix_len() != wanted {
                return Err(Refusal::PrefixLength { wanted, found: subnet.prefix_len() });
            }
        }
        Ok(())
    }

    fn has_configured_length(&self, subnets: &Subnets) -> bool {
        subnets.v4.map(|net| net.prefix_len()) == self.v4.map(|(_, len)| len)
            && subnets.v6.map(|net| net.prefix_len()) == self.v6.map(|(_, len)| len)
    }
}

impl Changed {
    fn or(self, other: Self) -> Self {
        match (self, other) {
            (Self::No, Self::No) => Self::No,
            _ => Self::Yes,
        }
    }
}

/// The subnets an unreadable entry would be about, when its key can be read.
fn subnets_of(entry: &Unreadable) -> Option<Subnets> {
    entry.key.rsplit('/').next()?.parse().ok()
}

fn spans(subnets: &Subnets) -> impl Iterator<Item = (IpAddr, IpAddr)> {
    let v4 = subnets.v4.map(|net| (net.network().into(), net.broadcast().into()));
    let v6 = subnets.v6.map(|net| (net.network().into(), net.broadcast().into()));
    v4.into_iter().chain(v6)
}

fn node_of(lease: &Lease) -> IpAddr {
    match lease.attrs.public_ipv6 {
        Some(v6) if lease.attrs.public_ip.is_unspecified() => v6.into(),
        _ => lease.attrs.public_ip.into(),
    }
}

fn is_usable(address: IpAddr) -> bool {
    let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast() || v4.octets()[0] == 0);
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || broadcast)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::config::SubnetRange;
    use crate::domain::lease::LeaseAttrs;
    use proptest::prelude::*;
    use std::time::{Duration, Instant};

    const OWN: &str = "10.5.1.0-24";

    fn config(backend: BackendConfig) -> NetworkConfig {
        NetworkConfig {
            v4: Some(SubnetRange {
                network: "10.5.0.0/16".parse().unwrap(),
                subnet_len: 24,
                subnet_min: "10.5.1.0".parse().unwrap(),
                subnet_max: "10.5.255.0".parse().unwrap(),
            }),
            v6: None,
            enable_nftables: false,
            backend,
            warnings: Vec::new(),
        }
    }

    fn lease(key: &str, ip: &str) -> Lease {
        Lease {
            subnets: key.parse().unwrap(),
            attrs: LeaseAttrs::new(ip.parse().unwrap()),
            expires: None,
            revision: 1,
        }
    }

    fn peers() -> Peers {
        Peers::new(
            &lease(OWN, "192.0.2.1"),
            &config(BackendConfig::HostGw),
            &["192.0.2.1".parse().unwrap(), "10.0.0.1".parse().unwrap()],
        )
    }

    fn added(key: &str, ip: &str) -> LeaseEvent {
        LeaseEvent::Added(lease(key, ip))
    }

    fn removed(key: &str) -> LeaseEvent {
        LeaseEvent::Removed(key.parse().unwrap())
    }

    fn snapshot(leases: &[(&str, &str)]) -> LeaseEvent {
        let own = [lease(OWN, "192.0.2.1")];
        LeaseEvent::Snapshot(
            own.into_iter().chain(leases.iter().map(|(key, ip)| lease(key, ip))).collect(),
            vec![],
        )
    }

    fn unreadable(key: &str) -> Unreadable {
        Unreadable { key: format!("/coreos.com/network/subnets/{key}"), reason: "not JSON".into() }
    }

    /// `yes` or `no`, our own lease's news, then what is believed and what is refused.
    fn say(peers: &mut Peers, event: LeaseEvent) -> String {
        let folded = peers.fold(event);
        let mut lines = vec![match folded.peers {
            Changed::Yes => "changed".to_owned(),
            Changed::No => "same".to_owned(),
        }];
        lines.extend(folded.own.map(|own| match own {
            OwnLease::Gone => "own gone".to_owned(),
            OwnLease::Changed(lease) => format!("own revision {}", lease.revision),
        }));
        lines.extend(peers.iter().map(|lease| format!("{} {}", lease.subnets, node_of(lease))));
        lines.extend(peers.refused().map(|refused| refused.to_string()));
        lines.join("\n")
    }

    #[test]
    fn nobody_is_known_before_the_first_snapshot() {
        let mut peers = peers();
        assert!(!peers.is_known());
        assert_eq!(say(&mut peers, LeaseEvent::Interrupted("away".into())), "same");
        assert!(!peers.is_known());
        assert_eq!(say(&mut peers, snapshot(&[])), "changed");
        assert!(peers.is_known());
        assert_eq!(say(&mut peers, snapshot(&[])), "same");
    }

    #[test]
    fn peers_come_move_and_go() {
        let mut peers = peers();
        let text = say(&mut peers, snapshot(&[("10.5.3.0-24", "192.0.2.3"), ("10.5.2.0-24", "192.0.2.2")]));
        assert_eq!(text, "changed\n10.5.2.0-24 192.0.2.2\n10.5.3.0-24 192.0.2.3");
        let text = say(&mut peers, added("10.5.2.0-24", "192.0.2.22"));
        assert_eq!(text, "changed\n10.5.2.0-24 192.0.2.22\n10.5.3.0-24 192.0.2.3");
        assert_eq!(say(&mut peers, removed("10.5.3.0-24")), "changed\n10.5.2.0-24 192.0.2.22");
        assert_eq!(say(&mut peers, removed("10.5.3.0-24")), "same\n10.5.2.0-24 192.0.2.22");
        assert_eq!(say(&mut peers, LeaseEvent::Interrupted("away".into())), "same\n10.5.2.0-24 192.0.2.22");
    }

    #[test]
    fn a_snapshot_brings_changed_attributes_and_drops_the_missing() {
        let mut peers = peers();
        peers.fold(snapshot(&[("10.5.2.0-24", "192.0.2.2"), ("10.5.3.0-24", "192.0.2.3")]));
        let text = say(&mut peers, snapshot(&[("10.5.2.0-24", "192.0.2.22")]));
        assert_eq!(text, "changed\n10.5.2.0-24 192.0.2.22");
    }

    #[test]
    fn a_renewal_of_a_peer_changes_nothing() {
        let mut peers = peers();
        peers.fold(snapshot(&[("10.5.2.0-24", "192.0.2.2")]));
        let mut renewed = lease("10.5.2.0-24", "192.0.2.2");
        renewed.revision = 9;
        renewed.expires = Some(Instant::now() + Duration::from_secs(86400));
        let folded = peers.fold(LeaseEvent::Added(renewed));
        assert_eq!(folded, Folded { peers: Changed::No, own: None });
        assert_eq!(peers.iter().next().unwrap().revision, 9);
    }

    #[test]
    fn our_own_lease_is_never_a_peer_but_its_news_are_told() {
        let mut peers = peers();
        assert_eq!(say(&mut peers, snapshot(&[])), "changed");
        let mut renewed = lease(OWN, "192.0.2.1");
        renewed.revision = 7;
        assert_eq!(say(&mut peers, LeaseEvent::Added(renewed.clone())), "same\nown revision 7");
        assert_eq!(say(&mut peers, LeaseEvent::Added(renewed.clone())), "same");
        assert_eq!(say(&mut peers, removed(OWN)), "same\nown gone");
        assert_eq!(say(&mut peers, removed(OWN)), "same");
        assert_eq!(say(&mut peers, LeaseEvent::Snapshot(vec![], vec![])), "same", "said once");
        assert_eq!(say(&mut peers, LeaseEvent::Added(renewed)), "same\nown revision 7");
        assert_eq!(say(&mut peers, LeaseEvent::Snapshot(vec![], vec![])), "same\nown gone");
    }

    #[test]
    fn our_subnet_in_another_nodes_hands_is_lost() {
        let mut peers = peers();
        peers.fold(snapshot(&[]));
        assert_eq!(say(&mut peers, added(OWN, "192.0.2.66")), "same\nown gone");
        assert_eq!(peers.own().attrs.public_ip, "192.0.2.1".parse::<std::net::Ipv4Addr>().unwrap());
    }

    #[test]
    fn claims_that_cannot_be_true_are_refused_with_the_reason() {
        for (key, ip, reason) in [
            ("10.5.0.0-23", "192.0.2.2", "overlaps our own subnet 10.5.1.0-24"),
            ("10.5.1.0-24&fd00::-64", "192.0.2.2", "belongs to a family the network does not use"),
            ("10.6.2.0-24", "192.0.2.2", "10.6.2.0/24 is not inside the network 10.5.0.0/16"),
            ("10.0.0.0-8", "192.0.2.2", "10.0.0.0/8 is not inside"),
            ("10.5.2.0-24", "192.0.2.1", "names our own address 192.0.2.1"),
            ("10.5.2.0-24", "10.0.0.1", "names our own address 10.0.0.1"),
            ("10.5.2.0-24", "0.0.0.0", "0.0.0.0 can't be the address of a node"),
            ("10.5.2.0-24", "127.0.0.1", "127.0.0.1 can't be the address of a node"),
            ("10.5.2.0-24", "224.0.0.1", "224.0.0.1 can't be the address of a node"),
            ("10.5.2.0-24", "255.255.255.255", "can't be the address of a node"),
            ("10.5.9.0-25", "192.0.2.2", "overlaps 10.5.9.0-24, leased by 192.0.2.9"),
            ("10.5.9.128-25", "192.0.2.2", "overlaps 10.5.9.0-24, leased by 192.0.2.9"),
            ("10.5.8.0-23", "192.0.2.2", "overlaps 10.5.9.0-24, leased by 192.0.2.9"),
        ] {
            let mut peers = peers();
            peers.fold(snapshot(&[("10.5.9.0-24", "192.0.2.9")]));
            let text = say(&mut peers, added(key, ip));
            assert!(text.starts_with("same\n10.5.9.0-24 192.0.2.9\nlease "), "{key}: {text}");
            assert!(text.contains(reason), "{key}: {text}");
            assert_eq!(say(&mut peers, removed(key)), "same\n10.5.9.0-24 192.0.2.9", "{key}");
        }
    }

    #[test]
    fn only_the_udp_backend_insists_on_one_prefix_length() {
        for (backend, believed) in [(BackendConfig::Udp { port: 8285 }, 0), (BackendConfig::HostGw, 1)] {
            let mut peers = Peers::new(&lease(OWN, "192.0.2.1"), &config(backend), &[]);
            peers.fold(snapshot(&[("10.5.2.0-25", "192.0.2.2")]));
            assert_eq!(peers.len(), believed);
            assert_eq!(peers.refused().len(), 1 - believed);
        }
    }

    #[test]
    fn who_was_known_first_wins_and_the_other_follows_when_he_leaves() {
        let mut peers = peers();
        peers.fold(snapshot(&[]));
        peers.fold(added("10.5.8.0-22", "192.0.2.2"));
        peers.fold(added("10.5.9.0-24", "192.0.2.3"));
        peers.fold(added("10.5.10.0-24", "192.0.2.4"));
        let list =
            [("10.5.8.0-22", "192.0.2.2"), ("10.5.9.0-24", "192.0.2.3"), ("10.5.10.0-24", "192.0.2.4")];
        assert!(say(&mut peers, snapshot(&list)).starts_with("same\n10.5.8.0-22 192.0.2.2\nlease"), "stable");
        assert_eq!(
            say(&mut peers, removed("10.5.8.0-22")),
            "changed\n10.5.9.0-24 192.0.2.3\n10.5.10.0-24 192.0.2.4"
        );
        // Also when the first one makes itself impossible.
        peers.fold(added("10.5.9.0-25", "192.0.2.5"));
        let text = say(&mut peers, added("10.5.9.0-24", "192.0.2.1"));
        assert!(text.starts_with("changed\n10.5.9.0-25 192.0.2.5\n10.5.10.0-24 192.0.2.4\nlease"), "{text}");
    }

    #[test]
    fn at_start_one_wide_claim_does_not_push_out_the_leases_it_covers() {
        let mut peers = peers();
        let text = say(&mut peers, snapshot(&[("10.5.8.0-22", "192.0.2.66"), ("10.5.9.0-24", "192.0.2.3")]));
        assert!(
            text.starts_with("changed\n10.5.9.0-24 192.0.2.3\nlease 10.5.8.0-22 of 192.0.2.66"),
            "{text}"
        );
    }

    #[test]
    fn an_entry_that_becomes_unreadable_leaves_the_lease_as_it_was() {
        let mut peers = peers();
        peers.fold(snapshot(&[("10.5.2.0-24", "192.0.2.2")]));
        let text = say(&mut peers, LeaseEvent::Unreadable(unreadable("10.5.2.0-24")));
        assert_eq!(text, "same\n10.5.2.0-24 192.0.2.2");
        peers.fold(LeaseEvent::Unreadable(unreadable("foo")));
        assert_eq!(peers.unreadable().len(), 2);
        let bad = vec![unreadable("10.5.2.0-24"), unreadable(OWN)];
        assert_eq!(say(&mut peers, LeaseEvent::Snapshot(vec![], bad)), "same\n10.5.2.0-24 192.0.2.2");
        assert_eq!(peers.unreadable().len(), 2);
        assert_eq!(say(&mut peers, removed("10.5.2.0-24")), "changed");
        assert_eq!(peers.unreadable().len(), 1);
    }

    #[test]
    fn both_families_of_a_lease_are_checked() {
        let mut config = config(BackendConfig::HostGw);
        config.v6 = Some(SubnetRange {
            network: "fd00::/48".parse().unwrap(),
            subnet_len: 64,
            subnet_min: "fd00:0:0:1::".parse().unwrap(),
            subnet_max: "fd00:0:0:ffff::".parse().unwrap(),
        });
        let mut peers = Peers::new(&lease("10.5.1.0-24&fd00:0:0:1::-64", "192.0.2.1"), &config, &[]);
        peers.fold(LeaseEvent::Snapshot(vec![], vec![]));
        let text = say(&mut peers, added("10.5.2.0-24&fd00:0:0:1::-64", "192.0.2.2"));
        assert!(text.contains("overlaps our own subnet"), "{text}");
        peers.fold(removed("10.5.2.0-24&fd00:0:0:1::-64"));
        peers.fold(added("10.5.2.0-24&fd00:0:0:2::-64", "192.0.2.2"));
        let text = say(&mut peers, added("10.5.3.0-24&fd00:0:0:2::-64", "192.0.2.3"));
        assert!(text.contains("overlaps 10.5.2.0-24&fd00:0:0:2::-64"), "{text}");
        let text = say(&mut peers, added("10.5.4.0-24&fd01:0:0:2::-64", "192.0.2.4"));
        assert!(text.contains("fd01:0:0:2::/64 is not inside the network fd00::/48"), "{text}");
    }

    fn any_lease() -> impl Strategy<Value = Lease> {
        (0u8..12, prop_oneof![Just(24u8), Just(23), Just(25), Just(20)], 1u8..9).prop_map(
            |(third, len, node)| {
                let net = Ipv4Net::new([10, 5, third, 0].into(), len).unwrap().trunc();
                lease(&Subnets::v4(net).to_string(), &format!("192.0.2.{node}"))
            },
        )
    }

    fn any_event() -> impl Strategy<Value = LeaseEvent> {
        prop_oneof![
            4 => any_lease().prop_map(LeaseEvent::Added),
            3 => any_lease().prop_map(|lease| LeaseEvent::Removed(lease.subnets)),
            1 => proptest::collection::vec(any_lease(), 0..8).prop_map(|all| LeaseEvent::Snapshot(all, vec![])),
            1 => Just(LeaseEvent::Interrupted("away".into())),
        ]
    }

    proptest! {
        #[test]
        fn whatever_the_store_says_peers_are_disjoint_and_not_us(events in proptest::collection::vec(any_event(), 0..40)) {
            let mut peers = peers();
            let mut store: BTreeMap<Subnets, Lease> = BTreeMap::new();
            for event in events {
                match &event {
                    LeaseEvent::Added(lease) => {
                        store.insert(lease.subnets, lease.clone());
                    }
                    LeaseEvent::Removed(subnets) => {
                        store.remove(subnets);
                    }
                    LeaseEvent::Snapshot(all, _) => {
                        store = all.iter().map(|lease| (lease.subnets, lease.clone())).collect();
                    }
                    _ => {}
                }
                let before: Vec<Lease> = peers.iter().cloned().collect();
                let known = peers.is_known();
                let folded = peers.fold(event);
                let after: Vec<Lease> = peers.iter().cloned().collect();
                prop_assert_eq!(folded.peers == Changed::Yes, before != after || known != peers.is_known());

                for (index, peer) in after.iter().enumerate() {
                    prop_assert!(!peer.subnets.overlaps(&peers.own.subnets));
                    for other in after.get(index + 1..).unwrap() {
                        prop_assert!(!peer.subnets.overlaps(&other.subnets));
                    }
                }
                // Nothing is lost: every lease of the store is believed or refused.
                store.remove(&peers.own.subnets);
                let mut held: Vec<Subnets> = after.iter().map(|lease| lease.subnets).collect();
                held.extend(peers.refused().map(|refused| refused.lease.subnets));
                held.sort();
                prop_assert_eq!(held, store.keys().copied().collect::<Vec<_>>());
                // Nothing is refused for a reason that is gone.
                for refused in peers.refused() {
                    prop_assert!(peers.examine(refused.lease).is_err());
                }
            }
        }
    }
}
