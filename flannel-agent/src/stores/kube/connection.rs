//! The connection to the API server: credentials, the few calls we make, and errors in words an operator can act on.
//!
//! Every call has a limit in time. Tokens and certificate authorities of a service account are read again by the kube
//! crate when they are rotated.

use std::fmt;
use std::time::Duration;

use futures_util::stream::BoxStream;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, ListParams, Patch, PatchParams, WatchEvent, WatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::ObjectList;
use kube::{Client, Config};
use serde_json::Value;
use tokio::sync::{Mutex, OnceCell};

use super::{KubeOptions, KubeOptionsError};
use crate::stores::StoreError;

/// For an answer to one call. A list of 5,000 nodes takes a busy API server a few seconds.
const CALL_LIMIT: Duration = Duration::from_secs(20);
/// For a connection.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// Nodes per page of a list: as client-go has it.
const PAGE: u32 = 500;

/// The API server notes who changed what by the part before the slash.
const USER_AGENT: &str = concat!("flannel-agent/", env!("CARGO_PKG_VERSION"));

/// How we know which Node we are on (contract §4.2).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeIdentity {
    /// `NODE_NAME`
    pub node: Option<String>,
    /// `POD_NAME` and `POD_NAMESPACE`: the pod's `spec.nodeName` is asked for.
    pub pod: Option<(String, String)>,
}

pub(super) struct Connection {
    client: Client,
    name: String,
    identity: NodeIdentity,
    node: OnceCell<String>,
    /// The newest version we know to exist: a list that is older would not show what we wrote.
    newest: Mutex<Option<String>>,
}

impl Connection {
    pub(super) async fn open(options: &KubeOptions) -> Result<Self, KubeOptionsError> {
        if options.node.node.is_none() && options.node.pod.is_none() {
            return Err(KubeOptionsError::NoNode);
        }
        let mut config = config(options).await.map_err(KubeOptionsError::Connection)?;
        config.connect_timeout = Some(CONNECT_LIMIT);
        config.headers.push((http::header::USER_AGENT, http::HeaderValue::from_static(USER_AGENT)));
        let name = format!("Kubernetes at {}", place(&config.cluster_url));
        let client =
            Client::try_from(config).map_err(|error| KubeOptionsError::Connection(describe(&error)))?;
        Ok(Self {
            client,
            name,
            identity: options.node.clone(),
            node: OnceCell::new(),
            newest: Mutex::new(None),
        })
    }

    /// Our own Node's name, asked for once if it must be.
    pub(super) async fn node_name(&self) -> Result<&str, StoreError> {
        let name = self.node.get_or_try_init(|| async {
            if let Some(name) = &self.identity.node {
                return Ok(name.clone());
            }
            let Some((pod, namespace)) = &self.identity.pod else {
                return Err(self.refused(KubeOptionsError::NoNode.to_string()));
            };
            let pods: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
            let found = self
                .limited("get", &format!("pod {namespace}/{pod}"), pods.get_opt(pod))
                .await?
                .ok_or_else(|| {
                    self.not_yet(format!(
                        "there is no pod {namespace}/{pod}, as POD_NAMESPACE and POD_NAME say"
                    ))
                })?;
            found
                .spec
                .and_then(|spec| spec.node_name)
                .ok_or_else(|| self.not_yet(format!("pod {namespace}/{pod} has no spec.nodeName yet")))
        });
        name.await.map(String::as_str)
    }

    pub(super) async fn get_node(&self, name: &str) -> Result<Option<Node>, StoreError> {
        let node = self.limited("get", &format!("node {name}"), self.nodes().get_opt(name)).await?;
        self.remember(node.as_ref()).await;
        Ok(node)
    }

    /// Changes our own Node's annotations or conditions, and nothing else.
    pub(super) async fn patch_status(&self, patch: &Value) -> Result<(), StoreError> {
        let name = self.node_name().await?;
        let nodes = self.nodes();
        let (parameters, patch) = (PatchParams::default(), Patch::Strategic(patch));
        let call = nodes.patch_status(name, &parameters, &patch);
        let node = self.limited("patch", &format!("nodes/status of {name}"), call).await?;
        self.remember(Some(&node)).await;
        Ok(())
    }

    async fn remember(&self, node: Option<&Node>) {
        if let Some(version) = node.and_then(|node| node.metadata.resource_version.clone()) {
            *self.newest.lock().await = Some(version);
        }
    }

