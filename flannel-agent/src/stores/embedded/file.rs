//! The file of the embedded store: one table of entries, one of facts about all of them.
//!
//! After a read or write that failed redb refuses everything (`StorageError::PreviousIo`), so the file is then left and
//! opened anew for the next write: a disk that was full for a moment costs the writes of that moment.
//!
//! Whoever deletes the file under a running server leaves it with one that nobody finds again. That is looked for before
//! each write and every second ([`File::look`]): everything in memory is then written into a new one in its place. What
//! somebody else put there is not overwritten, and no write is acknowledged that would end in the file without a name.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError, TableDefinition};

/// Key → (revision, end in milliseconds since 1970 or 0 for none, value).
const ENTRIES: TableDefinition<'_, &str, (u64, u64, &[u8])> = TableDefinition::new("entries");
const FACTS: TableDefinition<'_, &str, u64> = TableDefinition::new("facts");
const REVISION: &str = "revision";
const LAYOUT: &str = "layout";

/// What this version writes, and the only one it reads.
const THIS_LAYOUT: u64 = 1;

/// Why the file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    #[error("can't make the folder of {path}: {source}")]
    Folder { path: PathBuf, source: std::io::Error },
    #[error("{0} is in use by another process: one server at a time can have it")]
    InUse(PathBuf),
    #[error("can't open {path}: {reason}")]
    Open { path: PathBuf, reason: String },
    #[error(
        "{path} is damaged: {reason}; put a copy from before in its place, or move it away: nodes that have a lease take \
         the same subnet again when they are started"
    )]
    Damaged { path: PathBuf, reason: String },
    #[error("{path} was written by another version: its layout is {found}, this version has {THIS_LAYOUT}")]
    Layout { path: PathBuf, found: u64 },
    #[error("can't read or write {path}: {reason}")]
    Broken { path: PathBuf, reason: String },
    #[error(
        "{0} was replaced by another file while the server runs: start it again and it takes the leases in there, or move \
         that file away and it writes its own into a new one"
    )]
    Replaced(PathBuf),
    #[error("a write was interrupted: {0}")]
    Interrupted(String),
}

/// An entry as it is on disk.
pub(super) struct Record {
    pub(super) value: Vec<u8>,
    pub(super) revision: u64,
    pub(super) expires: Option<SystemTime>,
}

/// Everything in a file.
pub(super) struct Contents {
    pub(super) records: Vec<(String, Record)>,
    /// Of the latest change.
    pub(super) revision: u64,
    layout: u64,
}

/// What is in memory, as it is to be on disk.
pub(super) trait Known {
    fn record(&self, key: &str) -> Option<Record>;

    /// Every entry, and the revision of the latest change.
    fn everything(&self) -> (Vec<(String, Record)>, u64);
}

/// Which file a path names, whatever becomes of the path. A file that is open keeps its number for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
}

pub(super) struct File {
    path: PathBuf,
    identity: Identity,
    /// `None` after a failure, until the next write.
    database: Option<Database>,
    /// Entries whose last write failed: the disk may have it or not.
    unsure: BTreeSet<String>,
}

impl File {
    /// The file, made where there is none, with everything in it.
    pub(super) fn open(path: &Path) -> Result<(Self, Contents), EmbeddedError> {
        if !path.exists() {
            make(path)?;
        }
        let (database, contents, identity) = open_sound(path)?;
        if contents.layout != THIS_LAYOUT {
            return Err(EmbeddedError::Layout { path: path.into(), found: contents.layout });
        }
        let file = Self { path: path.into(), identity, database: Some(database), unsure: BTreeSet::new() };
        Ok((file, contents))
    }

    /// Writes or deletes an entry. On disk, where it can be found again, when it returns.
    pub(super) fn put(
        &mut self,
        key: &str,
        record: Option<&Record>,
        revision: u64,
        known: &impl Known,
    ) -> Result<(), EmbeddedError> {
        self.look(known)?;
        let database = match self.database.take() {
            Some(database) => database,
            None => self.reopen()?,
        };
        let unsure: Vec<_> = self.unsure.iter().map(|key| (key.clone(), known.record(key))).collect();
        let mended = unsure.iter().map(|(key, record)| (key.as_str(), record.as_ref()));
        let written = write(&database, mended.chain([(key, record)]), revision);
        if let Err(error) = written {
            self.unsure.insert(key.to_owned());
            return Err(self.broken(&error));
        }
        self.unsure.clear();
        self.database = Some(database);
        Ok(())
    }

    /// Looks whether the file is still in its place. Where nothing is, a new one is written with everything that is known.
    pub(super) fn look(&mut self, known: &impl Known) -> Result<(), EmbeddedError> {
        match identity(&self.path)? {
            Some(there) if there == self.identity => Ok(()),
            Some(_) => Err(EmbeddedError::Replaced(self.path.clone())),
            None => self.write_anew(known),
        }
    }

    fn write_anew(&mut self, known: &impl Known) -> Result<(), EmbeddedError> {
        make_with(&self.path, |database| {
            let (records, revision) = known.everything();
            let records = records.iter().map(|(key, record)| (key.as_str(), Some(record)));
            write(database, records, revision)
        })?;
        let (database, _, identity) = open_sound(&self.path)?;
        (self.database, self.identity) = (Some(database), identity);
        self.unsure.clear();
        tracing::warn!(
            "{} was gone while the server runs: all leases were written into a new one in its place",
            self.path.display()
        );
        Ok(())
    }

