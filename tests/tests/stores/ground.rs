//! One network in one store, seen by an operator: the same handles whatever the store is.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use etcd_client::{Client, DeleteOptions, GetOptions, PutOptions};
use flannel_agent::domain::config::{BackendConfig, NetworkConfig, SubnetRange};
use flannel_agent::domain::lease::{Lease, LeaseAttrs, LeaseEvent, Subnets, Unreadable};
use flannel_agent::stores::etcd::{self, EtcdOptions};
use flannel_agent::stores::memory::MemoryStore;
use flannel_agent::stores::{LeaseRequest, LeaseStore, NetworkStores};
use flannel_tests::etcd::Etcd;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;

/// Longer than anything a healthy store needs, also on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) type Events = BoxStream<'static, LeaseEvent>;

pub(crate) enum Ground {
    Memory(MemoryStore),
    Etcd { options: Box<EtcdOptions>, client: Box<Client>, prefix: String },
}

impl Ground {
    pub(crate) fn memory() -> Self {
        Self::Memory(MemoryStore::default())
    }

    pub(crate) async fn etcd(etcd: &Etcd, name: &str) -> Result<Self> {
        let prefix = format!("/{name}/network");
        let options = EtcdOptions {
            endpoints: vec![etcd.endpoint()],
            prefix: prefix.clone(),
            ..EtcdOptions::default()
        };
        let options = Box::new(options);
        Ok(Self::Etcd { options, client: Box::new(Client::connect([etcd.endpoint()], None).await?), prefix })
    }

    /// The store as one more node opens it.
    pub(crate) fn node(&self) -> Arc<dyn LeaseStore> {
        match self {
            Self::Memory(store) => Arc::new(store.clone()),
            Self::Etcd { options, .. } => etcd::open(options).expect("the options are good").network(None),
        }
    }

    pub(crate) async fn configure(&self, text: &str) -> Result<()> {
        match self {
            Self::Memory(store) => store.set_config(text),
            Self::Etcd { client, prefix, .. } => {
                client.kv_client().put(format!("{prefix}/config"), text, None).await?;
            }
        }
        Ok(())
    }

    /// Writes an entry as another daemon or an operator would. Without `ttl` it never ends.
    pub(crate) async fn put(&self, key: &str, value: &str, ttl: Option<Duration>) -> Result<()> {
        match self {
            Self::Memory(store) => store.put(key, value, ttl),
            Self::Etcd { client, prefix, .. } => {
                let lease = match ttl {
                    Some(ttl) => client.lease_client().grant(i64::try_from(ttl.as_secs())?, None).await?.id(),
                    None => 0,
                };
                let options = PutOptions::new().with_lease(lease);
                client.kv_client().put(format!("{prefix}/subnets/{key}"), value, Some(options)).await?;
            }
        }
        Ok(())
    }

    pub(crate) async fn delete(&self, key: &str) -> Result<()> {
        match self {
            Self::Memory(store) => store.delete(key),
            Self::Etcd { client, prefix, .. } => {
                client.kv_client().delete(format!("{prefix}/subnets/{key}"), None::<DeleteOptions>).await?;
            }
        }
        Ok(())
    }

    /// Keys and values below the leases' folder, ordered.
    pub(crate) async fn entries(&self) -> Result<Vec<(String, String)>> {
        match self {
            Self::Memory(store) => Ok(store.entries()),
            Self::Etcd { client, prefix, .. } => {
                let folder = format!("{prefix}/subnets/");
                let list =
                    client.kv_client().get(folder.as_str(), Some(GetOptions::new().with_prefix())).await?;
                list.kvs()
                    .iter()
                    .map(|kv| Ok((kv.key_str()?.replace(&folder, ""), kv.value_str()?.to_owned())))
                    .collect()
            }
        }
    }

    pub(crate) async fn value(&self, key: impl ToString) -> Result<String> {
        let key = key.to_string();
        let entries = self.entries().await?;
        let entry = entries.into_iter().find(|(other, _)| *other == key);
        entry.map(|(_, value)| value).with_context(|| format!("{key} is not there"))
    }

    /// What a new watcher sees first.
    pub(crate) async fn snapshot(&self) -> Result<Vec<Lease>> {
        Ok(first(&mut self.node().watch()).await?.0)
    }
}

pub(crate) async fn next(events: &mut Events) -> Result<LeaseEvent> {
    next_within(events, PATIENCE).await
}

pub(crate) async fn next_within(events: &mut Events, limit: Duration) -> Result<LeaseEvent> {
    let started = Instant::now();
    match tokio::time::timeout(limit, events.next()).await {
        Ok(Some(event)) => Ok(event),
        Ok(None) => bail!("the stream ended"),
        Err(_) => bail!("no event within {:.1} s", started.elapsed().as_secs_f64()),
    }
}

pub(crate) async fn first(events: &mut Events) -> Result<(Vec<Lease>, Vec<Unreadable>)> {
    match next(events).await? {
        LeaseEvent::Snapshot(leases, unreadable) => Ok((leases, unreadable)),
        other => bail!("a snapshot was due, not {other:?}"),
    }
}

pub(crate) async fn interrupted(events: &mut Events, limit: Duration) -> Result<String> {
    match next_within(events, limit).await? {
        LeaseEvent::Interrupted(reason) => Ok(reason),
        other => bail!("an interruption was due, not {other:?}"),
    }
}

/// `10.5.0.0/16`, subnets of 24 bits from 10.5.1.0 up to `last`.
pub(crate) fn network(last: &str) -> NetworkConfig {
    NetworkConfig {
        v4: Some(SubnetRange {
            network: "10.5.0.0/16".parse().unwrap(),
            subnet_len: 24,
            subnet_min: "10.5.1.0".parse().unwrap(),
            subnet_max: last.parse().unwrap(),
        }),
        v6: None,
        enable_nftables: false,
        backend: BackendConfig::Alloc,
        warnings: Vec::new(),
    }
}

/// A node with this public address and nothing to say beyond it.
pub(crate) fn request(config: &NetworkConfig, ip: &str) -> LeaseRequest {
    LeaseRequest {
        config: config.clone(),
        attrs: LeaseAttrs::new(ip.parse().unwrap()),
        previous: None,
        previous_only: false,
    }
}

pub(crate) fn subnets(key: &str) -> Subnets {
    key.parse().unwrap()
}
