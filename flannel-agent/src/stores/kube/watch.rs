//! Follows all Nodes for as long as the agent lives.
//!
//! ```text
//!   closed ── list (from the cache) ──► listed: Snapshot ── watch behind its version ──► open
//!     ▲  ▲        failed: Interrupted once, wait longer                                   │ Node → events, bookmark
//!     │  └─────────────── 410: the version is too old; list from the store ───────────────┤
//!     │          ended, as every watch does after minutes, or silent: watch on, quietly ◄──┤
//!     └── broken: Interrupted once; watch on from the same version, then a Snapshot ◄─────┘
//! ```
//!
//! An API server that comes back after an outage finds all agents waiting at random for up to 30 s, and those that had
//! not missed much ask for what changed, not for everything.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::jiff::Timestamp;
use kube::api::WatchEvent;
use rand::Rng as _;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::annotations::Annotations;
use super::connection::{Connection, From, describe};
use super::nodes::{self, Families, Nodes};
use crate::domain::config::NetworkConfig;
use crate::domain::lease::LeaseEvent;
use crate::stores::StoreError;

const FIRST_WAIT: Duration = Duration::from_millis(250);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// A watch that lived this long was a good one: the next failure is a new one.
const PROVEN: Duration = Duration::from_secs(10);
/// One that ended sooner failed, however it ended: whoever stands between must not make us ask without pause.
const LEAST: Duration = Duration::from_secs(1);
/// The API server ends a watch after this many seconds, a different number each time.
const WATCH_SECONDS: std::ops::Range<u32> = 240..360;
/// A watch that should have ended and did not is dead.
const GRACE: Duration = Duration::from_secs(10);
/// The API server's cache sends a bookmark about once a minute (apiserver's `bookmarkFrequency`, with a quarter of it at
/// random). It need not, so a watch that is silent for longer is no failure, but is opened anew: what stands between may
/// have lost an answer, or the connection, and nobody would say so before the watch's end.
const SILENCE: Duration = Duration::from_secs(90);
/// Events that wait for a busy agent.
const QUEUE: usize = 64;

/// What following needs.
pub(super) struct Ground {
    pub(super) connection: Arc<Connection>,
    pub(super) annotations: Annotations,
    pub(super) net_config: PathBuf,
    pub(super) up: Arc<NetworkUp>,
}

/// Whether our Node is to say that its network works, and whether somebody is about to make it say so.
#[derive(Debug, Default)]
pub(super) struct NetworkUp {
    wanted: AtomicBool,
    telling: AtomicBool,
}

/// Events until the stream is dropped.
pub(super) fn follow(ground: Ground) -> BoxStream<'static, LeaseEvent> {
    let (events, receiver) = mpsc::channel(QUEUE);
    let task = Ended(tokio::spawn(async move {
        let mut follower = Follower { ground, events, failures: 0, away: false };
        // It only ends when nobody listens any more.
        let _ = follower.run().await;
    }));
    stream::unfold((receiver, task), |(mut receiver, task)| async move {
        Some((receiver.recv().await?, (receiver, task)))
    })
    .boxed()
}

