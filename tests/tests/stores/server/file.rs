//! The file of the leases, deleted or replaced under a running server: the real binary.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use flannel_agent::domain::lease::Subnets;
use flannel_agent::stores::StoreError;
use flannel_agent::stores::embedded::Embedded;

use super::process::Process;
use super::{CONFIG, asking, node};
use crate::ground::first;

const ANEW: &str = "was gone while the server runs: all leases were written into a new one";

/// What it says yes to while its file is away is there after its death, as are all leases from before.
pub(crate) async fn a_file_that_was_deleted_is_written_anew_with_every_lease() -> Result<()> {
    let files = tempfile::tempdir()?;
    let mut process = Process::start_in(&files, "var/leases.redb").await?;
    let folder = files.path().join("var");
    let path = folder.join("leases.redb");
    let mut acknowledged = BTreeMap::new();
    // A write after it, nothing after it, and the folder goes along.
    for round in 0..3_u8 {
        let client = node(&[process.port.address()])?;
        for number in 1..=3 {
            let ip = Ipv4Addr::new(10, 99, round, number);
            acknowledged.insert(client.acquire(&asking(&ip.to_string())).await?.subnets, ip);
        }
        match round {
            2 => std::fs::remove_dir_all(&folder)?,
            _ => std::fs::remove_file(&path)?,
        }
        if round == 1 {
            said(&process, ANEW, 2).await?;
        } else {
            let ip = Ipv4Addr::new(10, 99, round, 9);
            acknowledged.insert(client.acquire(&asking(&ip.to_string())).await?.subnets, ip);
        }
        process.restart().await?;
        assert_eq!(known(&process).await?, acknowledged, "round {round}: {}", process.log());
    }
    said(&process, ANEW, 3).await
}

/// Somebody puts a backup in its place: it may be meant. It is not overwritten, and what would be lost is not promised.
pub(crate) async fn a_file_that_was_replaced_is_left_alone_and_nothing_is_promised() -> Result<()> {
    let files = tempfile::tempdir()?;
    let backup = files.path().join("backup.redb");
    let other = Embedded::open(&backup)?;
    other.configure(None, Some(CONFIG)).await?;
    drop(other);
    super::process::wait_until_free(&backup).await?;
    let sound = std::fs::read(&backup)?;

    let mut process = Process::start(&files).await?;
    let path = files.path().join("leases.redb");
    let client = node(&[process.port.address()])?;
    let lease = client.acquire(&asking("10.99.0.1")).await?;
    std::fs::rename(&backup, &path)?;
    for error in [
        client.acquire(&asking("10.99.0.2")).await.map(drop).err(),
        client.renew(&lease).await.map(drop).err(),
    ] {
        let error = error.context("a write that would be lost was acknowledged")?;
        ensure!(matches!(error, StoreError::Unreachable { .. }), "{error:?}");
        let text = error.to_string();
        ensure!(text.contains("leases.redb was replaced by another file while the server runs"), "{text}");
    }
    ensure!(std::fs::read(&path)? == sound, "the backup was written to");
    // Said by itself, and once.
    said(&process, "was replaced by another file", 1).await?;
    ensure!(client.network_config().await?.contains("10.5.0.0/16"), "what is known is still told");

    // Moved away, the server has its own again.
    std::fs::rename(&path, &backup)?;
    let ip = Ipv4Addr::new(10, 99, 0, 3);
    let another = client.acquire(&asking(&ip.to_string())).await?;
    let wanted = BTreeMap::from([(lease.subnets, Ipv4Addr::new(10, 99, 0, 1)), (another.subnets, ip)]);
    process.restart().await?;
    assert_eq!(known(&process).await?, wanted, "{}", process.log());

    // Or it is meant: the next start takes it.
    std::fs::rename(&backup, &path)?;
    process.restart().await?;
    assert_eq!(known(&process).await?, BTreeMap::new());
    Ok(())
}

async fn known(process: &Process) -> Result<BTreeMap<Subnets, Ipv4Addr>> {
    let (leases, unreadable) = first(&mut node(&[process.port.address()])?.watch()).await?;
    ensure!(unreadable.is_empty(), "{unreadable:?}");
    Ok(leases.iter().map(|lease| (lease.subnets, lease.attrs.public_ip)).collect())
}

/// Waits until its log has this line so many times, and not more.
async fn said(process: &Process, line: &str, times: usize) -> Result<()> {
    let started = Instant::now();
    loop {
        let (log, enough) = (process.log(), started.elapsed() > Duration::from_secs(20));
        match log.matches(line).count().cmp(&times) {
            std::cmp::Ordering::Equal => return Ok(()),
            std::cmp::Ordering::Less if !enough => tokio::time::sleep(Duration::from_millis(20)).await,
            _ => bail!("{line:?} is not there {times} times:\n{log}"),
        }
    }
}
