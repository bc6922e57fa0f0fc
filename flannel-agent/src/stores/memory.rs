//! Leases in this process: what tests of everything above a store run on.
//!
//! Keeps entries as text, like a real store, so that the same decoding is exercised, and runs on tokio's clock, so
//! that a test may pause it. It passes the same contract suite as etcd; the network between is simulated by
//! [`MemoryStore::cut`] and [`MemoryStore::mend`].

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::{Instant, sleep_until};

use super::{
    CONFIG_EXAMPLE, LEASE_TTL, LeaseRequest, LeaseStore, StoreError, check_reservation, decode, in_words,
};
use crate::domain::allocator::{Choice, Taken, choose};
use crate::domain::config::NetworkConfig;
use crate::domain::lease::{Lease, LeaseAttrs, LeaseEvent, Reservation, Subnets, Unreadable};

const NAME: &str = "the store in memory";

/// A store that several agents of one process share by cloning it.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    config: Option<String>,
    revision: u64,
    entries: BTreeMap<String, Entry>,
    cut: bool,
    watchers: Vec<UnboundedSender<LeaseEvent>>,
}

#[derive(Clone, Debug)]
struct Entry {
    value: String,
    expires: Option<Instant>,
    revision: u64,
}

impl MemoryStore {
    pub fn new(config: impl Into<String>) -> Self {
        let store = Self::default();
        store.set_config(config);
        store
    }

    pub fn set_config(&self, config: impl Into<String>) {
        self.lock().config = Some(config.into());
    }

    pub fn remove_config(&self) {
        self.lock().config = None;
    }

    /// Writes an entry as an operator or another daemon would, valid or not. Without `ttl` it is a reservation.
    pub fn put(&self, key: &str, value: &str, ttl: Option<Duration>) {
        let expires = ttl.map(|ttl| Instant::now() + ttl);
        let mut state = self.lock();
        state.put(key, value, expires);
    }

    /// Deletes an entry; that there is none is fine.
    pub fn delete(&self, key: &str) {
        self.lock().delete(key);
    }

    /// Keys and values, ordered by key.
    pub fn entries(&self) -> Vec<(String, String)> {
        let state = self.lock();
        state.entries.iter().map(|(key, entry)| (key.clone(), entry.value.clone())).collect()
    }

    /// From now on nobody reaches the store. Entries go on to expire in it.
    pub fn cut(&self) {
        let mut state = self.lock();
        if !std::mem::replace(&mut state.cut, true) {
            state.tell(LeaseEvent::Interrupted(format!("{NAME} was cut off")));
        }
    }

    /// Ends what [`cut`](Self::cut) began.
    pub fn mend(&self) {
        let mut state = self.lock();
        if std::mem::replace(&mut state.cut, false) {
            let snapshot = state.snapshot();
            state.tell(snapshot);
        }
    }

    /// A panic elsewhere leaves the state usable: every change is one insert or one remove.
    fn lock(&self) -> MutexGuard<'_, State> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.expire();
        state
    }

    fn reach(&self) -> Result<MutexGuard<'_, State>, StoreError> {
        let state = self.lock();
        match state.cut {
            true => Err(StoreError::Unreachable { store: NAME.into(), reason: "it was cut off".into() }),
            false => Ok(state),
        }
    }

    fn subscribe(&self) -> UnboundedReceiver<LeaseEvent> {
        let (sender, receiver) = unbounded_channel();
        let mut state = self.lock();
        let first = match state.cut {
            true => LeaseEvent::Interrupted(format!("{NAME} was cut off")),
            false => state.snapshot(),
        };
        // The receiver is in our hands.
        let _ = sender.send(first);
        state.watchers.push(sender);
        receiver
    }

    async fn next(&self, events: &mut UnboundedReceiver<LeaseEvent>) -> Option<LeaseEvent> {
        loop {
            let end = self.lock().entries.values().filter_map(|entry| entry.expires).min();
            let expiry = async {
                match end {
                    Some(end) => sleep_until(end).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                event = events.recv() => return event,
                // `lock` at the top of the loop drops what has expired and tells everybody.
                () = expiry => {}
            }
        }
    }
}

