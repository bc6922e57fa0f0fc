//! What a packet costs in the eBPF programs, with and without the check of its sender: as the kernel counts under a load
//! of small datagrams (`BPF_ENABLE_STATS`, which adds the price of reading the clock to each run), and through
//! `BPF_PROG_TEST_RUN` in the tests' benchmarks.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result};
use flannel_tests::{
    agent::AgentOptions,
    bpf::{RunTime, Statistics, run_time},
    probe::load::{Cpus, Ends, udp_flood},
    topology::{Host, Lab, Underlay},
};

use super::{Bench, NAME, figures::Summary};
use crate::progress::{Logged, Step, cargo};

const CHECKS: [&str; 3] = ["off", "observe", "enforce"];
const TIERS: [&str; 2] = ["xdp", "tc"];

/// Costs in nanoseconds.
pub(super) struct Programs {
    /// Under load: tier, program, source check.
    pub(super) loaded: BTreeMap<(&'static str, &'static str, &'static str), Summary>,
    /// Through test runs: name of the benchmark, median, half of the range between the quartiles.
    pub(super) test_runs: Vec<(String, f64, f64)>,
}

pub(super) fn measure(bench: &Bench) -> Result<Programs> {
    println!("\nprograms: nanoseconds per run");
    let cpus = Cpus::first_two()?;
    let mut samples: BTreeMap<_, Vec<f64>> = BTreeMap::new();
    for tier in TIERS {
        let step = Step::begin(&format!("{tier}, UDP of 64 bytes"));
        let mut lab = Lab::new(NAME).underlay(Underlay::Wire).build()?;
        let options = AgentOptions::with_binary(bench.agent.clone()).datapath(tier);
        lab.bring_up_with(&[options.clone(), options.clone()])?;
        let ends = Ends {
            client: lab.host(0).pod()?.netns.clone(),
            server: lab.host(1).pod()?.netns.clone(),
            address: lab.host(1).pod()?.address,
        };
        for round in 0..bench.rounds {
            for turn in 0..CHECKS.len() {
                let Some(check) = CHECKS.get((turn + round) % CHECKS.len()).copied() else { continue };
                step.note(&format!("round {}, source check {check}", round + 1));
                // Takes the running programs' place through their pinned links.
                let options = options.clone().flag(format!("--udp-source-check={check}"));
                for index in [0, 1] {
                    lab.host_mut(index).start_agent(&options)?;
                }
                lab.wait_connected()?;
                for (program, nanoseconds) in run(&lab, tier, &ends, (cpus, bench.flood()))? {
                    samples.entry((tier, program, check)).or_default().push(nanoseconds);
                }
            }
        }
        step.done("");
    }
    let loaded =
        samples.into_iter().filter_map(|(key, samples)| Some((key, Summary::of(samples)?))).collect();
    Ok(Programs { loaded, test_runs: test_runs()? })
}

/// One load, and nanoseconds per run of each program it passed.
fn run(lab: &Lab, tier: &str, ends: &Ends, load: (Cpus, Duration)) -> Result<Vec<(&'static str, f64)>> {
    let (sender, receiver) = (lab.host(0), lab.host(1));
    let mut programs =
        vec![("encap", pin(sender, "link_encap")?), ("ingress", pin(receiver, "link_ingress")?)];
    if tier == "xdp" {
        programs.push(("xdp", pin(receiver, "link_xdp")?));
    }
    let _on = Statistics::enable()?;
    let before = read(&programs)?;
    udp_flood::run(ends, load.0, load.1)?;
    let after = read(&programs)?;
    Ok(programs
        .iter()
        .zip(before.iter().zip(after))
        .filter_map(|((name, _), (before, after))| {
            let spent = after.since(*before);
            #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
            (spent.runs > 0).then(|| (*name, spent.nanoseconds as f64 / spent.runs as f64))
        })
        .collect())
}

fn read(programs: &[(&str, PathBuf)]) -> Result<Vec<RunTime>> {
    programs.iter().map(|(_, pin)| run_time(pin)).collect()
}

/// `<bpffs>/flannel/<device>/v<layout>/<link>`; before Linux 6.6 tc programs hang on no link.
fn pin(host: &Host, link: &str) -> Result<PathBuf> {
    let device = host.bpffs().context("no bpffs could be mounted")?.join("flannel/flannel0");
    let versions = std::fs::read_dir(&device).with_context(|| format!("read {}", device.display()))?;
    versions.flatten().map(|version| version.path().join(link)).find(|pin| pin.exists()).with_context(|| {
        format!("no {link} below {}; this part needs TCX links (Linux 6.6)", device.display())
    })
}

/// The benchmarks of `tests/tests/ebpf/cost.rs`.
fn test_runs() -> Result<Vec<(String, f64, f64)>> {
    let step = Step::begin("test runs");
    let mut command = cargo();
    command.args(["test", "--package", "flannel-tests", "--test", "ebpf", "--", "--bench", "cost::"]);
    let mut measured = Vec::new();
    let logged = Logged::run(&mut command, "bench-cost", |line| {
        step.note(line.trim_start());
        measured.extend(benchmark(line));
    })?;
    logged.require_success("the programs' benchmarks failed")?;
    step.done(&format!("{} benchmarks", measured.len()));
    Ok(measured)
}

/// `test cost::pass ... bench:           7 ns/iter (+/- 1)`
fn benchmark(line: &str) -> Option<(String, f64, f64)> {
    let (name, figures) = line.strip_prefix("test cost::")?.split_once("... bench:")?;
    let (median, spread) = figures.split_once("ns/iter (+/-")?;
    let number = |text: &str| text.trim().replace(',', "").parse().ok();
    Some((name.trim().to_owned(), number(median)?, number(spread.trim_end_matches(')'))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn benchmarks_are_read_as_libtest_prints_them() {
        let line = "test cost::tc_decap_repeated ... bench:       1,096 ns/iter (+/- 12)";
        assert_eq!(benchmark(line), Some(("tc_decap_repeated".to_owned(), 1096.0, 12.0)));
        assert_eq!(benchmark("test cost::something ... ok"), None);
    }
}
