//! Chance: which subnet, how long to wait. A test can make a thread's chance repeatable, and replay what failed.

use std::cell::RefCell;

use rand::rngs::{StdRng, ThreadRng};
use rand::{RngCore, SeedableRng};

thread_local! {
    static SEEDED: RefCell<Option<StdRng>> = const { RefCell::new(None) };
}

/// Random numbers: the operating system's, unless this thread was [seeded](seed).
#[derive(Debug)]
pub struct Chance {
    own: ThreadRng,
}

/// What every random choice outside of data structures is made with.
pub fn rng() -> Chance {
    Chance { own: rand::rng() }
}

/// From now on this thread draws the same numbers after the same seed. For tests.
pub fn seed(seed: u64) {
    SEEDED.with_borrow_mut(|seeded| *seeded = Some(StdRng::seed_from_u64(seed)));
}

impl RngCore for Chance {
    fn next_u32(&mut self) -> u32 {
        SEEDED.with_borrow_mut(|seeded| match seeded {
            Some(seeded) => seeded.next_u32(),
            None => self.own.next_u32(),
        })
    }

    fn next_u64(&mut self) -> u64 {
        SEEDED.with_borrow_mut(|seeded| match seeded {
            Some(seeded) => seeded.next_u64(),
            None => self.own.next_u64(),
        })
    }

    fn fill_bytes(&mut self, bytes: &mut [u8]) {
        SEEDED.with_borrow_mut(|seeded| match seeded {
            Some(seeded) => seeded.fill_bytes(bytes),
            None => self.own.fill_bytes(bytes),
        });
    }
}

#[cfg(test)]
mod tests {
    use rand::Rng as _;

    use super::*;

    #[test]
    fn a_seed_repeats_itself() {
        let numbers = || -> Vec<u32> { (0..4).map(|_| rng().random()).collect() };
        seed(7);
        let first = numbers();
        seed(7);
        assert_eq!(numbers(), first);
        assert_ne!(numbers(), first);
    }
}
