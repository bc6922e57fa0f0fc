//! What failed on the host, and when it may be tried again.
//!
//! Each item backs off by itself: one bad peer neither stops the others nor is hammered. A failure is said when it is
//! new or its reason changed, not each time it happens again.
//!
//! The same goes for what succeeds and does not last: where somebody undoes a repair as fast as it is made, or where it
//! does not help, the first [`PROMPT`] are made at once and the rest more and more seldom.

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use tokio::time::sleep_until;

use crate::domain::host_state::{Change, Key};

const FIRST: Duration = Duration::from_millis(250);
const LONGEST: Duration = Duration::from_secs(30);

/// Repairs of one item that are made at once although none of them lasts.
pub(super) const PROMPT: u32 = 10;
/// What lasts longer was a good repair.
const LASTS: Duration = Duration::from_secs(1);

#[derive(Debug, Default)]
pub(super) struct Retries {
    failed: HashMap<Key, Failure>,
    /// What was put lately.
    made: HashMap<Key, Made>,
    look: Option<Pause>,
    publish: Option<(String, Pause)>,
    soon: Option<Instant>,
}

#[derive(Debug)]
struct Failure {
    reason: String,
    pause: Pause,
}

/// Puts of one item of which none outlasted [`LASTS`].
#[derive(Debug)]
struct Made {
    times: u32,
    last: Instant,
    pause: Option<Pause>,
    /// It is missing again, and its pause is not over.
    awaited: bool,
}

impl Made {
    fn is_good(&self, now: Instant) -> bool {
        let held_back = self.pause.map_or(Duration::ZERO, |pause| pause.length);
        now.saturating_duration_since(self.last) > LASTS + held_back
    }
}

/// A time to wait for, twice as long after each failure.
#[derive(Clone, Copy, Debug)]
struct Pause {
    until: Instant,
    length: Duration,
}

impl Pause {
    fn after(previous: Option<Self>, now: Instant) -> Self {
        let length = previous.map_or(FIRST, |pause| (pause.length * 2).clamp(FIRST, LONGEST));
        Self { until: now + length, length }
    }
}

impl Retries {
    /// A change failed; whether that is news.
    pub(super) fn failed(&mut self, key: Key, reason: &str, now: Instant) -> bool {
        let previous = self.failed.remove(&key);
        let news = previous.as_ref().is_none_or(|failure| failure.reason != reason);
        let pause = Pause::after(previous.map(|failure| failure.pause), now);
        self.failed.insert(key, Failure { reason: reason.to_owned(), pause });
        news
    }

    /// A change was made; whether it had failed before.
    pub(super) fn succeeded(&mut self, key: &Key) -> bool {
        self.failed.remove(key).is_some()
    }

    /// An item was put; whether it is the first time that it has to wait before it is put again.
    pub(super) fn made(&mut self, key: Key, now: Instant) -> bool {
        let fresh = Made { times: 0, last: now, pause: None, awaited: false };
        let before = self.made.remove(&key).filter(|made| !made.is_good(now));
        let made = self.made.entry(key).or_insert(before.unwrap_or(fresh));
        made.times = made.times.saturating_add(1);
        made.last = now;
        made.awaited = false;
        if made.times < PROMPT {
            return false;
        }
        let before = made.pause.replace(Pause::after(made.pause, now));
        before.is_none()
    }

    pub(super) fn holds_back(&mut self, key: &Key, now: Instant) -> bool {
        let failed = self.failed.get(key).is_some_and(|failure| failure.pause.until > now);
        let Some(made) = self.made.get_mut(key) else { return failed };
        made.awaited = made.pause.is_some_and(|pause| pause.until > now);
        failed || made.awaited
    }

    /// What nobody wants any more need not be tried again. The rest of the due times are gone with this pass.
    pub(super) fn forget_all_but(&mut self, changes: &[Change], now: Instant) {
        self.soon = None;
        if !self.made.is_empty() {
            self.made.retain(|_, made| {
                made.awaited = false;
                !made.is_good(now)
            });
            self.made.shrink_to(0);
        }
        if !self.failed.is_empty() {
            let wanted: BTreeSet<Key> = changes.iter().map(|change| change.item().key()).collect();
            self.failed.retain(|key, _| wanted.contains(key));
        }
    }

    /// What stood in the way of things is gone: everything may be tried at once.
    pub(super) fn hurry(&mut self, now: Instant) {
        for failure in self.failed.values_mut() {
            failure.pause = Pause { until: now, length: Duration::ZERO };
        }
        self.made.clear();
    }

    /// Why the latest failure happened.
    pub(super) fn latest(&self) -> Option<&str> {
        let latest = self.failed.values().max_by_key(|failure| failure.pause.until);
        let undone = || self.made.values().any(|made| made.awaited);
        latest
            .map(|failure| failure.reason.as_str())
            .or_else(|| undone().then_some("what was made is undone again and again"))
    }

    /// The host could not be read; whether that is news.
    pub(super) fn could_not_look(&mut self, now: Instant) -> bool {
        let news = self.look.is_none();
        self.look = Some(Pause::after(self.look, now));
        news
    }

    pub(super) fn looked(&mut self) {
        self.look = None;
    }

    /// subnet.env could not be written; whether that is news.
    pub(super) fn could_not_publish(&mut self, reason: &str, now: Instant) -> bool {
        let news = self.publish.as_ref().is_none_or(|(said, _)| said != reason);
        let pause = Pause::after(self.publish.take().map(|(_, pause)| pause), now);
        self.publish = Some((reason.to_owned(), pause));
        news
    }

    /// There is more to do than one pass should.
    pub(super) fn soon(&mut self, now: Instant) {
        self.soon = Some(now + FIRST);
    }

    /// Returns when something may be tried again. Cancel-safe.
    pub(super) async fn due(&self) {
        let now = super::now();
        let next = self
            .failed
            .values()
            .map(|failure| failure.pause.until)
            .chain(self.made.values().filter(|made| made.awaited).filter_map(|made| Some(made.pause?.until)))
            .chain(self.look.map(|pause| pause.until))
            .chain(self.publish.as_ref().map(|(_, pause)| pause.until).filter(|until| *until > now))
            .chain(self.soon)
            .min();
        match next {
            Some(until) => sleep_until(until.into()).await,
            None => std::future::pending().await,
        }
    }
}
