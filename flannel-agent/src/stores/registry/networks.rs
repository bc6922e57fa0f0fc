//! The networks below one prefix: which there are, and the leases of each (contract §5.4).
//!
//! One list and one watch of the whole prefix, of which everything but `<prefix>/<name>/config` is passed over.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::time::{Instant, sleep_until};

use super::{Notice, Registry, RegistryError, RegistryStore, WatchEnd, join};
use crate::domain::network_name::NetworkName;
use crate::stores::back_off::{BackOff, jittered};
use crate::stores::{LeaseStore, NetworkEvent, NetworkStores};

/// All networks below a prefix.
#[derive(Clone)]
pub struct RegistryNetworks {
    pub(super) registry: Arc<dyn Registry>,
    pub(super) prefix: String,
    resync: Duration,
}

impl RegistryNetworks {
    pub(in crate::stores) fn new(registry: Arc<dyn Registry>, prefix: String, resync: Duration) -> Self {
        Self { registry, prefix, resync }
    }
}

impl NetworkStores for RegistryNetworks {
    fn name(&self) -> &str {
        self.registry.name()
    }

    fn network(&self, name: Option<&NetworkName>) -> Arc<dyn LeaseStore> {
        let prefix = match name {
            Some(name) => join(&self.prefix, name.as_str()),
            None => self.prefix.clone(),
        };
        Arc::new(RegistryStore::new(self.registry.clone(), &prefix, self.resync))
    }

    fn watch_networks(&self) -> BoxStream<'static, NetworkEvent> {
        let watcher = Watcher {
            registry: self.registry.clone(),
            folder: join(&self.prefix, ""),
            resync: self.resync,
            open: None,
            back_off: BackOff::default(),
            retry_at: Instant::now(),
            away: false,
        };
        stream::unfold(watcher, |mut watcher| async move { Some((watcher.next().await, watcher)) })
            .flat_map(stream::iter)
            .boxed()
    }
}

/// Whether there is any network below `prefix`, with a name or without.
pub(in crate::stores) async fn holds_a_network(
    registry: &dyn Registry,
    prefix: &str,
) -> Result<bool, RegistryError> {
    if registry.get(&join(prefix, "config")).await?.is_some() {
        return Ok(true);
    }
    let folder = join(prefix, "");
    let listing = match registry.list(&folder).await {
        // Who may read one network's keys only sees no other.
        Err(RegistryError::Refused(_)) => return Ok(false),
        listing => listing?,
    };
    Ok(listing.entries.iter().any(|entry| network_of(&folder, &entry.key).is_some()))
}

struct Watcher {
    registry: Arc<dyn Registry>,
    folder: String,
    resync: Duration,
    open: Option<Open>,
    back_off: BackOff,
    retry_at: Instant,
    /// `Interrupted` was said and no snapshot since.
    away: bool,
}

struct Open {
    notices: BoxStream<'static, Result<Vec<Notice>, WatchEnd>>,
    compare_at: Instant,
}

impl Watcher {
    async fn next(&mut self) -> Vec<NetworkEvent> {
        loop {
            let Some(open) = &mut self.open else {
                sleep_until(self.retry_at).await;
                match self.reopen().await {
                    Ok(snapshot) => return vec![snapshot],
                    Err(RegistryError::Unreachable(reason) | RegistryError::Refused(reason)) => {
                        if let Some(event) = self.failed(reason) {
                            return vec![event];
                        }
                    }
                }
                continue;
            };
            let item = tokio::select! {
                biased;
                item = open.notices.next() => item,
                () = sleep_until(open.compare_at) => {
                    // A watch is never trusted alone.
                    self.open = None;
                    self.retry_at = Instant::now();
                    continue;
                }
            };
            match item {
                Some(Ok(notices)) => {
                    self.back_off = BackOff::default();
                    let events: Vec<_> =
                        notices.into_iter().filter_map(|notice| event(&self.folder, notice)).collect();
                    if !events.is_empty() {
                        return events;
                    }
                }
                Some(Err(WatchEnd::Compacted)) => {
                    self.open = None;
                    self.retry_at = Instant::now() + self.back_off.next();
                }
                Some(Err(WatchEnd::Broken(reason))) => {
                    self.open = None;
                    if let Some(event) = self.failed(reason) {
                        return vec![event];
                    }
                }
                None => {
                    self.open = None;
                    if let Some(event) = self.failed("the server ended the watch".into()) {
                        return vec![event];
                    }
                }
            }
        }
    }

    async fn reopen(&mut self) -> Result<NetworkEvent, RegistryError> {
        let listing = self.registry.list(&self.folder).await?;
        let notices = self.registry.watch(&self.folder, listing.revision).await?;
        self.open = Some(Open { notices, compare_at: Instant::now() + jittered(self.resync) });
        self.away = false;
        let configs: BTreeMap<NetworkName, u64> = listing
            .entries
            .iter()
            .filter_map(|entry| Some((network_of(&self.folder, &entry.key)?, entry.revision)))
            .collect();
        Ok(NetworkEvent::Snapshot(configs.into_keys().collect()))
    }

    fn failed(&mut self, reason: String) -> Option<NetworkEvent> {
        self.retry_at = Instant::now() + self.back_off.next();
        (!std::mem::replace(&mut self.away, true)).then_some(NetworkEvent::Interrupted(reason))
    }
}

fn event(folder: &str, notice: Notice) -> Option<NetworkEvent> {
    match notice {
        Notice::Put(entry) => network_of(folder, &entry.key).map(NetworkEvent::Written),
        Notice::Deleted { key, .. } => network_of(folder, &key).map(NetworkEvent::Removed),
    }
}

/// The network whose configuration is at `key`. Names that can't be one are passed over: they are other people's keys.
fn network_of(folder: &str, key: &str) -> Option<NetworkName> {
    key.strip_prefix(folder)?.strip_suffix("/config")?.parse().ok()
}