    /// Every Node, and the version to watch from. The first time it may come from the API server's cache, as long as it
    /// is not older than what we have seen: a thousand agents that start together must not all read from its etcd.
    pub(super) async fn list(&self, from: From) -> Result<(Vec<Node>, String), StoreError> {
        let nodes = self.nodes();
        let first = match from {
            From::Cache => {
                let newest = self.newest.lock().await.clone();
                ListParams::default().at(newest.as_deref().unwrap_or("0"))
            }
            From::Store => ListParams::default().limit(PAGE),
        };
        let mut parameters = first;
        let mut all = Vec::new();
        loop {
            let page: ObjectList<Node> = self.limited("list", "nodes", nodes.list(&parameters)).await?;
            all.extend(page.items);
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => parameters = ListParams::default().limit(PAGE).continue_token(&token),
                None => return Ok((all, page.metadata.resource_version.unwrap_or_default())),
            }
        }
    }

    /// Changes behind `version`, for `seconds`.
    pub(super) async fn watch(
        &self,
        version: &str,
        seconds: u32,
    ) -> Result<BoxStream<'static, kube::Result<WatchEvent<Node>>>, StoreError> {
        let nodes = self.nodes();
        let parameters = WatchParams { bookmarks: true, timeout: Some(seconds), ..WatchParams::default() };
        let stream = self.limited("watch", "nodes", nodes.watch(&parameters, version)).await?;
        Ok(Box::pin(stream))
    }

    fn nodes(&self) -> Api<Node> {
        Api::all(self.client.clone())
    }

    async fn limited<T>(
        &self,
        verb: &str,
        what: &str,
        call: impl Future<Output = kube::Result<T>>,
    ) -> Result<T, StoreError> {
        match tokio::time::timeout(CALL_LIMIT, call).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(self.failed(verb, what, &error)),
            Err(_) => Err(StoreError::Unreachable {
                store: self.name.clone(),
                reason: format!("no answer to {verb} {what} within {} s", CALL_LIMIT.as_secs()),
            }),
        }
    }

    fn failed(&self, verb: &str, what: &str, error: &kube::Error) -> StoreError {
        let reason = format!("{verb} {what}: {}", describe(error));
        match error {
            // Not for good: an API server that has just started knows no roles for a moment, and a role may be granted
            // any time.
            kube::Error::Api(status) if status.code == 403 => {
                self.not_yet(format!("{reason}; the service account needs flannel's ClusterRole"))
            }
            kube::Error::Api(status) if status.code == 401 => {
                self.not_yet(format!("{reason}; the token or certificate is not accepted"))
            }
            _ => StoreError::Unreachable { store: self.name.clone(), reason },
        }
    }

    pub(super) fn refused(&self, reason: String) -> StoreError {
        StoreError::Refused { store: self.name.clone(), reason }
    }

    pub(super) fn not_yet(&self, reason: String) -> StoreError {
        StoreError::NotYet { store: self.name.clone(), reason }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("name", &self.name).finish_non_exhaustive()
    }
}

/// The API server, for messages: a kubeconfig's URL may hold a password.
fn place(url: &http::Uri) -> String {
    let authority = url.authority().map_or("", http::uri::Authority::as_str);
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    format!("{}://{host}{}", url.scheme_str().unwrap_or("https"), url.path())
}

/// Where a list may come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum From {
    /// The API server's memory.
    Cache,
    /// Its etcd: the newest there is.
    Store,
}

async fn config(options: &KubeOptions) -> Result<Config, String> {
    let url = options.api_url.as_deref().map(|url| {
        url.parse::<http::Uri>()
            .ok()
            .filter(|url| matches!(url.scheme_str(), Some("http" | "https")) && url.host().is_some())
            .ok_or_else(|| {
                format!("--kube-api-url {url} is no URL; it should look like https://10.0.0.1:6443")
            })
    });
    let url = url.transpose()?;
    match (&options.kubeconfig, url) {
        (Some(path), url) => {
            let place = || format!("--kubeconfig-file {}", path.display());
            let file = Kubeconfig::read_from(path).map_err(|error| format!("{}: {}", place(), describe(&error)))?;
            let mut config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
                .await
                .map_err(|error| format!("{}: {}", place(), describe(&error)))?;
            if let Some(url) = url {
                config.cluster_url = url;
            }
            Ok(config)
        }
        (None, Some(url)) => Ok(Config::new(url)),
        (None, None) => Config::incluster().map_err(|error| {
            format!(
                "neither --kubeconfig-file nor --kube-api-url is given, and this is no pod with a service account: {}",
                describe(&error)
            )
        }),
    }
}

/// An error with its causes, each said once.
pub(super) fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = match error.downcast_ref::<kube::Error>() {
        Some(kube::Error::Api(status)) => {
            return format!("{} ({} {})", status.message, status.code, status.reason);
        }
        _ => error.to_string(),
    };
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_password_in_a_kubeconfigs_url_is_not_printed() {
        for (url, wanted) in [
            ("https://root:s3cret@10.0.0.1:6443", "https://10.0.0.1:6443/"),
            ("https://[fd00::1]:6443/clusters/a", "https://[fd00::1]:6443/clusters/a"),
        ] {
            assert_eq!(place(&url.parse().unwrap()), wanted);
        }
    }
}
