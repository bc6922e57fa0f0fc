//! The udp tunnel: inner packets in datagrams, by the best means this kernel and interface have.
//!
//! ```text
//! pod ─ cni0 ─ netfilter ─► flannel0 ─ tc: flannel_encap ─────────────────────────► underlay ─ wire
//!                               └ unknown destination ─► userspace/ (answers as flanneld does)
//! pod ─ cni0 ─ netfilter ◄─ flannel0 ◄─ tc: flannel_ingress ◄─ XDP: flannel_decap_xdp ◄─ underlay ─ wire
//!                               ▲            └ no XDP: decapsulates, TCP through the GRO pair
//!                               └ userspace/ ◄─ UDP socket ◄─ fragments, IP options, odd lengths
//! ```
//!
//! | file | knows |
//! |---|---|
//! | [`ladder`] | which tier, and why |
//! | [`programs`] | load, attach, pin, take over |
//! | [`maps`] | peers in, counts out |
//! | [`gro_pair`], [`underlay`], [`ethtool`] | the devices around it |
//! | `filters` | what hangs on clsact and no pin remembers |
//! | `place` | keeping it among the programs of others |
//! | `prober` | how large a packet a path carries |
//! | [`proof`] | whether XDP's marks arrive |
//! | [`remains`] | what is left of tunnels, for `cleanup` |
//! | [`unattended`] | what tunnels do while no agent runs, for `status` |
//! | [`userspace`] | the tunnel without BPF |
//!
//! Links and maps are pinned: packets flow on when the agent ends, however it ends, and [`Tunnels::put`] of the next
//! agent takes them over. [`Tunnels::remove`] is the only thing that takes a tunnel away.

mod checksum;
mod errno;
pub mod ethtool;
mod filters;
pub mod gro_pair;
pub mod ladder;
pub mod maps;
pub mod object;
mod place;
mod prober;
pub mod programs;
pub mod proof;
pub mod remains;
mod report;
mod running;
pub mod shortcut;
pub mod unattended;
pub mod underlay;
pub mod userspace;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use futures_util::future::select_all;
use ipnet::Ipv4Net;
use tokio::time::Instant;

pub use errno::Refusal;
pub use ladder::Tier;
pub use report::{PeerReport, Tally, TunnelReport};
use running::Running;

use super::netlink::{Netlink, NextHop};
use super::{HostError, News};
use crate::domain::host_state::{HostItem, Tunnel, TunnelPeer};
use crate::domain::path_mtu::Probe;

/// How often links and threads are looked at: what breaks without a netlink event is noticed within half a second, for
/// about twenty system calls.
const LOOK_EVERY: Duration = Duration::from_millis(500);

/// The tunnels of this host; one per network.
///
/// Everything happens in the network namespace of the threads that call, which must be the one `netlink` was opened in.
pub struct Tunnels {
    netlink: Netlink,
    bpffs: PathBuf,
    tunnels: BTreeMap<String, Running>,
    next_look: Instant,
}

impl Tunnels {
    /// Nothing is touched yet. `bpffs` is where pins go, `/sys/fs/bpf` on a host; it is mounted when a tunnel needs it.
    #[must_use]
    pub fn new(netlink: Netlink, bpffs: PathBuf) -> Self {
        Self { netlink, bpffs, tunnels: BTreeMap::new(), next_look: Instant::now() }
    }

    /// Brings the tunnel up on its device, which must exist; or changes or repairs the one that is up; or takes over
    /// what an earlier agent pinned, with its peers. What is in place is not touched.
    ///
    /// # Errors
    /// The device or the underlay is missing, the port is taken, or `--udp-datapath` names a tier that does not work
    /// here. What ran before still runs; what did not leaves nothing behind.
    pub async fn put(&mut self, tunnel: &Tunnel) -> Result<(), HostError> {
        let Self { netlink, bpffs, tunnels, .. } = self;
        let running = tunnels.entry(tunnel.device.clone()).or_insert_with(|| Running::new(tunnel.clone()));
        let keep = running.is_up() || running::is_carried_already(bpffs, tunnel);
        let result = running.bring_up(netlink, bpffs, tunnel).await;
        if !running.is_up() {
            tunnels.remove(&tunnel.device);
            if !keep && let Err(e) = ladder::tear_down(netlink, bpffs, tunnel).await {
                tracing::warn!("cleaning up after a tunnel that did not come up: {e}");
            }
        } else if running.awaits_kernel() {
            self.next_look = Instant::now();
        }
        result
    }

    /// Takes the tunnel away: links, maps, GRO pair, pins, user-space path. The device stays, and stays up. Nothing
    /// there is a success.
    ///
    /// # Errors
    /// What could not be removed; everything else was.
    pub async fn remove(&mut self, tunnel: &Tunnel) -> Result<(), HostError> {
        self.tunnels.remove(&tunnel.device);
        ladder::tear_down(&self.netlink, &self.bpffs, tunnel).await
    }

