//! Whole maps in a few system calls (BPF_MAP_LOOKUP_BATCH, Linux 5.6): cheap enough to be done twice a second,
//! where walking it key by key would be two calls per peer.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};

use aya::maps::MapData;
use bytemuck::{Pod, Zeroable as _};
use flannel_common::peer::{MAX_PEERS, Peer, PeerCount, PeerKey};

// linux/bpf.h, enum bpf_cmd
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;

/// Entries per call; more than any of the kernel's buckets holds.
const CHUNK: usize = 1024;

/// `union bpf_attr` for the batch commands
#[repr(C)]
#[derive(Default)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    element_flags: u64,
    flags: u64,
}

/// Tells of every entry, in no order.
pub(super) fn each(map: &MapData, mut tell: impl FnMut(PeerKey, &Peer)) -> io::Result<()> {
    let mut walk = Walk::begin(map, None)?;
    let mut keys = vec![PeerKey::zeroed(); CHUNK];
    let mut peers = vec![Peer::zeroed(); CHUNK];
    let mut told = 0;
    while told <= MAX_PEERS as usize && !walk.is_over {
        let count = walk.step(&mut keys, &mut peers)?;
        keys.iter().zip(&peers).take(count).for_each(|(key, peer)| tell(*key, peer));
        told += count;
    }
    Ok(())
}

/// `count` values of the array of counters, from `first` on; fewer where it ends.
pub(super) fn counts(map: &MapData, first: u32, count: usize) -> io::Result<Vec<PeerCount>> {
    let mut walk = Walk::begin(map, first.checked_sub(1))?;
    let mut keys = vec![0_u32; CHUNK.min(count)];
    let mut values = vec![PeerCount::zeroed(); count];
    let mut read = 0;
    while let Some(rest) = values.get_mut(read..).filter(|rest| !rest.is_empty() && !walk.is_over) {
        let wanted = rest.len().min(keys.len());
        read += walk.step(keys.split_at_mut(wanted).0, rest.split_at_mut(wanted).0)?;
    }
    values.truncate(read);
    Ok(values)
}

/// Batch after batch.
struct Walk<'a> {
    map: &'a MapData,
    /// Sizes of a key and of a value.
    sizes: (usize, usize),
    /// Where the next batch begins: of a hash map, the number of a bucket; of an array, behind this key.
    place: Option<u32>,
    is_over: bool,
}

impl<'a> Walk<'a> {
    fn begin(map: &'a MapData, place: Option<u32>) -> io::Result<Self> {
        let info = map.info().map_err(io::Error::other)?;
        let sizes = (info.key_size() as usize, info.value_size() as usize);
        Ok(Self { map, sizes, place, is_over: false })
    }

    /// How many were read.
    fn step<K: Pod, V: Pod>(&mut self, keys: &mut [K], values: &mut [V]) -> io::Result<usize> {
        if self.sizes != (size_of::<K>(), size_of::<V>()) {
            return Err(io::Error::other("it has entries of another size"));
        }
        let room = keys.len().min(values.len());
        let (mut place, mut next) = (self.place.unwrap_or(0), 0_u32);
        let mut attr = BatchAttr {
            in_batch: if self.place.is_none() { 0 } else { (&raw mut place) as u64 },
            out_batch: (&raw mut next) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: u32::try_from(room).map_err(io::Error::other)?,
            map_fd: self.map.fd().as_fd().as_raw_fd().cast_unsigned(),
            ..BatchAttr::default()
        };
        // SAFETY: the attribute is an initialised struct of the size given. It points to room for `count` keys and values
        // of the sizes that the map has (checked above), and to two numbers that the kernel reads and writes.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_MAP_LOOKUP_BATCH,
                std::ptr::from_mut(&mut attr),
                size_of::<BatchAttr>(),
            )
        };
        self.is_over = match (result, io::Error::last_os_error()) {
            (0, _) => false,
            (_, e) if e.raw_os_error() == Some(libc::ENOENT) => true,
            (_, e) => return Err(e),
        };
        self.place = Some(next);
        Ok(room.min(attr.count as usize))
    }
}

/// Of one entry. Those of a map are combined by exclusive or, so that one that comes or goes changes the sum by its own.
/// Made of ten thousand entries twice a second: two multiplications each.
pub(super) fn digest(key: PeerKey, peer: &Peer) -> u64 {
    let pair = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
    mix(mix(pair(key, peer.node)) ^ pair(peer.ifindex, peer.index))
}

/// The finaliser of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators,
/// 2014): each bit depends on all.
const fn mix(number: u64) -> u64 {
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}
