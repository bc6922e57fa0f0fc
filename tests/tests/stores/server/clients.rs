//! A server in this process, and its clients.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use async_trait::async_trait;
use flannel_agent::domain::lease::{Lease, LeaseAttrs, LeaseEvent, Subnets};
use flannel_agent::domain::network_name::NetworkName;
use flannel_agent::server::{self, ListenAddress, Listener, ServerTlsFiles};
use flannel_agent::stores::memory::MemoryStore;
use flannel_agent::stores::remote::{RemoteNetworks, RemoteOptions};
use flannel_agent::stores::{LeaseRequest, LeaseStore, NetworkEvent, NetworkStores, StoreError};
use flannel_tests::etcd::Authority;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{CONFIG, asking, node};
use crate::ground::{first, next, next_within, subnets};

/// One network in memory, which counts how often it is watched.
#[derive(Clone)]
struct Counted {
    store: MemoryStore,
    leases: Arc<dyn LeaseStore>,
    watches: Arc<AtomicU32>,
}

impl Counted {
    fn new() -> Self {
        let store = MemoryStore::new(CONFIG);
        Self { leases: store.open(), store, watches: Arc::default() }
    }
}

#[async_trait]
impl LeaseStore for Counted {
    async fn network_config(&self) -> Result<String, StoreError> {
        self.leases.network_config().await
    }

    async fn acquire(&self, request: &LeaseRequest) -> Result<Lease, StoreError> {
        self.leases.acquire(request).await
    }

    async fn rewrite(&self, lease: &Lease, attrs: &LeaseAttrs) -> Result<Lease, StoreError> {
        self.leases.rewrite(lease, attrs).await
    }

    async fn revoke(&self, subnets: Subnets) -> Result<(), StoreError> {
        self.leases.revoke(subnets).await
    }

    fn watch(&self) -> BoxStream<'static, LeaseEvent> {
        self.watches.fetch_add(1, Ordering::SeqCst);
        self.leases.watch()
    }
}

impl NetworkStores for Counted {
    fn name(&self) -> &str {
        "a store that is counted"
    }

    fn network(&self, _: Option<&NetworkName>) -> Arc<dyn LeaseStore> {
        Arc::new(self.clone())
    }

    fn watch_networks(&self) -> BoxStream<'static, NetworkEvent> {
        futures_util::stream::iter([NetworkEvent::Snapshot(Vec::new())])
            .chain(futures_util::stream::pending())
            .boxed()
    }
}

struct Running {
    address: SocketAddr,
    _stop: DropGuard,
}

async fn serve(networks: Arc<dyn NetworkStores>, tls: Option<&ServerTlsFiles>) -> Result<Running> {
    let listener = Listener::bind(&ListenAddress::Tcp("127.0.0.1:0".into()), tls).await?;
    let address = listener.address()?;
    let stop = CancellationToken::new();
    tokio::spawn(server::serve(listener, networks, stop.clone()));
    Ok(Running { address, _stop: stop.drop_guard() })
}

pub(crate) async fn a_thousand_watching_clients_cost_one_watch_of_the_store() -> Result<()> {
    let store = Counted::new();
    let server = serve(Arc::new(store.clone()), None).await?;
    const CLIENTS: u32 = 1000;
    let known = Arc::new(AtomicU32::new(0));
    // A task for each, as each is a process: within one, those that are due wait for all others' turns.
    let clients = (0..CLIENTS).map(|_| {
        let (mut events, known) = (node(&[server.address])?.watch(), known.clone());
        Ok(tokio::spawn(async move {
            first(&mut events).await?;
            known.fetch_add(1, Ordering::SeqCst);
            match next(&mut events).await? {
                LeaseEvent::Added(lease) => Ok(lease.subnets),
                other => bail!("an addition was due, not {other:?}"),
            }
        }))
    });
    let clients: Vec<_> = clients.collect::<Result<_>>()?;
    while known.load(Ordering::SeqCst) < CLIENTS && !clients.iter().any(|client| client.is_finished()) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    store.store.put("10.5.7.0-24", r#"{"PublicIP":"192.0.2.7"}"#, None);
    for client in clients {
        assert_eq!(client.await??, subnets("10.5.7.0-24"));
    }
    assert_eq!(store.watches.load(Ordering::SeqCst), 1);
    Ok(())
}

/// Sends `text` and gives what comes back within three seconds.
async fn say(address: SocketAddr, text: &str) -> Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    stream.write_all(text.as_bytes()).await?;
    let mut answer = vec![0; 4096];
    let count = tokio::time::timeout(Duration::from_secs(3), stream.read(&mut answer)).await??;
    Ok(String::from_utf8_lossy(&answer[..count]).into_owned())
}

