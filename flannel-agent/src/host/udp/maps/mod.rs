//! The maps shared with the programs: remote nodes in, counts out.
//!
//! They are pinned and survive the agent, and with them the peers' places in `PEER_COUNTERS`: a subnet's index is
//! taken from the adopted entry, so its counts go on across restarts. A pinned map is used only when it has exactly
//! the shape this agent was built with; the kernel itself would let a program be loaded with any map at that path. From a
//! map of another layout version the peers are taken over, so that no packet is lost in between; counts begin anew.

mod batch;
mod cpus;
mod foreign;
mod indexes;
mod open;
mod subnets;
mod towards;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;

use aya::maps::xdp::XdpMapError;
use aya::maps::{DevMapHash, HashMap, IterableMap as _, Map, MapData, MapError, MapInfo, MapType};
use flannel_common::counter::{Count, Counter, MAX_COUNTERS};
use flannel_common::peer::{
    MAX_PEER_DROPS, MAX_PEERS, Peer, PeerCount, PeerDrop, PeerKey, SUBNETS_AND_ORDER, place,
};
use flannel_common::pod::{MAX_PODS, PodKey, PortIndex};
use flannel_common::tunnel::Settings;

use self::indexes::Indexes;
pub use self::open::OpenMaps;
use self::subnets::Subnets;
pub use self::towards::Towards;
use super::errno::Refusal;
use super::programs::{LoadedMaps, PinFolder};

/// The shape of a map: what must be equal for two agents to share it.
#[derive(Clone, Copy, Debug)]
pub struct MapShape {
    /// Name in the object.
    pub name: &'static str,
    /// Name of the pin.
    pub pin: &'static str,
    kind: MapType,
    key: u32,
    value: u32,
    entries: Entries,
}

/// How many entries a map has.
#[derive(Clone, Copy, Debug)]
enum Entries {
    Fixed(u32),
    /// For each CPU.
    PerCpu(u32),
}

/// Pin of the map of peers, the same in every layout version.
pub const PEERS_PIN: &str = "peers";

/// Every map of the object that is pinned.
pub const SHAPES: [MapShape; 7] = [
    MapShape {
        name: "PEERS",
        pin: PEERS_PIN,
        kind: MapType::Hash,
        key: size_of::<PeerKey>() as u32,
        value: size_of::<Peer>() as u32,
        entries: Entries::Fixed(MAX_PEERS),
    },
    MapShape {
        name: "COUNTERS",
        pin: "counters",
        kind: MapType::PerCpuArray,
        key: 4,
        value: size_of::<Count>() as u32,
        entries: Entries::Fixed(MAX_COUNTERS),
    },
    MapShape {
        name: "PEER_COUNTERS",
        pin: "peer_counters",
        kind: MapType::Array,
        key: 4,
        value: size_of::<PeerCount>() as u32,
        entries: Entries::PerCpu(MAX_PEERS),
    },
    MapShape {
        name: "PEER_DROPS",
        pin: "peer_drops",
        kind: MapType::PerCpuHash,
        key: size_of::<PeerDrop>() as u32,
        value: 8,
        entries: Entries::Fixed(MAX_PEER_DROPS),
    },
    MapShape {
        name: "PODS",
        pin: "pods",
        kind: MapType::Hash,
        key: size_of::<PodKey>() as u32,
        value: size_of::<PortIndex>() as u32,
        entries: Entries::Fixed(MAX_PODS),
    },
    MapShape {
        name: "PORTS",
        pin: "ports",
        kind: MapType::DevMapHash,
        key: size_of::<PortIndex>() as u32,
        value: 8,
        entries: Entries::Fixed(MAX_PODS),
    },
    MapShape {
        name: "SUBNETS",
        pin: "subnets",
        kind: MapType::Array,
        key: 4,
        value: size_of::<Peer>() as u32,
        entries: Entries::Fixed(SUBNETS_AND_ORDER),
    },
];

impl MapShape {
    /// Takes the map of this name out of a loaded object.
    fn take(&self, loaded: &mut LoadedMaps) -> Result<Map, Refusal> {
        let doing = || format!("open map {}", self.name);
        match loaded.take(self.name) {
            Some(map) => map.map_err(|e| Refusal::from_map(doing(), &e)),
            None => Err(Refusal::new(doing(), "the eBPF object has no such map")),
        }
    }