impl State {
    fn expire(&mut self) {
        let now = Instant::now();
        let due = |entry: &Entry| entry.expires.is_some_and(|end| end <= now);
        let keys: Vec<_> =
            self.entries.iter().filter(|(_, entry)| due(entry)).map(|(key, _)| key.clone()).collect();
        for key in keys {
            self.delete(&key);
        }
    }

    fn put(&mut self, key: &str, value: &str, expires: Option<Instant>) -> u64 {
        self.revision += 1;
        let entry = Entry { value: value.to_owned(), expires, revision: self.revision };
        let event = match lease(key, &entry) {
            Ok(lease) => LeaseEvent::Added(lease),
            Err(unreadable) => LeaseEvent::Unreadable(unreadable),
        };
        self.entries.insert(key.to_owned(), entry);
        if !self.cut {
            self.tell(event);
        }
        self.revision
    }

    fn delete(&mut self, key: &str) {
        if self.entries.remove(key).is_none() {
            return;
        }
        self.revision += 1;
        if !self.cut
            && let Ok(subnets) = key.parse()
        {
            self.tell(LeaseEvent::Removed(subnets));
        }
    }

    fn tell(&mut self, event: LeaseEvent) {
        self.watchers.retain(|watcher| watcher.send(event.clone()).is_ok());
    }

    fn list(&self) -> (Vec<Lease>, Vec<Unreadable>) {
        let (mut leases, mut unreadable) = (Vec::new(), Vec::new());
        for (key, entry) in &self.entries {
            match lease(key, entry) {
                Ok(lease) => leases.push(lease),
                Err(entry) => unreadable.push(entry),
            }
        }
        (leases, unreadable)
    }

    fn snapshot(&self) -> LeaseEvent {
        let (leases, unreadable) = self.list();
        LeaseEvent::Snapshot(leases, unreadable)
    }

    fn write(&mut self, subnets: Subnets, attrs: LeaseAttrs, expires: Option<Instant>) -> Lease {
        let revision = self.put(&subnets.to_string(), &attrs.to_json(), expires);
        Lease { subnets, attrs, expires: expires.map(Instant::into_std), revision }
    }
}

fn lease(key: &str, entry: &Entry) -> Result<Lease, Unreadable> {
    let (subnets, attrs) = decode(key, key, entry.value.as_bytes())?;
    Ok(Lease { subnets, attrs, expires: entry.expires.map(Instant::into_std), revision: entry.revision })
}

#[async_trait]
impl LeaseStore for MemoryStore {
    async fn network_config(&self) -> Result<String, StoreError> {
        self.reach()?
            .config
            .clone()
            .ok_or_else(|| StoreError::NoConfig { place: NAME.into(), example: CONFIG_EXAMPLE.into() })
    }

    async fn acquire(&self, request: &LeaseRequest) -> Result<Lease, StoreError> {
        let mut state = self.reach()?;
        loop {
            let (leases, unreadable) = state.list();
            let unreadable: Vec<Subnets> =
                unreadable.iter().filter_map(|entry| entry.key.parse().ok()).collect();
            let taken = Taken { leases: &leases, unreadable: &unreadable };
            let choice = choose(&request.wish(), &taken, &mut crate::chance::rng())
                .map_err(|error| StoreError::no_subnet(error, NAME))?;
            let mut attrs = request.attrs.clone();
            match choice {
                Choice::Delete(lease) => state.delete(&lease.subnets.to_string()),
                Choice::Reuse(lease) => {
                    attrs.keep_unknown_of(&lease.attrs);
                    let expires = lease.expires.map(|_| Instant::now() + LEASE_TTL);
                    return Ok(state.write(lease.subnets, attrs, expires));
                }
                Choice::Take(subnets) => {
                    return Ok(state.write(subnets, attrs, Some(Instant::now() + LEASE_TTL)));
                }
            }
        }
    }