pub(crate) async fn bad_requests_are_answered_as_flanneld_answers_them() -> Result<()> {
    let server = serve(Arc::new(Counted::new()), None).await?;
    let lease = r#"{"PublicIP":7}"#;
    for (request, status, body) in [
        ("GET /v1/_/leases/ HTTP/1.1", "404", "404 page not found"),
        ("GET /v2/keys HTTP/1.1", "404", "404 page not found"),
        ("PATCH /v1/_/leases HTTP/1.1", "404", "404 page not found"),
        ("GET /v1/_/leases?next=x HTTP/1.1", "500", "failed to parse cursor"),
        ("GET /v1/_/leases/nonsense HTTP/1.1", "400", "bad subnet"),
        ("DELETE /v1/_/leases/nonsense HTTP/1.1", "400", "failed to parse subnet"),
        ("DELETE /v1/_/reservations/nonsense HTTP/1.1", "400", "bad subnet"),
        ("GET /v1/..%2f/config HTTP/1.1", "400", "network name"),
        ("POST /v1/_/leases HTTP/1.1", "400", "JSON decoding error"),
        ("PUT /v1/_/leases/10.5.1.0-24 HTTP/1.1", "400", "JSON decoding error"),
        ("POST /v1/_/reservations HTTP/1.1", "400", "JSON decoding error"),
    ] {
        let head = format!("{request}\r\nHost: x\r\nContent-Length: {}\r\n\r\n{lease}", lease.len());
        let answer = say(server.address, &head).await?;
        ensure!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {answer}");
        ensure!(answer.contains(body), "{request}: {answer}");
    }
    let answer = say(server.address, "what is this\r\n\r\n").await?;
    ensure!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    let answer = say(server.address, &format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(100_000))).await?;
    ensure!(answer.starts_with("HTTP/1.1 4"), "{answer}");
    let huge = format!("POST /v1/_/leases HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", 1u64 << 40);
    let answer = say(server.address, &format!("{huge}{}", "x".repeat(200_000))).await?;
    ensure!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    Ok(())
}

pub(crate) async fn clients_that_hang_hurt_nobody_else() -> Result<()> {
    let server = serve(Arc::new(Counted::new()), None).await?;
    // Nothing said, half a head, half a body, a poll that is never read.
    let mut hanging = Vec::new();
    for text in [
        "",
        "GET /v1/_/lea",
        "POST /v1/_/leases HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n\r\n{",
        "GET /v1/_/leases?next=1 HTTP/1.1\r\nHost: x\r\n\r\nGET /v1/_/leases HTTP/1.1\r\nHost: x\r\n\r\n",
    ] {
        for _ in 0..50 {
            let mut stream = TcpStream::connect(server.address).await?;
            stream.write_all(text.as_bytes()).await?;
            hanging.push((text, stream));
        }
    }
    let node = node(&[server.address])?;
    let started = Instant::now();
    let lease = node.acquire(&asking("192.0.2.1")).await?;
    node.renew(&lease).await?;
    ensure!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    // Those who say nothing, or not all of it, are let go.
    for (text, stream) in hanging.iter_mut().filter(|(text, _)| !text.starts_with("GET /v1/_/leases?")) {
        let mut answer = Vec::new();
        let ended = tokio::time::timeout(Duration::from_secs(25), stream.read_to_end(&mut answer)).await;
        ensure!(ended.is_ok(), "a client that said {text:?} still has its connection");
    }
    Ok(())
}

