//! What `status` and the metrics say about a tunnel: the tier and why, and every count, from whichever tier counted.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};

use super::ladder::Tier;

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
