//! A hundred agents, one store, and everything that can go wrong between them, in an order that chance decides.
//!
//! The loop is the real one; the store is in memory, the hosts only remember, and the clock is made to jump. After each
//! schedule all trouble ends, and within minutes every node that runs must have a lease of its own, know all others, and
//! have its host as that says. While it lasts no two nodes that reach the store may think they have one subnet.
//!
//! A schedule that fails says its seed: `SIMULATION_SEED=7 cargo test -p flannel-tests --test simulation` runs that one.
//! The seed decides the schedule and every random choice of the agents; of events at one instant tokio may take either
//! first.

#![expect(clippy::unwrap_used, reason = "a case that fails this way has failed")]

mod link;
mod node;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use flannel_agent::chance;
use flannel_agent::stores::LEASE_TTL;
use flannel_agent::stores::memory::MemoryStore;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use tokio::time::{Instant, advance, sleep};

use self::link::Trouble;
use self::node::Node;

const NODES: u8 = 100;
/// Steps of a schedule.
const STEPS: u32 = 40;
/// Schedules of a run that names none.
const SEEDS: std::ops::Range<u64> = 0..4;
const CONFIG: &str = r#"{"Network":"10.1.0.0/16","Backend":{"Type":"host-gw"}}"#;

/// A node that reached the store for this long knows what the store knows.
const TOLD: Duration = Duration::from_secs(45);