pub(crate) async fn clients_without_a_certificate_are_refused() -> Result<()> {
    let (authority, foreign) = (Authority::new("lab")?, Authority::new("foreign")?);
    let own = authority.server("127.0.0.1".parse()?)?;
    let files = ServerTlsFiles { cert_file: own.cert, key_file: own.key, ca_file: Some(authority.ca()) };
    let server = serve(Arc::new(Counted::new()), Some(&files)).await?;
    let open = |ca: std::path::PathBuf, identity: Option<flannel_tests::etcd::Certificate>| {
        let (cert_file, key_file) = identity.map(|pair| (pair.cert, pair.key)).unzip();
        let servers = vec![server.address.to_string()];
        RemoteNetworks::open(&RemoteOptions { servers, ca_file: Some(ca), cert_file, key_file })
    };
    let node = open(authority.ca(), Some(authority.client("node")?))?.network(None);
    node.acquire(&asking("192.0.2.1")).await?;
    for (ca, identity, why) in [
        (authority.ca(), None, "no certificate"),
        (authority.ca(), Some(foreign.client("node")?), "a foreign certificate"),
        (foreign.ca(), Some(authority.client("other")?), "a server nobody vouches for"),
    ] {
        let error = open(ca, identity)?.network(None).network_config().await.unwrap_err();
        ensure!(
            matches!(error, StoreError::Refused { .. } | StoreError::Unreachable { .. }),
            "{why}: {error:?}"
        );
    }
    // Where one side speaks TLS and the other does not, it says what to write.
    let error = crate::server::node(&[server.address])?.network_config().await.unwrap_err().to_string();
    ensure!(error.contains("write https:// in --remote, or give --remote-cafile"), "{error}");
    let plain = serve(Arc::new(Counted::new()), None).await?;
    let servers = vec![plain.address.to_string()];
    let options = RemoteOptions { servers, ca_file: Some(authority.ca()), ..RemoteOptions::default() };
    let error = RemoteNetworks::open(&options)?.network(None).network_config().await.unwrap_err().to_string();
    ensure!(error.contains("write http:// in --remote, or leave --remote-cafile"), "{error}");
    // Plain HTTP gets no answer that looks like one.
    let answer =
        say(server.address, "GET /v1/_/config HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap_or_default();
    ensure!(!answer.starts_with("HTTP/1.1 200"), "{answer}");
    Ok(())
}

pub(crate) async fn a_client_moves_on_when_its_server_dies() -> Result<()> {
    let store = Counted::new();
    let (one, two) =
        (serve(Arc::new(store.clone()), None).await?, serve(Arc::new(store.clone()), None).await?);
    let node = node(&[one.address, two.address])?;
    let mut events = node.watch();
    first(&mut events).await?;
    let lease = node.acquire(&asking("192.0.2.1")).await?;
    assert!(matches!(next(&mut events).await?, LeaseEvent::Added(_)));
    drop(one);
    let renewed = node.renew(&lease).await?;
    assert_eq!(renewed.subnets, lease.subnets);
    // The poll comes back too, with or without saying that it was away.
    store.store.put("10.5.7.0-24", r#"{"PublicIP":"192.0.2.7"}"#, None);
    loop {
        let seen = match next_within(&mut events, Duration::from_secs(10)).await? {
            LeaseEvent::Added(lease) => vec![lease],
            LeaseEvent::Snapshot(leases, _) => leases,
            _ => Vec::new(),
        };
        if seen.iter().any(|lease| lease.subnets == subnets("10.5.7.0-24")) {
            return Ok(());
        }
    }
}
