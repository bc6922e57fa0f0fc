//! What `status` and the metrics say about a tunnel: the tier and why, and every count, from whichever tier counted.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use flannel_common::counter::{Count, Counter};
use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use super::ladder::Tier;
use super::maps::OpenMaps;
use super::userspace::{CounterSnapshot, monotonic_now};

/// One tunnel at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelReport {
    pub device: String,
    pub underlay: String,
    pub tier: Tier,
    /// Why this tier, in one line.
    pub reason: String,
    /// By [`Counter::name`](flannel_common::counter::Counter::name); those that are zero too.
    pub counters: BTreeMap<String, Tally>,
    /// By subnet.
    pub peers: Vec<PeerReport>,
}

/// Packets, and bytes of inner packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    pub packets: u64,
    pub bytes: u64,
}

/// One remote node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerReport {
    pub subnet: Ipv4Net,
    pub node: Ipv4Addr,
    /// Largest inner packet the path to it carries, bytes. `None` while the tunnel's MTU is fixed.
    pub path_mtu: Option<u32>,
    /// How that is known, for people.
    pub path_mtu_reason: Option<String>,
    pub tx_packets: u64,
    pub tx_bytes: u64,
    pub rx_packets: u64,
    pub rx_bytes: u64,
    /// Packets to or from its subnet that were dropped, or would be if the source check enforced; by
    /// [`Counter::name`](flannel_common::counter::Counter::name), only those that are not zero.
    pub drops: BTreeMap<String, u64>,
    /// How long ago the last packet came from it, at the resolution of a kernel tick; `None` for never.
    pub last_seen_ms_ago: Option<u64>,
}

/// Whoever counts for one tunnel.
pub(super) struct Ledger<'a> {
    pub(super) kernel: Option<&'a OpenMaps>,
    pub(super) user: Option<&'a CounterSnapshot>,
}

impl Ledger<'_> {
    /// What happened to packets, by name; those that are zero too.
    pub(super) fn counters(&self) -> BTreeMap<String, Tally> {
        let in_kernel = self.kernel.map(OpenMaps::counts).unwrap_or_default();
        let in_user = self.user.map(|user| user.counts.as_slice()).unwrap_or_default();
        let of =
            |counts: &[Count], counter: Counter| counts.get(counter as usize).copied().unwrap_or_default();
        Counter::ALL
            .iter()
            .map(|counter| {
                let (a, b) = (of(&in_kernel, *counter), of(in_user, *counter));
                let tally = Tally {
                    packets: a.packets.wrapping_add(b.packets),
                    bytes: a.bytes.wrapping_add(b.bytes),
                };
                (counter.name().to_owned(), tally)
            })
            .collect()
    }

    /// A line for each of these subnets and nodes.
    pub(super) fn peers(&self, peers: impl Iterator<Item = (Ipv4Net, Ipv4Addr)>) -> Vec<PeerReport> {
        let entries = self.kernel.and_then(|maps| maps.entries().ok()).unwrap_or_default();
        let mut dropped = self.kernel.map(OpenMaps::peer_drops).unwrap_or_default();
        let in_use = entries.values().map(|peer| peer.index.saturating_add(1)).max().unwrap_or(0);
        let counts = self.kernel.map(|maps| maps.peer_counts(in_use)).unwrap_or_default();
        let now = monotonic_now();
        peers
            .map(|(subnet, node)| {
                let entry = entries.get(&subnet.network());
                let counted = entry.and_then(|peer| counts.get(peer.index as usize));
                let in_kernel = counted.copied().unwrap_or_default();
                let in_user = self.user.and_then(|user| user.peers.get(&subnet)).cloned().unwrap_or_default();
                let count = in_kernel.and(&in_user.traffic);
                let mut drops = entry.and_then(|peer| dropped.remove(&peer.index)).unwrap_or_default();
                for (reason, packets) in in_user.drops {
                    *drops.entry(reason).or_default() += packets;
                }
                PeerReport {
                    subnet,
                    node,
                    path_mtu: None,
                    path_mtu_reason: None,
                    tx_packets: count.tx_packets,
                    tx_bytes: count.tx_bytes,
                    rx_packets: count.rx_packets,
                    rx_bytes: count.rx_bytes,
                    drops: drops
                        .into_iter()
                        .map(|(reason, packets)| (reason.name().to_owned(), packets))
                        .collect(),
                    last_seen_ms_ago: age_in_ms(count.last_seen, now),
                }
            })
            .collect()
    }
}

/// Since a moment that the data path noted; the tick it noted may be a little ahead of what we read.
fn age_in_ms(last_seen: u64, now: u64) -> Option<u64> {
    (last_seen != 0).then(|| now.saturating_sub(last_seen) / 1_000_000)
}
