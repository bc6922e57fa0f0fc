//! The real binary, serving from a file.

use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flannel_agent::domain::lease::{LeaseEvent, Reservation};
use flannel_agent::stores::NetworkStores;
use flannel_agent::stores::embedded::Embedded;
use flannel_tests::port::Port;
use tempfile::TempDir;
use tokio::net::TcpStream;

use super::{CONFIG, asking, node};
use crate::ground::{first, next, subnets};

pub(super) struct Process {
    pub(super) port: Port,
    files: std::path::PathBuf,
    store: std::path::PathBuf,
    child: Option<Child>,
}

impl Process {
    pub(super) async fn start(files: &TempDir) -> Result<Self> {
        Self::start_in(files, "leases.redb").await
    }

    /// With the leases in this file.
    pub(super) async fn start_in(files: &TempDir, store: &str) -> Result<Self> {
        std::fs::write(files.path().join("net-conf.json"), CONFIG)?;
        let port = Port::hold("127.0.0.1".parse()?)?;
        let (store, files) = (files.path().join(store), files.path().to_owned());
        let mut process = Self { port, files, store, child: None };
        process.restart().await?;
        Ok(process)
    }

    pub(super) fn log(&self) -> String {
        std::fs::read_to_string(self.files.join("server.log")).unwrap_or_default()
    }

