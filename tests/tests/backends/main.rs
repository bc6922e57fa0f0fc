//! Backends on whole hosts: the real agent on network namespaces, pods on bridges, and every byte compared.
//!
//! The hosts' underlay are veth pairs, so super-packets cross it whole; what a wire adds (cut frames) the offload matrix
//! brings in.

mod configuration;
mod looks;
mod narrow;
mod networks;
mod offloads;
mod others;
mod paths;
mod policies;
mod services;
mod shortcut;
mod tiers;

use std::process::ExitCode;

use flannel_tests::{
    pods as traffic,
    scenario::{TIERS, run},
};

fn main() -> ExitCode {
    let mut trials = tiers::trials();
    trials.extend(paths::trials());
    trials.extend(policies::trials());
    trials.extend(looks::trials());
    trials.extend(narrow::trials());
    trials.extend(networks::trials());
    trials.extend(services::trials());
    trials.extend(shortcut::trials());
    trials.extend(offloads::trials());
    trials.extend(others::trials());
    trials.extend(configuration::trials());
    run(trials)
}