/// A task that ends with its stream.
struct Ended(JoinHandle<()>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Follower {
    ground: Ground,
    events: mpsc::Sender<LeaseEvent>,
    failures: u32,
    /// `Interrupted` was said and no snapshot since.
    away: bool,
}

/// Nobody listens any more.
struct Unheard;

/// How a watch ended.
enum WatchEnd {
    /// As it should, or for a reason that a new watch from the same version can cure.
    Over(Option<String>),
    /// Its version is too old: 410.
    Expired,
}

impl Follower {
    async fn run(&mut self) -> Result<(), Unheard> {
        let mut from = From::Cache;
        loop {
            let (mut nodes, mut version) = match self.begin(from).await {
                Ok(begun) => begun,
                Err(error) => {
                    // The version we asked for may lie in the future of a restored store.
                    from = From::Store;
                    self.interrupted(error.to_string()).await?;
                    continue;
                }
            };
            self.tell(nodes.snapshot()).await?;
            loop {
                let seconds = rand::rng().random_range(WATCH_SECONDS);
                let opened = Instant::now();
                let end = match self.ground.connection.watch(&version, seconds).await {
                    Ok(changes) => {
                        if self.away {
                            self.tell(nodes.snapshot()).await?;
                        }
                        let limit = Duration::from_secs(seconds.into()) + GRACE;
                        self.take(changes, &mut nodes, &mut version, limit).await?
                    }
                    Err(error) => WatchEnd::Over(Some(error.to_string())),
                };
                if opened.elapsed() >= PROVEN {
                    self.failures = 0;
                }
                let lasted = opened.elapsed();
                match end {
                    WatchEnd::Over(None) if lasted >= LEAST => {}
                    WatchEnd::Over(None) => {
                        let reason = format!("the watch of nodes ended after {} ms", lasted.as_millis());
                        self.interrupted(reason).await?;
                    }
                    WatchEnd::Over(Some(reason)) => self.interrupted(reason).await?,
                    WatchEnd::Expired => {
                        // The list that follows costs more than a watch.
                        if lasted < LEAST {
                            self.pause().await?;
                        }
                        from = From::Store;
                        break;
                    }
                }
            }
        }
    }

    async fn begin(&mut self, from: From) -> Result<(Nodes, String), StoreError> {
        let own = self.ground.connection.node_name().await?.to_owned();
        let families = self.families().await;
        let (list, version) = self.ground.connection.list(from).await?;
        let mut nodes = Nodes::new(&own, self.ground.annotations.clone(), families);
        // Said by the caller.
        let _ = nodes.replace(&list);
        for node in &list {
            self.look_at_own(node, &own);
        }
        Ok((nodes, version))
    }

    /// As the configuration says now; the agent does not run without one.
    async fn families(&self) -> Families {
        let text = tokio::fs::read_to_string(&self.ground.net_config).await.unwrap_or_default();
        match NetworkConfig::parse(&super::without_what_kubernetes_decides(text)) {
            Ok(config) => super::families(&config),
            Err(_) => Families { v4: true, v6: false },
        }
    }

    /// Passes changes on until the watch ends or `limit` is over.
    async fn take(
        &mut self,
        mut changes: BoxStream<'static, kube::Result<WatchEvent<Node>>>,
        nodes: &mut Nodes,
        version: &mut String,
        limit: Duration,
    ) -> Result<WatchEnd, Unheard> {
        let end = Instant::now() + limit;
        loop {
            let limit = end.min(Instant::now() + SILENCE);
            let change = tokio::select! {
                change = tokio::time::timeout_at(limit, changes.next()) => change,
                () = self.events.closed() => return Err(Unheard),
            };
            let told = match change {
                Err(_) if limit < end => return Ok(WatchEnd::Over(None)),
                Err(_) => return Ok(WatchEnd::Over(Some("the watch of nodes fell silent".to_owned()))),
                Ok(None) => return Ok(WatchEnd::Over(None)),
                Ok(Some(Ok(WatchEvent::Added(node) | WatchEvent::Modified(node)))) => {
                    advance(version, &node);
                    self.look_at_own(&node, nodes.own());
                    nodes.put(&node)
                }
                Ok(Some(Ok(WatchEvent::Deleted(node)))) => {
                    advance(version, &node);
                    nodes.remove(&node)
                }
                Ok(Some(Ok(WatchEvent::Bookmark(bookmark)))) => {
                    *version = bookmark.metadata.resource_version;
                    Vec::new()
                }
                Ok(Some(Ok(WatchEvent::Error(status)))) if status.code == 410 => {
                    return Ok(WatchEnd::Expired);
                }
                Ok(Some(Ok(WatchEvent::Error(status)))) => {
                    let reason = format!("the watch of nodes: {} ({})", status.message, status.code);
                    return Ok(WatchEnd::Over(Some(reason)));
                }
                Ok(Some(Err(kube::Error::Api(status)))) if status.code == 410 => {
                    return Ok(WatchEnd::Expired);
                }
                Ok(Some(Err(error))) => {
                    return Ok(WatchEnd::Over(Some(format!("the watch of nodes: {}", describe(&error)))));
                }
            };
            for event in told {
                self.tell(event).await?;
            }
        }
    }

    /// Another controller may set the condition again, a cloud's when it adopts the Node.
    fn look_at_own(&self, node: &Node, own: &str) {
        if nodes::name(node) == own
            && self.ground.up.wanted.load(Ordering::Relaxed)
            && !nodes::says_network_is_up(node)
        {
            self.ground.up.tell(&self.ground.connection);
        }
    }

    async fn tell(&mut self, event: LeaseEvent) -> Result<(), Unheard> {
        if matches!(event, LeaseEvent::Snapshot(..)) {
            self.away = false;
        }
        self.events.send(event).await.map_err(|_| Unheard)
    }

    /// Says so once, and waits longer each time.
    async fn interrupted(&mut self, reason: String) -> Result<(), Unheard> {
        if !std::mem::replace(&mut self.away, true) {
            self.tell(LeaseEvent::Interrupted(reason)).await?;
        } else {
            tracing::debug!("{reason}");
        }
        self.pause().await
    }

    async fn pause(&mut self) -> Result<(), Unheard> {
        self.failures = self.failures.saturating_add(1);
        tokio::select! {
            () = tokio::time::sleep(wait(self.failures)) => Ok(()),
            () = self.events.closed() => Err(Unheard),
        }
    }
}

fn advance(version: &mut String, node: &Node) {
    if let Some(newer) = &node.metadata.resource_version {
        version.clone_from(newer);
    }
}

impl NetworkUp {
    /// From now on the Node is to say it.
    pub(super) fn want(self: &Arc<Self>, connection: &Arc<Connection>) {
        if !self.wanted.swap(true, Ordering::Relaxed) {
            self.tell(connection);
        }
    }

    /// Sets our Node's condition NetworkUnavailable to False, unless it is; tries until it could be done. flanneld tries
    /// once, and pods wait for ever when the API server was away at that moment.
    fn tell(self: &Arc<Self>, connection: &Arc<Connection>) {
        if self.telling.swap(true, Ordering::Relaxed) {
            return;
        }
        let (up, connection) = (Arc::clone(self), Arc::clone(connection));
        tokio::spawn(async move {
            let mut failures = 0_u32;
            while let Err(error) = try_to_say(&connection).await {
                if failures == 0 {
                    tracing::warn!(
                        "the Node can't be told yet that its network works, trying again: {error}"
                    );
                }
                failures = failures.saturating_add(1);
                tokio::time::sleep(wait(failures)).await;
            }
            up.telling.store(false, Ordering::Relaxed);
        });
    }
}

/// At random below a bound that doubles.
fn wait(failures: u32) -> Duration {
    let longest = LONGEST_WAIT.min(FIRST_WAIT * 2_u32.saturating_pow(failures.saturating_sub(1).min(10)));
    longest.mul_f64(rand::rng().random_range(0.25..=1.0))
}

async fn try_to_say(connection: &Connection) -> Result<(), StoreError> {
    let name = connection.node_name().await?;
    if let Some(node) = connection.get_node(name).await?
        && nodes::says_network_is_up(&node)
    {
        return Ok(());
    }
    let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    connection.patch_status(&nodes::network_is_up(&now)).await?;
    tracing::info!("Node {name}: NetworkUnavailable is False, reason FlannelIsUp");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::super::{ANNOTATION_PREFIX, KubeOptions, KubeStore, NodeIdentity};
    use super::*;
    use crate::stores::LeaseStore as _;

    /// Lists no Nodes, and answers every watch with `watch`. Counts the requests.
    async fn server(watch: &'static str) -> (String, Arc<AtomicU32>) {
        const LIST: &str =
            r#"{"kind":"NodeList","apiVersion":"v1","metadata":{"resourceVersion":"7"},"items":[]}"#;
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", socket.local_addr().unwrap());
        let requests = Arc::new(AtomicU32::new(0));
        let count = requests.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = socket.accept().await {
                let count = count.clone();
                tokio::spawn(async move {
                    let mut head = vec![0; 8192];
                    while let Ok(length @ 1..) = stream.read(&mut head).await {
                        count.fetch_add(1, Ordering::Relaxed);
                        let is_watch = String::from_utf8_lossy(&head[..length]).contains("watch=true");
                        let body = if is_watch { watch } else { LIST };
                        let answer = format!(
                            "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
                            body.len()
                        );
                        let _ = stream.write_all(answer.as_bytes()).await;
                    }
                });
            }
        });
        (url, requests)
    }

    /// A load balancer with a limit of no time, a store that has lost its history.
    #[tokio::test]
    async fn a_server_that_ends_every_watch_at_once_is_not_asked_without_pause() {
        const EXPIRED: &str = r#"{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","status":"Failure","message":"too old","reason":"Expired","code":410}}"#;
        let _ = rustls::crypto::ring::default_provider().install_default();
        for watch in ["", EXPIRED] {
            let (url, requests) = server(watch).await;
            let options = KubeOptions {
                api_url: Some(url),
                kubeconfig: None,
                annotation_prefix: ANNOTATION_PREFIX.into(),
                net_config: "/nonexistent/net-conf.json".into(),
                set_network_unavailable: false,
                node: NodeIdentity { node: Some("own".into()), pod: None },
            };
            let store = KubeStore::connect(&options).await.unwrap();
            let mut events = store.watch();
            let first = events.next().await;
            assert!(matches!(first, Some(LeaseEvent::Snapshot(..))), "{watch}: {first:?}");
            let heard = tokio::time::timeout(Duration::from_secs(2), async {
                while let Some(event) = events.next().await {
                    assert!(!matches!(event, LeaseEvent::Removed(_)), "{event:?}");
                }
            });
            assert!(heard.await.is_err(), "the stream ended");
            // A list and a watch per attempt, with pauses of 62 ms, 125, 250 and so on between at least.
            let asked = requests.load(Ordering::Relaxed);
            assert!((3..=16).contains(&asked), "{watch}: {asked} requests in 2 s");
        }
    }
}