    /// What to ask the kernel for, with the flags that the object wants; `None` when the object wants another kind of map.
    pub(super) fn definition(&self, wanted: &aya_obj::Map) -> Option<aya_obj::Map> {
        let (kind, flags) = (self.kind as u32, wanted.map_flags());
        (wanted.map_type() == kind)
            .then(|| aya_obj::Map::new_from_params(kind, self.key, self.value, self.entries(), flags))
    }

    fn entries(&self) -> u32 {
        match self.entries {
            Entries::Fixed(entries) => entries,
            Entries::PerCpu(entries) => entries.saturating_mul(cpus::highest().saturating_add(1)),
        }
    }

    /// What differs, in words; `None` when the map can be used.
    fn difference(&self, info: &MapInfo) -> Option<String> {
        if info.map_type().ok() != Some(self.kind) {
            return Some(format!("it is a {:?}, not a {:?}", info.map_type().ok(), self.kind));
        }
        [
            ("key size", info.key_size(), self.key),
            ("value size", info.value_size(), self.value),
            ("entries", info.max_entries(), self.entries()),
        ]
        .into_iter()
        .find(|(_, is, wanted)| is != wanted)
        .map(|(what, is, wanted)| format!("its {what} is {is}, not {wanted}"))
    }
}

/// Unpins every pinned map of another shape, so that loading makes a new one. Programs still attached keep using the
/// old one until they are replaced.
///
/// # Errors
/// A pin that can't be read or removed.
pub fn discard_strangers(pins: &PinFolder, settings: &Settings) -> Result<(), Refusal> {
    let [.., subnets] = &SHAPES;
    for shape in &SHAPES {
        let path = pins.map(shape.pin);
        if !path.exists() {
            continue;
        }
        let difference = MapData::from_pin(&path).and_then(|map| {
            let difference = shape.difference(&map.info()?);
            if difference.is_none() && shape.name == subnets.name {
                return subnets::difference(map, settings);
            }
            Ok(difference)
        });
        // Not a map at all.
        let difference =
            difference.unwrap_or_else(|e| Some(Refusal::from_map("it can't be read", &e).to_string()));
        if let Some(difference) = difference {
            tracing::warn!("pinned map {} is not used: {difference}; making a new one", path.display());
            fs::remove_file(&path)
                .map_err(|e| Refusal::from_io(format!("remove the pin {}", path.display()), &e))?;
        }
    }
    Ok(())
}

/// The maps of a running tunnel.
pub struct Maps {
    open: OpenMaps,
    pods: HashMap<MapData, PodKey, PortIndex>,
    ports: DevMapHash<MapData>,
    /// The entries of `peers` once more.
    subnets: Subnets,
    indexes: Indexes,
    /// Of all entries of `peers`, as they were last seen or written by us.
    digest: u64,
}

impl Maps {
    /// Takes the maps out of a loaded object. Entries an earlier agent left stay, with their indexes.
    ///
    /// # Errors
    /// The object has other maps than this agent was built for, or the kernel refuses to read them.
    pub fn take(mut loaded: LoadedMaps, settings: &Settings) -> Result<Self, Refusal> {
        let [_, _, counts, drops, ..] = &SHAPES;
        let counts_are_new = loaded.is_new(counts.name) && loaded.is_new(drops.name);
        let open = OpenMaps::of(&mut loaded)?;
        let wrong = |e: MapError| Refusal::from_map("open the maps of the eBPF object", &e);
        let [.., pods, ports, subnets] = &SHAPES;
        let mut maps = Self {
            open,
            pods: HashMap::try_from(pods.take(&mut loaded)?).map_err(wrong)?,
            ports: DevMapHash::try_from(ports.take(&mut loaded)?).map_err(wrong)?,
            subnets: Subnets::open(subnets.take(&mut loaded)?, settings)?,
            indexes: if counts_are_new { Indexes::of_new_maps() } else { Indexes::default() },
            digest: 0,
        };
        maps.adopt_indexes()?;
        let entries = maps.open.entries()?;
        maps.digest = digest(&entries);
        maps.subnets.align(&entries);
        Ok(maps)
    }

    /// Reads which places in `PEER_COUNTERS` are taken; drops entries whose place is impossible or another's.
    fn adopt_indexes(&mut self) -> Result<(), Refusal> {
        for (subnet, peer) in self.open.entries()? {
            if !self.indexes.take(peer.index) {
                tracing::warn!(
                    "adopted peer at {subnet} has counter index {}, which can't be; dropped",
                    peer.index
                );
                self.delete(to_wire(subnet)).map_err(|e| Refusal::from_map("clean map PEERS", &e))?;
            }
        }
        Ok(())
    }

