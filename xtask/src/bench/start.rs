//! From the start of the process to `READY=1`: on a host that never had a lease, and on the same host again after a
//! crash, when lease, device, routes and programs are there already. On the fresh host user space carries packets then,
//! and the kernel a little later: that is measured, too.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use flannel_tests::{
    agent::AgentOptions,
    readiness::Readiness,
    topology::{Host, Lab},
};

use super::{Bench, NAME, figures::Summary};
use crate::progress::Step;

const LIMIT: Duration = Duration::from_secs(30);

/// Milliseconds.
pub(super) struct Started {
    pub(super) fresh: Summary,
    /// From the same start until the programs are attached.
    pub(super) in_kernel: Summary,
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
    let (mut fresh, mut in_kernel, mut reused) = (Vec::new(), Vec::new(), Vec::new());
    let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
    for index in 0..usize::from(hosts) {
        for is_fresh in [true, false] {
            step.note(&format!("host {}", index + 1));
            let started = Instant::now();
            lab.host_mut(index).start_agent(&options)?;
            let ready = readiness.wait(LIMIT).with_context(|| lab.logs())?;
            let samples = if is_fresh { &mut fresh } else { &mut reused };
            samples.push(milliseconds(ready.duration_since(started)));
            if is_fresh {
                let attached = attached(lab.host(index)).with_context(|| lab.logs())?;
                in_kernel.push(milliseconds(attached.duration_since(started)));
            }
            let host = lab.host_mut(index);
            host.agent_mut()?.wait_ready()?;
            host.agent_mut()?.crash()?;
        }
    }
    let started = Started {
        fresh: Summary::of(fresh).context("no start was measured")?,
        in_kernel: Summary::of(in_kernel).context("no start was measured")?,
        reused: Summary::of(reused).context("no start was measured")?,
    };
    step.done(&format!(
        "fresh lease {:.1} ms, in the kernel after {:.1} ms, reused {:.1} ms",
        started.fresh.median, started.in_kernel.median, started.reused.median
    ));
    Ok(started)
}

/// When the program on the tunnel device, the last one, was attached.
fn attached(host: &Host) -> Result<Instant> {
    let device = host.bpffs().context("no bpffs could be mounted")?.join("flannel/flannel0");
    let begun = Instant::now();
    loop {
        let mut versions = std::fs::read_dir(&device).into_iter().flatten().flatten();
        if versions.any(|version| version.path().join("link_encap").exists()) {
            return Ok(Instant::now());
        }
        ensure!(begun.elapsed() < LIMIT, "no program is attached after {LIMIT:?}; did the agent choose tun?");
        sleep(Duration::from_micros(500));
    }
}
