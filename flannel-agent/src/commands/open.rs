//! From settings to stores: the one match over kinds of stores.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::cli::{ClientCertificate, EtcdSettings, KubeSettings, RemoteSettings, StoreSettings};
use crate::stores::embedded::{Embedded, EmbeddedError};
use crate::stores::etcd::{self, EtcdApi, EtcdOptions, EtcdOptionsError};
use crate::stores::kube::{KubeOptions, KubeOptionsError, KubeStore, NodeIdentity};
use crate::stores::remote::{RemoteNetworks, RemoteOptions, RemoteOptionsError};
use crate::stores::{LeaseStore, NetworkStores, RegistryNetworks};

/// Why a store can't be opened: settings that can't be right, or a file that can't be used. Servers may be down.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Etcd(#[from] EtcdOptionsError),
    #[error(transparent)]
    Kube(#[from] KubeOptionsError),
    #[error(transparent)]
    Remote(#[from] RemoteOptionsError),
    #[error("--store: {0}")]
    Embedded(#[from] EmbeddedError),
    #[error("Kubernetes keeps the leases of one network: leave out what names others")]
    OneNetworkOnly,
    #[error("the flags name another store than etcd: leave out -remote, -listen and -kube-subnet-mgr")]
    NotEtcd,
}

/// The leases of the network without a name.
pub(super) async fn store(settings: &StoreSettings) -> Result<Arc<dyn LeaseStore>, OpenError> {
    match settings {
        StoreSettings::Kube(kube) => Ok(Arc::new(KubeStore::connect(&kube_options(kube)).await?)),
        others => Ok(networks(others)?.network(None)),
    }
}

/// All networks of a store that has several.
pub(super) fn networks(settings: &StoreSettings) -> Result<Arc<dyn NetworkStores>, OpenError> {
    Ok(match settings {
        StoreSettings::Etcd(etcd) => Arc::new(etcd::open(&etcd_options(etcd))?),
        StoreSettings::Remote(remote) => Arc::new(RemoteNetworks::open(&remote_options(remote))?),
        StoreSettings::Embedded(embedded) => Arc::new(Embedded::open(&embedded.path)?.networks()),
        StoreSettings::Kube(_) => return Err(OpenError::OneNetworkOnly),
    })
}

/// etcd, where the flags are about it. `otherwise` is taken where they leave the keyspace open.
pub(super) fn etcd(settings: &StoreSettings, otherwise: EtcdApi) -> Result<RegistryNetworks, OpenError> {
    let StoreSettings::Etcd(etcd) = settings else { return Err(OpenError::NotEtcd) };
    let mut options = etcd_options(etcd);
    if options.api == EtcdApi::Auto {
        options.api = otherwise;
    }
    Ok(etcd::open(&options)?)
}

/// Both keyspaces of an etcd.
pub(super) fn keyspaces(settings: &EtcdSettings) -> Result<etcd::Mirror, OpenError> {
    Ok(etcd::keyspaces(&etcd_options(settings))?)
}

/// The file of a server that does not run, made where there is none.
pub(super) fn embedded(path: &Path) -> Result<RegistryNetworks, OpenError> {
    Ok(Embedded::open(path)?.networks())
}

fn kube_options(settings: &KubeSettings) -> KubeOptions {
    KubeOptions {
        api_url: settings.api_url.clone(),
        kubeconfig: settings.kubeconfig.clone(),
        annotation_prefix: settings.annotation_prefix.clone(),
        net_config: settings.net_config.clone(),
        set_network_unavailable: settings.set_network_unavailable,
        node: NodeIdentity { node: settings.node.clone(), pod: settings.pod.clone() },
    }
}

fn etcd_options(settings: &EtcdSettings) -> EtcdOptions {
    let (cert_file, key_file) = files(settings.identity.as_ref());
    EtcdOptions {
        endpoints: settings.endpoints.clone(),
        prefix: settings.prefix.clone(),
        cert_file,
        key_file,
        ca_file: settings.ca_file.clone(),
        username: settings.login.as_ref().map(|login| login.username.clone()),
        password: settings.login.as_ref().map(|login| login.password.expose().to_owned()),
        api: settings.api,
        ..EtcdOptions::default()
    }
}

fn remote_options(settings: &RemoteSettings) -> RemoteOptions {
    let (cert_file, key_file) = files(settings.identity.as_ref());
    RemoteOptions {
        servers: settings.servers.clone(),
        ca_file: settings.ca_file.clone(),
        cert_file,
        key_file,
    }
}

fn files(identity: Option<&ClientCertificate>) -> (Option<PathBuf>, Option<PathBuf>) {
    (identity.map(|identity| identity.cert_file.clone()), identity.map(|identity| identity.key_file.clone()))
}
