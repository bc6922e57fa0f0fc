//! What only a server can get wrong: many clients, bad ones, TLS, its own death.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use async_trait::async_trait;
use flannel_agent::domain::lease::{Lease, LeaseAttrs, LeaseEvent, Reservation};
use flannel_agent::domain::network_name::NetworkName;
use flannel_agent::server::{self, ListenAddress, Listener, ServerTlsFiles};
use flannel_agent::stores::embedded::Embedded;
use flannel_agent::stores::memory::MemoryStore;
use flannel_agent::stores::remote::{RemoteNetworks, RemoteOptions};
use flannel_agent::stores::{LeaseRequest, LeaseStore, NetworkEvent, NetworkStores, StoreError};
use flannel_tests::etcd::{Authority, free_port};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::ground::{first, next, next_within, request, subnets};

const CONFIG: &str = r#"{"Network":"10.5.0.0/16"}"#;

/// One network in memory, which counts how often it is watched.
#[derive(Clone)]
struct Counted {
    store: MemoryStore,
    watches: Arc<AtomicU32>,
}

impl Counted {
    fn new() -> Self {
        Self { store: MemoryStore::new(CONFIG), watches: Arc::default() }
    }
}

#[async_trait]
impl LeaseStore for Counted {
    async fn network_config(&self) -> Result<String, StoreError> {
        self.store.network_config().await
    }

    async fn acquire(&self, request: &LeaseRequest) -> Result<Lease, StoreError> {
        self.store.acquire(request).await
    }

    async fn rewrite(&self, lease: &Lease, attrs: &LeaseAttrs) -> Result<Lease, StoreError> {
        self.store.rewrite(lease, attrs).await
    }

    fn watch(&self) -> BoxStream<'static, LeaseEvent> {
        self.watches.fetch_add(1, Ordering::SeqCst);
        self.store.watch()
    }
}

