//! The whole map of peers in a few system calls (BPF_MAP_LOOKUP_BATCH, Linux 5.6): cheap enough to be done twice a second,
//! where walking it key by key would be two calls per peer.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};

use aya::maps::MapData;
use bytemuck::Zeroable as _;
use flannel_common::peer::{MAX_PEERS, Peer, PeerKey};

// linux/bpf.h, enum bpf_cmd
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;

/// Entries per call; more than any of the kernel's buckets holds.
const CHUNK: u32 = 1024;

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

/// Every entry, in no order.
pub(super) fn entries(map: &MapData) -> io::Result<Vec<(PeerKey, Peer)>> {
    let info = map.info().map_err(io::Error::other)?;
    if info.key_size() as usize != size_of::<PeerKey>() || info.value_size() as usize != size_of::<Peer>() {
        return Err(io::Error::other("it has entries of another size"));
    }
    let mut keys = vec![PeerKey::zeroed(); CHUNK as usize];
    let mut peers = vec![Peer::zeroed(); CHUNK as usize];
    let mut entries = Vec::new();
    // Where a hash map's next batch begins: the number of a bucket.
    let (mut place, mut next) = (0_u32, 0_u32);
    let mut first = true;
    while entries.len() <= MAX_PEERS as usize {
        let mut attr = BatchAttr {
            in_batch: if first { 0 } else { (&raw mut place) as u64 },
            out_batch: (&raw mut next) as u64,
            keys: keys.as_mut_ptr() as u64,
            values: peers.as_mut_ptr() as u64,
            count: CHUNK,
            map_fd: map.fd().as_fd().as_raw_fd().cast_unsigned(),
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
        let last = match (result, io::Error::last_os_error()) {
            (0, _) => false,
            (_, e) if e.raw_os_error() == Some(libc::ENOENT) => true,
            (_, e) => return Err(e),
        };
        let count = attr.count.min(CHUNK) as usize;
        entries.extend(keys.iter().copied().zip(peers.iter().copied()).take(count));
        if last {
            break;
        }
        (place, first) = (next, false);
    }
    Ok(entries)
}

/// Of one entry. Those of a map are combined by exclusive or, so that one that comes or goes changes the sum by its own.
pub(super) fn digest(key: PeerKey, peer: &Peer) -> u64 {
    let mut hasher = DefaultHasher::new();
    (key, peer.node, peer.ifindex, peer.index).hash(&mut hasher);
    hasher.finish()
}
