//! Leases in etcd, in flanneld's layout (contract §3): `<prefix>/config` and `<prefix>/subnets/<key>`.
//!
//! Everything that is the same for etcd's two APIs is here, on top of [`Registry`]; what an API's calls look like is
//! in a file of its own. Where flanneld loses something, this does not: a renewal is a compare-and-swap and never
//! overwrites a new owner, a lost race is tried again, lease objects that were replaced are revoked, a reservation
//! keeps having no TTL, and one entry that can't be read hides nothing else.

mod options;
mod v3;
mod watch;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use rand::Rng;

pub use self::options::{EtcdOptions, EtcdOptionsError};
use self::watch::Watcher;
use super::{CONFIG_EXAMPLE, LEASE_TTL, LeaseRequest, LeaseStore, StoreError, decode};
use crate::domain::allocator::{Choice, Taken, choose};
use crate::domain::lease::{Lease, LeaseAttrs, LeaseEvent, Subnets};

/// How often a lost race is run again (contract §3.5).
const TRIES: u32 = 10;

/// The calls both APIs of etcd offer. Keys are whole keys.
#[async_trait]
trait Registry: Send + Sync {
    /// `etcd at <endpoints>`, for messages.
    fn name(&self) -> &str;

    async fn get(&self, key: &str) -> Result<Option<Entry>, RegistryError>;

    /// All entries whose key begins with `folder`, in key order and as of one revision.
    async fn list(&self, folder: &str) -> Result<Listing, RegistryError>;

    /// Writes an entry that lives for `ttl`; `None` when the key exists.
    async fn create(&self, key: &str, value: String, ttl: Duration)
    -> Result<Option<Written>, RegistryError>;

    /// Replaces `old` if it is still what the store has, `None` when not. Without `ttl` the entry lives for ever.
    async fn update(
        &self,
        old: &Entry,
        value: String,
        ttl: Option<Duration>,
    ) -> Result<Option<Written>, RegistryError>;

    /// Deletes `old` if it is still what the store has.
    async fn delete(&self, old: &Entry) -> Result<Deleted, RegistryError>;

    /// What is left of an entry's life; `None` when it has no end.
    async fn remaining(&self, lifetime: Lifetime) -> Result<Option<Duration>, RegistryError>;

    /// Changes under `folder` after `revision`. The stream ends with its first error.
    async fn watch(
        &self,
        folder: &str,
        revision: u64,
    ) -> Result<BoxStream<'static, Result<Vec<Notice>, WatchEnd>>, RegistryError>;

    /// Leaves every connection; watches end, and the next call makes a new one.
    fn reconnect(&self);
}

/// A key as the store has it.
#[derive(Clone, Debug)]
struct Entry {
    key: String,
    value: Vec<u8>,
    revision: u64,
    lifetime: Lifetime,
}

/// How long an entry lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lifetime {
    /// A reservation.
    Forever,
    /// As long as etcd's lease object with this id.
    Lease(i64),
}

struct Listing {
    entries: Vec<Entry>,
    revision: u64,
}

struct Written {
    revision: u64,
    lifetime: Lifetime,
}

enum Deleted {
    Yes,
    /// It changed or vanished meanwhile.
    Changed,
}

enum Notice {
    Put(Entry),
    Deleted { key: String, revision: u64 },
}

enum WatchEnd {
    /// The history the watch needs was compacted: list again.
    Compacted,
    Broken(String),
}

#[derive(Debug)]
enum RegistryError {
    /// No server answered.
    Unreachable(String),
    /// Every server that answered refused for a reason that stays.
    Refused(String),
}

/// The entry we hold. Its end is known without asking, which spares a call per lease and event: the ends of other
/// nodes' leases matter to nobody but etcd.
#[derive(Clone, Debug)]
struct Held {
    key: String,
    lifetime: Lifetime,
    expires: Option<Instant>,
}

type HeldEntry = Arc<Mutex<Option<Held>>>;

/// [`LeaseStore`] on etcd. Connects when first used, and again whenever it must.
pub struct EtcdStore {
    registry: Arc<dyn Registry>,
    config_key: String,
    folder: String,
    resync: Duration,
    held: HeldEntry,
}

