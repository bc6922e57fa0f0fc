//! [`LeaseStore`] over any [`Registry`].

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use rand::Rng;

use super::watch::Watcher;
use super::{Deleted, Entry, Lifetime, Listing, Registry, RegistryError, Written, join, now};
use crate::domain::allocator::{Choice, Taken, choose};
use crate::domain::config::NetworkConfig;
use crate::domain::lease::{Lease, LeaseAttrs, LeaseEvent, Reservation, Subnets};
use crate::stores::{
    CONFIG_EXAMPLE, LEASE_TTL, LeaseRequest, LeaseStore, StoreError, check_reservation, decode, in_words,
};

/// How often a lost race is run again (contract §3.5).
const TRIES: u32 = 10;

/// The entry we hold. Its end is known without asking, which spares a call per lease and event: the ends of other
/// nodes' leases matter to nobody but the store.
#[derive(Clone, Debug)]
pub(super) struct Held {
    pub(super) key: String,
    pub(super) lifetime: Lifetime,
    pub(super) expires: Option<Instant>,
}

pub(super) type HeldEntry = Arc<Mutex<Option<Held>>>;

/// What our lease was chosen from, and our entry. The watch that begins right after takes it: with thousands of nodes a
/// second list would take a good part of the start.
pub(super) type Listed = Arc<Mutex<Option<(Instant, Listing)>>>;

/// The leases of one network.
pub(in crate::stores) struct RegistryStore {
    registry: Arc<dyn Registry>,
    config_key: String,
    folder: String,
    resync: Duration,
    held: HeldEntry,
    listed: Listed,
}

