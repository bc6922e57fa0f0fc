//! Counters of one direction, so that the two threads rarely write to the same cache line.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use flannel_common::counter::{Count, Counter};

#[derive(Debug, Default)]
struct Cell {
    packets: AtomicU64,
    bytes: AtomicU64,
}

/// One [`Count`] per [`Counter`]. Relaxed: a reader may see a packet before its bytes, never a number that was not
/// true a moment ago.
#[derive(Debug)]
pub(super) struct Tally {
    cells: Vec<Cell>,
}

impl Tally {
    pub(super) fn new() -> Self {
        Self { cells: Counter::ALL.iter().map(|_| Cell::default()).collect() }
    }

    pub(super) fn add(&self, counter: Counter, packets: usize, bytes: usize) {
        if let Some(cell) = self.cells.get(counter as usize) {
            cell.packets.fetch_add(packets as u64, Relaxed);
            cell.bytes.fetch_add(bytes as u64, Relaxed);
        }
    }

    /// In index order of [`Counter::ALL`].
    pub(super) fn counts(&self) -> impl Iterator<Item = Count> {
        self.cells
            .iter()
            .map(|cell| Count { packets: cell.packets.load(Relaxed), bytes: cell.bytes.load(Relaxed) })
    }
}
