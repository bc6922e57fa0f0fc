//! What a kernel must be good for: the real agent on two hosts, on every tier it has there. The part of the tests that
//! `cargo xtask vm` runs on every kernel of its matrix, and `cargo xtask test` on this one.
//!
//! Emulated, everything takes ten times as long, and most of that would go into starting etcd and building hosts. So all
//! tests share one lab (two where network cards are lent), one after the other as they are listed, each beginning with
//! agents of its own; after a failure the next one gets a new lab. What is expected of which kernel is in `expected.rs`.

mod expected;
mod hosts;
mod networks;
mod shortcut;
mod tiers;

use std::process::ExitCode;

use flannel_tests::{
    scenario::run_in_order,
    topology::{Underlay, cards},
};

fn main() -> ExitCode {
    let hosts = hosts::Hosts::on(Underlay::Bridge);
    let mut trials = tiers::trials(&hosts);
    trials.push(networks::trial());
    // The guests of `cargo xtask vm` have some.
    let with_cards = hosts::Hosts::on(Underlay::Cards);
    if cards::are_lent() {
        trials.extend(tiers::trials_on_cards(&with_cards));
        trials.push(networks::trial_on_cards(&with_cards));
    }
    let code = run_in_order(trials);
    drop((hosts, with_cards));
    code
}
