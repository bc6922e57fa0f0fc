//! Follows all leases for as long as the agent lives.
//!
//! ```text
//!             list, then watch behind its revision          change → event
//!   closed ─────────────────────────────────────────► open ─────────────────► open
//!     ▲  ▲     failed: Interrupted once, wait longer    │     compare is due → list → Snapshot
//!     │  └───── compacted ──────────────────────────────┤
//!     └──────── broken: Interrupted once ───────────────┘
//! ```
//!
//! A watch is never trusted alone: it is compared with a fresh list at an interval. While the store is away there is one
//! event, and one attempt per wait, which grows from 100 ms to 5 s; waits are random so that nodes come back one by
//! one. A watch that breaks again and again right after it was opened counts as away.

use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::time::{Instant, sleep_until};

use super::leases::{Held, HeldEntry, Listed};
use super::{Entry, Lifetime, Listing, Notice, Registry, RegistryError, WatchEnd};
use crate::domain::lease::{Lease, LeaseEvent, Unreadable};
use crate::stores::back_off::{BackOff, jittered};
use crate::stores::{LEASE_TTL, decode};

/// A watch that lived this long was a good one: the next failure is a new one.
const PROVEN: Duration = Duration::from_secs(10);
/// What was listed longer ago is listed again.
const FRESH: Duration = Duration::from_secs(5);
/// When a compare could not be made although the watch lives.
const COMPARE_AGAIN: Duration = Duration::from_secs(15);
/// When a list is wanted, but nobody who writes to the store shall make us list without pause.
const COMPARE_SOON: Duration = Duration::from_millis(500);

pub(super) struct Watcher {
    registry: Arc<dyn Registry>,
    folder: String,
    held: HeldEntry,
    listed: Listed,
    resync: Duration,
    ready: VecDeque<LeaseEvent>,
    open: Option<Open>,
    /// Everything up to here was told; older notices are repetitions.
    revision: u64,
    back_off: BackOff,
    retry_at: Instant,
    /// `Interrupted` was said and no snapshot since.
    away: bool,
}

struct Open {
    notices: BoxStream<'static, Result<Vec<Notice>, WatchEnd>>,
    since: Instant,
    compare_at: Instant,
}

enum Happened {
    Notices(Vec<Notice>),
    Ended(WatchEnd),
    CompareIsDue,
}

impl Watcher {
    pub(super) fn new(
        registry: Arc<dyn Registry>,
        folder: String,
        held: HeldEntry,
        resync: Duration,
    ) -> Self {
        Self {
            registry,
            folder,
            held,
            listed: Listed::default(),
            resync,
            ready: VecDeque::new(),
            open: None,
            revision: 0,
            back_off: BackOff::default(),
            retry_at: Instant::now(),
            away: false,
        }
    }

    /// A list that was just made serves as the first one.
    pub(super) fn beginning_with(self, listed: Listed) -> Self {
        Self { listed, ..self }
    }

