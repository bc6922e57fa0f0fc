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

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use tokio::sync::watch;

use self::file::{Contents, File, Known, Record};
use super::LEASE_TTL;
use super::back_off::BackOff;
use super::registry::{
    Deleted, Entry, Lifetime, Listing, Notice, Registry, RegistryError, RegistryNetworks, Stored, Table,
    WatchEnd, Written, follow,
};

pub use self::file::EmbeddedError;
use crate::domain::network_name::NetworkName;

/// How long every lease lives at least after a start. Nodes try a renewal that failed again each minute.
pub const GRACE: Duration = Duration::from_secs(300);

/// How often a look at the file is taken while nothing is written.
const LOOK: Duration = Duration::from_secs(1);

/// A running watch is compared with a list this often, as with every store.
const RESYNC: Duration = Duration::from_secs(300);

/// The file, open. One process at a time has it.
#[derive(Clone)]
pub struct Embedded {
    store: Arc<Store>,
}

struct Store {
    name: String,
    table: Arc<Mutex<Table>>,
    /// One write at a time, each of which waits for the disk. A look at it is one too.
    file: Arc<tokio::sync::Mutex<File>>,
    /// The latest revision.
    news: watch::Sender<u64>,
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
        let table = Table::new(entries.collect(), revision);
        let (news, _) = watch::channel(revision);
        let store = Arc::new(Store {
            name: format!("the store in {}", path.display()),
            table: Arc::new(Mutex::new(table)),
            file: Arc::new(tokio::sync::Mutex::new(file)),
            news,
        });
        tokio::spawn(end_leases(Arc::downgrade(&store)));
        tokio::spawn(keep_the_file(Arc::downgrade(&store)));
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
        let table = self.store.lock();
        let left = |entry: &Stored| entry.expires.map(|end| end.saturating_duration_since(now));
        table.all().map(|(key, entry)| (key.clone(), entry.value.clone(), left(entry))).collect()
    }
}

/// What a lease has left when the file is opened and the clock says `wall`.
fn left(end: SystemTime, wall: SystemTime) -> Duration {
    end.duration_since(wall).unwrap_or_default().clamp(GRACE, LEASE_TTL)
}

/// An entry as it is said on disk, by the clock as it is now.
fn record_of(stored: &Stored) -> Record {
    let (now, wall) = (Instant::now(), SystemTime::now());
    let end = |end: Instant| wall + end.saturating_duration_since(now);
    Record { value: stored.value.clone(), revision: stored.revision, expires: stored.expires.map(end) }
}

impl Known for Mutex<Table> {
    fn record(&self, key: &str) -> Option<Record> {
        self.lock().unwrap_or_else(PoisonError::into_inner).stored(key).map(record_of)
    }

    fn everything(&self) -> (Vec<(String, Record)>, u64) {
        let table = self.lock().unwrap_or_else(PoisonError::into_inner);
        (table.all().map(|(key, stored)| (key.clone(), record_of(stored))).collect(), table.revision())
    }
}

/// What an entry becomes: nothing, or a value that lives for a time.
type Wanted = Option<(Vec<u8>, Option<Duration>)>;

impl Store {
    /// Every change is made whole: a panic elsewhere leaves the state usable.
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes one entry, first on disk, then in memory. `decide` sees what is there and says what shall be; `None` from
    /// it changes nothing and is the answer.
    async fn write(
        &self,
        key: &str,
        decide: impl FnOnce(Option<&Stored>) -> Option<Wanted>,
    ) -> Result<Option<Written>, EmbeddedError> {
        let mut file = self.file.clone().lock_owned().await;
        let (wanted, revision) = {
            let table = self.lock();
            match decide(table.stored(key)) {
                Some(wanted) => (wanted, table.revision() + 1),
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
        let (key, table, news) = (key.to_owned(), self.table.clone(), self.news.clone());
        let lifetime = stored.as_ref().map_or(Lifetime::Forever, |(stored, _)| stored.lifetime());
        // A caller that goes away must not leave the disk ahead of the memory.
        let task = tokio::task::spawn_blocking(move || {
            file.put(&key, record.as_ref(), revision, &*table)?;
            let mut table = table.lock().unwrap_or_else(PoisonError::into_inner);
            table.apply(key, stored.map(|(stored, _)| stored), revision);
            drop(table);
            news.send_replace(revision);
            drop(file);
            Ok::<_, EmbeddedError>(())
        });
        task.await.map_err(|error| EmbeddedError::Interrupted(error.to_string()))??;
        Ok(Some(Written { revision, lifetime }))
    }

    /// The next moment at which a lease ends.
    fn next_end(&self) -> Option<Instant> {
        self.lock().next_end()
    }

    fn ended(&self) -> Vec<String> {
        self.lock().ended(Instant::now())
    }
}

/// Deletes leases as they end, as long as somebody has the store. While the disk takes nothing that is said once, and
/// tried again with pauses.
async fn end_leases(store: std::sync::Weak<Store>) {
    let mut back_off = BackOff::default();
    let mut fails = false;
    loop {
        let Some(held) = store.upgrade() else { return };
        let mut failed = None;
        for key in held.ended() {
            let now = Instant::now();
            let still_due =
                |entry: Option<&Stored>| entry?.expires.is_some_and(|end| end <= now).then_some(None);
            if let Err(error) = held.write(&key, still_due).await {
                failed = Some((key, error));
                break;
            }
        }
        let (mut news, next) = (held.news.subscribe(), held.next_end());
        drop(held);
        if let Some((key, error)) = failed {
            if !std::mem::replace(&mut fails, true) {
                tracing::error!("lease {key} has ended and can't be deleted: {error}");
            }
            let pause = tokio::time::sleep(back_off.next());
            tokio::pin!(pause);
            // Other writes go on meanwhile; when the store is gone this ends.
            loop {
                tokio::select! {
                    () = &mut pause => break,
                    changed = news.changed() => if changed.is_err() { return },
                }
            }
            continue;
        }
        if std::mem::take(&mut fails) {
            tracing::info!("leases that have ended can be deleted again");
            back_off = BackOff::default();
        }
        let soonest = Instant::now() + Duration::from_millis(100);
        let wake = next.map_or(soonest + RESYNC, |end| end.max(soonest));
        tokio::select! {
            () = tokio::time::sleep_until(wake.into()) => {}
            changed = news.changed() => if changed.is_err() { return },
        }
    }
}

/// Looks whether the file is still in its place, as long as somebody has the store: who deletes it must not cost what is
/// written later, nor what was before. Each trouble is said once.
async fn keep_the_file(store: std::sync::Weak<Store>) {
    let mut said = None;
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(held) = store.upgrade() else { return };
        let mut file = held.file.clone().lock_owned().await;
        let table = held.table.clone();
        drop(held);
        let looked = tokio::task::spawn_blocking(move || file.look(&*table)).await;
        match looked {
            Ok(Ok(())) => said = None,
            Ok(Err(error)) => {
                let error = error.to_string();
                if said.as_ref() != Some(&error) {
                    tracing::error!("leases can't be written: {error}");
                }
                said = Some(error);
            }
            Err(error) => tracing::error!("the file of the leases was not looked after: {error}"),
        }
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
        Ok(self.lock().get(key))
    }

    async fn list(&self, folder: &str) -> Result<Listing, RegistryError> {
        Ok(self.lock().list(folder))
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
        Ok(follow(self.table.clone(), self.news.subscribe(), folder, revision))
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
