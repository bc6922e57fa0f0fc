//! Kubernetes as a ground: one real API server for all cases, and in it Nodes of one case.
//!
//! A Node is nobody's lease until a flannel daemon of the case's own annotation prefix speaks for it, so cases do not see
//! each other. The test plays the kubelet and the controller manager: a node that asks for a lease has a Node by then, and
//! the Node the lowest free pod CIDR. Agents come with a token of flannel's own role.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use async_trait::async_trait;
use flannel_agent::domain::config::NetworkConfig;
use flannel_agent::domain::lease::{Lease, LeaseAttrs, Reservation, Subnets};
use flannel_agent::stores::kube::{KubeOptions, KubeStore, NodeIdentity};
use flannel_agent::stores::{LEASE_TTL, LeaseRequest, LeaseStore, StoreError};
use flannel_tests::etcd::Etcd;
use flannel_tests::kube::ApiServer;
use flannel_tests::port::Port;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::{Events, first};

/// As shipped to users, with the role that agents have.
const MANIFEST: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/kube-flannel.yml"));

/// Until a new API server knows its roles.
const ROLES_LIMIT: Duration = Duration::from_secs(30);

/// The API server of all cases; started by the first that needs it.
pub(crate) struct Cluster {
    etcd: String,
    running: OnceLock<Result<Running, String>>,
    grounds: AtomicU32,
}

struct Running {
    api: ApiServer,
    kubeconfig: PathBuf,
    _port: Port,
}

impl Cluster {
    /// On this etcd, which must outlive it.
    pub(crate) fn on(etcd: &Etcd) -> Self {
        Self { etcd: etcd.endpoint(), running: OnceLock::new(), grounds: AtomicU32::new(0) }
    }

    /// Starts it if it does not run yet.
    pub(crate) fn ready(&self) -> Result<()> {
        self.running().map(drop)
    }

    fn running(&self) -> Result<&Running> {
        let running = self.running.get_or_init(|| self.start().map_err(|error| format!("{error:#}")));
        running.as_ref().map_err(|error| anyhow::anyhow!("{error}"))
    }

    fn start(&self) -> Result<Running> {
        let port = Port::hold(Ipv4Addr::LOCALHOST.into())?;
        let api = ApiServer::start(None, port.address(), &self.etcd)?;
        api.create_from(MANIFEST)?;
        let token = api.service_account_token("kube-flannel", "flannel")?;
        let kubeconfig = api.kubeconfig("flannel", &token)?;
        let started = Instant::now();
        while api.request(&token, "GET", "/api/v1/nodes", None)?.status != 200 {
            ensure!(
                started.elapsed() < ROLES_LIMIT,
                "flannel's role may list no nodes after {ROLES_LIMIT:?}"
            );
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(Running { api, kubeconfig, _port: port })
    }
}

/// The Nodes of one case.
#[derive(Clone)]
pub(crate) struct Nodes {
    inner: Arc<Inner>,
}

struct Inner {
    cluster: Arc<Cluster>,
    /// What all its Nodes' names begin with.
    name: String,
    folder: TempDir,
    /// One Node at a time is given a pod CIDR.
    assigning: Mutex<()>,
    /// Who watches without having a Node.
    onlooker: OnceLock<Arc<KubeStore>>,
}

impl Nodes {
    pub(super) async fn of(cluster: &Arc<Cluster>) -> Result<Self> {
        cluster.ready()?;
        let inner = Inner {
            cluster: cluster.clone(),
            name: format!("c{}", cluster.grounds.fetch_add(1, Ordering::SeqCst)),
            folder: tempfile::tempdir()?,
            assigning: Mutex::new(()),
            onlooker: OnceLock::new(),
        };
        let nodes = Self { inner: Arc::new(inner) };
        let onlooker = Arc::new(nodes.open("onlooker").await?);
        ensure!(nodes.inner.onlooker.set(onlooker).is_ok(), "a ground is opened once");
        Ok(nodes)
    }

    pub(crate) fn api(&self) -> &ApiServer {
        &self.inner.cluster.running().expect("it was started before").api
    }

