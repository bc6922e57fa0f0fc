//! Leases in a file of our own, so that a small cluster needs nothing but this binary.
//!
//! One server, not replicated: while it is away nobody gets a lease, and everybody keeps theirs. Where that is not
//! enough, the same server runs on etcd.
//!
//! The file is a redb database: a write is acknowledged after it is on disk, and a crash at any moment leaves the state
//! before or after it. What is read comes from memory, where everything is a second time: ten thousand leases have
//! about 2 MB.
//!
//! **Time.** Ends are kept as wall-clock time in the file and as monotonic time in memory: a clock that is set while the
//! server runs moves nothing. After a start no lease ends within [`GRACE`]: a node that could not renew while the server
//! was away, or whose end a wrong clock has passed, finds its lease. (etcd does alike when its leader changes.)
//! And none has more than a new one has.

mod file;

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::sync::watch;

use self::file::{Contents, File, Record};
use super::LEASE_TTL;
use super::registry::{
    Deleted, Entry, Lifetime, Listing, Notice, Registry, RegistryError, RegistryNetworks, WatchEnd, Written,
};

pub use self::file::EmbeddedError;
use crate::domain::network_name::NetworkName;

/// How long every lease lives at least after a start. Nodes try a renewal that failed again each minute.
pub const GRACE: Duration = Duration::from_secs(300);

/// Changes that a watch can be behind before it must list again.
const HISTORY: usize = 8192;

/// A running watch is compared with a list this often, as with every store.
const RESYNC: Duration = Duration::from_secs(300);

/// The file, open. One process at a time has it.
#[derive(Clone)]
pub struct Embedded {
    store: Arc<Store>,
}

struct Store {
    name: String,
    state: Arc<Mutex<State>>,
    /// One write at a time, each of which waits for the disk.
    file: Arc<tokio::sync::Mutex<File>>,
    /// The latest revision.
    news: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    entries: BTreeMap<String, Stored>,
    revision: u64,
    /// The latest changes, oldest first.
    history: VecDeque<Notice>,
    /// Changes up to here are not in `history`.
    forgotten: u64,
}

#[derive(Clone)]
struct Stored {
    value: Vec<u8>,
    revision: u64,
    expires: Option<Instant>,
}

impl Embedded {
    /// Opens the file, and makes it and its folder where there is none. Ends leases whose time has come from now on.
    ///
    /// # Errors
    /// It can't be read or written, another process has it, or it is no file of ours.
    pub fn open(path: &Path) -> Result<Self, EmbeddedError> {
        let (file, Contents { records, revision, .. }) = File::open(path)?;
        let (now, wall) = (Instant::now(), SystemTime::now());
        let entries = records.into_iter().map(|(key, record)| {
            let Record { value, revision, expires } = record;
            let expires = expires.map(|end| now + left(end, wall));
            (key, Stored { value, revision, expires })
        });
        let state = State { entries: entries.collect(), revision, forgotten: revision, ..State::default() };
        let (news, _) = watch::channel(revision);
        let store = Arc::new(Store {
            name: format!("the store in {}", path.display()),
            state: Arc::new(Mutex::new(state)),
            file: Arc::new(tokio::sync::Mutex::new(file)),
            news,
        });
        tokio::spawn(end_leases(Arc::downgrade(&store)));
        Ok(Self { store })
    }

    /// The networks in it.
    pub fn networks(&self) -> RegistryNetworks {
        RegistryNetworks::new(self.store.clone(), String::new(), RESYNC)
    }

    /// Writes a network's configuration or takes it away, unless it says so already; without a name that of the network
    /// that has none.
    ///
    /// # Errors
    /// The disk is full or broken.
    pub async fn configure(
        &self,
        network: Option<&NetworkName>,
        text: Option<&str>,
    ) -> Result<(), EmbeddedError> {
        let key = network.map_or_else(|| "config".to_owned(), |name| format!("{name}/config"));
        let value = text.map(|text| text.as_bytes().to_vec());
        let different = |present: Option<&Stored>| {
            let same = present.map(|stored| &stored.value) == value.as_ref();
            (!same).then(|| value.map(|value| (value, None)))
        };
        self.store.write(&key, different).await.map(drop)
    }

    /// Writes an entry as it is, for moving leases here. Without `ttl` it never ends.
    ///
    /// # Errors
    /// The disk is full or broken.
    pub async fn put(&self, key: &str, value: &[u8], ttl: Option<Duration>) -> Result<(), EmbeddedError> {
        self.store.write(key, |_| Some(Some((value.to_vec(), ttl)))).await.map(drop)
    }

