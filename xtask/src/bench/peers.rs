//! Large networks: how long an agent takes to program thousands of peers and one change among them, and what memory it
//! needs when nothing happens.
//!
//! All from outside. A peer is programmed when the kernel's map of peers has its key, or the kernel its route; after a first
//! start that is later than `READY=1`, which user space says for `udp`. From the start until the last peer is programmed is
//! an upper bound of snapshot to programmed.

use std::{
    fs,
    net::{Ipv4Addr, UdpSocket},
    thread::{scope, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use flannel_tests::{
    agent::AgentOptions,
    bpf::PinnedMap,
    readiness::Readiness,
    topology::{Host, Lab, Underlay},
};

use super::{Bench, NAME, figures::Summary};
use crate::progress::Step;

const LIMIT: Duration = Duration::from_secs(60);
const QUIET_TIME: Duration = Duration::from_millis(1500);
/// First address of the peers' subnets of 16 addresses each.
const NETWORK: Ipv4Addr = Ipv4Addr::new(10, 240, 0, 0);
const SUBNET_SIZE: u32 = 16;
/// Where the peers' nodes are: reachable without a gateway, as host-gw wants it.
const NODES: Ipv4Addr = Ipv4Addr::new(10, 101, 0, 1);
const BACKENDS: [&str; 2] = ["udp", "host-gw"];

/// One backend with one number of peers.
pub(super) struct Peers {
    pub(super) backend: &'static str,
    pub(super) count: u32,
    /// From the start until all peers are programmed, on a host where nothing of ours was, ms.
    pub(super) start: f64,
    /// The same after a crash, when all is programmed already, ms.
    pub(super) restart: f64,
    /// From the request to etcd until a further peer is programmed, ms.
    pub(super) change: Summary,
    /// VmRSS at rest, MB (10⁶ bytes).
    pub(super) memory: f64,
}

/// Every backend with every number of peers.
pub(super) fn measure(bench: &Bench) -> Result<Vec<Peers>> {
    println!("\npeers: time to program them, one change among them, memory at rest");
    let counts: &[u32] = if bench.quick { &[100, 1000] } else { &[100, 1000, 10_000] };
    let mut measured = Vec::new();
    for backend in BACKENDS {
        for count in counts {
            let step = Step::begin(&format!("{backend}, {count} peers"));
            let peers = one(bench, backend, *count, &step)?;
            step.done(&format!(
                "programmed after {:.0} ms, again after a crash {:.0} ms, a change {:.1} ms, {:.1} MB",
                peers.start, peers.restart, peers.change.median, peers.memory
            ));
            measured.push(peers);
        }
    }
    Ok(measured)
}

fn one(bench: &Bench, backend: &'static str, count: u32, step: &Step) -> Result<Peers> {
    step.note("etcd and leases");
    let config = format!(
        r#"{{"Network":"{NETWORK}/12","SubnetLen":28,"SubnetMin":"10.255.0.0","Backend":{{"Type":"{backend}"}}}}"#
    );
    let mut lab = Lab::new(NAME).underlay(Underlay::Direct).config(&config).build()?;
    let leases: Vec<(String, String)> = (0..count).map(|number| lease(backend, number)).collect();
    lab.datastore().put_all(&leases)?;
    lab.host(0).netns().ip("addr add 10.101.255.254/16 dev eth0")?;

    let readiness = Readiness::listen(lab.folder())?;
    let options = AgentOptions::with_binary(bench.agent.clone()).flag("--iface=10.99.0.11");
    let options = readiness.told_by(options);
    step.note("first start");
    let last = subnet(count.saturating_sub(1));
    let start = programmed_after(&mut lab, &options, &readiness, (backend, last))?;
    lab.host_mut(0).agent_mut()?.wait_ready()?;
    sleep(QUIET_TIME);
    let memory = resident(lab.host(0).agent()?.pid())?;

    step.note("changes");
    let mut changes = Vec::new();
    for number in 0..if bench.quick { 2 } else { 10 } {
        changes.push(change(&lab, backend, count + number).with_context(|| lab.logs())?);
        sleep(Duration::from_millis(50));
    }
    step.note("second start");
    lab.host_mut(0).agent_mut()?.crash()?;
    let restart = programmed_after(&mut lab, &options, &readiness, (backend, last))?;
    let change = Summary::of(changes).context("no change was measured")?;
    Ok(Peers { backend, count, start, restart, change, memory })
}

/// From the start until the agent is ready and the last peer is programmed.
fn programmed_after(
    lab: &mut Lab,
    options: &AgentOptions,
    readiness: &Readiness,
    last: (&str, Ipv4Addr),
) -> Result<f64> {
    let started = Instant::now();
    lab.host_mut(0).start_agent(options)?;
    let ready = readiness.wait(LIMIT).with_context(|| lab.logs())?;
    let programmed = is_programmed(last.0, lab.host(0), last.1, LIMIT).with_context(|| lab.logs())?;
    Ok(milliseconds(programmed.max(ready).duration_since(started)))
}

/// Puts one more lease and waits until it is programmed.
fn change(lab: &Lab, backend: &str, number: u32) -> Result<f64> {
    scope(|scope| {
        let programmed = scope.spawn(|| is_programmed(backend, lab.host(0), subnet(number), LIMIT));
        // Until the one who looks is looking.
        sleep(Duration::from_millis(20));
        let (asked, _) = lab.datastore().put_all(&[lease(backend, number)])?;
        let programmed = programmed.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        Ok(milliseconds(programmed.duration_since(asked)))
    })
}

/// When the peer was programmed; at least one look, and none after `limit`.
fn is_programmed(backend: &str, host: &Host, peer: Ipv4Addr, limit: Duration) -> Result<Instant> {
    let map = if backend == "udp" { Some(map_of_peers(host, limit)?) } else { None };
    host.netns().run(|| {
        let started = Instant::now();
        // Without a default route, the kernel connects only where it has a route to.
        let socket = UdpSocket::bind(("0.0.0.0", 0)).context("make a socket")?;
        loop {
            let there = match &map {
                Some(map) => map.has(peer.octets())?,
                None => socket.connect((peer, 9)).is_ok(),
            };
            let now = Instant::now();
            if there {
                return Ok(now);
            }
            ensure!(started.elapsed() < limit, "peer {peer} is not programmed after {limit:?}");
            sleep(Duration::from_micros(100));
        }
    })
}

/// `<bpffs>/flannel/<device>/v<layout>/peers`, when it is there.
fn map_of_peers(host: &Host, limit: Duration) -> Result<PinnedMap> {
    let device = host.bpffs().context("no bpffs could be mounted")?.join("flannel/flannel0");
    let started = Instant::now();
    loop {
        let versions = fs::read_dir(&device).into_iter().flatten().flatten();
        let map = versions.map(|version| version.path().join("peers")).find(|map| map.exists());
        if let Some(map) = map {
            return PinnedMap::open(&map);
        }
        ensure!(
            started.elapsed() < limit,
            "no map of peers is pinned below {} after {limit:?}; did the agent choose tun?",
            device.display()
        );
        sleep(Duration::from_micros(500));
    }
}

fn subnet(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(NETWORK) + number * SUBNET_SIZE)
}

/// Key below the prefix, and value. A lease without an end is a reservation, which is a peer as any other.
fn lease(backend: &str, number: u32) -> (String, String) {
    let node = Ipv4Addr::from(u32::from(NODES) + number);
    let value = format!(r#"{{"PublicIP":"{node}","PublicIPv6":null,"BackendType":"{backend}"}}"#);
    (format!("subnets/{}-28", subnet(number)), value)
}

fn resident(process: u32) -> Result<f64> {
    let path = format!("/proc/{process}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let kibibytes: f64 = text
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix("kB")?.trim().parse().ok())
        .with_context(|| format!("{path} has no VmRSS"))?;
    Ok(kibibytes * 1024.0 / 1e6)
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