    /// Adds or moves peers; one result per peer.
    pub async fn put_peers(&mut self, peers: &[TunnelPeer]) -> Vec<Result<(), HostError>> {
        let matters =
            |peer: &&TunnelPeer| self.tunnels.get(&*peer.device).is_some_and(Running::knows_next_hops);
        let nodes: BTreeSet<Ipv4Addr> = peers.iter().filter(matters).map(|peer| peer.node).collect();
        let nodes: Vec<Ipv4Addr> = nodes.into_iter().collect();
        let hops: BTreeMap<Ipv4Addr, Result<NextHop, HostError>> =
            nodes.iter().copied().zip(self.netlink.next_hops(&nodes).await).collect();
        let put = |running: &mut Running, peer: &TunnelPeer| running.put_peer(peer, hops.get(&peer.node));
        let not_up = |peer: &TunnelPeer| {
            let reason = format!("the tunnel on {} is not up", peer.device);
            Err(HostError::new(format!("put {}", HostItem::TunnelPeer(peer.clone())), reason))
        };
        self.for_each(peers, put, not_up)
    }

    /// Removes peers; one result per peer. Gone already, alone or with its tunnel, is a success.
    pub async fn remove_peers(&mut self, peers: &[TunnelPeer]) -> Vec<Result<(), HostError>> {
        self.for_each(peers, Running::remove_peer, |_| Ok(()))
    }

    fn for_each(
        &mut self,
        peers: &[TunnelPeer],
        change: impl Fn(&mut Running, &TunnelPeer) -> Result<(), HostError>,
        without_tunnel: impl Fn(&TunnelPeer) -> Result<(), HostError>,
    ) -> Vec<Result<(), HostError>> {
        let mut touched = BTreeSet::new();
        let results = peers
            .iter()
            .map(|peer| match self.tunnels.get_mut(&*peer.device) {
                Some(running) => {
                    touched.insert(&*peer.device);
                    change(running, peer)
                }
                None => without_tunnel(peer),
            })
            .collect();
        for device in touched {
            if let Some(running) = self.tunnels.get(device) {
                running.peers_changed();
            }
        }
        results
    }

    /// The tunnels and peers that are truly in place: links attached to the interfaces of today, pins and GRO pair
    /// there, user-space path running, each peer's map entry with the next hop the routing table says now. What is not
    /// reported is put again by the agent.
    pub async fn observe(&mut self) -> Vec<HostItem> {
        let mut items = Vec::new();
        for running in self.tunnels.values_mut() {
            items.extend(running.observe(&self.netlink).await);
        }
        items
    }

    /// Returns when something netlink does not tell of needs another look: a link or pin vanished, the user-space path
    /// ended, XDP's marks did not arrive, or a predecessor's peers were taken over. Says each thing once. Returns with
    /// what came of probes, too. Cancel-safe; without tunnels it never returns.
    pub async fn news(&mut self) -> News {
        loop {
            if self.tunnels.is_empty() {
                std::future::pending::<()>().await;
            }
            let Self { netlink, tunnels, .. } = self;
            let heard = select_all(tunnels.values_mut().map(|running| Box::pin(running.heard(netlink))));
            tokio::select! {
                (heard, ..) = heard => return News::Heard(heard),
                () = tokio::time::sleep_until(self.next_look) => {}
            }
            self.next_look = Instant::now() + LOOK_EVERY;
            // All of them: a look also carries proofs forward.
            let news: Vec<bool> = self.tunnels.values_mut().map(Running::has_news).collect();
            if news.contains(&true) {
                return News::Disturbed;
            }
        }
    }

    /// Sends probes of path MTUs; what comes of them is told by [`Self::news`].
    ///
    /// # Errors
    /// No socket to be had.
    pub fn probe(&mut self, probes: &[Probe]) -> Result<(), HostError> {
        for probe in probes {
            let of = |running: &&mut Running| running.has_peer(probe.subnet);
            if let Some(running) = self.tunnels.values_mut().find(of) {
                running.probe(probe)?;
            }
        }
        Ok(())
    }

    /// Packets sent to each of these peers so far; 0 for one that is not there.
    #[must_use]
    pub fn sent(&self, subnets: &[Ipv4Net]) -> Vec<u64> {
        let mut sent = vec![0; subnets.len()];
        for running in self.tunnels.values() {
            for (total, packets) in sent.iter_mut().zip(running.sent(subnets)) {
                *total += packets.unwrap_or(0);
            }
        }
        sent
    }

    /// Whether user space carries a tunnel's packets for the moment, until the kernel's part is in place.
    #[must_use]
    pub fn await_kernel(&self) -> bool {
        self.tunnels.values().any(Running::awaits_kernel)
    }

    /// Tier, reason and counts of every tunnel.
    #[must_use]
    pub fn reports(&self) -> Vec<TunnelReport> {
        self.tunnels.values().filter_map(Running::report).collect()
    }
}