    /// Where agents reach the API server.
    pub(super) fn kubeconfig(&self) -> PathBuf {
        self.inner.cluster.running().expect("it was started before").kubeconfig.clone()
    }

    fn prefix(&self) -> String {
        format!("{}.flannel.test", self.inner.name)
    }

    /// The whole name of an annotation of flannel's, as this case has it.
    pub(crate) fn annotation(&self, suffix: &str) -> String {
        format!("{}/{suffix}", self.prefix())
    }

    /// The whole name of a Node.
    pub(crate) fn node_name(&self, name: &str) -> String {
        format!("{}-{name}", self.inner.name)
    }

    fn net_config(&self) -> PathBuf {
        self.inner.folder.path().join("net-conf.json")
    }

    pub(crate) fn configure(&self, text: &str) -> Result<()> {
        // An agent may read it at any time.
        let new = self.inner.folder.path().join("net-conf.new");
        std::fs::write(&new, text)?;
        Ok(std::fs::rename(new, self.net_config())?)
    }

    /// The store as the agent on this Node opens it.
    pub(crate) async fn open(&self, name: &str) -> Result<KubeStore> {
        self.open_with(name, None).await
    }

    /// The same with the API server at another address.
    pub(super) async fn open_with(&self, name: &str, api_url: Option<String>) -> Result<KubeStore> {
        let options = KubeOptions {
            api_url,
            kubeconfig: Some(self.kubeconfig()),
            annotation_prefix: self.prefix(),
            net_config: self.net_config(),
            set_network_unavailable: true,
            node: NodeIdentity { node: Some(self.node_name(name)), pod: None },
        };
        Ok(KubeStore::connect(&options).await?)
    }

    /// The agent of a Node that is chosen when it takes a lease.
    pub(super) fn agent(&self) -> Agent {
        Agent { nodes: self.clone(), own: OnceLock::new(), api_url: None }
    }

    pub(super) fn agent_through(&self, address: SocketAddr) -> Agent {
        Agent { api_url: Some(format!("https://{address}")), ..self.agent() }
    }

    pub(super) fn address(&self) -> Result<SocketAddr> {
        Ok(self.api().url().trim_start_matches("https://").parse()?)
    }

    /// All Nodes of the case.
    fn all(&self) -> Result<Vec<Value>> {
        let prefix = self.node_name("");
        let mut nodes = self.api().nodes()?;
        nodes.retain(|node| name_of(node).starts_with(&prefix));
        Ok(nodes)
    }

    fn with_subnets(&self, key: &str) -> Result<Option<Value>> {
        Ok(self.all()?.into_iter().find(|node| key_of(node).as_deref() == Some(key)))
    }

    /// The Node that publishes this address, else a new one: the part of the kubelet and of the controller manager.
    fn node_of(&self, ip: IpAddr, config: &NetworkConfig) -> Result<String> {
        let _alone = self.inner.assigning.lock().unwrap_or_else(PoisonError::into_inner);
        let text = ip.to_string();
        let all = self.all()?;
        let new = self.node_name(&text.replace(['.', ':'], "-"));
        let published = self.annotation(if ip.is_ipv4() { "public-ip" } else { "public-ipv6" });
        let known = all.iter().find(|node| {
            node["metadata"]["annotations"][&published] == text.as_str() || name_of(node) == new
        });
        let name = match known {
            Some(node) => name_of(node).to_owned(),
            None => {
                let cidrs = free(&all, config)?;
                let cidrs: Vec<&str> = cidrs.iter().map(String::as_str).collect();
                self.api().create_node(&new, &cidrs, None)?;
                new
            }
        };
        Ok(name.trim_start_matches(&self.node_name("")).to_owned())
    }

