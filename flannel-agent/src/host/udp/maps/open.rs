//! The maps as anybody may read them: by the agent that loaded them, or from their pins when no agent runs.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use aya::maps::{Array, HashMap, IterableMap as _, Map, MapData, MapError, PerCpuArray, PerCpuHashMap};
use flannel_common::counter::{Count, Counter};
use flannel_common::peer::{MAX_PEERS, Peer, PeerCount, PeerDrop, PeerKey, place};

use super::{MapShape, SHAPES, batch, cpus, from_wire, to_wire};
use crate::host::udp::errno::Refusal;
use crate::host::udp::programs::{LoadedMaps, PinFolder};

/// The peers, and every map that counts.
pub struct OpenMaps {
    pub(super) peers: HashMap<MapData, PeerKey, Peer>,
    counters: PerCpuArray<MapData, Count>,
    pub(super) peer_counters: Array<MapData, PeerCount>,
    pub(super) peer_drops: PerCpuHashMap<MapData, PeerDrop, u64>,
}

impl OpenMaps {
    /// Takes them out of a loaded object.
    pub(super) fn of(loaded: &mut LoadedMaps) -> Result<Self, Refusal> {
        Self::each(|shape| shape.take(loaded))
    }

    /// Opens what is pinned, and changes nothing.
    ///
    /// # Errors
    /// A map is not there, has another shape, or may not be read.
    pub fn pinned(pins: &PinFolder) -> Result<Self, Refusal> {
        Self::each(|shape| {
            let path = pins.map(shape.pin);
            let doing = || format!("open the pinned map {}", path.display());
            let failed = |e: &MapError| Refusal::from_map(doing(), e);
            let map = MapData::from_pin(&path).map_err(|e| failed(&e))?;
            let info = map.info().map_err(|e| failed(&e))?;
            match shape.difference(&info) {
                Some(difference) => Err(Refusal::new(doing(), difference)),
                None => Map::from_map_data(map).map_err(|e| failed(&e)),
            }
        })
    }

    fn each(mut open: impl FnMut(&MapShape) -> Result<Map, Refusal>) -> Result<Self, Refusal> {
        let [peers, counters, peer_counters, peer_drops, ..] = &SHAPES;
        let wrong = |e: MapError| Refusal::from_map("open the maps of the eBPF object", &e);
        Ok(Self {
            peers: HashMap::try_from(open(peers)?).map_err(wrong)?,
            counters: PerCpuArray::try_from(open(counters)?).map_err(wrong)?,
            peer_counters: Array::try_from(open(peer_counters)?).map_err(wrong)?,
            peer_drops: PerCpuHashMap::try_from(open(peer_drops)?).map_err(wrong)?,
        })
    }

    pub(super) fn data(&self) -> [&MapData; 4] {
        [self.peers.map(), self.counters.map(), self.peer_counters.map(), self.peer_drops.map()]
    }

    /// Base address of each subnet, and its node.
    ///
    /// # Errors
    /// The kernel refuses to read the map.
    pub fn entries(&self) -> Result<BTreeMap<Ipv4Addr, Peer>, Refusal> {
        let mut entries = Vec::new();
        batch::each(self.peers.map(), |key, peer| entries.push((from_wire(key), *peer)))
            .map_err(|e| Refusal::from_io("read map PEERS", &e))?;
        Ok(entries.into_iter().collect())
    }

    /// Sums over all CPUs, in index order of [`Counter`]. What can't be read counts as zero.
    #[must_use]
    pub fn counts(&self) -> Vec<Count> {
        Counter::ALL.iter().map(|counter| self.count(*counter)).collect()
    }

    /// Sum over all CPUs; zero when it can't be read.
    #[must_use]
    pub fn count(&self, counter: Counter) -> Count {
        let values = self.counters.get(&(counter as u32), 0);
        values.map_or_else(
            |_| Count::default(),
            |values| {
                values.iter().fold(Count::default(), |sum, cpu| Count {
                    packets: sum.packets.wrapping_add(cpu.packets),
                    bytes: sum.bytes.wrapping_add(cpu.bytes),
                })
            },
        )
    }

    /// What the peer with this subnet has sent and received; `None` when there is none.
    #[must_use]
    pub fn count_of(&self, subnet: Ipv4Addr) -> Option<PeerCount> {
        self.peers.get(&to_wire(subnet), 0).ok().map(|peer| self.peer_count(peer.index))
    }

    /// Sum over all CPUs for the peer with this index; zero when it can't be read.
    #[must_use]
    pub fn peer_count(&self, index: u32) -> PeerCount {
        (0..=cpus::highest())
            .filter_map(|cpu| self.peer_counters.get(&place(index, cpu)?, 0).ok())
            .fold(PeerCount::default(), |sum, cpu| sum.and(&cpu))
    }

    /// Sums over all CPUs for the first `peers` indexes, in few system calls; zero where they can't be read.
    #[must_use]
    pub fn peer_counts(&self, peers: u32) -> Vec<PeerCount> {
        let peers = peers.min(MAX_PEERS) as usize;
        let mut sums = vec![PeerCount::default(); peers];
        for first in (0..=cpus::highest()).filter_map(|cpu| place(0, cpu)) {
            let counts = batch::counts(self.peer_counters.map(), first, peers);
            for (sum, count) in sums.iter_mut().zip(counts.iter().flatten()) {
                *sum = sum.and(count);
            }
        }
        sums
    }

    /// Packets dropped on all CPUs, by peer index and reason. What can't be read, or is no reason this agent knows, is left out.
    #[must_use]
    pub fn peer_drops(&self) -> BTreeMap<u32, BTreeMap<Counter, u64>> {
        let mut drops: BTreeMap<u32, BTreeMap<Counter, u64>> = BTreeMap::new();
        for (key, packets) in self.peer_drops.iter().flatten() {
            if let Some(reason) = Counter::ALL.get(key.reason as usize) {
                drops.entry(key.peer).or_default().insert(*reason, packets.iter().sum());
            }
        }
        drops
    }
}
