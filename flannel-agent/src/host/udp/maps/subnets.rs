//! The peers in the order of their subnets, as the programs look them up (`SUBNETS`).
//!
//! An array is read without a call, a hash map with two or three; where calls are dear (every return is, on a CPU that has
//! to guard them) that is a fifth of what a packet costs in the programs. `PEERS` has the same entries; it is what the
//! agent, `status` and other versions go by, and the programs too in a network of more subnets than there are places.
//!
//! The array is mapped into memory: it is compared and written without system calls.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use aya::maps::{Array, IterableMap as _, Map, MapData, MapError};
use flannel_common::peer::{MAX_SUBNETS, Peer, PeerKey};
use flannel_common::tunnel::{SUBNETS_IN_ORDER, Settings};

use super::{batch, to_wire};
use crate::host::udp::errno::Refusal;

/// Where the map says in which order its places are.
const ORDER: u32 = MAX_SUBNETS;

/// An entry as it lies in the kernel: the value, made up to a multiple of 8 bytes.
#[repr(C)]
struct Place {
    node: AtomicU32,
    ifindex: AtomicU32,
    index: AtomicU32,
    _rest: AtomicU32,
}

const _: () = assert!(size_of::<Place>() == size_of::<Peer>().next_multiple_of(8));

/// The map, and the places that the network has.
pub(super) struct Subnets {
    map: Array<MapData, Peer>,
    settings: Settings,
    places: Places,
}

/// Why a pinned map can't be used; `None` when it is in our order.
pub(super) fn difference(map: MapData, settings: &Settings) -> Result<Option<String>, MapError> {
    let map: Array<MapData, Peer> = Array::try_from(Map::from_map_data(map)?)?;
    let is_ours = map.get(&ORDER, 0)? == settings.order();
    Ok((!is_ours).then(|| "it is in the order of another network".to_owned()))
}

impl Subnets {
    /// Maps it into memory, and notes its order.
    pub(super) fn open(map: Map, settings: &Settings) -> Result<Self, Refusal> {
        let doing = "open map SUBNETS";
        let mut map: Array<MapData, Peer> = Array::try_from(map).map_err(|e| Refusal::from_map(doing, &e))?;
        map.set(ORDER, settings.order(), 0).map_err(|e| Refusal::from_map(doing, &e))?;
        let subnets = match settings.flags & SUBNETS_IN_ORDER {
            0 => 0,
            _ => settings.subnets(),
        };
        let places = Places::of(map.map(), subnets).map_err(|e| Refusal::from_io(doing, &e))?;
        Ok(Self { map, settings: *settings, places })
    }

    pub(super) fn map(&self) -> &MapData {
        self.map.map()
    }

    /// Makes the entry of a subnet this. One outside the network has no place: no packet is looked up there.
    pub(super) fn set(&self, subnet: PeerKey, peer: Option<&Peer>) {
        if let Some(place) = self.places.all().get(self.settings.place_of(subnet) as usize) {
            place.set(peer);
        }
    }

    /// Makes all entries these.
    pub(super) fn align(&self, entries: &BTreeMap<Ipv4Addr, Peer>) {
        let mut wanted = entries
            .iter()
            .map(|(subnet, peer)| (self.settings.place_of(to_wire(*subnet)) as usize, peer))
            .peekable();
        for (number, place) in self.places.all().iter().enumerate() {
            while wanted.next_if(|(next, _)| *next < number).is_some() {}
            let wanted = wanted.next_if(|(next, _)| *next == number).map(|(_, peer)| peer);
            if place.get().as_ref() != wanted {
                place.set(wanted);
            }
        }
    }

    /// Whether the entries are others than those of this digest.
    pub(super) fn is_touched(&self, digest: u64) -> bool {
        let is_used = self.settings.flags & SUBNETS_IN_ORDER != 0;
        is_used && self.digest() != digest
    }

    fn digest(&self) -> u64 {
        let entries = self.places.all().iter().enumerate();
        entries
            .filter_map(|(number, place)| Some((u32::try_from(number).ok()?, place.get()?)))
            .fold(0, |sum, (number, peer)| sum ^ batch::digest(self.settings.key_of(number), &peer))
    }
}

impl Place {
    fn get(&self) -> Option<Peer> {
        let node = self.node.load(Ordering::Relaxed);
        let (ifindex, index) = (self.ifindex.load(Ordering::Relaxed), self.index.load(Ordering::Relaxed));
        (node != 0).then_some(Peer { node, ifindex, index })
    }

    /// The node last: what a program meets in between is an entry that does not exist yet, or half of each of two nodes.
    fn set(&self, peer: Option<&Peer>) {
        if let Some(peer) = peer {
            self.ifindex.store(peer.ifindex, Ordering::Relaxed);
            self.index.store(peer.index, Ordering::Relaxed);
        }
        self.node.store(peer.map_or(0, |peer| peer.node), Ordering::Release);
    }
}

/// The first places of the array, in memory that the kernel shares.
struct Places {
    start: NonNull<Place>,
    count: usize,
}

// SAFETY: the memory belongs to the process, and is read and written by atomic operations only.
unsafe impl Send for Places {}
// SAFETY: as above.
unsafe impl Sync for Places {}

impl Places {
    fn of(map: &MapData, count: u32) -> io::Result<Self> {
        let count = count as usize;
        if count == 0 {
            return Ok(Self { start: NonNull::dangling(), count });
        }
        // SAFETY: a new mapping, at an address of the kernel's choice; the kernel checks that the map has as much.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                count * size_of::<Place>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.fd().as_fd().as_raw_fd(),
                0,
            )
        };
        match NonNull::new(start.cast::<Place>()) {
            Some(start) if start.as_ptr().cast() != libc::MAP_FAILED => Ok(Self { start, count }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn all(&self) -> &[Place] {
        // SAFETY: the mapping is as long and lives as long as we do; without one the count is 0.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.count) }
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        if self.count > 0 {
            // SAFETY: what `of` has mapped; nothing borrows it any more.
            unsafe { libc::munmap(self.start.as_ptr().cast(), self.count * size_of::<Place>()) };
        }
    }
}