impl EtcdStore {
    /// Checks the options; etcd itself may be down. The process needs rustls's ring provider, installed or compiled
    /// in as the only one.
    pub fn connect(options: &EtcdOptions) -> Result<Self, EtcdOptionsError> {
        let checked = options::check(options)?;
        let (prefix, resync) = (checked.prefix.clone(), checked.resync);
        let join = |last: &str| match prefix.as_str() {
            "" => last.to_owned(),
            "/" => format!("/{last}"),
            prefix => format!("{prefix}/{last}"),
        };
        Ok(Self {
            registry: Arc::new(v3::V3::new(checked)),
            config_key: join("config"),
            folder: join("subnets/"),
            resync,
            held: HeldEntry::default(),
        })
    }

    fn failed(&self, error: RegistryError) -> StoreError {
        let store = self.registry.name().to_owned();
        match error {
            RegistryError::Unreachable(reason) => StoreError::Unreachable { store, reason },
            RegistryError::Refused(reason) => StoreError::Refused { store, reason },
        }
    }

    fn key(&self, subnets: Subnets) -> String {
        format!("{}{subnets}", self.folder)
    }

    /// The lease just written, remembered as ours. `asked` is taken before the call, so that the end we reckon with
    /// is never later than etcd's.
    fn hold(&self, subnets: Subnets, attrs: LeaseAttrs, written: Written, asked: Instant) -> Lease {
        let expires = match written.lifetime {
            Lifetime::Forever => None,
            Lifetime::Lease(_) => Some(asked + LEASE_TTL),
        };
        let held = Held { key: self.key(subnets), lifetime: written.lifetime, expires };
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = Some(held);
        Lease { subnets, attrs, expires, revision: written.revision }
    }

    /// One run of contract §3.5; `None` when somebody was faster.
    async fn try_acquire(&self, request: &LeaseRequest) -> Result<Option<Lease>, StoreError> {
        let listing = self.registry.list(&self.folder).await.map_err(|error| self.failed(error))?;
        let (mut leases, mut entries, mut unreadable) = (Vec::new(), Vec::new(), Vec::new());
        for entry in listing.entries {
            let last = entry.key.strip_prefix(&self.folder).unwrap_or_default();
            match decode(&entry.key, last, &entry.value) {
                Ok((subnets, attrs)) => {
                    leases.push(Lease { subnets, attrs, expires: None, revision: entry.revision });
                    entries.push(entry);
                }
                Err(_) => unreadable.extend(last.parse::<Subnets>().ok()),
            }
        }
        let mut attrs = request.attrs.clone();
        loop {
            let taken = Taken { leases: &leases, unreadable: &unreadable };
            let choice = choose(&request.wish(), &taken, &mut rand::rng())
                .map_err(|error| StoreError::no_subnet(error, self.registry.name()))?;
            let asked = Instant::now();
            let (subnets, written) = match choice {
                Choice::Take(subnets) => {
                    let key = self.key(subnets);
                    (subnets, self.registry.create(&key, attrs.to_json(), LEASE_TTL).await)
                }
                Choice::Reuse(lease) => {
                    let key = self.key(lease.subnets);
                    let Some(entry) = entries.iter().find(|entry| entry.key == key) else {
                        return Ok(None);
                    };
                    attrs.keep_unknown_of(&lease.attrs);
                    (lease.subnets, self.registry.update(entry, attrs.to_json(), ttl_like(entry)).await)
                }
                Choice::Delete(lease) => {
                    let key = self.key(lease.subnets);
                    let Some(index) = entries.iter().position(|entry| entry.key == key) else {
                        return Ok(None);
                    };
                    tracing::warn!(
                        subnets = %lease.subnets,
                        "the lease of this node does not fit the network configuration any more and is deleted"
                    );
                    let entry = entries.swap_remove(index);
                    leases.retain(|other| other.subnets != lease.subnets);
                    match self.registry.delete(&entry).await.map_err(|error| self.failed(error))? {
                        Deleted::Yes => continue,
                        Deleted::Changed => return Ok(None),
                    }
                }
            };
            let written = written.map_err(|error| self.failed(error))?;
            return Ok(written.map(|written| self.hold(subnets, attrs, written, asked)));
        }
    }