    fn reopen(&self) -> Result<Database, EmbeddedError> {
        let (database, _, identity) = open_sound(&self.path)?;
        match identity == self.identity {
            true => Ok(database),
            false => Err(EmbeddedError::Replaced(self.path.clone())),
        }
    }

    fn broken(&self, error: &redb::Error) -> EmbeddedError {
        EmbeddedError::Broken { path: self.path.clone(), reason: error.to_string() }
    }
}

/// Opens a file and reads it. Where its bytes make no sense redb mostly panics, which says that the file is damaged.
fn open_sound(path: &Path) -> Result<(Database, Contents, Identity), EmbeddedError> {
    let before = identity(path)?;
    let opened = catch_unwind(AssertUnwindSafe(|| {
        let database = Database::open(path).map_err(|error| unopened(path, &error))?;
        let contents = read(&database).map_err(|error| match error {
            redb::Error::Corrupted(reason) => EmbeddedError::Damaged { path: path.into(), reason },
            error => EmbeddedError::Broken { path: path.into(), reason: error.to_string() },
        })?;
        match (before, identity(path)?) {
            (Some(before), Some(now)) if before == now => Ok((database, contents, now)),
            _ => Err(EmbeddedError::Replaced(path.into())),
        }
    }));
    opened.unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str);
        let reason = said.or_else(|| panic.downcast_ref().copied()).unwrap_or("it can't be read");
        Err(EmbeddedError::Damaged { path: path.into(), reason: reason.to_owned() })
    })
}

fn read(database: &Database) -> Result<Contents, redb::Error> {
    // Makes the tables of a new file.
    let write = database.begin_write()?;
    {
        write.open_table(ENTRIES)?;
        let mut facts = write.open_table(FACTS)?;
        if facts.get(LAYOUT)?.is_none() {
            facts.insert(LAYOUT, THIS_LAYOUT)?;
        }
    }
    write.commit()?;
    let read = database.begin_read()?;
    let mut records = Vec::new();
    for entry in read.open_table(ENTRIES)?.iter()? {
        let (key, value) = entry?;
        let (revision, end, value) = value.value();
        let expires = (end != 0).then(|| UNIX_EPOCH + Duration::from_millis(end));
        records.push((key.value().to_owned(), Record { value: value.to_vec(), revision, expires }));
    }
    let facts = read.open_table(FACTS)?;
    let fact = |name| facts.get(name).map(|fact| fact.map_or(0, |fact| fact.value()));
    Ok(Contents { records, revision: fact(REVISION)?, layout: fact(LAYOUT)? })
}

/// All of them or none.
fn write<'a>(
    database: &Database,
    records: impl Iterator<Item = (&'a str, Option<&'a Record>)>,
    revision: u64,
) -> Result<(), redb::Error> {
    let write = database.begin_write()?;
    {
        let mut entries = write.open_table(ENTRIES)?;
        for (key, record) in records {
            match record {
                Some(record) => {
                    let end = record.expires.map_or(0, milliseconds);
                    entries.insert(key, (record.revision, end, record.value.as_slice()))?;
                }
                None => {
                    entries.remove(key)?;
                }
            }
        }
        write.open_table(FACTS)?.insert(REVISION, revision)?;
    }
    Ok(write.commit()?)
}

fn unopened(path: &Path, error: &DatabaseError) -> EmbeddedError {
    match error {
        DatabaseError::DatabaseAlreadyOpen => EmbeddedError::InUse(path.into()),
        DatabaseError::Storage(StorageError::Corrupted(reason)) => {
            EmbeddedError::Damaged { path: path.into(), reason: reason.clone() }
        }
        error => EmbeddedError::Open { path: path.into(), reason: error.to_string() },
    }
}

/// The file at a path, if there is one.
fn identity(path: &Path) -> Result<Option<Identity>, EmbeddedError> {
    match std::fs::metadata(path) {
        Ok(facts) => Ok(Some(Identity { device: facts.dev(), inode: facts.ino() })),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(EmbeddedError::Open { path: path.into(), reason: error.to_string() }),
    }
}

fn make(path: &Path) -> Result<(), EmbeddedError> {
    make_with(path, |_| Ok(()))
}

/// Makes a database and what is to be in it beside its place, in a folder that is made too, and moves it there: killed in
/// between, nothing half made is in the way.
fn make_with(
    path: &Path,
    fill: impl FnOnce(&Database) -> Result<(), redb::Error>,
) -> Result<(), EmbeddedError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(folder).map_err(|source| EmbeddedError::Folder { path: path.into(), source })?;
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    let failed = |error: std::io::Error| EmbeddedError::Open { path: path.into(), reason: error.to_string() };
    match std::fs::remove_file(&beside) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let database = Database::create(&beside).map_err(|error| unopened(&beside, &error))?;
    fill(&database)
        .map_err(|error| EmbeddedError::Broken { path: beside.clone(), reason: error.to_string() })?;
    drop(database);
    // What somebody put there meanwhile is not overwritten.
    if identity(path)?.is_some() {
        return Err(EmbeddedError::Replaced(path.into()));
    }
    std::fs::rename(&beside, path).map_err(failed)?;
    std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)
}

/// Never 0, which stands for no end.
fn milliseconds(end: SystemTime) -> u64 {
    let since = end.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX).max(1)
}
