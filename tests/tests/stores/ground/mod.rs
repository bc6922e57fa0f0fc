//! One network in one store, seen by an operator: the same handles whatever the store is.

mod events;
pub(crate) mod kube;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use etcd_client::{Client, DeleteOptions, GetOptions, PutOptions};
use flannel_agent::domain::config::{BackendConfig, NetworkConfig, SubnetRange};
use flannel_agent::domain::lease::{Lease, LeaseAttrs, Reservation, Subnets};
use flannel_agent::server::{self, ListenAddress, Listener};
use flannel_agent::stores::embedded::Embedded;
use flannel_agent::stores::etcd::{self, EtcdApi, EtcdOptions};
use flannel_agent::stores::memory::MemoryStore;
use flannel_agent::stores::remote::{RemoteNetworks, RemoteOptions};
use flannel_agent::stores::{LEASE_TTL, LeaseRequest, LeaseStore, NetworkStores, StoreError};
use flannel_tests::etcd::Etcd;
use flannel_tests::etcd_v2::V2Keys;
use tempfile::TempDir;
use tokio_util::sync::{CancellationToken, DropGuard};

pub(crate) use events::{Events, first, interrupted, next, next_unreadable, next_within};
use events::{PATIENCE, known};

/// A network as it lies in its store, and how nodes come to it.
pub(crate) struct Ground {
    backing: Backing,
    /// Nodes ask a server of ours, which is the one that opens the store.
    served: Option<Served>,
}

enum Backing {
    Memory(MemoryStore),
    Etcd { options: Box<EtcdOptions>, keys: Keys, prefix: String },
    Embedded { store: Embedded, _folder: TempDir },
    Kubernetes(kube::Nodes),
}

/// etcd's keys as an operator has them, by either API.
#[derive(Clone)]
pub(crate) enum Keys {
    V2(V2Keys),
    V3(Box<Client>),
}

impl Keys {
    pub(crate) async fn of(etcd: &Etcd, api: EtcdApi) -> Result<Self> {
        Ok(match api {
            EtcdApi::V2 => Self::V2(etcd.v2()),
            _ => Self::V3(Box::new(Client::connect([etcd.endpoint()], None).await?)),
        })
    }

    /// Without `ttl` it never ends.
    pub(crate) async fn put(&self, key: &str, value: &str, ttl: Option<Duration>) -> Result<()> {
        match self {
            Self::V2(keys) => keys.put(key, value, ttl)?,
            Self::V3(client) => {
                let lease = match ttl {
                    Some(ttl) => client.lease_client().grant(i64::try_from(ttl.as_secs())?, None).await?.id(),
                    None => 0,
                };
                let options = PutOptions::new().with_lease(lease);
                client.kv_client().put(key, value, Some(options)).await?;
            }
        }
        Ok(())
    }

    pub(crate) async fn delete(&self, key: &str) -> Result<()> {
        match self {
            Self::V2(keys) => keys.delete(key)?,
            Self::V3(client) => {
                client.kv_client().delete(key, None::<DeleteOptions>).await?;
            }
        }
        Ok(())
    }

    /// Keys below a folder that ends in a slash, and values.
    pub(crate) async fn list(&self, folder: &str) -> Result<Vec<(String, String)>> {
        match self {
            Self::V2(keys) => {
                Ok(keys.list(folder)?.into_iter().map(|entry| (entry.key, entry.value)).collect())
            }
            Self::V3(client) => {
                let list = client.kv_client().get(folder, Some(GetOptions::new().with_prefix())).await?;
                list.kvs()
                    .iter()
                    .map(|kv| Ok((kv.key_str()?.to_owned(), kv.value_str()?.to_owned())))
                    .collect()
            }
        }
    }
}

/// A server in this process.
struct Served {
    address: SocketAddr,
    networks: RemoteNetworks,
    _stop: DropGuard,
}

impl Ground {
    pub(crate) async fn memory() -> Result<Self> {
        Ok(Self { backing: Backing::Memory(MemoryStore::default()), served: None })
    }

