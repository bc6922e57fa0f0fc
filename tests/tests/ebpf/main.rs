//! The eBPF programs packet by packet: rows of packet, settings, verdict, packet out and counters through
//! `BPF_PROG_TEST_RUN` (`decap`, `others`), and single packets over real interfaces in a network namespace for what a
//! test run cannot show (`wire`).

mod cost;
mod decap;
mod others;
mod packets;
mod wire;

use std::{env, process::ExitCode};

use libtest_mimic::{Failed, Trial};

fn main() -> ExitCode {
    let mut trials = others::trials();
    trials.extend(decap::trials());
    trials.extend(wire::trials());
    // Measurements are no tests: they must not be counted as passed when nothing was measured.
    if env::args().any(|argument| argument == "--bench") {
        trials.extend(cost::trials());
    }
    flannel_tests::privilege::run(trials)
}

/// A trial from a function that fails with an error; a panic is a failure as well.
fn trial(name: &str, test: fn() -> anyhow::Result<()>) -> Trial {
    Trial::test(name, move || test().map_err(|e| Failed::from(format!("{e:#}"))))
}
