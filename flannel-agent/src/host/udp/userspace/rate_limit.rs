//! How often something may happen that anyone can provoke: answers to strays, lines in the log.

use std::time::{Duration, Instant};

/// A token bucket: at most `burst` at once, `per_second` in the long run.
pub(super) struct RateLimit {
    per_second: f64,
    burst: f64,
    tokens: f64,
    last: Instant,
}

impl RateLimit {
    pub(super) fn new(per_second: u32, burst: u32, now: Instant) -> Self {
        Self {
            per_second: f64::from(per_second),
            burst: f64::from(burst),
            tokens: f64::from(burst),
            last: now,
        }
    }

    pub(super) fn allows(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.last).min(Duration::from_secs(3600));
        self.tokens = (self.tokens + passed.as_secs_f64() * self.per_second).min(self.burst);
        self.last = now;
        if self.tokens < 1.0 {
            return false;
        }
        self.tokens -= 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_limited_in_time() {
        let start = Instant::now();
        let mut limit = RateLimit::new(10, 3, start);
        let allowed = (0..10).filter(|_| limit.allows(start)).count();
        assert_eq!(allowed, 3);
        assert!(!limit.allows(start + Duration::from_millis(50)));
        assert!(limit.allows(start + Duration::from_millis(150)));
        let later = start + Duration::from_secs(100);
        assert_eq!((0..10).filter(|_| limit.allows(later)).count(), 3);
    }
}
