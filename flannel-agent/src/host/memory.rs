//! Memory that is not needed goes back to the kernel: what was freed, and the code of the start.
//!
//! The agent's work comes in bursts: every pass builds the whole wanted state and throws it away, a snapshot of thousands of
//! leases is read and folded. glibc keeps what was freed for the next time, and raises its own thresholds with each large
//! block it sees (mallopt(3), `M_MMAP_THRESHOLD`): with 10,000 peers a third of the agent's memory was nobody's. Setting
//! the thresholds, to their defaults, stops them from growing.

#[cfg(target_env = "gnu")]
use std::fs;

/// From which size on a block is mapped by itself, and how much may stay free at the end of the heap, bytes.
#[cfg(target_env = "gnu")]
const THRESHOLD: libc::c_int = 128 * 1024;
/// Heaps that threads allocate from. The two of the user-space tunnel allocate nothing per packet.
#[cfg(target_env = "gnu")]
const ARENAS: libc::c_int = 2;

/// Call it once, before there are threads. Other C libraries than glibc do so by themselves.
pub fn give_back_what_is_freed() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [
        (libc::M_MMAP_THRESHOLD, THRESHOLD),
        (libc::M_TRIM_THRESHOLD, THRESHOLD),
        (libc::M_ARENA_MAX, ARENAS),
    ] {
        // A value it does not take leaves things as they were.
        // SAFETY: no preconditions but that no other thread calls it at the same time.
        let _ = unsafe { libc::mallopt(parameter, value) };
    }
}

/// Gives back free memory between what is in use, too, which the thresholds above leave alone.
pub fn give_back_free_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no preconditions.
    let _ = unsafe { libc::malloc_trim(0) };
}

/// Lets go of the code mapped so far: most of what the start ran through, TLS and parsers of flags, is not run again, and
/// what is comes back from the page cache, or the file, with the next call.
pub fn give_back_code() {
    #[cfg(target_env = "gnu")]
    for (start, length) in code(&fs::read_to_string("/proc/self/maps").unwrap_or_default()) {
        // SAFETY: a private mapping of a file that was never writable holds what the file holds: it is read again.
        let _ = unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED) };
    }
}

/// Start and length of each mapping of code from a file.
#[cfg(target_env = "gnu")]
fn code(maps: &str) -> Vec<(usize, usize)> {
    maps.lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            let (range, rights) = (words.next()?, words.next()?);
            let (_offset, _device, _inode, path) =
                (words.next()?, words.next()?, words.next()?, words.next()?);
            if rights != "r-xp" || !path.starts_with('/') {
                return None;
            }
            let (start, end) = range.split_once('-')?;
            let number = |text| usize::from_str_radix(text, 16).ok();
            Some((number(start)?, number(end)?.checked_sub(number(start)?)?))
        })
        .collect()
}

#[cfg(all(test, target_env = "gnu"))]
mod tests {
    use super::*;

    #[test]
    fn only_code_that_a_file_holds_is_let_go() {
        let maps = "\
55d0c0000000-55d0c0200000 r--p 00000000 fe:00 1234  /usr/local/bin/flannel-agent
55d0c0200000-55d0c0a00000 r-xp 00200000 fe:00 1234  /usr/local/bin/flannel-agent
55d0c0a00000-55d0c0b00000 rw-p 00a00000 fe:00 1234  /usr/local/bin/flannel-agent
55d0c1000000-55d0c1100000 rw-p 00000000 00:00 0     [heap]
7f0000000000-7f0000001000 r-xp 00000000 00:00 0
7ffd00000000-7ffd00002000 r-xp 00000000 00:00 0     [vdso]
";
        assert_eq!(code(maps), [(0x55d0_c020_0000, 0x80_0000)]);
    }

    #[test]
    fn what_was_given_back_still_runs() {
        give_back_code();
        give_back_free_memory();
        assert!(!code(&fs::read_to_string("/proc/self/maps").unwrap()).is_empty());
    }
}
