//! udp with offloads on and off, on the underlay and on the pods' side: nothing may be damaged, whatever the kernel leaves
//! to a device.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use flannel_tests::{scenario::scenario, topology::Lab};
use libtest_mimic::Trial;

use crate::{
    TIERS,
    traffic::{all_pairs, datagrams, nothing_refused, stream},
};

/// `tx` (checksums) first: the others depend on it.
const FEATURES: [&str; 4] = ["tx", "tso", "gso", "gro"];
const STREAM: u64 = 2 << 20;

pub(crate) fn trials() -> Vec<Trial> {
    TIERS
        .into_iter()
        .map(|tier| {
            scenario(
                format!("no_mix_of_offloads_damages_a_byte_over_{tier}"),
                Lab::new(&format!("offloads-{tier}")),
                move |lab| {
                    lab.bring_up(&[tier; 2])?;
                    matrix(lab, tier)
                },
            )
        })
        .collect()
}

/// XDP needs GRO on the underlay, and the agent puts it back each time that we take it away: no more often than an agent may
/// repair one thing before it is taken for one that never comes to rest (eight times in ten seconds, `lab/agent/unrest.rs`).
const PACE: Duration = Duration::from_millis(1500);

fn matrix(lab: &mut Lab, tier: &str) -> Result<()> {
    for (what, underlay, pods) in [("underlay", true, false), ("pods", false, true), ("both", true, true)] {
        for mask in 0..1u32 << FEATURES.len() {
            let settings: Vec<(&str, bool)> =
                (0..).zip(FEATURES).map(|(bit, name)| (name, mask & 1 << bit != 0)).collect();
            let started = Instant::now();
            set(lab, &settings, underlay, pods)?;
            check(lab).with_context(|| format!("{what}: {settings:?}"))?;
            if tier == "xdp" && underlay && settings.contains(&("gro", false)) {
                sleep(PACE.saturating_sub(started.elapsed()));
            }
        }
        set(lab, &FEATURES.map(|name| (name, true)), underlay, pods)?;
    }
    nothing_refused(lab)
}

fn set(lab: &Lab, settings: &[(&str, bool)], underlay: bool, pods: bool) -> Result<()> {
    for host in lab.hosts() {
        let pod = host.pod()?;
        for (name, on) in settings {
            let setting = format!("{name} {}", if *on { "on" } else { "off" });
            // A feature that needs another one stays off without it, and ethtool says so by its exit code.
            if underlay {
                let _ = host.netns().offload("eth0", &setting);
            }
            if pods {
                let _ = host.netns().offload(&pod.port, &setting);
                let _ = pod.netns.offload("eth0", &setting);
            }
        }
    }
    Ok(())
}

fn check(lab: &Lab) -> Result<()> {
    all_pairs(lab, |from, to| stream(from, to, STREAM))?;
    all_pairs(lab, datagrams)
}
