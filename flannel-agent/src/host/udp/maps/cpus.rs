//! The CPUs this machine may ever have, as their numbers go.

use std::fs;
use std::sync::OnceLock;

/// Written by the kernel at boot, such as `0-3` or `0,2-3`.
const POSSIBLE: &str = "/sys/devices/system/cpu/possible";

/// The highest number a CPU can have. Counts of CPUs beyond it are lost, so that without an answer it is guessed high.
pub(super) fn highest() -> u32 {
    static HIGHEST: OnceLock<u32> = OnceLock::new();
    *HIGHEST.get_or_init(|| {
        let possible = fs::read_to_string(POSSIBLE).ok().and_then(|text| last(&text));
        possible.unwrap_or_else(|| {
            let configured = std::thread::available_parallelism().map_or(1, usize::from);
            tracing::warn!("{POSSIBLE} can't be read; traffic is counted on the first {configured} CPUs");
            u32::try_from(configured - 1).unwrap_or(0)
        })
    })
}

fn last(list: &str) -> Option<u32> {
    list.trim().rsplit([',', '-']).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_number_ends_the_list() {
        for (list, highest) in
            [("0\n", Some(0)), ("0-3\n", Some(3)), ("0,2-11", Some(11)), ("0-1,8", Some(8)), ("", None)]
        {
            assert_eq!(last(list), highest, "{list:?}");
        }
    }
}