    async fn rewrite(&self, known: &Lease, attrs: &LeaseAttrs) -> Result<Lease, StoreError> {
        let mut state = self.reach()?;
        let lost = |reason: String| StoreError::LeaseLost { subnets: known.subnets, reason };
        let key = known.subnets.to_string();
        let entry = state.entries.get(&key).ok_or_else(|| lost("it was deleted or has expired".into()))?;
        let ours = [known.attrs.node(), attrs.node()];
        let mut attrs = attrs.clone();
        let endless = match lease(&key, entry) {
            Ok(present) if !ours.contains(&present.attrs.node()) => {
                return Err(lost(format!("it belongs to {} now", in_words(present.attrs.node()))));
            }
            Ok(present) => {
                attrs.keep_unknown_of(&present.attrs);
                present.expires.is_none()
            }
            // Nobody's claim: put right what was damaged, as long-lived as it was.
            Err(_) => known.expires.is_none(),
        };
        let expires = (!endless).then(|| Instant::now() + LEASE_TTL);
        Ok(state.write(known.subnets, attrs, expires))
    }

    async fn reservations(&self) -> Result<Vec<Reservation>, StoreError> {
        let (leases, _) = self.reach()?.list();
        let endless = leases.into_iter().filter(|lease| lease.expires.is_none());
        Ok(endless
            .map(|lease| Reservation {
                subnets: lease.subnets,
                public_ip: lease.attrs.node().unwrap_or(lease.attrs.public_ip.into()),
            })
            .collect())
    }

    async fn reserve(&self, reservation: &Reservation) -> Result<(), StoreError> {
        let config = NetworkConfig::parse_ranges(&self.network_config().await?).map_err(|error| {
            StoreError::Conflict(format!("the network configuration can't be used: {error}"))
        })?;
        check_reservation(reservation, &config)?;
        let mut state = self.reach()?;
        let subnets = reservation.subnets;
        let key = subnets.to_string();
        let attrs = match state.entries.get(&key).map(|entry| lease(&key, entry)) {
            Some(Ok(lease)) if lease.attrs.node() != Some(reservation.public_ip) => {
                return Err(StoreError::taken(subnets, &lease.attrs));
            }
            Some(Ok(lease)) => lease.attrs,
            Some(Err(_)) => LeaseAttrs::of_node(reservation.public_ip),
            None => {
                let mut others = state.entries.keys().filter_map(|key| key.parse::<Subnets>().ok());
                if let Some(other) = others.find(|other| other.overlaps(&subnets)) {
                    return Err(StoreError::Conflict(format!("subnet {subnets} overlaps lease {other}")));
                }
                LeaseAttrs::of_node(reservation.public_ip)
            }
        };
        state.write(subnets, attrs, None);
        Ok(())
    }

    async fn unreserve(&self, subnets: Subnets) -> Result<(), StoreError> {
        let mut state = self.reach()?;
        let key = subnets.to_string();
        let endless = state.entries.get(&key).filter(|entry| entry.expires.is_none());
        let value = endless.ok_or_else(|| StoreError::no_reservation(subnets))?.value.clone();
        state.put(&key, &value, Some(Instant::now() + LEASE_TTL));
        Ok(())
    }

    async fn revoke(&self, subnets: Subnets) -> Result<(), StoreError> {
        let mut state = self.reach()?;
        let key = subnets.to_string();
        if !state.entries.contains_key(&key) {
            return Err(StoreError::no_lease(subnets));
        }
        state.delete(&key);
        Ok(())
    }

    fn watch(&self) -> BoxStream<'static, LeaseEvent> {
        let watcher = (self.clone(), self.subscribe());
        stream::unfold(watcher, |(store, mut events)| async move {
            let event = store.next(&mut events).await?;
            Some((event, (store, events)))
        })
        .boxed()
    }
}
