//! A network of a thousand leases: how soon a new agent is ready, and how soon a change is everywhere. With etcd, and with
//! a lease server that keeps its own file.

use std::{
    net::Ipv4Addr,
    thread::sleep,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use flannel_tests::{agent::AgentOptions, readiness::Readiness, topology::Lab};

use super::{Bench, NAME, figures::Summary};
use crate::progress::Step;

pub(super) const LEASES: u32 = 1000;
const WATCHERS: u8 = 50;
/// First address of the leased subnets of 16 addresses each, and of their nodes.
const SUBNETS: Ipv4Addr = Ipv4Addr::new(10, 241, 0, 0);
const NODES: Ipv4Addr = Ipv4Addr::new(10, 101, 0, 1);
const LIMIT: Duration = Duration::from_secs(60);

/// One kind of store.
pub(super) struct Stores {
    pub(super) store: &'static str,
    /// From the start of the process to `READY=1`, among [`LEASES`] leases, ms.
    pub(super) start: Summary,
    /// From the change's request until an agent has folded it in, over all [`WATCHERS`] agents and rounds, ms.
    pub(super) change: Summary,
}

/// Both kinds.
pub(super) fn measure(bench: &Bench) -> Result<Vec<Stores>> {
    println!("\nstores: {LEASES} leases, {WATCHERS} watching agents");
    ["etcd", "server"].into_iter().map(|store| one(bench, store)).collect()
}

fn one(bench: &Bench, store: &'static str) -> Result<Stores> {
    let step = Step::begin(store);
    let config = r#"{"Network":"10.240.0.0/12","SubnetLen":28,"Backend":{"Type":"host-gw"}}"#;
    let plan = Lab::new(NAME).hosts(if bench.quick { 4 } else { WATCHERS }).config(config);
    let plan = if store == "etcd" { plan } else { plan.served_by(&bench.agent) };
    step.note("hosts and leases");
    let mut lab = plan.build()?;
    fill(&mut lab, store, "host-gw", LEASES)?;
    for host in lab.hosts() {
        // Where the peers' nodes are: reachable without a gateway, as host-gw wants it.
        host.netns().ip(&format!("addr add 10.101.255.{}/16 dev eth0", host.address().octets()[3]))?;
    }
    let readiness = Readiness::listen(lab.folder())?;
    let options = readiness.told_by(AgentOptions::with_binary(bench.agent.clone())).flag("--iface=eth0");

    let mut start = Vec::new();
    for index in 0..lab.hosts().len() {
        step.note(&format!("agent {}", index + 1));
        let started = Instant::now();
        lab.host_mut(index).start_agent(&options)?;
        let ready = readiness.wait(LIMIT).with_context(|| lab.logs())?;
        start.push(ready.duration_since(started).as_secs_f64() * 1e3);
        // Nobody measures while others still take in the last one.
        sleep(Duration::from_millis(300));
    }
    for index in 0..lab.hosts().len() {
        lab.host_mut(index).agent_mut()?.wait_ready()?;
    }

    let mut change = Vec::new();
    for round in 0..u32::try_from(bench.rounds).context("rounds")? {
        step.note(&format!("change {}", round + 1));
        sleep(Duration::from_millis(500));
        let asked = SystemTime::now();
        publish(&mut lab, store, LEASES + round)?;
        sleep(Duration::from_millis(1500));
        for host in lab.hosts() {
            change.push(folded_after(&host.agent()?.log(), asked)?);
        }
    }

    let measured = Stores {
        store,
        start: Summary::of(start).context("no start was measured")?,
        change: Summary::of(change).context("no change was measured")?,
    };
    step.done(&format!(
        "ready after {:.0} ms, a change everywhere after {:.1} ms (median)",
        measured.start.median, measured.change.median
    ));
    Ok(measured)
}

/// The leases of nodes that do not exist.
pub(super) fn fill(lab: &mut Lab, store: &str, backend: &str, leases: u32) -> Result<()> {
    if store == "etcd" {
        let all: Vec<_> = (0..leases).map(|number| entry(backend, number)).collect();
        return lab.datastore().put_all(&all).map(drop);
    }
    (0..leases).try_for_each(|number| lab.server_mut()?.lease(&entry(backend, number).1))
}

/// One more of them.
fn publish(lab: &mut Lab, store: &str, number: u32) -> Result<()> {
    let (key, value) = entry("host-gw", number);
    match store {
        "etcd" => lab.datastore().put_all(&[(key, value)]).map(drop),
        _ => lab.server_mut()?.lease(&value),
    }
}

/// Key and value.
fn entry(backend: &str, number: u32) -> (String, String) {
    let subnet = Ipv4Addr::from(u32::from(SUBNETS) + number * 16);
    let node = Ipv4Addr::from(u32::from(NODES) + number);
    (format!("subnets/{subnet}-28"), format!(r#"{{"PublicIP":"{node}","BackendType":"{backend}"}}"#))
}

/// Milliseconds from `asked` until the agent's log says that its peers changed.
fn folded_after(log: &str, asked: SystemTime) -> Result<f64> {
    let line =
        log.lines().rev().find(|line| line.contains("peers changed")).context("no change was logged")?;
    let stamp = line.split_whitespace().next().context("a time")?;
    let said = since_midnight(stamp)?;
    let asked = asked.duration_since(SystemTime::UNIX_EPOCH).context("the clock")?;
    let asked = asked.as_secs_f64() % 86400.0;
    let after = (said - asked).rem_euclid(86400.0);
    ensure!(after < 10.0, "the last change an agent noticed was at {stamp}, before this one");
    Ok(after * 1e3)
}

/// Seconds of the day in `2026-11-26T12:02:13.173814Z`.
fn since_midnight(stamp: &str) -> Result<f64> {
    let time = stamp.split_once('T').and_then(|(_, time)| time.strip_suffix('Z')).context("a time stamp")?;
    let mut parts = time.split(':').map(str::parse::<f64>);
    let mut next = || parts.next().context("a time stamp")?.context("a time stamp");
    Ok((next()? * 60.0 + next()?) * 60.0 + next()?)
}
