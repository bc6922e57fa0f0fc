//! Leases in a store of keys and values, in flanneld's layout (contract §3): `<prefix>/config`, `<prefix>/subnets/<key>`,
//! and the same below `<prefix>/<network>` for named networks.
//!
//! Everything that is the same for all such stores is here, on top of [`Registry`]: etcd's two APIs and our own file are
//! a file each, with the calls and nothing else. Where flanneld loses something, this does not: a renewal is a
//! compare-and-swap and never overwrites a new owner, a lost race is tried again, a reservation keeps having no TTL, and
//! one entry that can't be read hides nothing else.

mod leases;
mod mirror;
mod networks;
mod table;
mod transfer;
mod watch;

use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::stream::BoxStream;

pub(super) use self::leases::RegistryStore;
pub use self::mirror::{Fate, FollowEnd, Mirror, Planned};
pub use self::networks::RegistryNetworks;
pub(super) use self::networks::holds_a_network;
pub(super) use self::table::{Stored, Table, follow};
pub use self::transfer::{Content, Received};

/// The calls every such store offers. Keys are whole keys.
#[async_trait]
pub(super) trait Registry: Send + Sync {
    /// `etcd at <endpoints>`, for messages.
    fn name(&self) -> &str;

    async fn get(&self, key: &str) -> Result<Option<Entry>, RegistryError>;

    /// All entries whose key begins with `folder`, which ends in a slash; in key order and as of one revision.
    async fn list(&self, folder: &str) -> Result<Listing, RegistryError>;

    /// Writes an entry that lives for `ttl`, or for ever; `None` when the key exists.
    async fn create(
        &self,
        key: &str,
        value: String,
        ttl: Option<Duration>,
    ) -> Result<Option<Written>, RegistryError>;

    /// Replaces `old` if it is still what the store has, `None` when not. Without `ttl` the entry lives for ever.
    async fn update(
        &self,
        old: &Entry,
        value: String,
        ttl: Option<Duration>,
    ) -> Result<Option<Written>, RegistryError>;

    /// Deletes `old` if it is still what the store has.
    async fn delete(&self, old: &Entry) -> Result<Deleted, RegistryError>;

    /// What is left of an entry's life; `None` when it has no end. Asked of the store where the entry does not say.
    async fn remaining(&self, lifetime: Lifetime) -> Result<Option<Duration>, RegistryError> {
        Ok(match lifetime {
            Lifetime::Forever => None,
            Lifetime::Until(end) => Some(end.saturating_duration_since(now())),
            // Only the store that made it can say; the one that does has a method of its own.
            Lifetime::Lease(_) => Some(Duration::ZERO),
        })
    }

    /// Changes under `folder` after `revision`. The stream ends with its first error.
    async fn watch(
        &self,
        folder: &str,
        revision: u64,
    ) -> Result<BoxStream<'static, Result<Vec<Notice>, WatchEnd>>, RegistryError>;

    /// Leaves every connection; watches end, and the next call makes a new one.
    fn reconnect(&self) {}
}

/// A key as the store has it.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) key: String,
    pub(super) value: Vec<u8>,
    pub(super) revision: u64,
    pub(super) lifetime: Lifetime,
}

/// How long an entry lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lifetime {
    /// A reservation.
    Forever,
    /// As long as etcd's lease object with this id.
    Lease(i64),
    /// The store says it with the entry.
    Until(Instant),
}

pub(super) struct Listing {
    pub(super) entries: Vec<Entry>,
    pub(super) revision: u64,
}

pub(super) struct Written {
    pub(super) revision: u64,
    pub(super) lifetime: Lifetime,
}

pub(super) enum Deleted {
    Yes,
    /// It changed or vanished meanwhile.
    Changed,
}

#[derive(Clone, Debug)]
pub(super) enum Notice {
    Put(Entry),
    Deleted { key: String, revision: u64 },
}

#[derive(Debug)]
pub(super) enum WatchEnd {
    /// The history the watch needs was compacted: list again.
    Compacted,
    Broken(String),
}

#[derive(Debug)]
pub(super) enum RegistryError {
    /// No server answered.
    Unreachable(String),
    /// Every server that answered refused for a reason that stays.
    Refused(String),
}

/// The clock of leases: monotonic, and one with the timers that are waited on.
pub(super) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// `<prefix>/<last>`, as Go's `path.Join` does with a clean prefix.
fn join(prefix: &str, last: &str) -> String {
    match prefix {
        "" => last.to_owned(),
        "/" => format!("/{last}"),
        prefix => format!("{prefix}/{last}"),
    }
}
