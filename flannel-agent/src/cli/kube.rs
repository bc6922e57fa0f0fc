//! Leasing from Kubernetes: its flags, and the pod's variables that say which Node this is.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgAction, Args};

use super::flags::{KUBE_ANNOTATION_PREFIX, NET_CONFIG_PATH};
use super::go;

/// Variables that say which Node this is (contract §4.2); manifests set them from the pod's own fields.
const NODE_NAME: &str = "NODE_NAME";
const POD_NAME: &str = "POD_NAME";
const POD_NAMESPACE: &str = "POD_NAMESPACE";

#[derive(Args)]
#[command(next_help_heading = "Leases from Kubernetes")]
pub(super) struct KubeFlags {
    /// The node's lease is its pod CIDR; the others' are in the Kubernetes API. Needs NODE_NAME, or POD_NAME and
    /// POD_NAMESPACE
    #[arg(long, action = ArgAction::Set, default_value = "false", value_parser = go::boolean)]
    pub(super) kube_subnet_mgr: bool,
    /// API server; without it the kubeconfig's, else that of the pod's service account
    #[arg(long, value_name = "URL")]
    pub(super) kube_api_url: Option<String>,
    /// Server and credentials; without it those of the pod's service account
    #[arg(long, value_name = "FILE")]
    pub(super) kubeconfig_file: Option<String>,
    /// Prefix of the annotations on Nodes
    #[arg(long, value_name = "PREFIX", default_value = KUBE_ANNOTATION_PREFIX)]
    pub(super) kube_annotation_prefix: String,
    /// The network configuration, also of a server with an embedded store: there a folder may hold NAME.json of several
    /// networks, and the default is /etc/flannel/net-conf.json
    #[arg(long, value_name = "FILE", default_value = NET_CONFIG_PATH)]
    pub(super) net_config_path: String,
    /// Set the Node's condition NetworkUnavailable to False once the network works
    #[arg(long, action = ArgAction::Set, default_value = "true", value_parser = go::boolean)]
    pub(super) set_node_network_unavailable: bool,
}

/// How leases are had from Kubernetes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubeSettings {
    pub api_url: Option<String>,
    pub kubeconfig: Option<PathBuf>,
    /// As given: the store checks it.
    pub annotation_prefix: String,
    pub net_config: PathBuf,
    pub set_network_unavailable: bool,
    /// `NODE_NAME`
    pub node: Option<String>,
    /// `POD_NAME` and `POD_NAMESPACE`
    pub pod: Option<(String, String)>,
}

/// The variables of the pod we run in, as far as they are text and not empty.
#[derive(Clone, Debug, Default)]
pub(super) struct PodVariables(BTreeMap<String, String>);

impl PodVariables {
    pub(super) fn of(env: &[(OsString, OsString)]) -> Self {
        let ours = |name: &str| [NODE_NAME, POD_NAME, POD_NAMESPACE].contains(&name);
        let text = |(name, value): &(OsString, OsString)| {
            Some((name.to_str()?.to_owned(), value.to_str()?.to_owned()))
        };
        Self(env.iter().filter_map(text).filter(|(name, value)| ours(name) && !value.is_empty()).collect())
    }

    fn get(&self, name: &str) -> Option<String> {
        self.0.get(name).cloned()
    }
}

impl KubeFlags {
    /// The folder or file of `--net-config-path`, where it was set to something.
    pub(super) fn given_net_config(&self) -> Option<PathBuf> {
        (self.net_config_path != NET_CONFIG_PATH && !self.net_config_path.is_empty())
            .then(|| PathBuf::from(&self.net_config_path))
    }

    /// `None` when leases come from elsewhere; then the flags that have no effect are named, as the operator wrote them.
    pub(super) fn resolve(self, pod: &PodVariables) -> Result<Option<KubeSettings>, Vec<&'static str>> {
        let given = |value: Option<String>| value.filter(|text| !text.is_empty());
        let (api_url, kubeconfig) =
            (given(self.kube_api_url), given(self.kubeconfig_file).map(PathBuf::from));
        if !self.kube_subnet_mgr {
            let idle: Vec<&'static str> = [
                ("kube-api-url", api_url.is_some()),
                ("kubeconfig-file", kubeconfig.is_some()),
                ("kube-annotation-prefix", self.kube_annotation_prefix != KUBE_ANNOTATION_PREFIX),
                ("net-config-path", self.net_config_path != NET_CONFIG_PATH),
                ("set-node-network-unavailable", !self.set_node_network_unavailable),
            ]
            .into_iter()
            .filter_map(|(flag, is_given)| is_given.then_some(flag))
            .collect();
            return if idle.is_empty() { Ok(None) } else { Err(idle) };
        }
        Ok(Some(KubeSettings {
            api_url,
            kubeconfig,
            annotation_prefix: self.kube_annotation_prefix,
            net_config: self.net_config_path.into(),
            set_network_unavailable: self.set_node_network_unavailable,
            node: pod.get(NODE_NAME),
            pod: pod.get(POD_NAME).zip(pod.get(POD_NAMESPACE)),
        }))
    }
}
