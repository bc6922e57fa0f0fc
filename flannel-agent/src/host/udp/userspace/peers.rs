//! Which node leases an inner address, and what was exchanged with it.
//!
//! Leases of one network have one prefix length, so a lookup is one mask and one hash; should a network ever mix
//! lengths, the longest prefix wins.

use std::{
    collections::{BTreeMap, HashMap},
    net::Ipv4Addr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use flannel_common::counter::Counter;
use flannel_common::peer::PeerCount;
use ipnet::Ipv4Net;
use nix::sys::time::TimeValLike as _;
use nix::time::{ClockId, clock_gettime};

use super::PeerTally;

/// One node's lease.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) node: Ipv4Addr,
    pub(super) traffic: Arc<Traffic>,
}

/// Packets and bytes of inner packets, per direction. Under the tiers of the kernel thousands of peers have none here.
#[derive(Debug, Default)]
pub(super) struct Traffic(OnceLock<Box<Counts>>);

#[derive(Debug, Default)]
struct Counts {
    tx_packets: AtomicU64,
    tx_bytes: AtomicU64,
    rx_packets: AtomicU64,
    rx_bytes: AtomicU64,
    last_seen: AtomicU64,
    /// Most peers have none.
    drops: Mutex<BTreeMap<Counter, u64>>,
}

impl Traffic {
    pub(super) fn sent(&self, packets: u64, bytes: u64) {
        let counts = self.counts();
        counts.tx_packets.fetch_add(packets, Relaxed);
        counts.tx_bytes.fetch_add(bytes, Relaxed);
    }

    pub(super) fn received(&self, packets: u64, bytes: u64) {
        let counts = self.counts();
        counts.rx_packets.fetch_add(packets, Relaxed);
        counts.rx_bytes.fetch_add(bytes, Relaxed);
        counts.last_seen.store(monotonic_now(), Relaxed);
    }

    pub(super) fn dropped(&self, reason: Counter, packets: u64) {
        *self.counts().drops().entry(reason).or_default() += packets;
    }

    fn counts(&self) -> &Counts {
        self.0.get_or_init(Box::default)
    }

    fn snapshot(&self) -> PeerTally {
        self.0.get().map_or_else(PeerTally::default, |counts| counts.snapshot())
    }
}

impl Counts {
    /// A panic elsewhere leaves whole numbers.
    fn drops(&self) -> MutexGuard<'_, BTreeMap<Counter, u64>> {
        self.drops.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn snapshot(&self) -> PeerTally {
        let traffic = PeerCount {
            tx_packets: self.tx_packets.load(Relaxed),
            tx_bytes: self.tx_bytes.load(Relaxed),
            rx_packets: self.rx_packets.load(Relaxed),
            rx_bytes: self.rx_bytes.load(Relaxed),
            last_seen: self.last_seen.load(Relaxed),
            tick: 0,
        };
        PeerTally { traffic, drops: self.drops().clone() }
    }
}

/// Nanoseconds of CLOCK_MONOTONIC as of the kernel's last tick: the clock of the programs.
pub(in crate::host::udp) fn monotonic_now() -> u64 {
    // It can't fail for a clock that every kernel has; 0 is "never".
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map_or(0, |time| time.num_nanoseconds());
    u64::try_from(now).unwrap_or(0)
}

/// All peers at one moment; replaced as a whole.
#[derive(Debug, Default)]
pub(super) struct PeerTable {
    /// Longest prefix first.
    by_length: Vec<(Ipv4Net, HashMap<Ipv4Addr, Peer>)>,
}

impl PeerTable {
    /// A subnet that was in `previous` keeps its counters; of two entries for one subnet the last one wins.
    pub(super) fn new(peers: impl IntoIterator<Item = (Ipv4Net, Ipv4Addr)>, previous: &Self) -> Self {
        let mut by_length: BTreeMap<u8, HashMap<Ipv4Addr, Peer>> = BTreeMap::new();
        for (subnet, node) in peers {
            let traffic = previous.get(subnet).map(|peer| Arc::clone(&peer.traffic)).unwrap_or_default();
            by_length
                .entry(subnet.prefix_len())
                .or_default()
                .insert(subnet.network(), Peer { node, traffic });
        }
        let any = Ipv4Addr::UNSPECIFIED;
        let by_length = by_length
            .into_iter()
            .rev()
            .filter_map(|(length, peers)| Some((Ipv4Net::new(any, length).ok()?, peers)))
            .collect();
        Self { by_length }
    }

    /// The node that leases `address`.
    pub(super) fn lookup(&self, address: Ipv4Addr) -> Option<&Peer> {
        self.by_length.iter().find_map(|(mask, peers)| peers.get(&(address & mask.netmask())))
    }

    fn get(&self, subnet: Ipv4Net) -> Option<&Peer> {
        let (_, peers) = self.by_length.iter().find(|(mask, _)| mask.prefix_len() == subnet.prefix_len())?;
        peers.get(&subnet.network())
    }

    /// Packets sent to the peer with this subnet; 0 where there is none.
    pub(super) fn sent(&self, subnet: Ipv4Net) -> u64 {
        let counts = self.get(subnet).and_then(|peer| peer.traffic.0.get());
        counts.map_or(0, |counts| counts.tx_packets.load(Relaxed))
    }

    pub(super) fn counts(&self) -> BTreeMap<Ipv4Net, PeerTally> {
        let all = self.by_length.iter().flat_map(|(mask, peers)| {
            peers.iter().filter_map(|(base, peer)| {
                let subnet = Ipv4Net::new(*base, mask.prefix_len()).ok()?;
                Some((subnet, peer.traffic.snapshot()))
            })
        });
        all.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn ip(text: &str) -> Ipv4Addr {
        text.parse().unwrap()
    }

    #[test]
    fn the_longest_prefix_wins() {
        let peers = [
            (net("10.5.0.0/16"), ip("192.0.2.1")),
            (net("10.5.54.0/24"), ip("192.0.2.2")),
            (net("10.5.54.128/25"), ip("192.0.2.3")),
        ];
        let table = PeerTable::new(peers, &PeerTable::default());
        for (address, node) in [
            ("10.5.54.200", Some("192.0.2.3")),
            ("10.5.54.7", Some("192.0.2.2")),
            ("10.5.55.7", Some("192.0.2.1")),
            ("10.6.0.1", None),
        ] {
            assert_eq!(table.lookup(ip(address)).map(|p| p.node), node.map(ip), "{address}");
        }
    }

    #[test]
    fn a_moved_peer_keeps_its_counters_and_a_removed_one_is_gone() {
        let subnets = [net("10.5.1.0/24"), net("10.5.2.0/24")];
        let before = PeerTable::new(subnets.map(|s| (s, ip("192.0.2.1"))), &PeerTable::default());
        before.lookup(ip("10.5.1.9")).unwrap().traffic.sent(3, 300);
        let after = PeerTable::new([(subnets[0], ip("192.0.2.9"))], &before);
        assert_eq!(after.lookup(ip("10.5.1.9")).unwrap().node, ip("192.0.2.9"));
        assert_eq!((after.sent(subnets[0]), after.sent(subnets[1])), (3, 0));
        let counts = after.counts();
        assert_eq!(counts.len(), 1);
        assert_eq!(counts[&subnets[0]].traffic.tx_bytes, 300);
    }
}