    /// One try to write our lease again; `None` when it changed in between.
    async fn try_rewrite(&self, known: &Lease, attrs: &LeaseAttrs) -> Result<Option<Lease>, StoreError> {
        let lost = |reason: String| StoreError::LeaseLost { subnets: known.subnets, reason };
        let key = self.key(known.subnets);
        let present = self.registry.get(&key).await.map_err(|error| self.failed(error))?;
        let Some(entry) = present else {
            return Err(lost("it was deleted or has expired".into()));
        };
        let ours = [known.attrs.public_ip, attrs.public_ip];
        let mut attrs = attrs.clone();
        let ttl = match decode(&key, &known.subnets.to_string(), &entry.value) {
            Ok((_, present)) if !ours.contains(&present.public_ip) => {
                return Err(lost(format!("it belongs to {} now", present.public_ip)));
            }
            // Another daemon with our public address, or an operator, may have written it: still ours.
            Ok((_, present)) => {
                attrs.keep_unknown_of(&present);
                ttl_like(&entry)
            }
            // Nobody's claim: put right what was damaged, as long-lived as it was.
            Err(_) => known.expires.map(|_| LEASE_TTL),
        };
        let asked = Instant::now();
        let written = self.registry.update(&entry, attrs.to_json(), ttl).await;
        let written = written.map_err(|error| self.failed(error))?;
        Ok(written.map(|written| self.hold(known.subnets, attrs, written, asked)))
    }

    /// Lets others finish what they are doing before a race is run again.
    async fn step_aside(&self, tries: u32) {
        let wait = rand::rng().random_range(0..=20 * u64::from(tries));
        tokio::time::sleep(Duration::from_millis(wait)).await;
    }
}

/// A reservation stays one; everything else gets the usual time to live.
fn ttl_like(entry: &Entry) -> Option<Duration> {
    match entry.lifetime {
        Lifetime::Forever => None,
        Lifetime::Lease(_) => Some(LEASE_TTL),
    }
}

#[async_trait]
impl LeaseStore for EtcdStore {
    async fn network_config(&self) -> Result<String, StoreError> {
        let entry = self.registry.get(&self.config_key).await.map_err(|error| self.failed(error))?;
        let place = || format!("{} in {}", self.config_key, self.registry.name());
        let entry =
            entry.ok_or_else(|| StoreError::NoConfig { place: place(), example: CONFIG_EXAMPLE.into() })?;
        String::from_utf8(entry.value).map_err(|error| StoreError::Refused {
            store: place(),
            reason: format!("the network configuration is not text: {error}"),
        })
    }

    async fn acquire(&self, request: &LeaseRequest) -> Result<Lease, StoreError> {
        for tries in 1..=TRIES {
            if let Some(lease) = self.try_acquire(request).await? {
                return Ok(lease);
            }
            tracing::debug!(tries, "another node was faster, choosing a subnet again");
            self.step_aside(tries).await;
        }
        Err(StoreError::Unreachable {
            store: self.registry.name().into(),
            reason: format!("other nodes were faster {TRIES} times in a row when a subnet was chosen"),
        })
    }

    async fn rewrite(&self, lease: &Lease, attrs: &LeaseAttrs) -> Result<Lease, StoreError> {
        for tries in 1..=TRIES {
            if let Some(lease) = self.try_rewrite(lease, attrs).await? {
                return Ok(lease);
            }
            self.step_aside(tries).await;
        }
        Err(StoreError::Unreachable {
            store: self.registry.name().into(),
            reason: format!("lease {} was changed by others {TRIES} times in a row", lease.subnets),
        })
    }

    fn reconnect(&self) {
        self.registry.reconnect();
    }

    fn watch(&self) -> BoxStream<'static, LeaseEvent> {
        Watcher::new(self.registry.clone(), self.folder.clone(), self.held.clone(), self.resync).stream()
    }
}