    pub(crate) async fn etcd(etcd: &Etcd, api: EtcdApi, name: &str) -> Result<Self> {
        let prefix = format!("/{name}/network");
        let options = EtcdOptions {
            endpoints: vec![etcd.endpoint()],
            prefix: prefix.clone(),
            api,
            ..EtcdOptions::default()
        };
        let keys = Keys::of(etcd, api).await?;
        Ok(Self { backing: Backing::Etcd { options: Box::new(options), keys, prefix }, served: None })
    }

    pub(crate) async fn embedded() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let store = Embedded::open(&folder.path().join("leases.redb"))?;
        Ok(Self { backing: Backing::Embedded { store, _folder: folder }, served: None })
    }

    pub(crate) async fn kubernetes(cluster: &Arc<kube::Cluster>) -> Result<Self> {
        Ok(Self { backing: Backing::Kubernetes(kube::Nodes::of(cluster).await?), served: None })
    }

    /// The Nodes, where it is Kubernetes.
    pub(crate) fn nodes(&self) -> &kube::Nodes {
        match &self.backing {
            Backing::Kubernetes(nodes) => nodes,
            _ => panic!("this case is about Kubernetes"),
        }
    }

    /// The same ground behind a server.
    pub(crate) async fn served(self) -> Result<Self> {
        let listener = Listener::bind(&ListenAddress::Tcp("127.0.0.1:0".into()), None).await?;
        let address = listener.address()?;
        let servers = vec![address.to_string()];
        let networks: Arc<dyn NetworkStores> = match &self.backing {
            Backing::Memory(_) => bail!("the store in memory has one network"),
            Backing::Kubernetes(_) => bail!("a server keeps no leases in Kubernetes"),
            Backing::Etcd { options, .. } => Arc::new(etcd::open(options)?),
            Backing::Embedded { store, .. } => Arc::new(store.networks()),
        };
        let stop = CancellationToken::new();
        tokio::spawn(server::serve(listener, networks, stop.clone()));
        let networks = RemoteNetworks::open(&RemoteOptions { servers, ..RemoteOptions::default() })?;
        Ok(Self { served: Some(Served { address, networks, _stop: stop.drop_guard() }), ..self })
    }

    /// Where nodes connect to.
    pub(crate) fn server_address(&self) -> Result<SocketAddr> {
        match (&self.served, &self.backing) {
            (Some(served), _) => Ok(served.address),
            (None, Backing::Etcd { options, .. }) => {
                let endpoint = options.endpoints.first().context("an endpoint")?;
                Ok(endpoint.trim_start_matches("http://").parse()?)
            }
            (None, Backing::Kubernetes(nodes)) => nodes.address(),
            _ => bail!("there is no server"),
        }
    }

    /// The store as a node opens it whose way leads over `address`.
    pub(crate) fn node_through(&self, address: SocketAddr) -> Result<Arc<dyn LeaseStore>> {
        match (&self.served, &self.backing) {
            (Some(_), _) => {
                let options =
                    RemoteOptions { servers: vec![address.to_string()], ..RemoteOptions::default() };
                let store = RemoteNetworks::open(&options)?.network(None);
                Ok(Arc::new(Configuring { store, operator: self.operator() }))
            }
            (None, Backing::Etcd { options, .. }) => {
                let options =
                    EtcdOptions { endpoints: vec![format!("http://{address}")], ..(**options).clone() };
                Ok(etcd::open(&options)?.network(None))
            }
            (None, Backing::Kubernetes(nodes)) => Ok(Arc::new(nodes.agent_through(address))),
            _ => bail!("there is no server"),
        }
    }

    /// Which revision a lease has is not said by a server, and a Node's version is not its lease's.
    pub(crate) fn tells_revisions(&self) -> bool {
        self.served.is_none() && !matches!(self.backing, Backing::Kubernetes(_))
    }

    /// Whether a lease that was just taken or renewed ends when it should: a day from now, give or take what the test
    /// itself took, and in Kubernetes never.
    pub(crate) fn is_fresh(&self, end: Option<Instant>) -> bool {
        if matches!(self.backing, Backing::Kubernetes(_)) {
            return end.is_none();
        }
        let wanted = Instant::now() + LEASE_TTL;
        end.is_some_and(|end| end <= wanted && end + Duration::from_secs(30) > wanted)
    }

    /// Why a lease is lost that somebody deleted.
    pub(crate) fn words_for_deleted(&self) -> &'static str {
        match self.backing {
            Backing::Kubernetes(_) => "the Node was deleted",
            _ => "it was deleted or has expired",
        }
    }

    /// Whether a lease that can't be read any more is told as gone, too: a Node has a name that is no subnet.
    pub(crate) fn tells_unreadable_as_gone(&self) -> bool {
        matches!(self.backing, Backing::Kubernetes(_))
    }

    /// Options, where it is etcd.
    pub(crate) fn etcd_options(&self) -> Option<&EtcdOptions> {
        match &self.backing {
            Backing::Etcd { options, .. } => Some(options),
            _ => None,
        }
    }

    /// The store as one more node opens it.
    pub(crate) fn node(&self) -> Arc<dyn LeaseStore> {
        match &self.served {
            Some(served) => {
                Arc::new(Configuring { store: served.networks.network(None), operator: self.operator() })
            }
            None => self.direct(),
        }
    }

    fn direct(&self) -> Arc<dyn LeaseStore> {
        match &self.backing {
            Backing::Memory(store) => store.open(),
            Backing::Etcd { options, .. } => etcd::open(options).expect("the options are good").network(None),
            Backing::Embedded { store, .. } => store.networks().network(None),
            Backing::Kubernetes(nodes) => Arc::new(nodes.agent()),
        }
    }

    fn operator(&self) -> Operator {
        match &self.backing {
            Backing::Memory(store) => Operator::Memory(store.clone()),
            Backing::Etcd { keys, prefix, .. } => {
                Operator::Etcd { keys: keys.clone(), prefix: prefix.clone() }
            }
            Backing::Embedded { store, .. } => Operator::Embedded(store.clone()),
            Backing::Kubernetes(nodes) => Operator::Kubernetes(nodes.clone()),
        }
    }

    pub(crate) async fn configure(&self, text: &str) -> Result<()> {
        self.operator().configure(text).await
    }

    /// Writes an entry as another daemon would. Without `ttl` it never ends.
    pub(crate) async fn put(&self, key: &str, value: &str, ttl: Option<Duration>) -> Result<()> {
        match &self.backing {
            Backing::Memory(store) => store.put(key, value, ttl),
            Backing::Etcd { keys, prefix, .. } => {
                keys.put(&format!("{prefix}/subnets/{key}"), value, ttl).await?;
            }
            Backing::Embedded { store, .. } => {
                store.put(&format!("subnets/{key}"), value.as_bytes(), ttl).await?;
            }
            Backing::Kubernetes(nodes) => nodes.put(key, value, ttl)?,
        }
        self.settle().await
    }

    pub(crate) async fn delete(&self, key: &str) -> Result<()> {
        match &self.backing {
            Backing::Memory(store) => store.delete(key),
            Backing::Etcd { keys, prefix, .. } => keys.delete(&format!("{prefix}/subnets/{key}")).await?,
            Backing::Embedded { store, .. } => store.delete(&format!("subnets/{key}")).await?,
            Backing::Kubernetes(nodes) => nodes.delete(key)?,
        }
        self.settle().await
    }

    /// What others wrote into its store reaches a server by a watch: waits for it.
    async fn settle(&self) -> Result<()> {
        let Some(served) = &self.served else { return Ok(()) };
        let started = Instant::now();
        loop {
            let there = known(&mut self.direct().watch()).await?;
            // Without a configuration there is no network to be served.
            self.configure_if_missing().await?;
            let served = known(&mut served.networks.network(None).watch()).await?;
            if served == there {
                return Ok(());
            }
            if started.elapsed() > PATIENCE {
                bail!("the store has {there:?}, the server {served:?}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn configure_if_missing(&self) -> Result<()> {
        match self.direct().network_config().await {
            Err(StoreError::NoConfig { .. }) => self.configure(r#"{"Network":"10.5.0.0/16"}"#).await,
            other => other.map(drop).map_err(Into::into),
        }
    }

    /// Keys and values below the leases' folder, ordered.
    pub(crate) async fn entries(&self) -> Result<Vec<(String, String)>> {
        match &self.backing {
            Backing::Memory(store) => Ok(store.entries()),
            Backing::Etcd { keys, prefix, .. } => {
                let folder = format!("{prefix}/subnets/");
                let list = keys.list(&folder).await?;
                Ok(list.into_iter().map(|(key, value)| (key.replace(&folder, ""), value)).collect())
            }
            Backing::Embedded { store, .. } => {
                let leases = store.entries().into_iter().filter_map(|(key, value, _)| {
                    Some((key.strip_prefix("subnets/")?.to_owned(), String::from_utf8(value)))
                });
                leases.map(|(key, value)| Ok((key, value?))).collect()
            }
            Backing::Kubernetes(nodes) => nodes.entries(),
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

/// Somebody who writes configurations.
enum Operator {
    Memory(MemoryStore),
    Etcd { keys: Keys, prefix: String },
    Embedded(Embedded),
    Kubernetes(kube::Nodes),
}

impl Operator {
    async fn configure(&self, text: &str) -> Result<()> {
        match self {
            Self::Memory(store) => store.set_config(text),
            Self::Etcd { keys, prefix } => keys.put(&format!("{prefix}/config"), text, None).await?,
            Self::Embedded(store) => store.configure(None, Some(text)).await?,
            Self::Kubernetes(nodes) => nodes.configure(text)?,
        }
        Ok(())
    }
}

/// A server gives leases out of its own configuration, not of the asking node's: here both are the same.
struct Configuring {
    store: Arc<dyn LeaseStore>,
    operator: Operator,
}

#[async_trait]
impl LeaseStore for Configuring {
    async fn network_config(&self) -> Result<String, StoreError> {
        self.store.network_config().await
    }

    async fn acquire(&self, request: &LeaseRequest) -> Result<Lease, StoreError> {
        self.operator.configure(&request.config.to_string()).await.expect("the store is there");
        self.store.acquire(request).await
    }

    async fn rewrite(&self, lease: &Lease, attrs: &LeaseAttrs) -> Result<Lease, StoreError> {
        self.store.rewrite(lease, attrs).await
    }

    async fn reservations(&self) -> Result<Vec<Reservation>, StoreError> {
        self.store.reservations().await
    }

    async fn reserve(&self, reservation: &Reservation) -> Result<(), StoreError> {
        self.store.reserve(reservation).await
    }

    async fn unreserve(&self, subnets: Subnets) -> Result<(), StoreError> {
        self.store.unreserve(subnets).await
    }

    async fn revoke(&self, subnets: Subnets) -> Result<(), StoreError> {
        self.store.revoke(subnets).await
    }

    fn reconnect(&self) {
        self.store.reconnect();
    }

    fn watch(&self) -> Events {
        self.store.watch()
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

/// `fd00::/48` alone, two subnets of 64 bits.
pub(crate) fn only_ipv6() -> NetworkConfig {
    let v6 = SubnetRange {
        network: "fd00::/48".parse().unwrap(),
        subnet_len: 64,
        subnet_min: "fd00:0:0:1::".parse().unwrap(),
        subnet_max: "fd00:0:0:2::".parse().unwrap(),
    };
    NetworkConfig { v4: None, v6: Some(v6), ..network("10.5.1.0") }
}

/// A node with this public address and nothing to say beyond it.
pub(crate) fn request(config: &NetworkConfig, ip: &str) -> LeaseRequest {
    LeaseRequest {
        config: config.clone(),
        attrs: LeaseAttrs::of_node(ip.parse().unwrap()),
        previous: None,
        previous_only: false,
    }
}

pub(crate) fn subnets(key: &str) -> Subnets {
    key.parse().unwrap()
}
