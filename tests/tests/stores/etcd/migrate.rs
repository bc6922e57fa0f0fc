//! `migrate-etcd`: a cluster's leases from v2's keyspace into v3's, with nodes in both.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use flannel_agent::domain::lease::Reservation;
use flannel_agent::stores::etcd::EtcdApi;
use flannel_agent::stores::{LEASE_TTL, StoreError};
use flannel_tests::agent_binary;
use flannel_tests::etcd::Etcd;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::{PEER, restart, start, store};
use crate::ground::{Keys, network, request, subnets};

const PREFIX: &str = "/coreos.com/network";
const CONFIG: &str = r#"{"Network":"10.5.0.0/16"}"#;
/// Longer than a change needs to get to the other side, also on a busy machine.
const PATIENCE: Duration = Duration::from_secs(15);

fn command(etcd: &Etcd, words: &[&str]) -> Result<Command> {
    let mut command = Command::new(agent_binary()?);
    command.arg("migrate-etcd").args(words).arg(format!("--etcd-endpoints={}", etcd.endpoint()));
    Ok(command)
}

fn said(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// A key in v3 with what it has left, in seconds.
async fn in_v3(etcd: &Etcd, key: &str) -> Result<Option<(String, Option<i64>)>> {
    let mut client = etcd_client::Client::connect([etcd.endpoint()], None).await?;
    let found = client.get(format!("{PREFIX}/{key}"), None).await?;
    let Some(kv) = found.kvs().first() else { return Ok(None) };
    let left = match kv.lease() {
        0 => None,
        lease => Some(client.lease_time_to_live(lease, None).await?.ttl()),
    };
    Ok(Some((kv.value_str()?.to_owned(), left)))
}

fn in_v2(etcd: &Etcd, key: &str) -> Result<Option<(String, Option<i64>)>> {
    let key = format!("{PREFIX}/{key}");
    let found = etcd.v2().list(PREFIX)?.into_iter().find(|entry| entry.key == key);
    Ok(found.map(|entry| (entry.value, entry.ttl)))
}

pub(crate) async fn leases_come_to_v3_as_they_are() -> Result<()> {
    let etcd = start().await?;
    let v2 = etcd.v2();
    let run = |words: &[&str]| anyhow::Ok(said(&command(&etcd, words)?.output()?));
    let (code, _, errors) = run(&[])?;
    ensure!(code == Some(1) && errors.contains("holds no network below /coreos.com/network"), "{errors}");

    // As flanneld 0.7.0 left it.
    let recorded =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/v0.7.0/vxlan/etcd-v2.json");
    let recorded: Value = serde_json::from_str(&std::fs::read_to_string(recorded)?)?;
    let (mut left, mut written) = (vec![&recorded["node"]], Vec::new());
    while let Some(node) = left.pop() {
        left.extend(node["nodes"].as_array().into_iter().flatten());
        if let (Some(key), Some(value)) = (node["key"].as_str(), node["value"].as_str()) {
            v2.put(key, value, key.contains("/subnets/").then_some(Duration::from_secs(3600)))?;
            written.push((
                key.strip_prefix("/coreos.com/network/").context("ours")?.to_owned(),
                value.to_owned(),
            ));
        }
    }
    ensure!(written.len() >= 3, "{written:?}");
    v2.put(&format!("{PREFIX}/blue/config"), CONFIG, None)?;
    v2.put(&format!("{PREFIX}/blue/subnets/10.5.7.0-24"), r#"{"PublicIP":"192.0.2.7"}"#, None)?;
    v2.put(&format!("{PREFIX}/elses"), "treasure", None)?;
    let count = written.len() + 2;

    let (code, out, errors) = run(&["--dry-run"])?;
    ensure!(
        code == Some(0) && out.contains(&format!("{count} to copy, 0 to prolong, 0 there already")),
        "{out}{errors}"
    );
    assert_eq!(out.matches("would copy").count(), count);
    let v3 = Keys::of(&etcd, EtcdApi::V3).await?;
    ensure!(v3.list(&format!("{PREFIX}/")).await?.is_empty(), "a dry run writes nothing");

    let (code, out, errors) = run(&[])?;
    ensure!(code == Some(0) && out.contains(&format!("{count} copied, 0 prolonged")), "{out}{errors}");
    ensure!(
        out.lines().nth_back(1).is_some_and(|last| last.contains("config")),
        "configurations last: {out}"
    );
    for (key, value) in &written {
        let (there, left) = in_v3(&etcd, key).await?.with_context(|| format!("{key} was copied"))?;
        assert_eq!(there, *value, "byte for byte");
        match left {
            None => ensure!(key == "config", "{key} must end"),
            Some(left) => ensure!((3500..=3601).contains(&left), "{key}: {left} s"),
        }
    }
    let reserved = in_v3(&etcd, "blue/subnets/10.5.7.0-24").await?;
    assert_eq!(reserved, Some((r#"{"PublicIP":"192.0.2.7"}"#.to_owned(), None)), "a reservation stays one");
    assert_eq!(in_v3(&etcd, "elses").await?, None);

    // Again, and after a renewal in v2, and when a node has come to v3.
    let (_, out, _) = run(&[])?;
    ensure!(out.contains(&format!("0 copied, 0 prolonged, {count} there already")), "{out}");
    let (key, value) = written.iter().find(|(key, _)| key != "config").context("a lease")?;
    v2.put(&format!("{PREFIX}/{key}"), value, Some(LEASE_TTL))?;
    let (_, out, _) = run(&[])?;
    ensure!(out.contains("0 copied, 1 prolonged"), "{out}");
    let (_, left) = in_v3(&etcd, key).await?.context("it is there")?;
    ensure!(left.is_some_and(|left| left > 86000), "{left:?}");
    let today = value.replace(r#","BackendType""#, r#","PublicIPv6":null,"BackendType""#);
    v3.put(&format!("{PREFIX}/{key}"), &today, Some(LEASE_TTL)).await?;
    let (code, out, errors) = run(&[])?;
    ensure!(code == Some(0) && out.contains("0 copied, 0 prolonged"), "{out}{errors}");
    assert_eq!(in_v3(&etcd, key).await?.context("it is there")?.0, today, "its node wrote it");

    // Somebody else's: named with both values, and nothing at all is written.
    v3.put(&format!("{PREFIX}/{key}"), PEER, Some(LEASE_TTL)).await?;
    v3.delete(&format!("{PREFIX}/blue/config")).await?;
    for words in [&["--dry-run"][..], &[]] {
        let (code, _, errors) = run(words)?;
        ensure!(code == Some(1) && errors.contains(key.as_str()), "{errors}");
        ensure!(errors.contains(PEER) && errors.contains(value.as_str()), "{errors}");
    }
    assert_eq!(in_v3(&etcd, "blue/config").await?, None);
    // So is another configuration.
    v3.put(&format!("{PREFIX}/{key}"), &today, Some(LEASE_TTL)).await?;
    let other = r#"{"Network":"10.9.0.0/16"}"#;
    v3.put(&format!("{PREFIX}/blue/config"), other, None).await?;
    let (code, _, errors) = run(&[])?;
    ensure!(code == Some(1) && errors.contains(CONFIG) && errors.contains(other), "{errors}");
    Ok(())
}

/// `migrate-etcd --follow`, running.
struct Follower {
    process: Child,
    lines: Receiver<String>,
}

impl Follower {
    fn start(etcd: &Etcd) -> Result<Self> {
        let mut process =
            command(etcd, &["--follow"])?.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let (tell, lines) = channel();
        let out = BufReader::new(process.stdout.take().context("its output")?);
        let errors = BufReader::new(process.stderr.take().context("its errors")?);
        let told = tell.clone();
        std::thread::spawn(move || out.lines().map_while(Result::ok).try_for_each(|line| told.send(line)));
        std::thread::spawn(move || errors.lines().map_while(Result::ok).try_for_each(|line| tell.send(line)));
        let follower = Self { process, lines };
        // A change before that is none to it.
        follower.says("both keyspaces are alike")?;
        Ok(follower)
    }

    fn says(&self, wanted: &str) -> Result<String> {
        let started = Instant::now();
        let mut heard = Vec::new();
        loop {
            match self.lines.recv_timeout(PATIENCE.saturating_sub(started.elapsed())) {
                Ok(line) if line.contains(wanted) => return Ok(line),
                Ok(line) => heard.push(line),
                Err(_) => bail!("{wanted:?} was not said, only {heard:?}"),
            }
        }
    }

    fn end(mut self) -> Result<Option<i32>> {
        kill(Pid::from_raw(i32::try_from(self.process.id())?), Signal::SIGTERM)?;
        Ok(self.process.wait()?.code())
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Waits until both have the key alike and it fits; its value and what it has left in v3.
async fn both(
    etcd: &Etcd,
    key: &str,
    wanted: &str,
    fits: impl Fn(&str, Option<i64>) -> bool,
) -> Result<(String, Option<i64>)> {
    let started = Instant::now();
    loop {
        let (old, new) = (in_v2(etcd, key)?, in_v3(etcd, key).await?);
        if let (Some((old_value, old_left)), Some((new_value, new_left))) = (&old, &new)
            && old_value == new_value
            && old_left.is_some() == new_left.is_some()
            && old_left.zip(*new_left).is_none_or(|(old, new)| old.abs_diff(new) <= 12)
            && fits(new_value, *new_left)
        {
            return Ok((new_value.clone(), *new_left));
        }
        ensure!(started.elapsed() < PATIENCE, "{wanted}: {key} is {old:?} in v2 and {new:?} in v3");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn gone(etcd: &Etcd, key: &str) -> Result<()> {
    let started = Instant::now();
    loop {
        let (old, new) = (in_v2(etcd, key)?, in_v3(etcd, key).await?);
        if old.is_none() && new.is_none() {
            return Ok(());
        }
        ensure!(started.elapsed() < PATIENCE, "{key} is {old:?} in v2 and {new:?} in v3");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The latest writes below the prefix.
async fn revisions(etcd: &Etcd) -> Result<(u64, i64)> {
    let old = etcd.v2().list(PREFIX)?.iter().map(|entry| entry.index).max().unwrap_or_default();
    let mut client = etcd_client::Client::connect([etcd.endpoint()], None).await?;
    let new = client.get(PREFIX, None).await?.header().context("a header")?.revision();
    Ok((old, new))
}

pub(crate) async fn nodes_in_both_keyspaces_live_side_by_side() -> Result<()> {
    let etcd = start().await?;
    etcd.v2().put(&format!("{PREFIX}/config"), CONFIG, None)?;
    let (old, new) = (store(EtcdApi::V2, &[etcd.endpoint()])?, store(EtcdApi::V3, &[etcd.endpoint()])?);
    let config = network("10.5.20.0");
    let first = old.acquire(&request(&config, "192.0.2.1")).await?;
    let key = |lease: &flannel_agent::domain::lease::Lease| format!("subnets/{}", lease.subnets);
    let follower = Follower::start(&etcd)?;
    both(&etcd, &key(&first), "what was there", |_, _| true).await?;
    both(&etcd, "config", "the network", |value, _| value == CONFIG).await?;

    // A new node in either is known in the other at once.
    let second = old.acquire(&request(&config, "192.0.2.2")).await?;
    both(&etcd, &key(&second), "a node in v2", |_, left| left.is_some_and(|left| left > 86000)).await?;
    let third = new.acquire(&request(&config, "192.0.2.3")).await?;
    both(&etcd, &key(&third), "a node in v3", |_, left| left.is_some_and(|left| left > 86000)).await?;

    // A renewal, and an end that is moved by hand, on either side.
    for api in [EtcdApi::V2, EtcdApi::V3] {
        let keys = Keys::of(&etcd, api).await?;
        for lease in [&second, &third] {
            let value = lease.attrs.to_json();
            keys.put(&format!("{PREFIX}/{}", key(lease)), &value, Some(Duration::from_secs(600))).await?;
            both(&etcd, &key(lease), "a shorter end", |_, left| left.is_some_and(|left| left <= 601)).await?;
        }
        old.renew(&second).await?;
        new.renew(&third).await?;
        for lease in [&second, &third] {
            both(&etcd, &key(lease), "a renewal", |_, left| left.is_some_and(|left| left > 86000)).await?;
        }
    }

    // The first node changes over: its subnet stays, and the old nodes learn what it says.
    let moved = new.acquire(&request(&config, "192.0.2.1")).await?;
    assert_eq!(moved.subnets, first.subnets);
    both(&etcd, &key(&first), "a node that came over", |value, _| value.contains(r#""PublicIPv6":null"#))
        .await?;

    // Reservations, made and ended.
    let reservation = Reservation { subnets: second.subnets, public_ip: second.attrs.public_ip.into() };
    new.reserve(&reservation).await?;
    both(&etcd, &key(&second), "a reservation", |_, left| left.is_none()).await?;
    old.unreserve(second.subnets).await?;
    both(&etcd, &key(&second), "its end", |_, left| left.is_some()).await?;

    // What is deleted on either side is gone from both, and stays so.
    old.revoke(third.subnets).await?;
    new.revoke(second.subnets).await?;
    etcd.v2().put(&format!("{PREFIX}/subnets/10.5.219.0-24"), PEER, Some(Duration::from_secs(2)))?;
    for deleted in [key(&second), key(&third), "subnets/10.5.219.0-24".into()] {
        gone(&etcd, &deleted).await?;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = revisions(&etcd).await?;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(revisions(&etcd).await?, before, "nothing goes round in circles");
    for deleted in [key(&second), key(&third)] {
        gone(&etcd, &deleted).await?;
    }

    // etcd is away for a while.
    let etcd = restart(etcd).await?;
    follower.says("waiting")?;
    follower.says("answer again")?;
    let fourth = old.acquire(&request(&config, "192.0.2.4")).await?;
    both(&etcd, &key(&fourth), "after a restart", |_, _| true).await?;
    assert_eq!(follower.end()?, Some(0));
    Ok(())
}

/// Nodes on both sides choose at the same time, out of few subnets.
pub(crate) async fn no_subnet_is_left_with_two_owners() -> Result<()> {
    const SUBNETS: u8 = 24;
    let etcd = start().await?;
    etcd.v2().put(&format!("{PREFIX}/config"), CONFIG, None)?;
    let follower = Follower::start(&etcd)?;
    let config = network(&format!("10.5.{SUBNETS}.0"));
    let (held, over) = (Arc::new(Mutex::new(BTreeMap::new())), Arc::new(AtomicBool::new(false)));
    let nodes = (1..=16_u8).map(|number| {
        let api = if number % 2 == 0 { EtcdApi::V2 } else { EtcdApi::V3 };
        let (node, request) =
            (store(api, &[etcd.endpoint()]), request(&config, &format!("192.0.2.{number}")));
        let (held, over) = (held.clone(), over.clone());
        tokio::spawn(async move {
            let node = node?;
            let mut lease = node.acquire(&request).await?;
            // As an agent does: one that lost its lease is started again and takes another.
            while !over.load(Ordering::SeqCst) {
                held.lock().unwrap().insert(number, (lease.subnets, lease.attrs.public_ip));
                tokio::time::sleep(Duration::from_millis(100)).await;
                lease = match node.renew(&lease).await {
                    Err(StoreError::LeaseLost { .. }) => node.acquire(&request).await?,
                    other => other?,
                };
            }
            anyhow::Ok(())
        })
    });
    let nodes: Vec<_> = nodes.collect();
    // Once each has one of its own, which is the same on both sides, nothing is left that could change that.
    let started = Instant::now();
    loop {
        let held = held.lock().unwrap().clone();
        let subnets: BTreeSet<_> = held.values().map(|(subnets, _)| subnets.to_string()).collect();
        let mut alike = 0;
        for (subnets, public_ip) in held.values() {
            let (key, owner) = (format!("subnets/{subnets}"), format!("\"{public_ip}\""));
            let (old, new) = (in_v2(&etcd, &key)?, in_v3(&etcd, &key).await?);
            let owned =
                |side: Option<(String, Option<i64>)>| side.is_some_and(|(value, _)| value.contains(&owner));
            alike += usize::from(owned(old) && owned(new));
        }
        if (held.len(), subnets.len(), alike) == (16, 16, 16) {
            break;
        }
        ensure!(started.elapsed() < 2 * PATIENCE, "{alike} of {held:?} are alike");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    over.store(true, Ordering::SeqCst);
    for node in futures_util::future::join_all(nodes).await {
        node??;
    }
    let mut known: Vec<_> = held.lock().unwrap().values().map(|(subnets, _)| subnets.to_string()).collect();
    known.sort();
    known.dedup();
    assert_eq!(known.len(), 16);
    let clashes = follower.lines.try_iter().filter(|line| line.contains("in both keyspaces at once")).count();
    eprintln!("{clashes} subnets were taken in both keyspaces at once");
    Ok(())
}

/// When the move is over, somebody deletes the old keyspace, and has forgotten to end it.
pub(crate) async fn deleting_the_old_keyspace_leaves_the_new_one_alone() -> Result<()> {
    let etcd = start().await?;
    etcd.v2().put(&format!("{PREFIX}/config"), CONFIG, None)?;
    for third in 1..=5 {
        etcd.v2().put(
            &format!("{PREFIX}/subnets/10.5.{third}.0-24"),
            &PEER.replace("2.9", &format!("2.{third}")),
            Some(LEASE_TTL),
        )?;
    }
    let mut follower = Follower::start(&etcd)?;
    both(&etcd, "config", "the network", |_, _| true).await?;
    etcd.v2().delete("/coreos.com")?;
    follower.says("config was deleted from one of the keyspaces")?;
    assert_eq!(follower.process.wait()?.code(), Some(1));
    let left = Keys::of(&etcd, EtcdApi::V3).await?.list(&format!("{PREFIX}/")).await?;
    assert_eq!(left.len(), 6, "{left:?}");
    let node = store(EtcdApi::V3, &[etcd.endpoint()])?;
    let lease = node.acquire(&request(&network("10.5.9.0"), "192.0.2.3")).await?;
    assert_eq!(lease.subnets, subnets("10.5.3.0-24"));
    Ok(())
}