impl RegistryStore {
    /// The network whose configuration is `<prefix>/config`. A running watch is compared with a fresh list every
    /// `resync`, give or take a fifth.
    pub(in crate::stores) fn new(registry: Arc<dyn Registry>, prefix: &str, resync: Duration) -> Self {
        Self {
            registry,
            config_key: join(prefix, "config"),
            folder: join(prefix, "subnets/"),
            resync,
            held: HeldEntry::default(),
            listed: Listed::default(),
        }
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
    /// is never later than the store's.
    fn hold(&self, subnets: Subnets, attrs: LeaseAttrs, written: Written, asked: Instant) -> Lease {
        let expires = match written.lifetime {
            Lifetime::Forever => None,
            Lifetime::Lease(_) | Lifetime::Until(_) => Some(asked + LEASE_TTL),
        };
        let held = Held { key: self.key(subnets), lifetime: written.lifetime, expires };
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = Some(held);
        Lease { subnets, attrs, expires, revision: written.revision }
    }

    /// One run of contract §3.5; `None` when somebody was faster.
    async fn try_acquire(&self, request: &LeaseRequest) -> Result<Option<Lease>, StoreError> {
        let listing = self.registry.list(&self.folder).await.map_err(|error| self.failed(error))?;
        let Listing { mut entries, revision } = listing;
        let (mut leases, mut unreadable) = (Vec::with_capacity(entries.len()), Vec::new());
        for entry in &entries {
            let last = entry.key.strip_prefix(&self.folder).unwrap_or_default();
            match decode(&entry.key, last, &entry.value) {
                Ok((subnets, attrs)) => {
                    leases.push(Lease { subnets, attrs, expires: None, revision: entry.revision });
                }
                Err(_) => unreadable.extend(last.parse::<Subnets>().ok()),
            }
        }
        let mut attrs = request.attrs.clone();
        loop {
            let taken = Taken { leases: &leases, unreadable: &unreadable };
            let choice = choose(&request.wish(), &taken, &mut crate::chance::rng())
                .map_err(|error| StoreError::no_subnet(error, self.registry.name()))?;
            let asked = now();
            let (subnets, written) = match choice {
                Choice::Take(subnets) => {
                    let key = self.key(subnets);
                    (subnets, self.registry.create(&key, attrs.to_json(), Some(LEASE_TTL)).await)
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
            let Some(written) = written.map_err(|error| self.failed(error))? else { return Ok(None) };
            let key = self.key(subnets);
            entries.retain(|entry| entry.key != key);
            let (value, lifetime) = (attrs.to_json().into_bytes(), written.lifetime);
            entries.push(Entry { key, value, revision: written.revision, lifetime });
            *self.listed.lock().unwrap_or_else(PoisonError::into_inner) =
                Some((asked, Listing { entries, revision }));
            return Ok(Some(self.hold(subnets, attrs, written, asked)));
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
        let ours = [known.attrs.node(), attrs.node()];
        let mut attrs = attrs.clone();
        let ttl = match decode(&key, &known.subnets.to_string(), &entry.value) {
            Ok((_, present)) if !ours.contains(&present.node()) => {
                return Err(lost(format!("it belongs to {} now", in_words(present.node()))));
            }
            // Another daemon with our public address, or an operator, may have written it: still ours.
            Ok((_, present)) => {
                attrs.keep_unknown_of(&present);
                ttl_like(&entry)
            }
            // Nobody's claim: put right what was damaged, as long-lived as it was.
            Err(_) => known.expires.map(|_| LEASE_TTL),
        };
        let asked = now();
        let written = self.registry.update(&entry, attrs.to_json(), ttl).await;
        let written = written.map_err(|error| self.failed(error))?;
        Ok(written.map(|written| self.hold(known.subnets, attrs, written, asked)))
    }

    fn raced(&self, subnets: Subnets) -> StoreError {
        StoreError::Unreachable {
            store: self.registry.name().into(),
            reason: format!("lease {subnets} was changed by others {TRIES} times in a row"),
        }
    }

    /// One try to make a reservation; `false` when the entry changed in between.
    async fn try_reserve(&self, reservation: &Reservation) -> Result<bool, StoreError> {
        let failed = |error| self.failed(error);
        let listing = self.registry.list(&self.folder).await.map_err(failed)?;
        let key = self.key(reservation.subnets);
        let Some(entry) = listing.entries.iter().find(|entry| entry.key == key) else {
            let others = listing
                .entries
                .iter()
                .filter_map(|entry| entry.key.strip_prefix(&self.folder)?.parse::<Subnets>().ok());
            if let Some(other) = others.into_iter().find(|other| other.overlaps(&reservation.subnets)) {
                return Err(StoreError::Conflict(format!(
                    "subnet {} overlaps lease {other}",
                    reservation.subnets
                )));
            }
            let value = LeaseAttrs::of_node(reservation.public_ip).to_json();
            return Ok(self.registry.create(&key, value, None).await.map_err(failed)?.is_some());
        };
        let attrs = match decode(&key, &reservation.subnets.to_string(), &entry.value) {
            Ok((_, attrs)) if attrs.node() != Some(reservation.public_ip) => {
                return Err(StoreError::taken(reservation.subnets, &attrs));
            }
            Ok((_, attrs)) => attrs,
            // Nobody's claim.
            Err(_) => LeaseAttrs::of_node(reservation.public_ip),
        };
        if entry.lifetime == Lifetime::Forever {
            return Ok(true);
        }
        Ok(self.registry.update(entry, attrs.to_json(), None).await.map_err(failed)?.is_some())
    }

    /// Lets others finish what they are doing before a race is run again.
    async fn step_aside(&self, tries: u32) {
        let wait = crate::chance::rng().random_range(0..=20 * u64::from(tries));
        tokio::time::sleep(Duration::from_millis(wait)).await;
    }
}

/// A reservation stays one; everything else gets the usual time to live.
fn ttl_like(entry: &Entry) -> Option<Duration> {
    match entry.lifetime {
        Lifetime::Forever => None,
        Lifetime::Lease(_) | Lifetime::Until(_) => Some(LEASE_TTL),
    }
}

#[async_trait]
impl LeaseStore for RegistryStore {
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
        Err(self.raced(lease.subnets))
    }

    async fn reservations(&self) -> Result<Vec<Reservation>, StoreError> {
        let listing = self.registry.list(&self.folder).await.map_err(|error| self.failed(error))?;
        let endless = listing.entries.iter().filter(|entry| entry.lifetime == Lifetime::Forever);
        let decoded = endless.filter_map(|entry| {
            let last = entry.key.strip_prefix(&self.folder).unwrap_or_default();
            let (subnets, attrs) = decode(&entry.key, last, &entry.value).ok()?;
            Some(Reservation { subnets, public_ip: attrs.node().unwrap_or(attrs.public_ip.into()) })
        });
        Ok(decoded.collect())
    }

    async fn reserve(&self, reservation: &Reservation) -> Result<(), StoreError> {
        let config = NetworkConfig::parse_ranges(&self.network_config().await?).map_err(|error| {
            StoreError::Conflict(format!("the network configuration can't be used: {error}"))
        })?;
        check_reservation(reservation, &config)?;
        for tries in 1..=TRIES {
            if self.try_reserve(reservation).await? {
                return Ok(());
            }
            self.step_aside(tries).await;
        }
        Err(self.raced(reservation.subnets))
    }

    async fn unreserve(&self, subnets: Subnets) -> Result<(), StoreError> {
        let key = self.key(subnets);
        for tries in 1..=TRIES {
            let present = self.registry.get(&key).await.map_err(|error| self.failed(error))?;
            let entry = present
                .filter(|entry| entry.lifetime == Lifetime::Forever)
                .ok_or_else(|| StoreError::no_reservation(subnets))?;
            let value = String::from_utf8_lossy(&entry.value).into_owned();
            let written = self.registry.update(&entry, value, Some(LEASE_TTL)).await;
            if written.map_err(|error| self.failed(error))?.is_some() {
                return Ok(());
            }
            self.step_aside(tries).await;
        }
        Err(self.raced(subnets))
    }

    async fn revoke(&self, subnets: Subnets) -> Result<(), StoreError> {
        let key = self.key(subnets);
        for tries in 1..=TRIES {
            let present = self.registry.get(&key).await.map_err(|error| self.failed(error))?;
            let Some(entry) = present else { return Err(StoreError::no_lease(subnets)) };
            if let Deleted::Yes = self.registry.delete(&entry).await.map_err(|error| self.failed(error))? {
                return Ok(());
            }
            self.step_aside(tries).await;
        }
        Err(self.raced(subnets))
    }

    fn reconnect(&self) {
        self.registry.reconnect();
    }

    fn watch(&self) -> BoxStream<'static, LeaseEvent> {
        let watcher =
            Watcher::new(self.registry.clone(), self.folder.clone(), self.held.clone(), self.resync);
        watcher.beginning_with(self.listed.clone()).stream()
    }
}
