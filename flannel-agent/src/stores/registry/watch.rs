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
use super::{Entry, Lifetime, Listing, Notice, Registry, RegistryError, WatchEnd, now};
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
    /// A key that was told as of a later revision: our own, which was written after the list.
    ahead: Option<(String, u64)>,
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
            ahead: None,
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
        let ahead = listing.entries.iter().find(|entry| entry.revision > listing.revision);
        self.ahead = ahead.map(|entry| (entry.key.clone(), entry.revision));
        let snapshot = self.snapshot(listing).await;
        self.ready.push_back(snapshot);
        Ok(())
    }

    /// For the first list only: later, what was told since is not in it.
    fn just_listed(&self) -> Option<Listing> {
        if self.revision != 0 {
            return None;
        }
        let (at, listing) = self.listed.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        (now().saturating_duration_since(at) < FRESH).then_some(listing)
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

    /// Whether a notice tells what was told already.
    fn is_old(&self, notice: &Notice) -> bool {
        let (Notice::Put(Entry { key, revision, .. }) | Notice::Deleted { key, revision }) = notice;
        let told = match &self.ahead {
            Some((ahead, told)) if ahead == key => *told,
            _ => self.revision,
        };
        *revision <= told.max(self.revision)
    }

    async fn take(&mut self, notices: Vec<Notice>) {
        for notice in notices {
            if self.is_old(&notice) {
                continue;
            }
            let event = match notice {
                Notice::Put(entry) => match self.lease(entry).await {
                    Ok(lease) => LeaseEvent::Added(lease),
                    Err(unreadable) => LeaseEvent::Unreadable(unreadable),
                },
                Notice::Deleted { key, .. } => {
                    match key.strip_prefix(&self.folder).map(str::parse) {
                        Some(Ok(subnets)) => LeaseEvent::Removed(subnets),
                        // Told as unreadable before: a list says that it is no more.
                        _ => {
                            self.compare_soon();
                            continue;
                        }
                    }
                }
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
        let now = now();
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
        if std::mem::replace(&mut self.away, true) {
            tracing::debug!(reason, "the leases still can't be watched");
        } else {
            self.ready.push_back(LeaseEvent::Interrupted(reason));
        }
        self.wait_longer();
    }

    fn wait_longer(&mut self) {
        self.retry_at = Instant::now() + self.back_off.next();
    }
}

#[cfg(test)]
mod tests;