    /// The maps that count and those of the peers, for reading.
    #[must_use]
    pub fn open(&self) -> &OpenMaps {
        &self.open
    }

    /// Pins what lost its pin: the maps are still ours by file descriptor.
    ///
    /// # Errors
    /// Missing permission.
    pub fn ensure_pinned(&self, pins: &PinFolder) -> Result<(), Refusal> {
        for (shape, map) in SHAPES.iter().zip(self.data()) {
            let path = pins.map(shape.pin);
            if !path.exists() {
                map.pin(&path).map_err(|e| Refusal::from_pin(format!("pin map {}", shape.name), &e))?;
            }
        }
        Ok(())
    }

    /// The first map without its pin.
    #[must_use]
    pub fn unpinned(&self, pins: &PinFolder) -> Option<&'static str> {
        SHAPES.iter().find(|shape| !pins.map(shape.pin).exists()).map(|shape| shape.name)
    }

    fn data(&self) -> [&MapData; 7] {
        let [peers, counters, peer_counters, peer_drops] = self.open.data();
        [peers, counters, peer_counters, peer_drops, self.pods.map(), self.ports.map(), self.subnets.map()]
    }

    /// Whether somebody else wrote to the maps of peers since [`Maps::accept`]. A map that can't be read is not to blame.
    #[must_use]
    pub fn is_touched(&self) -> bool {
        let mut sum = 0;
        let read = batch::each(self.open.peers.map(), |key, peer| sum ^= batch::digest(key, peer));
        read.is_ok() && (sum != self.digest || self.subnets.is_touched(sum))
    }

    /// These entries have been compared with what is wanted: what differs from them next is news.
    pub fn accept(&mut self, entries: &BTreeMap<Ipv4Addr, Peer>) {
        self.subnets.align(entries);
        let seen = digest(entries);
        if seen != self.digest {
            self.digest = seen;
            // Places of entries that somebody deleted are free again.
            self.indexes.clear();
            for peer in entries.values() {
                self.indexes.take(peer.index);
            }
        }
    }

    /// Adds or replaces, in one step. A subnet that has an entry keeps its counts, also when it moved to another node.
    ///
    /// # Errors
    /// The map is full (16384 peers), or the kernel refuses to write it.
    pub fn put(&mut self, subnet: Ipv4Addr, to: Towards) -> Result<(), Refusal> {
        let doing = || format!("write the map entry of peer {subnet}");
        let key = to_wire(subnet);
        let existing = match self.open.peers.get(&key, 0) {
            Ok(peer) => Some(peer),
            Err(MapError::KeyNotFound) => None,
            Err(e) => return Err(Refusal::from_map(doing(), &e)),
        };
        let index = match existing {
            Some(peer) => peer.index,
            None => self.fresh_index(doing)?,
        };
        let peer = Peer { node: to_wire(to.node), ifindex: to.ifindex, index };
        if existing != Some(peer) {
            self.open.peers.insert(key, peer, 0).map_err(|e| {
                if existing.is_none() {
                    self.indexes.free(index);
                }
                Refusal::from_map(doing(), &e)
            })?;
        }
        self.subnets.set(key, Some(&peer));
        self.digest ^= existing.map_or(0, |peer| batch::digest(key, &peer)) ^ batch::digest(key, &peer);
        Ok(())
    }

    /// The lowest free place, with its counts set to zero.
    fn fresh_index(&mut self, doing: impl Fn() -> String) -> Result<u32, Refusal> {
        let index = self
            .indexes
            .lowest_free()
            .ok_or_else(|| Refusal::new(doing(), format!("the map holds at most {MAX_PEERS} peers")))?;
        if self.indexes.may_have_counts(index) {
            self.forget_counts(index).map_err(|e| Refusal::from_map(doing(), &e))?;
        }
        self.indexes.take(index);
        Ok(index)
    }

    fn forget_counts(&mut self, index: u32) -> Result<(), MapError> {
        for place in (0..=cpus::highest()).filter_map(|cpu| place(index, cpu)) {
            self.open.peer_counters.set(place, PeerCount::default(), 0)?;
        }
        if self.open.peer_drops.keys().next().is_some() {
            for reason in Counter::ALL {
                let key = PeerDrop { peer: index, reason: *reason as u32 };
                ignore_missing(self.open.peer_drops.remove(&key))?;
            }
        }
        Ok(())
    }

    /// That there is no entry is a success.
    ///
    /// # Errors
    /// The kernel refuses to write the map.
    pub fn remove(&mut self, subnet: Ipv4Addr) -> Result<(), Refusal> {
        let key = to_wire(subnet);
        let existing = self.open.peers.get(&key, 0).ok();
        self.delete(key)
            .map_err(|e| Refusal::from_map(format!("remove the map entry of peer {subnet}"), &e))?;
        if let Some(peer) = existing {
            self.indexes.free(peer.index);
            self.digest ^= batch::digest(key, &peer);
        }
        Ok(())
    }

    fn delete(&mut self, key: PeerKey) -> Result<(), MapError> {
        self.subnets.set(key, None);
        ignore_missing(self.open.peers.remove(&key))
    }

    /// Makes the pods' ports these and no others. A port that has gone in the meantime is left out.
    ///
    /// # Errors
    /// The kernel refuses to read or write the maps.
    pub fn set_pods(&mut self, wanted: &BTreeMap<PodKey, PortIndex>) -> Result<(), Refusal> {
        let failed = |e: MapError| Refusal::from_map("write the map of pods", &e);
        let mut present = BTreeMap::new();
        for entry in self.pods.iter() {
            let (key, port) = entry.map_err(failed)?;
            present.insert(key, port);
        }
        for key in present.keys().filter(|key| !wanted.contains_key(*key)) {
            ignore_missing(self.pods.remove(key)).map_err(failed)?;
        }
        let needed: BTreeSet<PortIndex> = wanted.values().copied().collect();
        let known: BTreeSet<PortIndex> = self.ports.keys().filter_map(Result::ok).collect();
        for port in known.difference(&needed) {
            ignore_missing(self.ports.remove(*port)).map_err(failed)?;
        }
        for port in needed.difference(&known) {
            self.add_port(*port)?;
        }
        for (key, port) in wanted.iter().filter(|(key, port)| present.get(*key) != Some(*port)) {
            self.pods.insert(*key, port, 0).map_err(failed)?;
        }
        Ok(())
    }

    /// Makes the door to the room known: while it exists, TCP goes through it. (The kernel takes it out with the device.)
    ///
    /// # Errors
    /// The kernel refuses to write the map.
    pub fn add_port(&mut self, port: PortIndex) -> Result<(), Refusal> {
        match self.ports.insert(port, port, None, 0) {
            Err(XdpMapError::MapError(MapError::SyscallError(e))) if is_gone(&e.io_error) => Ok(()),
            Err(XdpMapError::MapError(e)) => Err(Refusal::from_map("write the map of ports", &e)),
            // No program is chained to a port.
            Err(e @ XdpMapError::ChainedProgramNotSupported) => {
                Err(Refusal::new("write the map of ports", e.to_string()))
            }
            Ok(()) => Ok(()),
        }
    }

    /// Takes the peers of another layout version's map over, so that the programs about to be attached know them all:
    /// every version's key is the subnet, and every version's value begins with the node. They leave by `ifindex` until
    /// the agent says otherwise. A map that has peers already is left alone.
    ///
    /// # Errors
    /// The kernel refuses to write the map. A map that can't be read is passed over: its peers come with the leases.
    pub fn inherit(&mut self, older: &Path, ifindex: u32) -> Result<usize, Refusal> {
        if self.open.peers.keys().next().is_some() {
            return Ok(0);
        }
        let entries = match foreign::entries(older) {
            Ok(entries) => entries,
            Err(e) => {
                tracing::warn!("the peers in {} can't be taken over: {e}", older.display());
                return Ok(0);
            }
        };
        for (subnet, node) in &entries {
            self.put(from_wire(*subnet), Towards { node: from_wire(*node), ifindex })?;
        }
        Ok(entries.len())
    }
}

fn digest(entries: &BTreeMap<Ipv4Addr, Peer>) -> u64 {
    entries.iter().fold(0, |sum, (subnet, peer)| sum ^ batch::digest(to_wire(*subnet), peer))
}

/// What the kernel says to the index of an interface that does not exist.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENODEV))
}

fn ignore_missing(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(e)) if e.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        result => result,
    }
}

/// An address as it stands in the packet.
pub(super) fn to_wire(address: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(address.octets())
}

pub(super) fn from_wire(address: u32) -> Ipv4Addr {
    Ipv4Addr::from(address.to_ne_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_stand_in_the_maps_as_in_the_packet() {
        let address = Ipv4Addr::new(10, 244, 2, 0);
        assert_eq!(to_wire(address).to_ne_bytes(), [10, 244, 2, 0]);
        assert_eq!(from_wire(to_wire(address)), address);
    }
}
