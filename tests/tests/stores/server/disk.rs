//! A disk that is full, and a file that is damaged: the real binary, on a small file system of its own.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use flannel_agent::stores::NetworkStores as _;
use flannel_agent::stores::embedded::Embedded;
use flannel_tests::port::Port;
use tempfile::TempDir;
use tokio::net::TcpStream;

use super::{CONFIG, asking, node};
use crate::ground::first;

/// A server whose leases are on a file system of 256 KiB, which only it and its mount namespace have.
struct Cramped {
    port: Port,
    files: TempDir,
    child: Child,
}

impl Cramped {
    async fn start() -> Result<Self> {
        let (port, files) = (Port::hold("127.0.0.1".parse()?)?, tempfile::tempdir()?);
        let (disk, config) = (files.path().join("disk"), files.path().join("net-conf.json"));
        std::fs::create_dir(&disk)?;
        std::fs::write(&config, CONFIG)?;
        let mut command = Command::new("unshare");
        // Mounting takes root, or a user namespace in which one is.
        if !nix::unistd::Uid::effective().is_root() {
            command.args(["--user", "--map-root-user"]);
        }
        let child = command
            .args(["--mount", "sh", "-c", "mount -t tmpfs -o size=256k none \"$0\" && exec \"$@\""])
            .arg(&disk)
            .arg(flannel_tests::agent_binary()?)
            .arg(format!("--listen={}", port.address()))
            .arg(format!("--store=embedded:{}", disk.join("leases.redb").display()))
            .arg(format!("--net-config-path={}", config.display()))
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(files.path().join("server.log"))?)
            .spawn()?;
        let server = Self { port, files, child };
        let started = Instant::now();
        while TcpStream::connect(server.port.address()).await.is_err() {
            ensure!(started.elapsed() < Duration::from_secs(20), "it does not listen: {}", server.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(server)
    }

    /// A file on the server's own file system, seen from here (proc_pid_root(5)).
    fn on_disk(&self, name: &str) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.child.id()));
        root.join(self.files.path().strip_prefix("/").unwrap_or(self.files.path())).join("disk").join(name)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.files.path().join("server.log")).unwrap_or_default()
    }
}

impl Drop for Cramped {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        crate::heard(&self.log());
    }
}

fn fill(path: &Path) -> Result<()> {
    match std::fs::write(path, vec![0_u8; 1 << 20]) {
        Err(error) if error.kind() == std::io::ErrorKind::StorageFull => Ok(()),
        other => bail!("the disk is full at 256 KiB: {other:?}"),
    }
}

/// What the disk does not take is refused with the reason, and when there is room again the server goes on by itself.
/// What it said yes to is on disk, and nothing else.
pub(crate) async fn a_disk_that_was_full_costs_the_writes_of_that_time_only() -> Result<()> {
    let server = Cramped::start().await?;
    let node = node(&[server.port.address()])?;
    let mut acknowledged = BTreeMap::new();
    let mut numbers = 1_u32..=255;
    let mut next_ip =
        || numbers.next().map(|number| Ipv4Addr::from(0x0a63_0000 + number)).context("255 nodes");
    for _ in 0..3 {
        let ip = next_ip()?;
        acknowledged.insert(node.acquire(&asking(&ip.to_string())).await?.subnets, ip);
    }
    fill(&server.on_disk("filler"))?;
    // The file has some room left inside.
    let refused = loop {
        let ip = next_ip()?;
        match node.acquire(&asking(&ip.to_string())).await {
            Ok(lease) => drop(acknowledged.insert(lease.subnets, ip)),
            Err(error) => break error.to_string(),
        }
    };
    ensure!(refused.contains("leases.redb") && refused.contains("No space left"), "{refused}");
    // Reading goes on.
    let (leases, _) = first(&mut node.watch()).await?;
    assert_eq!(leases.len(), acknowledged.len());

    std::fs::remove_file(server.on_disk("filler"))?;
    for _ in 0..3 {
        let ip = next_ip()?;
        let lease = node.acquire(&asking(&ip.to_string())).await;
        let lease = lease.with_context(|| format!("there is room again; its log: {}", server.log()))?;
        acknowledged.insert(lease.subnets, ip);
    }
    // As after a SIGKILL: the file as it is now.
    let copy = server.files.path().join("copy.redb");
    std::fs::copy(server.on_disk("leases.redb"), &copy)?;
    let (leases, _) = first(&mut Embedded::open(&copy)?.networks().network(None).watch()).await?;
    let on_disk: BTreeMap<_, _> = leases.iter().map(|lease| (lease.subnets, lease.attrs.public_ip)).collect();
    assert_eq!(on_disk, acknowledged);
    Ok(())
}

/// redb panics over bytes that make no sense; the server ends with a sentence instead.
pub(crate) async fn a_damaged_file_is_named_with_what_to_do() -> Result<()> {
    let files = tempfile::tempdir()?;
    let path = files.path().join("leases.redb");
    let store = Embedded::open(&path)?;
    store.configure(None, Some(CONFIG)).await?;
    drop(store);
    super::process::wait_until_free(&path).await?;
    let sound = std::fs::read(&path)?;
    let mut damaged = 0;
    // Each page but the first, which has the file's own head, filled with what is no page.
    for page in 1..sound.len() / 4096 {
        let mut bytes = sound.clone();
        bytes.iter_mut().skip(page * 4096).take(4096).for_each(|byte| *byte = 0xa5);
        let broken = files.path().join(format!("{page}.redb"));
        std::fs::write(&broken, bytes)?;
        if let Err(error) = Embedded::open(&broken) {
            let text = error.to_string();
            ensure!(text.starts_with(&format!("{} is damaged", broken.display())), "{text}");
            ensure!(text.contains("move it away"), "{text}");
            damaged += 1;
        }
    }
    let cut = files.path().join("cut.redb");
    std::fs::write(&cut, &sound[..sound.len() - 4096])?;
    let error = Embedded::open(&cut).err().context("a file that was cut off")?.to_string();
    ensure!(error.contains("cut.redb is damaged"), "{error}");
    ensure!(damaged > 0, "no page of {} made redb panic", sound.len() / 4096);
    Ok(())
}