    /// Writes a lease as another daemon would, on the Node that has these subnets.
    pub(super) fn put(&self, key: &str, value: &str, ttl: Option<Duration>) -> Result<()> {
        ensure!(ttl.is_none_or(|ttl| ttl == LEASE_TTL), "a Node does not end after {ttl:?}");
        let annotations = self.annotations(value);
        match self.with_subnets(key)? {
            Some(node) => {
                self.api().patch_node(name_of(&node), &json!({"metadata": {"annotations": annotations}}))
            }
            None => {
                let cidrs = cidrs_of(key.parse()?);
                let cidrs: Vec<&str> = cidrs.iter().map(String::as_str).collect();
                let name = self.node_name(&key.replace('&', "-").replace(':', ""));
                self.api().create_node(&name, &cidrs, Some(annotations))
            }
        }
    }

    /// What a daemon publishes with this value; a value that can't be read becomes an address that can't be.
    pub(crate) fn annotations(&self, value: &str) -> Value {
        let text = |data: &Option<Box<Value>>| data.as_deref().unwrap_or(&Value::Null).to_string();
        let mut all = vec![("kube-subnet-manager", "true".to_owned())];
        match LeaseAttrs::from_json(value) {
            Ok(attrs) => {
                all.push(("backend-data", text(&attrs.backend_data)));
                all.push(("public-ip", attrs.public_ip.to_string()));
                if let Some(address) = attrs.public_ipv6 {
                    all.push(("backend-v6-data", text(&attrs.backend_v6_data)));
                    all.push(("public-ipv6", address.to_string()));
                }
                all.push(("backend-type", attrs.backend_type));
            }
            Err(_) => all.push(("public-ip", value.to_owned())),
        }
        all.into_iter()
            .map(|(suffix, text)| (self.annotation(suffix), text.into()))
            .collect::<Map<_, _>>()
            .into()
    }

    pub(super) fn delete(&self, key: &str) -> Result<()> {
        match self.with_subnets(key)? {
            Some(node) => self.api().delete_node(name_of(&node)),
            None => Ok(()),
        }
    }

