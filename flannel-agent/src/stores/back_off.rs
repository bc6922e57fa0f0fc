//! Waits between attempts: growing, and random, so that nodes come back one by one.

use std::time::Duration;

use rand::Rng;

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(5);

/// Waits that grow from 100 ms to 5 s.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct BackOff {
    failures: u32,
}

impl BackOff {
    /// How long to wait after one more failure: a random half to whole of the present longest.
    pub(super) fn next(&mut self) -> Duration {
        let longest = FIRST.saturating_mul(1 << self.failures.min(10)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        longest.mul_f64(crate::chance::rng().random_range(0.5..=1.0))
    }
}

/// Give or take a fifth.
pub(super) fn jittered(interval: Duration) -> Duration {
    interval.mul_f64(crate::chance::rng().random_range(0.8..=1.2))
}