    pub(super) fn stream(self) -> BoxStream<'static, LeaseEvent> {
        stream::unfold(self, |mut watcher| async move { Some((watcher.next().await, watcher)) }).boxed()
    }

    async fn next(&mut self) -> LeaseEvent {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return event;
            }
            let Some(open) = &mut self.open else {
                sleep_until(self.retry_at).await;
                if let Err(RegistryError::Unreachable(reason) | RegistryError::Refused(reason)) =
                    self.reopen().await
                {
                    self.failed(reason);
                }
                continue;
            };
            let happened = tokio::select! {
                biased;
                item = open.notices.next() => match item {
                    Some(Ok(notices)) => Happened::Notices(notices),
                    Some(Err(end)) => Happened::Ended(end),
                    None => Happened::Ended(WatchEnd::Broken("the server ended the watch".into())),
                },
                () = sleep_until(open.compare_at) => Happened::CompareIsDue,
            };
            match happened {
                Happened::Notices(notices) => self.take(notices).await,
                Happened::CompareIsDue => self.compare().await,
                Happened::Ended(end) => {
                    if open.since.elapsed() >= PROVEN {
                        self.back_off = BackOff::default();
                    }
                    self.open = None;
                    match end {
                        WatchEnd::Broken(reason) => self.failed(reason),
                        WatchEnd::Compacted => {
                            tracing::debug!(
                                "the store compacted what the watch had not seen yet, listing again"
                            );
                            self.wait_longer();
                        }
                    }
                }
            }
        }
    }

    async fn reopen(&mut self) -> Result<(), RegistryError> {
        let listing = match self.just_listed() {
            Some(listing) => listing,
            None => self.registry.list(&self.folder).await?,
        };
        let notices = self.registry.watch(&self.folder, listing.revision).await?;
        let now = Instant::now();
        self.open = Some(Open { notices, since: now, compare_at: now + jittered(self.resync) });
        self.away = false;
        self.revision = listing.revision;
        let snapshot = self.snapshot(listing).await;
        self.ready.push_back(snapshot);
        Ok(())
    }

    fn just_listed(&self) -> Option<Listing> {
        let (at, listing) = self.listed.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        (at.elapsed() < FRESH).then_some(listing)
    }

    async fn compare(&mut self) {
        let listing = self.registry.list(&self.folder).await;
        let Some(open) = &mut self.open else { return };
        match listing {
            // A store that went back in time, restored from a backup: the watch would wait for revisions to come.
            Ok(listing) if listing.revision < self.revision => {
                tracing::warn!(
                    was = self.revision,
                    is = listing.revision,
                    "the store's revision went backwards: it was restored or replaced"
                );
                self.open = None;
                self.retry_at = Instant::now();
            }
            Ok(listing) => {
                open.compare_at = Instant::now() + jittered(self.resync);
                self.revision = listing.revision;
                let snapshot = self.snapshot(listing).await;
                self.ready.push_back(snapshot);
            }
            // The watch is alive and tells when it isn't.
            Err(RegistryError::Unreachable(reason) | RegistryError::Refused(reason)) => {
                tracing::debug!(reason, "could not list the leases to compare them");
                open.compare_at = Instant::now() + jittered(COMPARE_AGAIN);
            }
        }
    }

    async fn take(&mut self, notices: Vec<Notice>) {
        for notice in notices {
            let event = match notice {
                Notice::Put(entry) if entry.revision > self.revision => match self.lease(entry).await {
                    Ok(lease) => LeaseEvent::Added(lease),
                    Err(unreadable) => LeaseEvent::Unreadable(unreadable),
                },
                Notice::Deleted { key, revision } if revision > self.revision => {
                    match key.strip_prefix(&self.folder).map(str::parse) {
                        Some(Ok(subnets)) => LeaseEvent::Removed(subnets),
                        // Told as unreadable before: a list says that it is no more.
                        _ => {
                            self.compare_soon();
                            continue;
                        }
                    }
                }
                Notice::Put(_) | Notice::Deleted { .. } => continue,
            };
            self.ready.push_back(event);
        }
    }

    fn compare_soon(&mut self) {
        let soon = Instant::now() + COMPARE_SOON;
        if let Some(open) = &mut self.open {
            open.compare_at = open.compare_at.min(soon);
        }
    }

    async fn snapshot(&mut self, listing: Listing) -> LeaseEvent {
        let (mut leases, mut unreadable) = (Vec::with_capacity(listing.entries.len()), Vec::new());
        for entry in listing.entries {
            match self.lease(entry).await {
                Ok(lease) => leases.push(lease),
                Err(entry) => unreadable.push(entry),
            }
        }
        LeaseEvent::Snapshot(leases, unreadable)
    }

    async fn lease(&mut self, entry: Entry) -> Result<Lease, Unreadable> {
        let last = entry.key.strip_prefix(&self.folder).unwrap_or_default();
        let (subnets, attrs) = decode(&entry.key, last, &entry.value)?;
        let expires = self.expiry(&entry).await;
        Ok(Lease { subnets, attrs, expires, revision: entry.revision })
    }

    /// Exact for our own entry. For others' an upper bound without asking: a day from now, the longest flanneld gives.
    async fn expiry(&mut self, entry: &Entry) -> Option<std::time::Instant> {
        match entry.lifetime {
            Lifetime::Forever => return None,
            Lifetime::Until(end) => return Some(end),
            Lifetime::Lease(_) => {}
        }
        let now = std::time::Instant::now();
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match held {
            Some(Held { key, lifetime, expires }) if key == entry.key => {
                if lifetime == entry.lifetime && expires.is_some() {
                    return expires;
                }
                // Somebody else wrote our lease.
                match self.registry.remaining(entry.lifetime).await {
                    Ok(remaining) => remaining.map(|remaining| now + remaining),
                    // Better too early than too late.
                    Err(_) => expires.or(Some(now)),
                }
            }
            _ => Some(now + LEASE_TTL),
        }
    }

    fn failed(&mut self, reason: String) {
        if !std::mem::replace(&mut self.away, true) {
            self.ready.push_back(LeaseEvent::Interrupted(reason));
        }
        self.wait_longer();
    }

    fn wait_longer(&mut self) {
        self.retry_at = Instant::now() + self.back_off.next();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stores::registry::{Deleted, Written};
    use async_trait::async_trait;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU32, Ordering};

    const FOLDER: &str = "/n/subnets/";

    /// What the next list says, and the one after it; the last one is repeated.
    type Lists = VecDeque<Result<(u64, &'static [&'static str]), &'static str>>;
    /// What each watch says before it falls silent, or ends when its last item is an error.
    type Watches = VecDeque<Vec<Said>>;

    #[derive(Clone, Copy)]
    enum Said {
        Put(u64, &'static str),
        Deleted(u64, &'static str),
        Compacted,
        Broken,
    }

    #[derive(Default)]
    struct Script {
        lists: Mutex<Lists>,
        watches: Mutex<Watches>,
        listed: AtomicU32,
        asked: AtomicU32,
    }

    fn entry(key: &str, revision: u64) -> Entry {
        Entry {
            key: format!("{FOLDER}{key}"),
            value: br#"{"PublicIP":"192.0.2.1"}"#.to_vec(),
            revision,
            lifetime: Lifetime::Lease(7),
        }
    }

    #[async_trait]
    impl Registry for Script {
        fn name(&self) -> &str {
            "a script"
        }

        async fn get(&self, _: &str) -> Result<Option<Entry>, RegistryError> {
            Ok(None)
        }

        async fn list(&self, _: &str) -> Result<Listing, RegistryError> {
            self.listed.fetch_add(1, Ordering::SeqCst);
            let mut lists = self.lists.lock().unwrap();
            let list = if lists.len() > 1 { lists.pop_front() } else { lists.front().copied() };
            let (revision, keys) =
                list.unwrap_or(Err("nothing")).map_err(|error| RegistryError::Unreachable(error.into()))?;
            Ok(Listing { entries: keys.iter().map(|key| entry(key, 1)).collect(), revision })
        }

        async fn create(
            &self,
            _: &str,
            _: String,
            _: Option<Duration>,
        ) -> Result<Option<Written>, RegistryError> {
            Ok(None)
        }

        async fn update(
            &self,
            _: &Entry,
            _: String,
            _: Option<Duration>,
        ) -> Result<Option<Written>, RegistryError> {
            Ok(None)
        }

        async fn delete(&self, _: &Entry) -> Result<Deleted, RegistryError> {
            Ok(Deleted::Changed)
        }

        async fn remaining(&self, _: Lifetime) -> Result<Option<Duration>, RegistryError> {
            self.asked.fetch_add(1, Ordering::SeqCst);
            Ok(Some(Duration::from_secs(60)))
        }

        fn reconnect(&self) {}

        async fn watch(
            &self,
            _: &str,
            _: u64,
        ) -> Result<BoxStream<'static, Result<Vec<Notice>, WatchEnd>>, RegistryError> {
            let mut watches = self.watches.lock().unwrap();
            let said = if watches.len() > 1 { watches.pop_front() } else { watches.front().cloned() }
                .unwrap_or_default();
            let ends = matches!(said.last(), Some(Said::Compacted | Said::Broken));
            let items: Vec<_> = said
                .into_iter()
                .map(|said| match said {
                    Said::Put(revision, key) => Ok(vec![Notice::Put(entry(key, revision))]),
                    Said::Deleted(revision, key) => {
                        Ok(vec![Notice::Deleted { key: format!("{FOLDER}{key}"), revision }])
                    }
                    Said::Compacted => Err(WatchEnd::Compacted),
                    Said::Broken => Err(WatchEnd::Broken("broken".into())),
                })
                .collect();
            let items = stream::iter(items);
            Ok(if ends { items.boxed() } else { items.chain(stream::pending()).boxed() })
        }
    }

    fn watch(lists: &[Result<(u64, &'static [&'static str]), &'static str>], watches: &[&[Said]]) -> Watch {
        let script = Arc::new(Script {
            lists: Mutex::new(lists.iter().copied().collect()),
            watches: Mutex::new(watches.iter().map(|said| said.to_vec()).collect()),
            ..Script::default()
        });
        let watcher =
            Watcher::new(script.clone(), FOLDER.into(), HeldEntry::default(), Duration::from_secs(300));
        Watch { script, events: watcher.stream() }
    }

    struct Watch {
        script: Arc<Script>,
        events: BoxStream<'static, LeaseEvent>,
    }

    impl Watch {
        async fn next(&mut self) -> String {
            match self.events.next().await.unwrap() {
                LeaseEvent::Snapshot(leases, unreadable) => {
                    let keys: Vec<_> = leases.iter().map(|lease| lease.subnets.to_string()).collect();
                    format!("snapshot [{}] {} unreadable", keys.join(" "), unreadable.len())
                }
                LeaseEvent::Added(lease) => format!("added {} at {}", lease.subnets, lease.revision),
                LeaseEvent::Removed(subnets) => format!("removed {subnets}"),
                LeaseEvent::Unreadable(entry) => format!("unreadable {}", entry.key),
                LeaseEvent::Interrupted(reason) => format!("interrupted: {reason}"),
            }
        }

        /// What is said within an hour, at most `count` times.
        async fn all(&mut self, count: usize) -> Vec<String> {
            let mut said = Vec::new();
            while said.len() < count {
                match tokio::time::timeout(Duration::from_secs(3600), self.next()).await {
                    Ok(text) => said.push(text),
                    Err(_) => break,
                }
            }
            said
        }
    }

    #[tokio::test(start_paused = true)]
    async fn changes_the_list_already_showed_are_not_told_again() {
        let notices =
            [Said::Deleted(9, "10.5.1.0-24"), Said::Put(10, "10.5.1.0-24"), Said::Put(11, "10.5.2.0-24")];
        let mut watch = watch(&[Ok((10, &["10.5.1.0-24"]))], &[&notices]);
        assert_eq!(watch.all(2).await, ["snapshot [10.5.1.0-24] 0 unreadable", "added 10.5.2.0-24 at 11"]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_removal_of_a_key_that_is_no_subnet_brings_a_list() {
        let notices = [Said::Put(2, "foo"), Said::Deleted(3, "foo"), Said::Deleted(4, "10.5.1.0-24")];
        let mut watch = watch(&[Ok((1, &["foo"])), Ok((4, &[]))], &[&notices]);
        let started = Instant::now();
        assert_eq!(
            watch.all(4).await,
            [
                "snapshot [] 1 unreadable",
                "unreadable /n/subnets/foo",
                "removed 10.5.1.0-24",
                "snapshot [] 0 unreadable"
            ]
        );
        assert!(started.elapsed() < Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_of_an_hour_is_one_interruption_and_few_questions() {
        let mut watch = watch(&[Err("away")], &[]);
        assert_eq!(watch.all(2).await, ["interrupted: away"]);
        let listed = watch.script.listed.load(Ordering::SeqCst);
        assert!((700..1500).contains(&listed), "{listed} lists in an hour");
    }

    #[tokio::test(start_paused = true)]
    async fn a_compaction_is_no_interruption() {
        let lists = [Ok((1, &["10.5.1.0-24"][..])), Ok((9, &["10.5.2.0-24"][..]))];
        let mut watch = watch(&lists, &[&[Said::Compacted], &[]]);
        assert_eq!(
            watch.all(2).await,
            ["snapshot [10.5.1.0-24] 0 unreadable", "snapshot [10.5.2.0-24] 0 unreadable"]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_that_never_holds_is_not_opened_in_a_loop() {
        for end in [Said::Broken, Said::Compacted] {
            let mut watch = watch(&[Ok((1, &[]))], &[&[end]]);
            let started = Instant::now();
            while started.elapsed() < Duration::from_secs(600) {
                watch.next().await;
            }
            let listed = watch.script.listed.load(Ordering::SeqCst);
            assert!((100..260).contains(&listed), "{listed} lists in ten minutes");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_that_held_is_opened_again_at_once() {
        let mut watch = watch(&[Ok((1, &[]))], &[&[]]);
        watch.next().await;
        for _ in 0..5 {
            // Silence, then a compare.
            let started = Instant::now();
            assert_eq!(watch.next().await, "snapshot [] 0 unreadable");
            let waited = started.elapsed().as_secs();
            assert!((239..=361).contains(&waited), "{waited} s between compares");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_went_back_in_time_is_watched_from_there() {
        let lists = [Ok((100, &["10.5.1.0-24"][..])), Ok((5, &[][..])), Ok((5, &["10.5.2.0-24"][..]))];
        let mut watch = watch(&lists, &[&[], &[Said::Put(6, "10.5.3.0-24")]]);
        assert_eq!(
            watch.all(3).await,
            [
                "snapshot [10.5.1.0-24] 0 unreadable",
                "snapshot [10.5.2.0-24] 0 unreadable",
                "added 10.5.3.0-24 at 6"
            ]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_compare_that_fails_is_made_soon_again_and_the_watch_goes_on() {
        let lists = [Ok((1, &[][..])), Err("busy"), Ok((2, &["10.5.1.0-24"][..]))];
        let mut watch = watch(&lists, &[&[]]);
        watch.next().await;
        let started = Instant::now();
        assert_eq!(watch.next().await, "snapshot [10.5.1.0-24] 0 unreadable");
        assert!(started.elapsed() < Duration::from_secs(380));
    }

    #[tokio::test(start_paused = true)]
    async fn the_list_our_lease_was_chosen_from_is_not_made_again() {
        let listing =
            Listing { entries: vec![entry("10.5.1.0-24", 9), entry("10.5.7.0-24", 12)], revision: 10 };
        let listed: Listed = Arc::new(Mutex::new(Some((std::time::Instant::now(), listing))));
        // Our own entry was written after the list, and comes once more with the changes behind it.
        let said =
            vec![Said::Put(10, "10.5.1.0-24"), Said::Put(11, "10.5.2.0-24"), Said::Put(12, "10.5.7.0-24")];
        let script = Arc::new(Script { watches: Mutex::new([said].into()), ..Script::default() });
        let watcher =
            Watcher::new(script.clone(), FOLDER.into(), HeldEntry::default(), Duration::from_secs(300));
        let events = watcher.beginning_with(listed.clone()).stream();
        let mut watch = Watch { script, events };
        assert_eq!(
            [watch.next().await, watch.next().await, watch.next().await],
            [
                "snapshot [10.5.1.0-24 10.5.7.0-24] 0 unreadable",
                "added 10.5.2.0-24 at 11",
                "added 10.5.7.0-24 at 12"
            ]
        );
        assert_eq!(watch.script.listed.load(Ordering::SeqCst), 0);
        assert!(listed.lock().unwrap().is_none(), "it serves once");
    }

    #[tokio::test(start_paused = true)]
    async fn the_ends_of_other_nodes_leases_are_not_asked_for() {
        let mut watch = watch(&[Ok((1, &["10.5.1.0-24", "10.5.2.0-24"]))], &[&[Said::Put(2, "10.5.3.0-24")]]);
        assert_eq!(watch.all(2).await.len(), 2);
        assert_eq!(watch.script.asked.load(Ordering::SeqCst), 0);
    }
}
