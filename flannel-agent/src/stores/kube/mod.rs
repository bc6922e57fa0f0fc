//! Leases from Kubernetes (contract §4): the controller manager gives each Node its pod CIDR, which is the lease; what
//! the other nodes must know stands in the Node's annotations.
//!
//! There is no time to live here and nothing to allocate. Taking a lease is reading our own Node and writing the
//! annotations that differ; the others' leases are the Nodes that some flannel daemon speaks for. The network's
//! configuration is a file, mounted from a ConfigMap.
//!
//! Where flanneld ends or gives up, this waits: a Node that is not there yet, has no annotations or no pod CIDR, an API
//! server that is away at the wrong moment. It asks for nothing beyond flannel's own role: get pods, get, list and watch
//! nodes, patch nodes/status.

mod annotations;
mod connection;
mod nodes;
mod watch;

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use serde_json::{Map, Value, json};

use self::annotations::{Annotations, Present};
use self::connection::Connection;
pub use self::connection::NodeIdentity;
use self::nodes::{Families, pod_subnets};
use super::{CONFIG_EXAMPLE, LeaseRequest, LeaseStore, StoreError};
use crate::domain::config::NetworkConfig;
use crate::domain::interface::PublicAddresses;
use crate::domain::lease::{Lease, LeaseAttrs, LeaseEvent, Subnets};

/// What flannel's manifests mount, and flanneld's default.
pub const NET_CONFIG_PATH: &str = "/etc/kube-flannel/net-conf.json";

/// flanneld's default.
pub const ANNOTATION_PREFIX: &str = "flannel.alpha.coreos.com";

/// Keys of net-conf.json that are of no effect here: Kubernetes decides which subnet a node has.
const DECIDED_BY_KUBERNETES: [&str; 6] =
    ["subnetlen", "subnetmin", "subnetmax", "ipv6subnetlen", "ipv6subnetmin", "ipv6subnetmax"];

/// Longest net-conf.json that is read, in bytes.
const MAX_CONFIG: u64 = 64 * 1024;

/// How to reach the API server, and as whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubeOptions {
    /// `--kube-api-url`; with a kubeconfig it goes before the kubeconfig's server.
    pub api_url: Option<String>,
    /// Without it and without `api_url`: the service account of the pod we run in.
    pub kubeconfig: Option<PathBuf>,
    pub annotation_prefix: String,
    pub net_config: PathBuf,
    /// Whether the Node's condition NetworkUnavailable is set to False once the network works.
    pub set_network_unavailable: bool,
    pub node: NodeIdentity,
}

/// Why the options can't work.
#[derive(Debug, thiserror::Error)]
pub enum KubeOptionsError {
    #[error("--kube-annotation-prefix {0}")]
    Prefix(String),
    #[error("can't reach Kubernetes: {0}")]
    Connection(String),
    #[error(
        "which Node is this? Set NODE_NAME, or POD_NAME and POD_NAMESPACE, from the pod's spec.nodeName, metadata.name \
         and metadata.namespace"
    )]
    NoNode,
}

/// [`LeaseStore`] on Kubernetes.
pub struct KubeStore {
    connection: Arc<Connection>,
    annotations: Annotations,
    net_config: PathBuf,
    up: Arc<watch::NetworkUp>,
    set_network_unavailable: bool,
}

impl KubeStore {
    /// Checks the options and reads the credentials; the API server may be down. The process needs rustls's ring
    /// provider, installed or compiled in as the only one.
    ///
    /// # Errors
    /// What can't work, and what would.
    pub async fn connect(options: &KubeOptions) -> Result<Self, KubeOptionsError> {
        let annotations = Annotations::new(&options.annotation_prefix).map_err(KubeOptionsError::Prefix)?;
        Ok(Self {
            connection: Arc::new(Connection::open(options).await?),
            annotations,
            net_config: options.net_config.clone(),
            up: Arc::default(),
            set_network_unavailable: options.set_network_unavailable,
        })
    }