    /// Deletes an entry; that there is none is fine.
    ///
    /// # Errors
    /// The disk is full or broken.
    pub async fn delete(&self, key: &str) -> Result<(), EmbeddedError> {
        self.store.write(key, |present| present.map(|_| None)).await.map(drop)
    }

    /// Every entry with what it has left to live, for moving elsewhere.
    pub fn entries(&self) -> Vec<(String, Vec<u8>, Option<Duration>)> {
        let now = Instant::now();
        let state = self.store.lock();
        let left = |entry: &Stored| entry.expires.map(|end| end.saturating_duration_since(now));
        state.entries.iter().map(|(key, entry)| (key.clone(), entry.value.clone(), left(entry))).collect()
    }
}

/// What a lease has left when the file is opened and the clock says `wall`.
fn left(end: SystemTime, wall: SystemTime) -> Duration {
    end.duration_since(wall).unwrap_or_default().clamp(GRACE, LEASE_TTL)
}

/// What an entry becomes: nothing, or a value that lives for a time.
type Wanted = Option<(Vec<u8>, Option<Duration>)>;

impl Store {
    /// Every change is made whole: a panic elsewhere leaves the state usable.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes one entry, first on disk, then in memory. `decide` sees what is there and says what shall be; `None` from
    /// it changes nothing and is the answer.
    async fn write(
        &self,
        key: &str,
        decide: impl FnOnce(Option<&Stored>) -> Option<Wanted>,
    ) -> Result<Option<Written>, EmbeddedError> {
        let file = self.file.clone().lock_owned().await;
        let (wanted, revision) = {
            let state = self.lock();
            match decide(state.entries.get(key)) {
                Some(wanted) => (wanted, state.revision + 1),
                None => return Ok(None),
            }
        };
        let stored = wanted.map(|(value, ttl)| {
            let expires = ttl.map(|ttl| (Instant::now() + ttl, SystemTime::now() + ttl));
            (Stored { value, revision, expires: expires.map(|(end, _)| end) }, expires.map(|(_, end)| end))
        });
        let record = stored.as_ref().map(|(stored, wall)| Record {
            value: stored.value.clone(),
            revision,
            expires: *wall,
        });
        let (key, state, news) = (key.to_owned(), self.state.clone(), self.news.clone());
        let lifetime = stored.as_ref().map_or(Lifetime::Forever, |(stored, _)| lifetime(stored));
        // A caller that goes away must not leave the disk ahead of the memory.
        let task = tokio::task::spawn_blocking(move || {
            file.put(&key, record.as_ref(), revision)?;
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            state.apply(key, stored.map(|(stored, _)| stored), revision);
            drop(state);
            news.send_replace(revision);
            drop(file);
            Ok::<_, EmbeddedError>(())
        });
        task.await.map_err(|error| EmbeddedError::Interrupted(error.to_string()))??;
        Ok(Some(Written { revision, lifetime }))
    }

    /// The next moment at which a lease ends.
    fn next_end(&self) -> Option<Instant> {
        self.lock().entries.values().filter_map(|entry| entry.expires).min()
    }

    fn ended(&self) -> Vec<String> {
        let (now, state) = (Instant::now(), self.lock());
        let due = |entry: &Stored| entry.expires.is_some_and(|end| end <= now);
        state.entries.iter().filter(|(_, entry)| due(entry)).map(|(key, _)| key.clone()).collect()
    }
}

/// Deletes leases as they end, as long as somebody has the store.
async fn end_leases(store: std::sync::Weak<Store>) {
    loop {
        let Some(held) = store.upgrade() else { return };
        for key in held.ended() {
            let now = Instant::now();
            let still_due =
                |entry: Option<&Stored>| entry?.expires.is_some_and(|end| end <= now).then_some(None);
            if let Err(error) = held.write(&key, still_due).await {
                tracing::error!("lease {key} has ended and can't be deleted: {error}");
            }
        }
        let (mut news, next) = (held.news.subscribe(), held.next_end());
        drop(held);
        // A deletion that failed is tried again in a moment, not at once.
        let soonest = Instant::now() + Duration::from_millis(100);
        let wake = next.map_or(soonest + RESYNC, |end| end.max(soonest));
        tokio::select! {
            () = tokio::time::sleep_until(wake.into()) => {}
            changed = news.changed() => if changed.is_err() { return },
        }
    }
}

