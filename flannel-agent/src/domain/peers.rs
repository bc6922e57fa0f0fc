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
        Self {
            own: own.clone(),
            own_present: true,
            own_addresses: with_those_of(own, own_addresses),
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

    /// The store has said that this is our lease, in answer to us: what it names as our address is ours.
    pub fn hold(&mut self, lease: &Lease) {
        self.own = lease.clone();
        self.own_present = true;
    }

    /// This node answers to other addresses from now on; those in our lease stay among them until the store shows others.
    /// Leases that are in the way now are refused, those that no longer are come back.
    pub fn renumber(&mut self, own_addresses: &[IpAddr]) -> Changed {
        self.own_addresses = with_those_of(&self.own, own_addresses);
        let named: Vec<Lease> =
            self.accepted.values().filter(|lease| self.examine_node(lease).is_err()).cloned().collect();
        let mut changed = Changed::No;
        for lease in named {
            self.vacate(&lease.subnets);
            changed = changed.or(Changed::Yes).or(self.put(lease));
        }
        changed.or(self.examine_refused_again())
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
        let node = lease.attrs.node();
        let ours =
            node == self.own.attrs.node() || node.is_some_and(|node| self.own_addresses.contains(&node));
        if !ours {
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
        self.examine_node(lease)?;
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

    /// Whether the lease's node is one packets can be sent to.
    fn examine_node(&self, lease: &Lease) -> Result<(), Refusal> {
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

/// What a node answers to: what it knows by itself, and what its lease says.
fn with_those_of(own: &Lease, addresses: &[IpAddr]) -> Vec<IpAddr> {
    let published = [IpAddr::from(own.attrs.public_ip)];
    let published = published.into_iter().chain(own.attrs.public_ipv6.map(IpAddr::from));
    addresses.iter().copied().chain(published).filter(|address| !address.is_unspecified()).collect()
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
    lease.attrs.node().unwrap_or(lease.attrs.public_ip.into())
}

fn is_usable(address: IpAddr) -> bool {
    let broadcast = matches!(address, IpAddr::V4(v4) if v4.is_broadcast() || v4.octets()[0] == 0);
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || broadcast)
}

#[cfg(test)]
mod tests;