    /// Our own Node as the API server has it now.
    async fn own_node(&self) -> Result<Node, StoreError> {
        let name = self.connection.node_name().await?;
        self.connection.get_node(name).await?.ok_or_else(|| {
            self.connection.not_yet(format!("there is no Node {name}; has its kubelet registered it?"))
        })
    }

    /// What is to be published instead of our own attributes, where an operator says so.
    fn published(&self, attrs: &LeaseAttrs, present: &Present) -> Result<LeaseAttrs, StoreError> {
        self.annotations.overwritten(attrs.clone(), present).map_err(|reason| self.connection.refused(reason))
    }

    async fn annotate(&self, missing: &Present) -> Result<(), StoreError> {
        let annotations: Map<String, Value> =
            missing.iter().map(|(name, value)| (name.clone(), value.as_str().into())).collect();
        self.connection.patch_status(&json!({"metadata": {"annotations": annotations}})).await
    }
}

#[async_trait]
impl LeaseStore for KubeStore {
    async fn network_config(&self) -> Result<String, StoreError> {
        let path = self.net_config.display();
        let failed = |reason: String| StoreError::NoConfig {
            place: format!(
                "{path} ({reason}; --net-config-path names the file, a ConfigMap in flannel's manifests)"
            ),
            example: CONFIG_EXAMPLE.to_owned(),
        };
        let size =
            tokio::fs::metadata(&self.net_config).await.map_err(|error| failed(error.to_string()))?.len();
        if size > MAX_CONFIG {
            return Err(failed(format!("it has {size} bytes, at most {MAX_CONFIG} are read")));
        }
        let text =
            tokio::fs::read_to_string(&self.net_config).await.map_err(|error| failed(error.to_string()))?;
        Ok(without_what_kubernetes_decides(text))
    }

    async fn node_addresses(&self) -> Result<PublicAddresses, StoreError> {
        let node = self.own_node().await?;
        let present = node.metadata.annotations.unwrap_or_default();
        self.annotations.node_addresses(&present).map_err(|reason| self.connection.refused(reason))
    }

    async fn acquire(&self, request: &LeaseRequest) -> Result<Lease, StoreError> {
        if request.node().is_none() {
            let family = if request.config.v4.is_some() { "IPv4" } else { "IPv6" };
            return Err(self.connection.refused(format!(
                "this node has no public {family} address, without which no other node could reach it"
            )));
        }
        let node = self.own_node().await?;
        let subnets = pod_subnets(&node, families(&request.config)).map_err(|reason| {
            self.connection.not_yet(format!(
                "Node {}: {reason}; the controller manager assigns pod CIDRs when it runs with --allocate-node-cidrs",
                nodes::name(&node)
            ))
        })?;
        if let Some(reason) = outside(&request.config, &subnets) {
            return Err(self.connection.refused(format!("Node {}: {reason}", nodes::name(&node))));
        }
        if request.previous_only
            && let Some(previous) = request.previous
            && previous != subnets
        {
            let reason = format!("the Node's pod CIDR is {subnets} now");
            return Err(StoreError::LeaseLost { subnets: previous, reason });
        }
        let present = node.metadata.annotations.unwrap_or_default();
        let attrs = self.published(&request.attrs, &present)?;
        let missing = self.annotations.missing(&attrs, &present);
        if !missing.is_empty() {
            self.annotate(&missing).await?;
        }
        Ok(Lease { subnets, attrs, expires: None, revision: 0 })
    }

