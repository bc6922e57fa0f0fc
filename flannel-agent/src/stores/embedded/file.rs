//! The file of the embedded store: one table of entries, one of facts about all of them.
//!
//! After a read or write that failed redb refuses everything (`StorageError::PreviousIo`), so the file is then left and
//! opened anew for the next write: a disk that was full for a moment costs the writes of that moment.

use std::collections::BTreeSet;
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

pub(super) struct File {
    path: PathBuf,
    /// `None` after a failure, until the next write.
    database: Option<Database>,
    /// Entries whose last write failed: the disk may have it or not.
    unsure: BTreeSet<String>,
}

impl File {
    /// The file, made where there is none, with everything in it.
    pub(super) fn open(path: &Path) -> Result<(Self, Contents), EmbeddedError> {
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder)
                .map_err(|source| EmbeddedError::Folder { path: path.into(), source })?;
        }
        if !path.exists() {
            make(path)?;
        }
        let (database, contents) = open_sound(path)?;
        if contents.layout != THIS_LAYOUT {
            return Err(EmbeddedError::Layout { path: path.into(), found: contents.layout });
        }
        Ok((Self { path: path.into(), database: Some(database), unsure: BTreeSet::new() }, contents))
    }

    /// Writes or deletes an entry. On disk when it returns. `known` says what an entry is whose last write failed.
    pub(super) fn put(
        &mut self,
        key: &str,
        record: Option<&Record>,
        revision: u64,
        known: impl Fn(&str) -> Option<Record>,
    ) -> Result<(), EmbeddedError> {
        let database = match self.database.take() {
            Some(database) => database,
            None => open_sound(&self.path)?.0,
        };
        let unsure: Vec<_> = self.unsure.iter().map(|key| (key.clone(), known(key))).collect();
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

    fn broken(&self, error: &redb::Error) -> EmbeddedError {
        EmbeddedError::Broken { path: self.path.clone(), reason: error.to_string() }
    }
}

/// Opens a file and reads it. Where its bytes make no sense redb mostly panics, which says that the file is damaged.
fn open_sound(path: &Path) -> Result<(Database, Contents), EmbeddedError> {
    let opened = catch_unwind(AssertUnwindSafe(|| {
        let database = Database::open(path).map_err(|error| unopened(path, &error))?;
        let contents = read(&database).map_err(|error| match error {
            redb::Error::Corrupted(reason) => EmbeddedError::Damaged { path: path.into(), reason },
            error => EmbeddedError::Broken { path: path.into(), reason: error.to_string() },
        })?;
        Ok((database, contents))
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

/// Makes an empty database beside its place and moves it there: killed in between, nothing half made is in the way.
fn make(path: &Path) -> Result<(), EmbeddedError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    let failed = |error: std::io::Error| EmbeddedError::Open { path: path.into(), reason: error.to_string() };
    match std::fs::remove_file(&beside) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    drop(Database::create(&beside).map_err(|error| unopened(&beside, &error))?);
    std::fs::rename(&beside, path).map_err(failed)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(failed)
}

/// Never 0, which stands for no end.
fn milliseconds(end: SystemTime) -> u64 {
    let since = end.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX).max(1)
}
