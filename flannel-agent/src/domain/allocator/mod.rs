//! Which subnet a node takes (contract §3.5).
//!
//! Pure: the store lists what is leased, asks here, and then does what the [`Choice`] says. Losing a race means that
//! the list was old, and the whole question is asked again.
//!
//! Addresses are counted in `u128` for both families, so that nothing wraps at the end of an address space.

#[cfg(test)]
mod tests;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use rand::Rng;
use rand::seq::IndexedRandom;

use crate::domain::config::{NetworkConfig, SubnetRange};
use crate::domain::lease::{Lease, Subnets};

/// How many free subnets the random choice is made from.
const CANDIDATES: usize = 100;

/// What a node wants.
#[derive(Clone, Copy, Debug)]
pub struct Wish<'a> {
    pub config: &'a NetworkConfig,
    /// The node's public address, IPv4 unless the network is of only IPv6: a lease that names it is ours, whatever daemon
    /// wrote it.
    pub node: Option<IpAddr>,
    pub previous: Previous,
}

/// What the subnet of a former run is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Previous {
    /// There was none.
    None,
    /// Taken again when it is free and fits.
    Preferred(Subnets),
    /// This or nothing: pods live in it.
    Only(Subnets),
}

/// What is taken.
#[derive(Clone, Copy, Debug)]
pub struct Taken<'a> {
    /// In the store's order.
    pub leases: &'a [Lease],
    /// Subnets whose entries exist but can't be read: nobody's, and not free either.
    pub unreadable: &'a [Subnets],
}

/// What to do next.
#[derive(Clone, Debug, PartialEq)]
pub enum Choice {
    /// This lease is ours already: write it again with today's attributes.
    Reuse(Lease),
    /// This lease is ours and does not fit the configuration any more: delete it, then ask again without it.
    Delete(Lease),
    /// These are free.
    Take(Subnets),
}

/// Why there is no subnet to take.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoSubnet {
    #[error("out of subnets: every /{len} from {first} to {last} is leased")]
    Exhausted { first: IpAddr, last: IpAddr, len: u8 },
    #[error("subnet {subnets} is leased by {by} now")]
    PreviousTaken { subnets: Subnets, by: String },
    #[error("subnet {0} does not fit the network configuration any more")]
    PreviousUnfit(Subnets),
    #[error("this node has no public {family} address, and leases are told apart by it")]
    NoPublicIp { family: &'static str },
}

/// Contract §3.5, steps 3 to 5.
pub fn choose(wish: &Wish<'_>, taken: &Taken<'_>, rng: &mut impl Rng) -> Result<Choice, NoSubnet> {
    let config = wish.config;
    let family = if config.v4.is_some() { "IPv4" } else { "IPv6" };
    let node = wish.node.ok_or(NoSubnet::NoPublicIp { family })?;
    if let Previous::Only(subnets) = wish.previous {
        return choose_again(config, node, taken, subnets);
    }
    if let Some(own) = taken.leases.iter().find(|lease| lease.attrs.node() == Some(node)) {
        return Ok(match fits(&own.subnets, config) {
            true => Choice::Reuse(own.clone()),
            false => Choice::Delete(own.clone()),
        });
    }
    if let Previous::Preferred(subnets) = wish.previous {
        let subnets = without_host_bits(subnets);
        if fits(&subnets, config) && !taken.all().any(|other| other.overlaps(&subnets)) {
            return Ok(Choice::Take(subnets));
        }
    }
    let v4 = match &config.v4 {
        None => None,
        Some(range) => {
            let blocked = blocked(taken.all().filter_map(|subnets| subnets.v4).map(span_v4));
            let base = pick(range_v4(range), &blocked, rng).ok_or_else(|| exhausted(range))?;
            u32::try_from(base).ok().and_then(|base| Ipv4Net::new(base.into(), range.subnet_len).ok())
        }
    };
    let v6 = match &config.v6 {
        None => None,
        Some(range) => {
            let blocked = blocked(taken.all().filter_map(|subnets| subnets.v6).map(span_v6));
            let base = pick(range_v6(range), &blocked, rng).ok_or_else(|| exhausted(range))?;
            Ipv6Net::new(base.into(), range.subnet_len).ok()
        }
    };
    Ok(Choice::Take(Subnets { v4, v6 }))
}

/// Whether a lease of these subnets could have been given out under this configuration.
pub fn fits(subnets: &Subnets, config: &NetworkConfig) -> bool {
    let v4 = match (&subnets.v4, &config.v4) {
        (None, None) => true,
        (Some(net), Some(range)) => {
            net.prefix_len() == range.subnet_len
                && (range.subnet_min..=range.subnet_max).contains(&net.network())
        }
        _ => false,
    };
    let v6 = match (&subnets.v6, &config.v6) {
        (None, None) => true,
        (Some(net), Some(range)) => {
            net.prefix_len() == range.subnet_len
                && (range.subnet_min..=range.subnet_max).contains(&net.network())
        }
        _ => false,
    };
    v4 && v6
}

