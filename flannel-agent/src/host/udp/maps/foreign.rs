//! A map of peers that another version of the agent made, of which only two things are sure: the key is the subnet's base
//! address, and the value begins with the node's. Both stand as in the packet.
//!
//! Read by plain system calls, because a typed map needs to know the whole value.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, RawFd};
use std::path::Path;

use aya::maps::{MapData, MapType};

// linux/bpf.h, enum bpf_cmd
const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_GET_NEXT_KEY: libc::c_long = 4;

/// Longest value that is read; ours have a dozen bytes.
const LONGEST_VALUE: usize = 4096;

/// `union bpf_attr` as the two commands read it.
#[repr(C)]
#[derive(Default)]
struct ElementAttr {
    map_fd: u32,
    padding: u32,
    key: u64,
    /// Value, or next key.
    value: u64,
    flags: u64,
}

/// Subnet and node of every entry.
pub(super) fn entries(pin: &Path) -> io::Result<Vec<(u32, u32)>> {
    let map = MapData::from_pin(pin).map_err(io::Error::other)?;
    let info = map.info().map_err(io::Error::other)?;
    let value_size = info.value_size() as usize;
    let is_readable = info.map_type().ok() == Some(MapType::Hash)
        && info.key_size() == 4
        && (4..=LONGEST_VALUE).contains(&value_size);
    if !is_readable {
        return Err(io::Error::other("it is no map of peers"));
    }
    let fd = map.fd().as_fd().as_raw_fd();
    let mut value = vec![0_u8; value_size];
    let mut entries = Vec::new();
    let mut key: Option<u32> = None;
    // A map that someone writes to may be walked in circles; it never has more entries than this.
    for _ in 0..info.max_entries() {
        let Some(next) = next_key(fd, key)? else { break };
        if look_up(fd, next, &mut value)?
            && let Some(node) = value.first_chunk::<4>()
        {
            entries.push((next, u32::from_ne_bytes(*node)));
        }
        key = Some(next);
    }
    Ok(entries)
}

fn next_key(fd: RawFd, key: Option<u32>) -> io::Result<Option<u32>> {
    let mut next = 0_u32;
    let attr = ElementAttr {
        map_fd: fd as u32,
        key: key.as_ref().map_or(0, |key| std::ptr::from_ref(key) as u64),
        value: (&raw mut next) as u64,
        ..ElementAttr::default()
    };
    match bpf(BPF_MAP_GET_NEXT_KEY, &attr) {
        Ok(()) => Ok(Some(next)),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

/// False when the entry has gone.
fn look_up(fd: RawFd, key: u32, value: &mut [u8]) -> io::Result<bool> {
    let attr = ElementAttr {
        map_fd: fd as u32,
        key: (&raw const key) as u64,
        value: value.as_mut_ptr() as u64,
        ..ElementAttr::default()
    };
    match bpf(BPF_MAP_LOOKUP_ELEM, &attr) {
        Ok(()) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(e) => Err(e),
    }
}

fn bpf(command: libc::c_long, attr: &ElementAttr) -> io::Result<()> {
    // SAFETY: `attr` is an initialised struct of the size given; the key it points to has the 4 bytes and the value the
    // number of bytes that the map's own description asks for, and both outlive the call.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<ElementAttr>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
