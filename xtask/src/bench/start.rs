//! From the start of the process to `READY=1`: on a host that never had a lease, and on the same host again after a
//! crash, when lease, device, routes and programs are there already.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use flannel_tests::{agent::AgentOptions, readiness::Readiness, topology::Lab};

use super::{Bench, NAME, figures::Summary};
use crate::progress::Step;

const LIMIT: Duration = Duration::from_secs(30);

/// Milliseconds.
pub(super) struct Started {
    pub(super) fresh: Summary,
    pub(super) reused: Summary,
}

/// One sample of each per round, every one on a host of its own.
pub(super) fn measure(bench: &Bench) -> Result<Started> {
    println!("\nstart to ready: etcd on the same machine, data path auto");
    let hosts = u8::try_from(bench.rounds.clamp(2, 20)).context("rounds")?;
    let step = Step::begin("lab");
    let mut lab = Lab::new(NAME).hosts(hosts).build()?;
    step.done(&format!("{hosts} hosts"));
    let step = Step::begin("starts");
    let readiness = Readiness::listen(lab.folder())?;
    let options = readiness.told_by(AgentOptions::with_binary(bench.agent.clone()));
    let (mut fresh, mut reused) = (Vec::new(), Vec::new());
    for index in 0..usize::from(hosts) {
        for samples in [&mut fresh, &mut reused] {
            step.note(&format!("host {}", index + 1));
            let started = Instant::now();
            lab.host_mut(index).start_agent(&options)?;
            let ready = readiness.wait(LIMIT).with_context(|| lab.logs())?;
            samples.push(ready.duration_since(started).as_secs_f64() * 1e3);
            let host = lab.host_mut(index);
            host.agent_mut()?.wait_ready()?;
            host.agent_mut()?.crash()?;
        }
    }
    let started = Started {
        fresh: Summary::of(fresh).context("no start was measured")?,
        reused: Summary::of(reused).context("no start was measured")?,
    };
    step.done(&format!("fresh lease {:.1} ms, reused {:.1} ms", started.fresh.median, started.reused.median));
    Ok(started)
}