impl NetworkStores for Counted {
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

fn node(servers: &[SocketAddr]) -> Result<Arc<dyn LeaseStore>> {
    let servers = servers.iter().map(ToString::to_string).collect();
    Ok(RemoteNetworks::open(&RemoteOptions { servers, ..RemoteOptions::default() })?.network(None))
}

fn asking(ip: &str) -> LeaseRequest {
    request(&crate::ground::network("10.5.255.0"), ip)
}

pub(crate) async fn a_thousand_watching_clients_cost_one_watch_of_the_store() -> Result<()> {
    let store = Counted::new();
    let server = serve(Arc::new(store.clone()), None).await?;
    let mut clients: Vec<_> =
        (0..1000).map(|_| Ok(node(&[server.address])?.watch())).collect::<Result<_>>()?;
    let known = clients.iter_mut().map(|events| async { first(events).await.map(drop) });
    futures_util::future::try_join_all(known).await?;
    store.store.put("10.5.7.0-24", r#"{"PublicIP":"192.0.2.7"}"#, None);
    let told = clients.iter_mut().map(|events| async {
        match next(events).await? {
            LeaseEvent::Added(lease) => Ok(lease.subnets),
            other => bail!("an addition was due, not {other:?}"),
        }
    });
    for told in futures_util::future::try_join_all(told).await? {
        assert_eq!(told, subnets("10.5.7.0-24"));
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

pub(crate) async fn a_server_that_is_away_is_one_interruption_and_then_a_snapshot() -> Result<()> {
    let files = tempfile::tempdir()?;
    let mut process = Process::start(&files).await?;
    let node = node(&[process.address])?;
    let mut events = node.watch();
    first(&mut events).await?;
    process.kill()?;
    assert!(matches!(next(&mut events).await?, LeaseEvent::Interrupted(_)));
    let quiet = tokio::time::timeout(Duration::from_secs(2), next(&mut events)).await;
    assert!(quiet.is_err(), "{quiet:?}");
    process.restart().await?;
    first(&mut events).await?;
    Ok(())
}

/// The real binary, serving from a file.
struct Process {
    address: SocketAddr,
    files: std::path::PathBuf,
    child: Option<Child>,
}

impl Process {
    async fn start(files: &TempDir) -> Result<Self> {
        std::fs::write(files.path().join("net-conf.json"), CONFIG)?;
        let address = free_port("127.0.0.1".parse()?)?;
        let mut process = Self { address, files: files.path().to_owned(), child: None };
        process.restart().await?;
        Ok(process)
    }

    async fn restart(&mut self) -> Result<()> {
        self.kill()?;
        let log = std::fs::File::options().create(true).append(true).open(self.files.join("server.log"))?;
        let child = Command::new(flannel_tests::agent_binary()?)
            .arg(format!("--listen={}", self.address))
            .arg(format!("--store=embedded:{}", self.files.join("leases.redb").display()))
            .arg(format!("--net-config-path={}", self.files.join("net-conf.json").display()))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        self.child = Some(child);
        let started = Instant::now();
        while TcpStream::connect(self.address).await.is_err() {
            let log = || std::fs::read_to_string(self.files.join("server.log")).unwrap_or_default();
            ensure!(started.elapsed() < Duration::from_secs(20), "the server does not listen: {}", log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// SIGKILL.
    fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// Nodes come and operators reserve while the server is killed at random moments. Whatever it said yes to is there
/// afterwards, and no subnet has two owners.
pub(crate) async fn nothing_acknowledged_is_lost_in_twenty_kills() -> Result<()> {
    const KILLS: u32 = 20;
    let files = tempfile::tempdir()?;
    let mut process = Process::start(&files).await?;
    let next_ip = Arc::new(AtomicU32::new(1));
    let mut acknowledged: BTreeMap<_, _> = BTreeMap::new();
    for kill in 0..KILLS {
        let writers = (0..4).map(|writer| {
            let (address, next_ip) = (process.address, next_ip.clone());
            tokio::spawn(async move {
                let node = node(&[address])?;
                let mut done = Vec::new();
                loop {
                    let number = next_ip.fetch_add(1, Ordering::SeqCst);
                    let ip = std::net::Ipv4Addr::from(0x0a63_0000 + number);
                    let Ok(lease) = node.acquire(&asking(&ip.to_string())).await else { return Ok(done) };
                    done.push((lease.subnets, ip, false));
                    if writer == 0 {
                        let wanted = Reservation { subnets: lease.subnets, public_ip: ip };
                        if node.reserve(&wanted).await.is_err() {
                            return Ok(done);
                        }
                        done.push((lease.subnets, ip, true));
                    }
                    if done.len() >= 3 {
                        return Ok::<_, anyhow::Error>(done);
                    }
                }
            })
        });
        let writers: Vec<_> = writers.collect();
        // From before the first write to after the last.
        tokio::time::sleep(Duration::from_millis(u64::from(kill) * 5)).await;
        process.kill()?;
        for writer in writers {
            for (subnets, ip, reserved) in writer.await?? {
                let before: Option<(std::net::Ipv4Addr, bool)> = acknowledged.insert(subnets, (ip, reserved));
                ensure!(
                    before.is_none_or(|(owner, _)| owner == ip),
                    "{subnets} was given to {before:?} and {ip}"
                );
            }
        }
        process.restart().await?;
        let node = node(&[process.address])?;
        let (leases, unreadable) = first(&mut node.watch()).await?;
        ensure!(unreadable.is_empty(), "{unreadable:?}");
        for (subnets, (ip, reserved)) in &acknowledged {
            let lease = leases.iter().find(|lease| lease.subnets == *subnets);
            let lease = lease.with_context(|| format!("{subnets} of {ip} is lost after kill {kill}"))?;
            assert_eq!(lease.attrs.public_ip, *ip);
            ensure!(!reserved || lease.expires.is_none(), "{subnets} is not reserved any more");
        }
    }
    ensure!(acknowledged.len() > 20, "only {} leases were given out", acknowledged.len());
    Ok(())
}

pub(crate) async fn a_file_has_one_server_at_a_time() -> Result<()> {
    let files = tempfile::tempdir()?;
    let path = files.path().join("leases.redb");
    let first = Embedded::open(&path)?;
    let error = Embedded::open(&path).err().context("a second one must not open it")?.to_string();
    ensure!(error.contains("is in use by another process"), "{error}");
    drop(first);
    std::fs::write(files.path().join("other"), "no database")?;
    let error = Embedded::open(&files.path().join("other")).err().context("an error")?.to_string();
    ensure!(error.contains("can't open") || error.contains("can't read"), "{error}");
    Ok(())
}

/// A node that could not renew while the server was away finds its lease, even when its time had come.
pub(crate) async fn no_lease_ends_right_after_a_start() -> Result<()> {
    let files = tempfile::tempdir()?;
    let path = files.path().join("leases.redb");
    let store = Embedded::open(&path)?;
    store.configure(None, Some(CONFIG)).await?;
    let value = br#"{"PublicIP":"192.0.2.7"}"#;
    store.put("subnets/10.5.7.0-24", value, Some(Duration::from_millis(300))).await?;
    store.put("subnets/10.5.8.0-24", value, None).await?;
    drop(store);
    tokio::time::sleep(Duration::from_millis(400)).await;
    let store = reopen(&path).await?;
    let (leases, _) = first(&mut store.networks().network(None).watch()).await?;
    let left = leases.iter().map(|lease| lease.expires.map(|end| end - Instant::now()));
    let left: Vec<_> = left.collect();
    ensure!(left.len() == 2, "{left:?}");
    ensure!(left.iter().flatten().all(|left| (290..=300).contains(&left.as_secs())), "{left:?}");
    ensure!(left.iter().any(Option::is_none), "a reservation has no end");
    Ok(())
}

/// The task that ends leases may have the file for a moment longer.
async fn reopen(path: &std::path::Path) -> Result<Embedded> {
    let started = Instant::now();
    loop {
        match Embedded::open(path) {
            Ok(store) => return Ok(store),
            Err(error) if started.elapsed() > Duration::from_secs(5) => return Err(error.into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

/// As a systemd socket unit hands it over (sd_listen_fds(3)).
pub(crate) async fn a_socket_of_systemd_is_taken_over() -> Result<()> {
    use std::os::fd::AsRawFd as _;
    use std::os::unix::process::CommandExt as _;
    let files = tempfile::tempdir()?;
    std::fs::write(files.path().join("net-conf.json"), CONFIG)?;
    let socket = std::net::TcpListener::bind("127.0.0.1:0")?;
    let address = socket.local_addr()?;
    let start = |listen: &str, count: u32| -> Result<Child> {
        let mut command = Command::new("sh");
        command
            .args(["-c", "LISTEN_PID=$$ exec \"$0\" \"$@\""])
            .arg(flannel_tests::agent_binary()?)
            .arg(format!("--listen={listen}"))
            .arg(format!("--store=embedded:{}", files.path().join("leases.redb").display()))
            .arg(format!("--net-config-path={}", files.path().join("net-conf.json").display()))
            .env("LISTEN_FDS", count.to_string())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let descriptor = socket.as_raw_fd();
        // SAFETY: dup2 is async-signal-safe and touches nothing of this process.
        unsafe {
            command.pre_exec(move || match libc::dup2(descriptor, 3) {
                -1 => Err(std::io::Error::last_os_error()),
                _ => Ok(()),
            });
        }
        Ok(command.spawn()?)
    };
    let output = start("fd://4", 1)?.wait_with_output()?;
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1) && text.contains("fd 4 is out of range (1"), "{text}");
    let mut child = start("fd://", 1)?;
    let config = node(&[address])?.network_config().await;
    child.kill()?;
    child.wait()?;
    ensure!(config?.contains("10.5.0.0/16"));
    Ok(())
}

fn agent(arguments: &[&str]) -> Result<(Option<i32>, String, String)> {
    let output = Command::new(flannel_tests::agent_binary()?).args(arguments).output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((output.status.code(), text(&output.stdout), text(&output.stderr)))
}

/// Leases of a server's file move to etcd and back, with what they have left, and nothing is overwritten.
pub(crate) async fn leases_move_between_a_file_and_etcd() -> Result<()> {
    let files = tempfile::tempdir()?;
    let path = files.path().join("leases.redb");
    let store = Embedded::open(&path)?;
    store.configure(None, Some(CONFIG)).await?;
    store.configure(Some(&"blue".parse()?), Some(r#"{"Network":"10.6.0.0/16"}"#)).await?;
    let lease = r#"{"PublicIP":"192.0.2.7","Zone":"a"}"#;
    store.put("subnets/10.5.7.0-24", lease.as_bytes(), Some(Duration::from_secs(3600))).await?;
    store.put("blue/subnets/10.6.8.0-24", lease.as_bytes(), None).await?;
    drop(store);
    let etcd = tokio::task::spawn_blocking(flannel_tests::etcd::Etcd::start).await??;
    let (from, endpoint) = (format!("embedded:{}", path.display()), etcd.endpoint());
    let mut words = vec!["migrate", "--from", &from, "--to=etcd", "--etcd-endpoints", &endpoint];
    // The file is free when the task that ends leases has noticed.
    drop(reopen(&path).await?);
    tokio::time::sleep(Duration::from_millis(200)).await;

    words.push("--dry-run");
    let (code, said, errors) = agent(&words)?;
    ensure!(
        code == Some(0) && said.contains("4 to be moved, 0 there already, 0 in conflict"),
        "{said}{errors}"
    );
    words.pop();
    let (code, said, errors) = agent(&words)?;
    ensure!(code == Some(0) && said.contains("4 moved, 0 there already, 0 in conflict"), "{said}{errors}");
    let moved = flannel_agent::stores::etcd::open(&flannel_agent::stores::etcd::EtcdOptions {
        endpoints: vec![endpoint.clone()],
        ..Default::default()
    })?;
    let contents = moved.contents().await?;
    let find = |key: &str| contents.iter().find(|content| content.key == key).context("it was moved");
    let seven = find("subnets/10.5.7.0-24")?;
    let left = seven.left.context("an end")?.as_secs();
    ensure!(seven.value == lease && (3500..=3600).contains(&left), "{seven}");
    ensure!(find("blue/subnets/10.6.8.0-24")?.left.is_none(), "a reservation stays one");
    ensure!(find("blue/config")?.value.contains("10.6.0.0/16") && find("config")?.left.is_none());

    // Again: nothing to do. Somebody else's lease is named and stays.
    let (code, said, _) = agent(&words)?;
    ensure!(code == Some(0) && said.contains("0 moved, 4 there already"), "{said}");
    etcd.ctl(&["put", "/coreos.com/network/subnets/10.5.7.0-24", r#"{"PublicIP":"192.0.2.9"}"#])?;
    let (code, _, errors) = agent(&words)?;
    ensure!(code == Some(1) && errors.contains("10.5.7.0-24") && errors.contains("192.0.2.9"), "{errors}");
    Ok(())
}

pub(crate) async fn reservations_are_kept_by_a_command() -> Result<()> {
    let files = tempfile::tempdir()?;
    let process = Process::start(&files).await?;
    let remote = format!("--remote={}", process.address);
    let (code, said, errors) = agent(&["reservations", "add", "10.5.9.0/24", "192.0.2.9", &remote])?;
    ensure!(code == Some(0) && said == "10.5.9.0/24 is reserved for 192.0.2.9\n", "{said}{errors}");
    let lease = node(&[process.address])?.acquire(&asking("192.0.2.9")).await?;
    assert_eq!((lease.subnets, lease.expires), (subnets("10.5.9.0-24"), None));
    let (_, said, _) = agent(&["reservations", "list", "--json", &remote])?;
    let said: serde_json::Value = serde_json::from_str(&said)?;
    assert_eq!(said, serde_json::json!([{"subnet": "10.5.9.0/24", "public_ip": "192.0.2.9"}]));
    let (code, _, errors) = agent(&["reservations", "add", "10.5.9.0/24", "192.0.2.8", &remote])?;
    ensure!(code == Some(1) && errors.contains("is leased by 192.0.2.9 already"), "{errors}");
    let (code, said, errors) = agent(&["reservations", "remove", "10.5.9.0/24", &remote])?;
    ensure!(code == Some(0) && said.contains("a lease like any other"), "{said}{errors}");
    let (_, said, _) = agent(&["reservations", "list", &remote])?;
    ensure!(said == "no subnet is reserved\n", "{said}");
    Ok(())
}
