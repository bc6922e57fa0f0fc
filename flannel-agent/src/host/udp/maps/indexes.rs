//! Which places in `PEER_COUNTERS` are taken, so that every peer has its own and a new one begins at zero.

use std::collections::BTreeSet;

use flannel_common::peer::MAX_PEERS;

/// Places in `PEER_COUNTERS`.
#[derive(Debug)]
pub(super) struct Indexes {
    taken: BTreeSet<u32>,
    /// Every index below is taken.
    floor: u32,
    /// From here on none was ever taken since the maps were made, and so nothing is counted there.
    untouched: u32,
}

impl Default for Indexes {
    /// Of maps with a past.
    fn default() -> Self {
        Self { taken: BTreeSet::new(), floor: 0, untouched: MAX_PEERS }
    }
}

impl Indexes {
    pub(super) fn of_new_maps() -> Self {
        Self { untouched: 0, ..Self::default() }
    }

    pub(super) fn may_have_counts(&self, index: u32) -> bool {
        index < self.untouched
    }

    /// None is taken any more.
    pub(super) fn clear(&mut self) {
        *self = Self { untouched: self.untouched, ..Self::default() };
    }

    /// False when it is taken already or does not exist.
    pub(super) fn take(&mut self, index: u32) -> bool {
        let taken = index < MAX_PEERS && self.taken.insert(index);
        if taken {
            self.untouched = self.untouched.max(index + 1);
        }
        while self.taken.contains(&self.floor) {
            self.floor += 1;
        }
        taken
    }

    pub(super) fn free(&mut self, index: u32) {
        if self.taken.remove(&index) {
            self.floor = self.floor.min(index);
        }
    }

    pub(super) fn lowest_free(&self) -> Option<u32> {
        Some(self.floor).filter(|floor| *floor < MAX_PEERS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_index_is_given_and_a_freed_one_again() {
        let mut indexes = Indexes::default();
        for adopted in [0, 1, 3] {
            assert!(indexes.take(adopted));
        }
        assert_eq!(indexes.lowest_free(), Some(2));
        assert!(indexes.take(2));
        assert_eq!(indexes.lowest_free(), Some(4));
        indexes.free(1);
        assert_eq!(indexes.lowest_free(), Some(1));
    }

    #[test]
    fn only_an_index_that_was_never_taken_in_new_maps_is_sure_to_have_no_counts() {
        let mut indexes = Indexes::of_new_maps();
        assert!(!indexes.may_have_counts(0));
        assert!(indexes.take(0) && indexes.take(1));
        indexes.free(1);
        assert!(indexes.may_have_counts(1) && !indexes.may_have_counts(2));
        indexes.clear();
        assert!(indexes.may_have_counts(0) && !indexes.may_have_counts(2));
        assert!(Indexes::default().may_have_counts(MAX_PEERS - 1));
    }

    #[test]
    fn an_index_is_taken_once_and_must_exist() {
        let mut indexes = Indexes::default();
        assert!(indexes.take(7));
        assert!(!indexes.take(7));
        assert!(!indexes.take(MAX_PEERS));
        for index in 0..MAX_PEERS {
            indexes.take(index);
        }
        assert_eq!(indexes.lowest_free(), None);
    }
}