fn main() -> std::process::ExitCode {
    let arguments = libtest_mimic::Arguments::from_args();
    let seeds: Vec<u64> = match std::env::var("SIMULATION_SEED").ok().map(|text| text.parse()) {
        Some(Ok(seed)) => vec![seed],
        Some(Err(error)) => {
            eprintln!("SIMULATION_SEED is no number: {error}");
            return std::process::ExitCode::FAILURE;
        }
        None => SEEDS.collect(),
    };
    let trials = seeds.into_iter().map(|seed| {
        libtest_mimic::Trial::test(format!("a_hundred_agents_survive_schedule_{seed}"), move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build()?;
            chance::seed(seed);
            let mut told = Vec::new();
            runtime.block_on(simulate(seed, &mut told)).map_err(|error| {
                let schedule = told.join("\n  ");
                format!("seed {seed}: {error:#}\nafter\n  {schedule}\nreplay it with SIMULATION_SEED={seed}")
                    .into()
            })
        })
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}

/// The cluster and what is wrong with it.
struct Cluster {
    store: MemoryStore,
    nodes: Vec<Node>,
    dice: StdRng,
    /// Entries nobody can use, or nobody should have written.
    strangers: BTreeSet<String>,
    /// The whole store is away.
    away: bool,
}

async fn simulate(seed: u64, told: &mut Vec<String>) -> Result<()> {
    let store = MemoryStore::new(CONFIG);
    let files = tempfile::tempdir()?;
    let nodes = (1..=NODES).map(|number| Node::new(number, &store, files.path())).collect();
    let mut cluster =
        Cluster { store, nodes, dice: StdRng::seed_from_u64(seed), strangers: BTreeSet::new(), away: false };
    for node in &mut cluster.nodes {
        node.start();
    }
    for _ in 0..STEPS {
        let step = cluster.step().await;
        told.push(step);
        sleep(Duration::from_millis(cluster.dice.random_range(0..4000))).await;
        cluster.supervise();
        cluster.nobody_shares_a_subnet()?;
    }
    cluster.end_all_trouble();
    told.push("all trouble ends".into());
    let ended = Instant::now();
    loop {
        sleep(Duration::from_secs(5)).await;
        cluster.supervise();
        match cluster.has_converged() {
            Ok(()) => return Ok(()),
            Err(error) if ended.elapsed() > Duration::from_secs(240) => return Err(error),
            Err(_) => {}
        }
    }
}

impl Cluster {
    /// One thing happens; says which.
    async fn step(&mut self) -> String {
        let index = self.dice.random_range(0..self.nodes.len());
        let name = self.nodes[index].ip;
        match self.dice.random_range(0..16) {
            0 | 1 => {
                self.nodes[index].kill();
                format!("{name} is killed")
            }
            2 => {
                for node in &mut self.nodes {
                    node.kill();
                }
                "every node is killed".into()
            }
            3..=7 => {
                let troubles = [
                    Trouble::Cut,
                    Trouble::Slow(Duration::from_secs(3)),
                    Trouble::AnswersLost,
                    Trouble::Garbage,
                    Trouble::Doubled,
                    Trouble::Overtaking,
                ];
                let trouble = *troubles.choose(&mut self.dice).unwrap();
                let hit = self.dice.random_range(1..=30);
                for _ in 0..hit {
                    let index = self.dice.random_range(0..self.nodes.len());
                    self.nodes[index].trouble(trouble);
                }
                format!("{hit} nodes have {trouble:?}")
            }
            8 => {
                for node in &mut self.nodes {
                    node.trouble(Trouble::None);
                }
                "all links are mended".into()
            }
            9 => {
                if self.away {
                    self.store.mend();
                } else {
                    self.store.cut();
                }
                self.away = !self.away;
                format!("the store is {}", if self.away { "away" } else { "back" })
            }
            10 => {
                for node in &self.nodes {
                    node.compact();
                }
                "history is compacted".into()
            }
            11 | 12 => {
                let entries = self.store.entries();
                let Some((key, _)) = entries.choose(&mut self.dice) else { return "nothing".into() };
                self.store.delete(key);
                format!("lease {key} is deleted")
            }
            13 => {
                let key = format!("10.1.{}.0-24", self.dice.random_range(1..=255));
                let value = ["nonsense", r#"{"PublicIP":7}"#, ""].choose(&mut self.dice).unwrap();
                self.store.put(&key, value, Some(LEASE_TTL));
                self.strangers.insert(key.clone());
                format!("{key} is {value:?}")
            }
            14 => {
                let entries = self.store.entries();
                let Some((key, _)) = entries.choose(&mut self.dice) else { return "nothing".into() };
                self.store.put(
                    key,
                    r#"{"PublicIP":"203.0.113.66","BackendType":"host-gw"}"#,
                    Some(LEASE_TTL),
                );
                self.strangers.insert(key.clone());
                format!("a stranger takes {key}")
            }
            _ => {
                let hours = self.dice.random_range(1..=24);
                advance(Duration::from_secs(hours * 3600)).await;
                format!("{hours} hours pass at once")
            }
        }
    }

    /// What a supervisor of processes does: who ended is started again.
    fn supervise(&mut self) {
        for node in &mut self.nodes {
            if node.has_ended() {
                node.start();
            }
        }
    }

    fn nobody_shares_a_subnet(&self) -> Result<()> {
        let mut owners: BTreeMap<String, std::net::Ipv4Addr> = BTreeMap::new();
        for node in self.nodes.iter().filter(|node| !self.away && node.knows_since(TOLD)) {
            let Some(subnet) = node.subnet() else { continue };
            if let Some(other) = owners.insert(subnet.clone(), node.ip) {
                bail!("{} and {other} both have {subnet}", node.ip);
            }
        }
        Ok(())
    }

    fn end_all_trouble(&mut self) {
        if std::mem::take(&mut self.away) {
            self.store.mend();
        }
        let stranger = |value: &str| value.contains("203.0.113.66") || !value.contains("\"PublicIP\":\"");
        for (key, value) in self.store.entries() {
            if self.strangers.contains(&key) && stranger(&value) {
                self.store.delete(&key);
            }
        }
        for node in &mut self.nodes {
            node.trouble(Trouble::None);
        }
    }

    fn has_converged(&self) -> Result<()> {
        let entries: BTreeMap<String, String> = self.store.entries().into_iter().collect();
        ensure!(entries.len() == self.nodes.len(), "{} leases for {} nodes", entries.len(), self.nodes.len());
        let mut owners = BTreeMap::new();
        for (key, value) in &entries {
            let value: serde_json::Value =
                serde_json::from_str(value).with_context(|| format!("{key}: {value}"))?;
            let ip = value["PublicIP"].as_str().context("an address")?.to_owned();
            ensure!(owners.insert(ip.clone(), key.replace('-', "/")).is_none(), "{ip} has two leases");
        }
        for node in &self.nodes {
            let ip = node.ip.to_string();
            let reasons = node.reasons();
            ensure!(reasons.is_empty(), "{ip} is not ready: {reasons:?}");
            let own = owners.get(&ip).with_context(|| format!("{ip} has no lease"))?;
            ensure!(node.subnet().as_ref() == Some(own), "{ip} thinks it has {:?}, not {own}", node.subnet());
            let mut wanted: Vec<String> = owners
                .iter()
                .filter(|(other, _)| **other != ip)
                .map(|(other, subnet)| format!("{subnet} via {other}"))
                .collect();
            wanted.sort();
            let routes = node.routes();
            ensure!(routes == wanted, "{ip} has {} routes, not {}:\n{routes:?}", routes.len(), wanted.len());
        }
        Ok(())
    }
}
