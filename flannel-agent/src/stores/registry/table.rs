//! Entries in this process, with their latest changes: what a store that is its own server answers from.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::sync::watch;

use super::{Entry, Lifetime, Listing, Notice, WatchEnd};

/// Changes that a watch can be behind before it must list again.
const HISTORY: usize = 8192;

#[derive(Debug, Default)]
pub(in crate::stores) struct Table {
    entries: BTreeMap<String, Stored>,
    revision: u64,
    /// The latest changes, oldest first.
    history: VecDeque<Notice>,
    /// Changes up to here are not in `history`.
    forgotten: u64,
}

#[derive(Clone, Debug)]
pub(in crate::stores) struct Stored {
    pub(in crate::stores) value: Vec<u8>,
    pub(in crate::stores) revision: u64,
    pub(in crate::stores) expires: Option<Instant>,
}

impl Stored {
    pub(in crate::stores) fn lifetime(&self) -> Lifetime {
        self.expires.map_or(Lifetime::Forever, Lifetime::Until)
    }

    fn entry(&self, key: &str) -> Entry {
        let Self { value, revision, .. } = self.clone();
        Entry { key: key.to_owned(), value, revision, lifetime: self.lifetime() }
    }
}

impl Table {
    /// What there is as of a revision; what led there is not known.
    pub(in crate::stores) fn new(entries: BTreeMap<String, Stored>, revision: u64) -> Self {
        Self { entries, revision, history: VecDeque::new(), forgotten: revision }
    }

    pub(in crate::stores) fn revision(&self) -> u64 {
        self.revision
    }

    pub(in crate::stores) fn stored(&self, key: &str) -> Option<&Stored> {
        self.entries.get(key)
    }

    pub(in crate::stores) fn all(&self) -> impl Iterator<Item = (&String, &Stored)> {
        self.entries.iter()
    }

    pub(in crate::stores) fn get(&self, key: &str) -> Option<Entry> {
        self.entries.get(key).map(|stored| stored.entry(key))
    }

    pub(in crate::stores) fn list(&self, folder: &str) -> Listing {
        let below = self.entries.range(folder.to_owned()..).take_while(|(key, _)| key.starts_with(folder));
        Listing { entries: below.map(|(key, stored)| stored.entry(key)).collect(), revision: self.revision }
    }

    /// The next moment at which an entry ends.
    pub(in crate::stores) fn next_end(&self) -> Option<Instant> {
        self.entries.values().filter_map(|entry| entry.expires).min()
    }

    /// Whose time has come.
    pub(in crate::stores) fn ended(&self, now: Instant) -> Vec<String> {
        let due = |entry: &Stored| entry.expires.is_some_and(|end| end <= now);
        self.entries.iter().filter(|(_, entry)| due(entry)).map(|(key, _)| key.clone()).collect()
    }

    /// Writes or deletes an entry.
    pub(in crate::stores) fn apply(&mut self, key: String, stored: Option<Stored>, revision: u64) {
        self.revision = revision;
        let notice = match stored {
            Some(stored) => {
                let notice = Notice::Put(stored.entry(&key));
                self.entries.insert(key, stored);
                notice
            }
            None => {
                self.entries.remove(&key);
                Notice::Deleted { key, revision }
            }
        };
        self.history.push_back(notice);
        if self.history.len() > HISTORY
            && let Some(oldest) = self.history.pop_front()
        {
            self.forgotten = revision_of(&oldest);
        }
    }

    /// Changes below `folder` after `revision`; `None` when some of them are forgotten.
    fn after(&self, folder: &str, revision: u64) -> Option<Vec<Notice>> {
        if revision < self.forgotten {
            return None;
        }
        let below = |notice: &&Notice| match notice {
            Notice::Put(Entry { key, .. }) | Notice::Deleted { key, .. } => key.starts_with(folder),
        };
        let new = self.history.iter().rev().take_while(|notice| revision_of(notice) > revision).filter(below);
        let mut new: Vec<_> = new.cloned().collect();
        new.reverse();
        Some(new)
    }
}

/// Changes below `folder` after `revision`, as `news` says that there are any.
pub(in crate::stores) fn follow(
    table: Arc<Mutex<Table>>,
    news: watch::Receiver<u64>,
    folder: &str,
    revision: u64,
) -> BoxStream<'static, Result<Vec<Notice>, WatchEnd>> {
    let (start, folder) = (Some((table, news, revision)), folder.to_owned());
    let notices = stream::unfold(start, move |at| {
        let folder = folder.clone();
        async move {
            let (table, mut news, mut seen) = at?;
            loop {
                let head = *news.borrow_and_update();
                let new = table.lock().unwrap_or_else(PoisonError::into_inner).after(&folder, seen);
                match new {
                    None => return Some((Err(WatchEnd::Compacted), None)),
                    Some(new) if new.is_empty() => seen = head.max(seen),
                    Some(new) => {
                        let last = new.last().map_or(head, revision_of);
                        return Some((Ok(new), Some((table, news, last))));
                    }
                }
                if news.changed().await.is_err() {
                    return None;
                }
            }
        }
    });
    notices.boxed()
}

fn revision_of(notice: &Notice) -> u64 {
    match notice {
        Notice::Put(entry) => entry.revision,
        Notice::Deleted { revision, .. } => *revision,
    }
}