impl State {
    fn apply(&mut self, key: String, stored: Option<Stored>, revision: u64) {
        self.revision = revision;
        let notice = match stored {
            Some(stored) => {
                let notice = Notice::Put(entry(&key, &stored));
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

fn revision_of(notice: &Notice) -> u64 {
    match notice {
        Notice::Put(entry) => entry.revision,
        Notice::Deleted { revision, .. } => *revision,
    }
}

fn lifetime(stored: &Stored) -> Lifetime {
    stored.expires.map_or(Lifetime::Forever, Lifetime::Until)
}

fn entry(key: &str, stored: &Stored) -> Entry {
    Entry {
        key: key.to_owned(),
        value: stored.value.clone(),
        revision: stored.revision,
        lifetime: lifetime(stored),
    }
}

fn failed(error: EmbeddedError) -> RegistryError {
    RegistryError::Unreachable(error.to_string())
}

#[async_trait]
impl Registry for Store {
    fn name(&self) -> &str {
        &self.name
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, RegistryError> {
        Ok(self.lock().entries.get(key).map(|stored| entry(key, stored)))
    }

    async fn list(&self, folder: &str) -> Result<Listing, RegistryError> {
        let state = self.lock();
        let below = state.entries.range(folder.to_owned()..).take_while(|(key, _)| key.starts_with(folder));
        let entries = below.map(|(key, stored)| entry(key, stored)).collect();
        Ok(Listing { entries, revision: state.revision })
    }

    async fn create(
        &self,
        key: &str,
        value: String,
        ttl: Option<Duration>,
    ) -> Result<Option<Written>, RegistryError> {
        let absent = |present: Option<&Stored>| present.is_none().then(|| Some((value.into_bytes(), ttl)));
        self.write(key, absent).await.map_err(failed)
    }

    async fn update(
        &self,
        old: &Entry,
        value: String,
        ttl: Option<Duration>,
    ) -> Result<Option<Written>, RegistryError> {
        let unchanged = |present: Option<&Stored>| {
            (present?.revision == old.revision).then(|| Some((value.into_bytes(), ttl)))
        };
        self.write(&old.key, unchanged).await.map_err(failed)
    }

    async fn delete(&self, old: &Entry) -> Result<Deleted, RegistryError> {
        let unchanged = |present: Option<&Stored>| (present?.revision == old.revision).then_some(None);
        let written = self.write(&old.key, unchanged).await.map_err(failed)?;
        Ok(if written.is_some() { Deleted::Yes } else { Deleted::Changed })
    }

    async fn watch(
        &self,
        folder: &str,
        revision: u64,
    ) -> Result<BoxStream<'static, Result<Vec<Notice>, WatchEnd>>, RegistryError> {
        let (state, news, folder) = (self.state.clone(), self.news.subscribe(), folder.to_owned());
        let start = Some((state, news, revision));
        let notices = stream::unfold(start, move |at| {
            let folder = folder.clone();
            async move {
                let (state, mut news, mut seen) = at?;
                loop {
                    let head = *news.borrow_and_update();
                    let new = {
                        let state = state.lock().unwrap_or_else(PoisonError::into_inner);
                        state.after(&folder, seen)
                    };
                    match new {
                        None => return Some((Err(WatchEnd::Compacted), None)),
                        Some(new) if new.is_empty() => seen = head.max(seen),
                        Some(new) => {
                            let last = new.last().map_or(head, revision_of);
                            return Some((Ok(new), Some((state, news, last))));
                        }
                    }
                    if news.changed().await.is_err() {
                        return None;
                    }
                }
            }
        });
        Ok(notices.boxed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_jumped_while_the_server_was_away_ends_nothing_and_makes_nothing_eternal() {
        let day = Duration::from_secs(86400);
        let written = SystemTime::UNIX_EPOCH + 20_000 * day;
        let end = written + day;
        for (clock, wanted) in [
            (written, day),
            (written + day / 2, day / 2),
            (end - Duration::from_secs(1), GRACE),
            (end + 100 * day, GRACE),
            (written - day, LEASE_TTL),
            (SystemTime::UNIX_EPOCH, LEASE_TTL),
        ] {
            assert_eq!(left(end, clock), wanted, "{clock:?}");
        }
    }
}