    /// Subnets and what is published of them, in the order and the words of etcd.
    pub(super) fn entries(&self) -> Result<Vec<(String, String)>> {
        let mut entries = Vec::new();
        for node in self.all()? {
            let annotation = |suffix: &str| node["metadata"]["annotations"][self.annotation(suffix)].as_str();
            if annotation("kube-subnet-manager") != Some("true") {
                continue;
            }
            let key = key_of(&node).with_context(|| format!("{} has no pod CIDR", name_of(&node)))?;
            let quoted = |text: Option<&str>| text.map_or(Value::Null, Value::from);
            let mut value = format!(
                r#"{{"PublicIP":{},"PublicIPv6":{}"#,
                quoted(annotation("public-ip")),
                quoted(annotation("public-ipv6"))
            );
            if let Some(backend) = annotation("backend-type").filter(|backend| !backend.is_empty()) {
                value += &format!(r#","BackendType":{}"#, Value::from(backend));
            }
            for (name, suffix) in [("BackendData", "backend-data"), ("BackendV6Data", "backend-v6-data")] {
                if let Some(data) = annotation(suffix).filter(|data| *data != "null") {
                    value += &format!(r#","{name}":{data}"#);
                }
            }
            entries.push((key, value + "}"));
        }
        entries.sort();
        Ok(entries)
    }
}

fn name_of(node: &Value) -> &str {
    node["metadata"]["name"].as_str().unwrap_or_default()
}

/// A Node's pod CIDRs, spelled as a lease's key.
fn key_of(node: &Value) -> Option<String> {
    let cidrs = node["spec"]["podCIDRs"].as_array()?;
    let mut subnets = Subnets { v4: None, v6: None };
    for cidr in cidrs.iter().filter_map(Value::as_str) {
        match cidr.parse::<ipnet::IpNet>().ok()? {
            ipnet::IpNet::V4(net) => subnets.v4 = Some(net),
            ipnet::IpNet::V6(net) => subnets.v6 = Some(net),
        }
    }
    Some(subnets.to_string())
}

fn cidrs_of(subnets: Subnets) -> Vec<String> {
    let v4 = subnets.v4.map(|net| net.to_string());
    v4.into_iter().chain(subnets.v6.map(|net| net.to_string())).collect()
}

/// The lowest pod CIDRs of the network's families that no Node has.
fn free(nodes: &[Value], config: &NetworkConfig) -> Result<Vec<String>> {
    let taken: Vec<Subnets> = nodes.iter().filter_map(key_of).filter_map(|key| key.parse().ok()).collect();
    let mut free = Subnets { v4: None, v6: None };
    if let Some(range) = config.v4 {
        let bases =
            (u32::from(range.subnet_min)..=range.subnet_max.into()).step_by(1 << (32 - range.subnet_len));
        let nets = bases.filter_map(|base| ipnet::Ipv4Net::new(base.into(), range.subnet_len).ok());
        free.v4 = nets.into_iter().find(|net| !taken.iter().any(|other| other.v4 == Some(*net)));
        ensure!(free.v4.is_some(), "no IPv4 pod CIDR is free");
    }
    if let Some(range) = config.v6 {
        let size = 1_u128 << (128 - range.subnet_len);
        let bases = (0..).map(|index| u128::from(range.subnet_min) + index * size);
        let bases = bases.take_while(|base| *base <= range.subnet_max.into());
        let nets = bases.filter_map(|base| ipnet::Ipv6Net::new(base.into(), range.subnet_len).ok());
        free.v6 = nets.into_iter().find(|net| !taken.iter().any(|other| other.v6 == Some(*net)));
        ensure!(free.v6.is_some(), "no IPv6 pod CIDR is free");
    }
    Ok(cidrs_of(free))
}

/// An agent, whose Node is known once it takes a lease; until then it looks on.
pub(super) struct Agent {
    nodes: Nodes,
    own: OnceLock<Arc<KubeStore>>,
    api_url: Option<String>,
}

impl Agent {
    fn store(&self) -> &Arc<KubeStore> {
        let onlooker = || self.nodes.inner.onlooker.get().expect("a ground has an onlooker");
        self.own.get().unwrap_or_else(onlooker)
    }
}

#[async_trait]
impl LeaseStore for Agent {
    async fn network_config(&self) -> Result<String, StoreError> {
        self.store().network_config().await
    }

    async fn acquire(&self, request: &LeaseRequest) -> Result<Lease, StoreError> {
        self.nodes.configure(&request.config.to_string()).expect("the file can be written");
        if self.own.get().is_none() {
            let ip = request.attrs.node().unwrap_or(Ipv4Addr::UNSPECIFIED.into());
            let name = self.nodes.node_of(ip, &request.config).expect("a Node");
            let store =
                self.nodes.open_with(&name, self.api_url.clone()).await.expect("the options are good");
            let _ = self.own.set(Arc::new(store));
        }
        self.store().acquire(request).await
    }

    async fn rewrite(&self, lease: &Lease, attrs: &LeaseAttrs) -> Result<Lease, StoreError> {
        self.store().rewrite(lease, attrs).await
    }

    async fn reservations(&self) -> Result<Vec<Reservation>, StoreError> {
        self.store().reservations().await
    }

    async fn reserve(&self, reservation: &Reservation) -> Result<(), StoreError> {
        self.store().reserve(reservation).await
    }

    async fn unreserve(&self, subnets: Subnets) -> Result<(), StoreError> {
        self.store().unreserve(subnets).await
    }

    async fn revoke(&self, subnets: Subnets) -> Result<(), StoreError> {
        self.store().revoke(subnets).await
    }

    fn reconnect(&self) {
        self.store().reconnect();
    }

    fn watch(&self) -> Events {
        self.store().watch()
    }
}

/// What a watch of this store tells first.
pub(crate) async fn known_to(store: &KubeStore) -> Result<Vec<String>> {
    let (leases, unreadable) = first(&mut store.watch()).await?;
    let mut all: Vec<String> = leases.iter().map(|lease| lease.subnets.to_string()).collect();
    all.extend(unreadable.iter().map(|entry| format!("! {}", entry.key)));
    all.sort();
    Ok(all)
}
