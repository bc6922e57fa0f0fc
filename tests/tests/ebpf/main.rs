//! The eBPF programs packet by packet: rows of packet, settings, verdict, packet out and counters through
//! `BPF_PROG_TEST_RUN` (`decap`, `others`), and single packets over real interfaces in a network namespace for what a
//! test run cannot show (`wire`).

mod cost;
mod decap;
mod others;
mod packets;
mod wire;

use std::process::ExitCode;

use libtest_mimic::{Failed, Trial};

fn main() -> ExitCode {
    let trials = others::trials()
        .into_iter()
        .chain(decap::trials())
        .chain(wire::trials())
        .chain(cost::trials())
        .collect();
    flannel_tests::privilege::run(trials)
}

/// A trial from a function that fails with an error; a panic is a failure as well.
fn trial(name: &str, test: fn() -> anyhow::Result<()>) -> Trial {
    Trial::test(name, move || test().map_err(|e| Failed::from(format!("{e:#}"))))
}