    /// Kills it (SIGKILL), if it runs, and starts it on the same file.
    pub(super) async fn restart(&mut self) -> Result<()> {
        self.kill()?;
        let log = std::fs::File::options().create(true).append(true).open(self.files.join("server.log"))?;
        let child = Command::new(flannel_tests::agent_binary()?)
            .arg(format!("--listen={}", self.port.address()))
            .arg(format!("--store=embedded:{}", self.store.display()))
            .arg(format!("--net-config-path={}", self.files.join("net-conf.json").display()))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()?;
        self.child = Some(child);
        let started = Instant::now();
        while TcpStream::connect(self.port.address()).await.is_err() {
            ensure!(
                started.elapsed() < Duration::from_secs(20),
                "the server does not listen: {}",
                self.log()
            );
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
        crate::heard(&self.log());
    }
}

pub(crate) async fn a_server_that_is_away_is_one_interruption_and_then_a_snapshot() -> Result<()> {
    let files = tempfile::tempdir()?;
    let mut process = Process::start(&files).await?;
    let node = node(&[process.port.address()])?;
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

/// Nodes come and operators reserve while the server is killed at random moments. Whatever it said yes to is there
/// afterwards, and no subnet has two owners.
pub(crate) async fn nothing_acknowledged_is_lost_in_twenty_kills() -> Result<()> {
    const KILLS: u32 = 20;
    let files = tempfile::tempdir()?;
    let mut process = Process::start(&files).await?;
    let next_ip = Arc::new(AtomicU32::new(1));
    let mut acknowledged: BTreeMap<_, _> = BTreeMap::new();
    for kill in 0..KILLS {
        // How many leases and reservations it says yes to before it is killed: none, and all there are to ask for.
        let (answered, enough) = (Arc::new(AtomicU32::new(0)), kill % 16);
        let writers = (0..4).map(|writer| {
            let (address, next_ip, answered) = (process.port.address(), next_ip.clone(), answered.clone());
            tokio::spawn(async move {
                let node = node(&[address])?;
                let mut done = Vec::new();
                loop {
                    let number = next_ip.fetch_add(1, Ordering::SeqCst);
                    let ip = std::net::Ipv4Addr::from(0x0a63_0000 + number);
                    let Ok(lease) = node.acquire(&asking(&ip.to_string())).await else { return Ok(done) };
                    done.push((lease.subnets, ip, false));
                    answered.fetch_add(1, Ordering::SeqCst);
                    if writer == 0 {
                        let wanted = Reservation { subnets: lease.subnets, public_ip: ip.into() };
                        if node.reserve(&wanted).await.is_err() {
                            return Ok(done);
                        }
                        done.push((lease.subnets, ip, true));
                        answered.fetch_add(1, Ordering::SeqCst);
                    }
                    if done.len() >= 3 {
                        return Ok::<_, anyhow::Error>(done);
                    }
                }
            })
        });
        let writers: Vec<_> = writers.collect();
        // From before the first write to after the last, and each time somewhere else in the next one.
        while answered.load(Ordering::SeqCst) < enough && !writers.iter().all(|writer| writer.is_finished()) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        tokio::time::sleep(Duration::from_micros(u64::from(kill) * 700)).await;
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
        let node = node(&[process.port.address()])?;
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
    store.put("subnets/10.5.8.0-24", value, None).await?;
    // While it is away: nobody who has the file open ends the lease.
    let short = Duration::from_secs(5);
    let asked = Instant::now();
    store.put("subnets/10.5.7.0-24", value, Some(short)).await?;
    drop(store);
    wait_until_free(&path).await?;
    ensure!(asked.elapsed() < short, "too slow to stop before the lease ends: {:?}", asked.elapsed());
    tokio::time::sleep(short.saturating_sub(asked.elapsed()) + Duration::from_millis(100)).await;
    let store = Embedded::open(&path)?;
    let (leases, _) = first(&mut store.networks().network(None).watch()).await?;
    let left = leases.iter().map(|lease| lease.expires.map(|end| end - Instant::now()));
    let left: Vec<_> = left.collect();
    ensure!(left.len() == 2, "{left:?}");
    ensure!(left.iter().flatten().all(|left| (290..=300).contains(&left.as_secs())), "{left:?}");
    ensure!(left.iter().any(Option::is_none), "a reservation has no end");
    Ok(())
}

/// Until nobody has it open any more.
pub(super) async fn wait_until_free(path: &std::path::Path) -> Result<()> {
    let started = Instant::now();
    let file = std::fs::File::options().read(true).write(true).open(path)?;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(()),
            Err(std::fs::TryLockError::WouldBlock) => {
                ensure!(started.elapsed() < Duration::from_secs(20), "{} stays open", path.display());
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Err(error) => return Err(error.into()),
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
    wait_until_free(&path).await?;

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

    // A place that is not there is no empty one, and looking makes no file.
    let (nowhere, made) = (files.path().join("nowhere.redb"), files.path().join("made.redb"));
    let place = |path: &std::path::Path| format!("embedded:{}", path.display());
    let (code, _, errors) =
        agent(&["migrate", "--from", &place(&nowhere), "--to=etcd", "--etcd-endpoints", &endpoint])?;
    ensure!(code == Some(1) && errors.contains("nowhere.redb, and there is no such file"), "{errors}");
    let back = ["migrate", "--from=etcd", "--to", &place(&made), "--etcd-endpoints", &endpoint, "--dry-run"];
    let (code, said, errors) = agent(&back)?;
    ensure!(code == Some(0) && said.contains("4 to be moved"), "{said}{errors}");
    ensure!(!nowhere.exists() && !made.exists(), "a file was made");
    let (code, _, errors) = agent(&[&back[..6], &["--etcd-prefix=/elsewhere"]].concat())?;
    ensure!(code == Some(1) && errors.contains("holds no network and no lease"), "{errors}");

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
    let remote = format!("--remote={}", process.port.address());
    let (code, said, errors) = agent(&["reservations", "add", "10.5.9.0/24", "192.0.2.9", &remote])?;
    ensure!(code == Some(0) && said == "10.5.9.0/24 is reserved for 192.0.2.9\n", "{said}{errors}");
    let lease = node(&[process.port.address()])?.acquire(&asking("192.0.2.9")).await?;
    assert_eq!((lease.subnets, lease.expires), (subnets("10.5.9.0-24"), None));
    let (_, said, _) = agent(&["reservations", "list", "--json", &remote])?;
    let said: serde_json::Value = serde_json::from_str(&said)?;
    assert_eq!(said, serde_json::json!([{"subnet": "10.5.9.0/24", "public_ip": "192.0.2.9"}]));
    let (code, _, errors) = agent(&["reservations", "add", "10.5.9.0/24", "192.0.2.8", &remote])?;
    ensure!(code == Some(1) && errors.contains("is leased by 192.0.2.9 already"), "{errors}");
    let (code, _, errors) = agent(&["reservations", "list", "--kube-subnet-mgr"])?;
    ensure!(code == Some(1) && errors.contains("this store keeps no reservations"), "{errors}");
    let (code, said, errors) = agent(&["reservations", "remove", "10.5.9.0/24", &remote])?;
    ensure!(code == Some(0) && said.contains("a lease like any other"), "{said}{errors}");
    let (_, said, _) = agent(&["reservations", "list", &remote])?;
    ensure!(said == "no subnet is reserved\n", "{said}");
    Ok(())
}
