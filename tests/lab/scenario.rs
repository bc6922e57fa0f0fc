//! A test on a lab of its own: built for it, gone after it; when it fails, or an agent never came to rest, the message
//! has the agents' last words.

use std::process::ExitCode;

use anyhow::Result;
use libtest_mimic::{Failed, Trial};

use crate::{
    namespace::private_mounts,
    privilege,
    topology::{Lab, Plan},
};

/// The data paths of the udp backend, best first.
pub const TIERS: [&str; 3] = ["xdp", "tc", "tun"];

/// Those that outlive the agent.
pub const IN_KERNEL: [&str; 2] = ["xdp", "tc"];

/// A trial named `sentence` that builds `plan` and runs `test` on it.
pub fn scenario(
    sentence: impl Into<String>,
    plan: Plan,
    test: impl FnOnce(&mut Lab) -> Result<()> + Send + 'static,
) -> Trial {
    Trial::test(sentence, move || {
        let mut lab = plan.build().map_err(|e| Failed::from(format!("{e:#}")))?;
        let result = test(&mut lab);
        lab.verdict(result).map_err(|e| Failed::from(format!("{e:#}")))
    })
}

/// For each of these tiers a trial named `<sentence>_over_<tier>`, on two hosts of which both agents have it. `name` is the
/// lab's.
pub fn over(
    tiers: &[&'static str],
    sentence: &str,
    name: &str,
    test: impl Fn(&mut Lab, &'static str) -> Result<()> + Copy + Send + 'static,
) -> Vec<Trial> {
    let trial = |tier: &'static str| {
        let plan = Lab::new(&format!("{name}-{tier}"));
        scenario(format!("{sentence}_over_{tier}"), plan, move |lab| {
            lab.bring_up(&[tier; 2])?;
            test(lab, tier)
        })
    };
    tiers.iter().copied().map(trial).collect()
}

/// What a test binary's `main` returns: mounts become the process's own (call it before any thread exists), then the
/// trials run behind the gate of [`privilege`].
pub fn run(trials: Vec<Trial>) -> ExitCode {
    run_when(privilege::require, trials)
}

/// [`run`], one after the other, for trials that share a lab, or that each need the machine for themselves.
pub fn run_in_order(trials: Vec<Trial>) -> ExitCode {
    with_own_mounts(|| privilege::run_in_order(trials))
}

/// [`run`] for trials that need less, or more, than root and eBPF programs.
pub fn run_when(ready: fn() -> Result<(), String>, trials: Vec<Trial>) -> ExitCode {
    with_own_mounts(|| privilege::run_when(ready, trials))
}

fn with_own_mounts(run: impl FnOnce() -> ExitCode) -> ExitCode {
    // Each host of a lab mounts a bpffs.
    if privilege::require_root().is_ok()
        && let Err(e) = private_mounts()
    {
        eprintln!("error: {e:#}");
        return ExitCode::FAILURE;
    }
    run()
}