/// A running node: its subnet, whoever else may share its address.
fn choose_again(
    config: &NetworkConfig,
    node: IpAddr,
    taken: &Taken<'_>,
    subnets: Subnets,
) -> Result<Choice, NoSubnet> {
    let subnets = without_host_bits(subnets);
    if !fits(&subnets, config) {
        return Err(NoSubnet::PreviousUnfit(subnets));
    }
    let is_ours = |lease: &&Lease| lease.attrs.node() == Some(node);
    if let Some(own) = taken.leases.iter().filter(is_ours).find(|lease| lease.subnets == subnets) {
        return Ok(Choice::Reuse(own.clone()));
    }
    let mut in_the_way = taken.leases.iter().filter(|lease| lease.subnets.overlaps(&subnets));
    if let Some(other) = in_the_way.clone().find(|lease| !is_ours(lease)) {
        let by =
            other.attrs.node().map_or_else(|| "a lease that names no node".to_owned(), |ip| ip.to_string());
        return Err(NoSubnet::PreviousTaken { subnets, by });
    }
    if let Some(own) = in_the_way.next() {
        return Ok(Choice::Delete(own.clone()));
    }
    if taken.unreadable.iter().any(|other| other.overlaps(&subnets)) {
        return Err(NoSubnet::PreviousTaken { subnets, by: "an entry that can't be read".into() });
    }
    Ok(Choice::Take(subnets))
}

impl Taken<'_> {
    fn all(&self) -> impl Iterator<Item = &Subnets> {
        self.leases.iter().map(|lease| &lease.subnets).chain(self.unreadable)
    }
}

/// Subnets by their first address: from `first` to `last`, both inclusive, each `size` addresses long.
struct Candidates {
    first: u128,
    last: u128,
    size: u128,
}

/// One of the first [`CANDIDATES`] subnets that touch nothing in `blocked` (sorted, disjoint, inclusive ranges).
fn pick(candidates: Candidates, blocked: &[(u128, u128)], rng: &mut impl Rng) -> Option<u128> {
    let Candidates { first, last, size } = candidates;
    let mut free = Vec::with_capacity(CANDIDATES);
    let mut blocked = blocked.iter().copied().peekable();
    let mut base = Some(first);
    while let Some(start) = base
        && start <= last
        && free.len() < CANDIDATES
    {
        let end = start.saturating_add(size - 1);
        while blocked.next_if(|(_, blocked_end)| *blocked_end < start).is_some() {}
        base = match blocked.peek() {
            Some((blocked_start, blocked_end)) if *blocked_start <= end => {
                // On to the first candidate that begins behind what blocks this one.
                let behind = (blocked_end - start) / size + 1;
                behind.checked_mul(size).and_then(|offset| start.checked_add(offset))
            }
            _ => {
                free.push(start);
                start.checked_add(size)
            }
        };
    }
    free.choose(rng).copied()
}

/// Sorted, with overlapping ranges made one.
fn blocked(spans: impl Iterator<Item = (u128, u128)>) -> Vec<(u128, u128)> {
    let mut spans: Vec<_> = spans.collect();
    spans.sort_unstable();
    let mut merged: Vec<(u128, u128)> = Vec::with_capacity(spans.len());
    for (start, end) in spans {
        match merged.last_mut() {
            Some((_, last)) if start <= *last => *last = end.max(*last),
            _ => merged.push((start, end)),
        }
    }
    merged
}

fn span_v4(net: Ipv4Net) -> (u128, u128) {
    (u32::from(net.network()).into(), u32::from(net.broadcast()).into())
}

fn span_v6(net: Ipv6Net) -> (u128, u128) {
    (net.network().into(), net.broadcast().into())
}

fn range_v4(range: &SubnetRange<Ipv4Net, Ipv4Addr>) -> Candidates {
    Candidates {
        first: u32::from(range.subnet_min).into(),
        last: u32::from(range.subnet_max).into(),
        size: 1 << 32u8.saturating_sub(range.subnet_len),
    }
}

fn range_v6(range: &SubnetRange<Ipv6Net, Ipv6Addr>) -> Candidates {
    Candidates {
        first: range.subnet_min.into(),
        last: range.subnet_max.into(),
        // A /0 does not pass the configuration's checks; the largest power of two stands in for it.
        size: 1 << 128u8.saturating_sub(range.subnet_len).min(127),
    }
}

fn exhausted<Net, Addr: Copy + Into<IpAddr>>(range: &SubnetRange<Net, Addr>) -> NoSubnet {
    NoSubnet::Exhausted {
        first: range.subnet_min.into(),
        last: range.subnet_max.into(),
        len: range.subnet_len,
    }
}

fn without_host_bits(subnets: Subnets) -> Subnets {
    Subnets { v4: subnets.v4.map(|net| net.trunc()), v6: subnets.v6.map(|net| net.trunc()) }
}
