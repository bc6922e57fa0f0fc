//! The shortcut past the pods' bridge, for nodes that are joined by veth (kind, laptops, labs).
//!
//! There super-packets of 64 KiB cross the "wire" whole. What the kernel notes on a packet that was encapsulated stays on
//! it after decapsulation, and a bridge, which has no tunnel offloads, splits such packets in software: a third of the
//! throughput is left. A program on the bridge's tc egress hands packets to the port of their pod instead; netfilter is
//! behind the packet by then. What is passed by is the bridge's own doing for packets that the host routes into it:
//!
//! | passed by | so the shortcut is taken only when |
//! |---|---|
//! | rules of nftables' bridge family, ebtables | there are none |
//! | VLAN filtering | it is off |
//! | a port's state, `locked` | left to the bridge, port by port |
//! | rules that match `physdev` | – : `br_netfilter` shows them bridged packets only, not those the host routes into the bridge (by reading `br_nf_post_routing`; no test) |
//! | the bridge's counters, captures on it | documented |
//!
//! Which MAC address is behind which port is the bridge's knowledge, read from its forwarding entries when they change.
//! What is not known, is unclear or has gone is left to the bridge.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;

use flannel_common::pod::{MAX_PODS, PodKey, PortIndex};
use ipnet::{IpNet, Ipv4Net};

use super::errno::Refusal;
use super::maps::Maps;
use crate::host::HostError;
use crate::host::netfilter;
use crate::host::netlink::{ForwardingEvents, Netlink};

/// A bridge that may be passed by.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodBridge {
    pub name: String,
    pub index: u32,
}

/// The bridge that has an address in our subnet, if it may be passed by.
///
/// # Errors
/// Why not, in words.
pub async fn find(netlink: &Netlink, own_subnet: Ipv4Net) -> Result<PodBridge, String> {
    let text = |error: HostError| error.to_string();
    let gateways: Vec<u32> = netlink
        .addresses()
        .await
        .map_err(text)?
        .into_iter()
        .filter(|address| matches!(address.net, IpNet::V4(net) if is_gateway(net, own_subnet)))
        .map(|address| address.ifindex)
        .collect();
    let bridges = netlink.bridges().await.map_err(text)?;
    let mut ours = bridges.into_iter().filter(|bridge| gateways.contains(&bridge.index));
    let Some(bridge) = ours.next() else {
        return Err(format!("no bridge has an address in {own_subnet} yet"));
    };
    if ours.next().is_some() {
        return Err(format!("more than one bridge has an address in {own_subnet}"));
    }
    if bridge.vlan_filtering {
        return Err(format!("{} filters VLANs", bridge.name));
    }
    is_unwatched(&bridge.name)?;
    Ok(PodBridge { name: bridge.name, index: bridge.index })
}

fn is_gateway(net: Ipv4Net, own_subnet: Ipv4Net) -> bool {
    own_subnet.contains(&net.addr()) && net.prefix_len() < 32 && net.addr() != Ipv4Addr::UNSPECIFIED
}

/// Whether no rules look at what the bridge does.
///
/// # Errors
/// Which do.
pub(super) fn is_unwatched(name: &str) -> Result<(), String> {
    match netfilter::bridge_tables() {
        Ok(0) => {}
        Ok(count) => return Err(format!("{count} nftables tables of the bridge family watch {name}")),
        Err(e) => return Err(format!("whether nftables watches {name} can't be told: {e}")),
    }
    let modules = fs::read_to_string("/proc/modules").unwrap_or_default();
    let is_loaded = |module: &str| modules.lines().any(|line| line.split(' ').next() == Some(module));
    match ["ebtable_filter", "ebtable_nat"].into_iter().find(|module| is_loaded(module)) {
        Some(module) => Err(format!("ebtables watches {name} (module {module})")),
        None => Ok(()),
    }
}

/// Keeps the map of pods as the bridge's forwarding entries are.
pub(super) struct Shortcut {
    pub(super) bridge: PodBridge,
    events: ForwardingEvents,
    /// The map may be behind.
    stale: bool,
    /// More pods than the map holds was said.
    said_full: bool,
}

impl Shortcut {
    pub(super) fn new(netlink: &Netlink, bridge: PodBridge) -> Result<Self, HostError> {
        Ok(Self { bridge, events: netlink.forwarding_events()?, stale: true, said_full: false })
    }

    /// Reads the bridge's entries and brings the map up to them.
    pub(super) async fn refresh(&mut self, netlink: &Netlink, maps: &mut Maps) -> Result<(), HostError> {
        let bridges = netlink.bridges().await?;
        let ports: Vec<u32> = bridges
            .iter()
            .filter(|bridge| bridge.index == self.bridge.index)
            .flat_map(|bridge| &bridge.ports)
            .filter(|port| port.forwarding && !port.locked)
            .map(|port| port.index)
            .collect();
        let entries = netlink.forwarding(self.bridge.index).await?;
        let mut pods: BTreeMap<PodKey, PortIndex> = entries
            .into_iter()
            .filter(|(_, port)| ports.contains(port))
            .map(|(mac, port)| (PodKey::new(mac), port))
            .collect();
        if pods.len() > MAX_PODS as usize {
            if !self.said_full {
                tracing::warn!(
                    "{} has {} addresses, {MAX_PODS} are passed on directly and the rest by the bridge",
                    self.bridge.name,
                    pods.len()
                );
            }
            self.said_full = true;
            pods = pods.into_iter().take(MAX_PODS as usize).collect();
        }
        maps.set_pods(&pods)?;
        self.stale = false;
        Ok(())
    }

    /// Follows the bridge; never returns. Cancel-safe.
    pub(super) async fn follow(&mut self, netlink: &Netlink, maps: &mut Maps) {
        loop {
            if self.stale
                && let Err(e) = self.refresh(netlink, maps).await
            {
                tracing::debug!("{e}");
                tokio::time::sleep(RETRY).await;
                continue;
            }
            self.events.changed().await;
            self.stale = true;
        }
    }
}

/// After a refresh that failed.
const RETRY: std::time::Duration = std::time::Duration::from_secs(1);

/// No pod is passed on directly any more.
///
/// # Errors
/// The kernel refuses to write the map.
pub(super) fn forget_pods(maps: &mut Maps) -> Result<(), Refusal> {
    maps.set_pods(&BTreeMap::new())
}