    /// A pod CIDR has no end and belongs to its Node for as long as there is one; what can change, or be lost, are the
    /// annotations.
    async fn rewrite(&self, lease: &Lease, attrs: &LeaseAttrs) -> Result<Lease, StoreError> {
        let subnets = lease.subnets;
        let lost = |reason: String| StoreError::LeaseLost { subnets, reason };
        let name = self.connection.node_name().await?;
        let node = self.connection.get_node(name).await?;
        let node = node.ok_or_else(|| lost("the Node was deleted".to_owned()))?;
        let had = Families { v4: subnets.v4.is_some(), v6: subnets.v6.is_some() };
        match pod_subnets(&node, had) {
            Ok(now) if now == subnets => {}
            Ok(now) => return Err(lost(format!("the Node's pod CIDR is {now} now"))),
            Err(reason) => return Err(lost(format!("Node {name} is another now: {reason}"))),
        }
        let present = node.metadata.annotations.unwrap_or_default();
        let attrs = self.published(attrs, &present)?;
        let missing = self.annotations.missing(&attrs, &present);
        if !missing.is_empty() {
            self.annotate(&missing).await?;
        }
        Ok(Lease { attrs, ..lease.clone() })
    }

    async fn revoke(&self, subnets: Subnets) -> Result<(), StoreError> {
        Err(StoreError::Conflict(format!(
            "subnet {subnets} can't be taken from its Node: in Kubernetes delete the Node (kubectl delete node)"
        )))
    }

    fn watch(&self) -> BoxStream<'static, LeaseEvent> {
        watch::follow(watch::Ground {
            connection: Arc::clone(&self.connection),
            annotations: self.annotations.clone(),
            net_config: self.net_config.clone(),
            up: Arc::clone(&self.up),
        })
    }

    fn network_is_up(&self) {
        if self.set_network_unavailable {
            self.up.want(&self.connection);
        }
    }
}

fn families(config: &NetworkConfig) -> Families {
    Families { v4: config.v4.is_some(), v6: config.v6.is_some() }
}

/// Pods with addresses outside the network would not be routed to.
fn outside(config: &NetworkConfig, subnets: &Subnets) -> Option<String> {
    let pairs = [
        (subnets.v4.map(IpNet::V4), config.v4.map(|range| IpNet::V4(range.network)), "Network"),
        (subnets.v6.map(IpNet::V6), config.v6.map(|range| IpNet::V6(range.network)), "IPv6Network"),
    ];
    pairs.into_iter().find_map(|(subnet, network, key)| {
        let (subnet, network) = (subnet?, network?);
        (!network.contains(&subnet)).then(|| {
            format!(
                "its pod CIDR {subnet} is not inside {key} {network} of net-conf.json; {key} must be the cluster's pod \
                 network (--cluster-cidr of the controller manager)"
            )
        })
    })
}

/// flanneld reads these keys and does nothing with them; a value that would be wrong elsewhere is none here. A text that
/// is no JSON object is left for the configuration's own check to name.
fn without_what_kubernetes_decides(text: String) -> String {
    match serde_json::from_str::<Value>(&text) {
        Ok(Value::Object(mut object)) => {
            let before = object.len();
            object.retain(|key, _| !DECIDED_BY_KUBERNETES.contains(&key.to_ascii_lowercase().as_str()));
            if object.len() == before { text } else { Value::Object(object).to_string() }
        }
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kubernetes_decides_is_left_out_of_the_configuration() {
        let text = r#"{"Network":"10.244.0.0/16","SubnetLen":99,"subnetmin":"x","Backend":{"Type":"udp"}}"#;
        assert_eq!(
            without_what_kubernetes_decides(text.to_owned()),
            r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}"#
        );
        for other in [r#"{"Network": "10.244.0.0/16"}"#, "{", "[]"] {
            assert_eq!(without_what_kubernetes_decides(other.to_owned()), other);
        }
    }

    #[test]
    fn a_pod_cidr_outside_the_network_is_named_with_both() {
        let config = NetworkConfig::parse(r#"{"Network":"10.244.0.0/16"}"#).unwrap();
        assert_eq!(outside(&config, &"10.244.3.0-24".parse().unwrap()), None);
        let reason = outside(&config, &"10.1.0.0-24".parse().unwrap()).unwrap();
        assert!(reason.contains("10.1.0.0/24 is not inside Network 10.244.0.0/16"), "{reason}");
    }
}
