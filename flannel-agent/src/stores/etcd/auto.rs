//! `--etcd-api=auto`: finds out which of etcd's two keyspaces the leases are in, when they are first asked for.
//!
//! The one that holds a network configuration, and v3 when both do. That is decided once: the keyspaces do not see each
//! other, and a node that changed over while it runs would lease a second subnet. While neither has one, there is
//! nothing here, and every question looks at both again.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::sync::{Mutex, OnceCell};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::sleep;

use super::options::Checked;
use super::v2::V2;
use super::v3::V3;
use crate::stores::registry::{
    Deleted, Entry, Lifetime, Listing, Notice, Registry, RegistryError, WatchEnd, Written, holds_a_network,
};

/// How often a watch looks whether there is something to watch by now.
const LOOK: Duration = Duration::from_secs(1);

pub(super) struct Auto {
    name: String,
    apis: Arc<Apis>,
}

struct Apis {
    prefix: String,
    v3: Arc<V3>,
    /// What v2 is made of.
    options: Checked,
    /// Only while it may be the one. Making it takes tens of milliseconds where the system's certificate authorities must
    /// be read, for which v3 does not wait.
    v2: Mutex<Option<Arc<V2>>>,
    chosen: OnceCell<Arc<dyn Registry>>,
    deciding: Mutex<()>,
}

impl Auto {
    pub(super) fn new(options: Checked) -> Self {
        let prefix = options.prefix.clone();
        let v3 = Arc::new(V3::new(options.clone()));
        let name = v3.name().to_owned();
        let apis = Apis {
            prefix,
            v3,
            options,
            v2: Mutex::default(),
            chosen: OnceCell::new(),
            deciding: Mutex::default(),
        };
        Self { name, apis: Arc::new(apis) }
    }

    /// For what writes: there is no network to write to yet.
    async fn chosen(&self) -> Result<Arc<dyn Registry>, RegistryError> {
        self.apis.decide().await?.ok_or_else(|| {
            RegistryError::Unreachable(format!(
                "neither of its APIs holds a network configuration below {} yet",
                self.apis.prefix
            ))
        })
    }
}

impl Apis {
    /// The API there is a network in; `None` when there is none yet.
    async fn decide(self: &Arc<Self>) -> Result<Option<Arc<dyn Registry>>, RegistryError> {
        if let Some(chosen) = self.chosen.get() {
            return Ok(Some(chosen.clone()));
        }
        let _one_at_a_time = self.deciding.lock().await;
        if let Some(chosen) = self.chosen.get() {
            return Ok(Some(chosen.clone()));
        }
        let apis = self.clone();
        let v2 = tokio::spawn(async move { apis.network_in_v2().await });
        let chosen: Arc<dyn Registry> = match holds_a_network(&*self.v3, &self.prefix).await {
            Ok(true) => {
                tokio::spawn(self.clone().without_v2(v2));
                tracing::info!("leases are in etcd's v3 keyspace");
                self.v3.clone()
            }
            Ok(false) => match v2.await {
                Ok(Some(v2)) => chosen_v2(v2),
                _ => return Ok(None),
            },
            // An etcd of before 3.0, or one that does not answer.
            Err(error) => match v2.await {
                Ok(Some(v2)) if v2.is_all_there_is().await => chosen_v2(v2),
                _ => return Err(error),
            },
        };
        Ok(Some(self.chosen.get_or_init(async || chosen).await.clone()))
    }

    /// v2, when there is a network in it.
    async fn network_in_v2(&self) -> Option<Arc<V2>> {
        let made = self.v2().await;
        let v2 = match made {
            Ok(v2) => v2,
            Err(error) => {
                tracing::debug!("etcd's v2 API can't be asked: {error}");
                return None;
            }
        };
        match holds_a_network(&*v2, &self.prefix).await {
            Ok(true) => Some(v2),
            Ok(false) => None,
            // Most often that there is no such API.
            Err(RegistryError::Unreachable(reason) | RegistryError::Refused(reason)) => {
                tracing::debug!("etcd's v2 API does not say what it has: {reason}");
                None
            }
        }
    }

    async fn v2(&self) -> Result<Arc<V2>, String> {
        let mut v2 = self.v2.lock().await;
        if let Some(v2) = &*v2 {
            return Ok(v2.clone());
        }
        let options = self.options.clone();
        let made = spawn_blocking(|| V2::new(options)).await.map_err(|error| error.to_string())?;
        Ok(v2.insert(Arc::new(made.map_err(|error| error.to_string())?)).clone())
    }

    /// v3 was chosen: a last look at what v2 has.
    async fn without_v2(self: Arc<Self>, v2: JoinHandle<Option<Arc<V2>>>) {
        if let Ok(Some(_)) = v2.await {
            let prefix = &self.prefix;
            tracing::warn!(
                "both of etcd's keyspaces hold a network configuration below {prefix}, and nodes in one do not see those \
                 in the other: taking v3; --etcd-api=v2 takes the other, --etcd-api=v3 this one without a warning"
            );
        }
        *self.v2.lock().await = None;
    }
}

fn chosen_v2(v2: Arc<V2>) -> Arc<dyn Registry> {
    tracing::info!("leases are in etcd's v2 keyspace; `flannel-agent migrate-etcd` moves them to v3's");
    v2
}

#[async_trait]
impl Registry for Auto {
    fn name(&self) -> &str {
        &self.name
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, RegistryError> {
        match self.apis.decide().await? {
            Some(registry) => registry.get(key).await,
            None => Ok(None),
        }
    }

    async fn list(&self, folder: &str) -> Result<Listing, RegistryError> {
        match self.apis.decide().await? {
            Some(registry) => registry.list(folder).await,
            None => Ok(Listing { entries: Vec::new(), revision: 0 }),
        }
    }

    async fn create(
        &self,
        key: &str,
        value: String,
        ttl: Option<Duration>,
    ) -> Result<Option<Written>, RegistryError> {
        self.chosen().await?.create(key, value, ttl).await
    }

    async fn update(
        &self,
        old: &Entry,
        value: String,
        ttl: Option<Duration>,
    ) -> Result<Option<Written>, RegistryError> {
        self.chosen().await?.update(old, value, ttl).await
    }

    async fn delete(&self, old: &Entry) -> Result<Deleted, RegistryError> {
        self.chosen().await?.delete(old).await
    }

    async fn remaining(&self, lifetime: Lifetime) -> Result<Option<Duration>, RegistryError> {
        self.chosen().await?.remaining(lifetime).await
    }

    async fn watch(
        &self,
        folder: &str,
        revision: u64,
    ) -> Result<BoxStream<'static, Result<Vec<Notice>, WatchEnd>>, RegistryError> {
        if let Some(registry) = self.apis.decide().await? {
            return registry.watch(folder, revision).await;
        }
        let apis = self.apis.clone();
        let undecided = async move {
            loop {
                sleep(LOOK).await;
                match apis.decide().await {
                    // Everything there is, is news.
                    Ok(Some(_)) => return Err(WatchEnd::Compacted),
                    Ok(None) => {}
                    Err(RegistryError::Unreachable(reason) | RegistryError::Refused(reason)) => {
                        return Err(WatchEnd::Broken(reason));
                    }
                }
            }
        };
        Ok(stream::once(undecided).boxed())
    }

    fn reconnect(&self) {
        match self.apis.chosen.get() {
            Some(chosen) => chosen.reconnect(),
            // Of v2 there is no watch yet, and its calls end by themselves.
            None => self.apis.v3.reconnect(),
        }
    }
}
