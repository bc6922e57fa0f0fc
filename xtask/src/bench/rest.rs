//! What an agent takes while nothing happens, with a thousand peers and with ten thousand: first while its store is there,
//! then while it is gone.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use flannel_tests::{agent::AgentOptions, topology::Lab};
use nix::{time::clock_getcpuclockid, unistd::Pid};

use super::{
    Bench, NAME,
    stores::{LEASES, fill},
};
use crate::progress::Step;

/// One agent.
pub(super) struct Rest {
    pub(super) store: &'static str,
    pub(super) backend: &'static str,
    pub(super) peers: u32,
    /// Share of one core that all its threads take, percent.
    pub(super) with_store: f64,
    /// The same while the store is gone.
    pub(super) alone: f64,
}

const WHAT: [(&str, &str, u32); 6] = [
    ("etcd", "udp", LEASES),
    ("etcd", "host-gw", LEASES),
    ("etcd", "udp", 10 * LEASES),
    ("etcd", "host-gw", 10 * LEASES),
    ("server", "udp", LEASES),
    ("server", "host-gw", LEASES),
];

/// Every store and backend.
pub(super) fn measure(bench: &Bench) -> Result<Vec<Rest>> {
    println!("\nat rest: the store there, the store gone");
    let most = if bench.quick { LEASES } else { u32::MAX };
    WHAT.into_iter().filter(|(.., peers)| *peers <= most).map(|what| one(bench, what)).collect()
}

fn one(bench: &Bench, (store, backend, peers): (&'static str, &'static str, u32)) -> Result<Rest> {
    let step = Step::begin(&format!("{store}, {backend}, {peers} peers"));
    step.note("leases");
    let config = format!(
        r#"{{"Network":"10.240.0.0/12","SubnetLen":28,"SubnetMin":"10.255.0.0","Backend":{{"Type":"{backend}"}}}}"#
    );
    let plan = Lab::new(NAME).hosts(1).config(&config);
    let plan = if store == "etcd" { plan } else { plan.served_by(&bench.agent) };
    let mut lab = plan.build()?;
    fill(&mut lab, store, backend, peers)?;
    // Where the peers' nodes are: reachable without a gateway, as host-gw wants it.
    lab.host(0).netns().ip("addr add 10.101.255.254/16 dev eth0")?;
    let options =
        AgentOptions::with_binary(bench.agent.clone()).flag(format!("--iface={}", lab.host(0).address()));
    let agent = lab.host_mut(0).start_agent(&options)?;
    agent.wait_ready()?;
    let wanted = usize::try_from(peers)?;
    agent.wait_status("all peers", |status| status.peers.len() == wanted)?;
    let pid = agent.pid();

    let (settle, window) = if bench.quick { (1, 1) } else { (5, 10) };
    let (settle, window) = (Duration::from_secs(settle), Duration::from_secs(window));
    step.note("the store there");
    sleep(settle);
    let with_store = share(pid, window)?;
    step.note("the store gone");
    if store == "etcd" {
        lab.datastore_mut().stop()?;
    } else {
        lab.server_mut()?.kill()?;
    }
    sleep(settle);
    let alone = share(pid, window)?;
    step.done(&format!("{with_store:.2} % of a core, {alone:.2} % without store"));
    Ok(Rest { store, backend, peers, with_store, alone })
}

/// Share of one core that a process takes, threads that end meanwhile included; percent.
fn share(pid: u32, window: Duration) -> Result<f64> {
    let clock = clock_getcpuclockid(Pid::from_raw(i32::try_from(pid)?)).context("the agent's CPU clock")?;
    let spent = || clock.now().map(Duration::from).context("read the agent's CPU clock");
    let (began, before) = (Instant::now(), spent()?);
    sleep(window);
    let spent = spent()?.saturating_sub(before);
    Ok(spent.as_secs_f64() / began.elapsed().as_secs_f64() * 100.0)
}
