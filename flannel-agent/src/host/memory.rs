//! Freed memory goes back to the kernel.
//!
//! The agent's work comes in bursts: every pass builds the whole wanted state and throws it away, a snapshot of thousands of
//! leases is read and folded. glibc keeps what was freed for the next time, and raises its own thresholds with each large
//! block it sees (mallopt(3), `M_MMAP_THRESHOLD`): with 10,000 peers a third of the agent's memory was nobody's. Setting
//! the thresholds, to their defaults, stops them from growing.

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
