//! Leases in this process: what tests of everything above a store run on.
//!
//! Keys and values under the same [`RegistryStore`] as etcd's, on tokio's clock, so that a test may pause it. Every node
//! opens the store for itself; the network between is simulated by [`MemoryStore::cut`] and [`MemoryStore::mend`].

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::sync::watch;
use tokio::time::sleep_until;

use super::LeaseStore;
use super::registry::{
    Deleted, Entry, Listing, Notice, Registry, RegistryError, RegistryStore, Stored, Table, WatchEnd,
    Written, follow, now,
};

const CONFIG: &str = "config";
const LEASES: &str = "subnets/";

/// Nothing that it tells is ever lost.
const RESYNC: Duration = Duration::from_secs(365 * 86400);

/// A store that several agents of one process share by cloning it.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    memory: Arc<Memory>,
}

#[derive(Clone, Debug, Default)]
struct Memory {
    table: Arc<Mutex<Table>>,
    /// The latest revision.
    news: watch::Sender<u64>,
    cut: watch::Sender<bool>,
}

impl MemoryStore {
    pub fn new(config: impl Into<String>) -> Self {
        let store = Self::default();
        store.set_config(config);
        store
    }

    /// The leases as one more node opens them.
    pub fn open(&self) -> Arc<dyn LeaseStore> {
        Arc::new(RegistryStore::new(self.memory.clone(), "", RESYNC))
    }

    pub fn set_config(&self, config: impl Into<String>) {
        self.memory.write(&mut self.memory.table(), CONFIG, config.into(), None);
    }

    pub fn remove_config(&self) {
        self.memory.remove(&mut self.memory.table(), CONFIG);
    }

    /// Writes an entry as an operator or another daemon would, valid or not. Without `ttl` it is a reservation.
    pub fn put(&self, key: &str, value: &str, ttl: Option<Duration>) {
        self.memory.write(&mut self.memory.table(), &format!("{LEASES}{key}"), value.to_owned(), ttl);
    }

    /// Deletes an entry; that there is none is fine.
    pub fn delete(&self, key: &str) {
        self.memory.remove(&mut self.memory.table(), &format!("{LEASES}{key}"));
    }

    /// Keys and values, ordered by key.
    pub fn entries(&self) -> Vec<(String, String)> {
        let entries = self.memory.table().list(LEASES).entries.into_iter();
        let text = |entry: Entry| {
            (entry.key.replacen(LEASES, "", 1), String::from_utf8_lossy(&entry.value).into_owned())
        };
        entries.map(text).collect()
    }

    /// From now on nobody reaches the store. Entries go on to expire in it.
    pub fn cut(&self) {
        self.memory.cut.send_replace(true);
    }

    /// Ends what [`cut`](Self::cut) began.
    pub fn mend(&self) {
        self.memory.cut.send_replace(false);
    }
}

impl Memory {
    /// As it is now: what has ended is gone. A panic elsewhere leaves it usable: every change is made whole.
    fn table(&self) -> MutexGuard<'_, Table> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        for key in table.ended(now()) {
            self.remove(&mut table, &key);
        }
        table
    }

    fn write(&self, table: &mut Table, key: &str, value: String, ttl: Option<Duration>) -> Written {
        let revision = table.revision() + 1;
        let stored = Stored { value: value.into_bytes(), revision, expires: ttl.map(|ttl| now() + ttl) };
        let lifetime = stored.lifetime();
        table.apply(key.to_owned(), Some(stored), revision);
        self.news.send_replace(revision);
        Written { revision, lifetime }
    }

    fn remove(&self, table: &mut Table, key: &str) {
        if table.stored(key).is_some() {
            let revision = table.revision() + 1;
            table.apply(key.to_owned(), None, revision);
            self.news.send_replace(revision);
        }
    }

    fn reach(&self) -> Result<MutexGuard<'_, Table>, RegistryError> {
        match *self.cut.borrow() {
            true => Err(RegistryError::Unreachable("it was cut off".into())),
            false => Ok(self.table()),
        }
    }
}

#[async_trait]
impl Registry for Memory {
    fn name(&self) -> &str {
        "the store in memory"
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, RegistryError> {
        Ok(self.reach()?.get(key))
    }

    async fn list(&self, folder: &str) -> Result<Listing, RegistryError> {
        Ok(self.reach()?.list(folder))
    }

    async fn create(
        &self,
        key: &str,
        value: String,
        ttl: Option<Duration>,
    ) -> Result<Option<Written>, RegistryError> {
        let mut table = self.reach()?;
        let absent = table.stored(key).is_none();
        Ok(absent.then(|| self.write(&mut table, key, value, ttl)))
    }

    async fn update(
        &self,
        old: &Entry,
        value: String,
        ttl: Option<Duration>,
    ) -> Result<Option<Written>, RegistryError> {
        let mut table = self.reach()?;
        let unchanged = table.stored(&old.key).is_some_and(|stored| stored.revision == old.revision);
        Ok(unchanged.then(|| self.write(&mut table, &old.key, value, ttl)))
    }

    async fn delete(&self, old: &Entry) -> Result<Deleted, RegistryError> {
        let mut table = self.reach()?;
        if table.stored(&old.key).is_none_or(|stored| stored.revision != old.revision) {
            return Ok(Deleted::Changed);
        }
        self.remove(&mut table, &old.key);
        Ok(Deleted::Yes)
    }

    async fn watch(
        &self,
        folder: &str,
        revision: u64,
    ) -> Result<BoxStream<'static, Result<Vec<Notice>, WatchEnd>>, RegistryError> {
        drop(self.reach()?);
        let notices = follow(self.table.clone(), self.news.subscribe(), folder, revision);
        let watch = Watch { notices, cut: self.cut.subscribe(), memory: self.clone() };
        Ok(stream::unfold(watch, |mut watch| async move { Some((watch.next().await, watch)) }).boxed())
    }
}

struct Watch {
    notices: BoxStream<'static, Result<Vec<Notice>, WatchEnd>>,
    cut: watch::Receiver<bool>,
    memory: Memory,
}

impl Watch {
    async fn next(&mut self) -> Result<Vec<Notice>, WatchEnd> {
        loop {
            let end = self.memory.table().next_end();
            let expiry = async {
                match end {
                    Some(end) => sleep_until(end.into()).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                _ = self.cut.wait_for(|cut| *cut) => {
                    return Err(WatchEnd::Broken("the store in memory was cut off".into()));
                }
                notices = self.notices.next() => {
                    return notices.unwrap_or_else(|| Err(WatchEnd::Broken("the store is gone".into())));
                }
                // The look at the top of the loop drops what has ended and tells everybody.
                () = expiry => {}
            }
        }
    }
}
