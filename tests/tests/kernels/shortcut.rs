//! What ends the shortcut past the pods' bridge and not every kernel has: VLANs on the bridge, and ebtables' own modules.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use flannel_tests::{
    probe::ping::Ping,
    topology::{Host, Lab},
};

use crate::tiers::{Choice, settle};

const LIMIT: Duration = Duration::from_secs(60);

/// A port that is in no VLAN gets nothing from the bridge: nor may it from us.
pub(crate) fn vlans(lab: &mut Lab, choice: &Choice) -> Result<()> {
    let host = lab.host(1);
    let port = &host.pod()?.port;
    host.netns().ip("link set cni0 type bridge vlan_filtering 1")?;
    left(host, "cni0 filters VLANs")?;
    lab.ping_all_pairs(2)?;
    host.netns().output(&format!("bridge vlan del dev {port} vid 1"))?;
    let (from, to) = (lab.host(0).pod()?, host.pod()?);
    let report = Ping::new(&from.netns, to.address).count(3).patience(Duration::from_secs(1)).run()?;
    ensure!(report.lost() == 3, "a pod whose port is in no VLAN was reached: {report}");
    host.netns().output(&format!("bridge vlan add dev {port} vid 1 pvid untagged"))?;
    host.netns().ip("link set cni0 type bridge vlan_filtering 0")?;
    settle(lab, choice)
}

/// Loaded is enough: what the rules are is not looked at.
pub(crate) fn ebtables(lab: &mut Lab, choice: &Choice) -> Result<()> {
    let host = lab.host(1);
    host.netns().output("modprobe ebtable_filter")?;
    left(host, "ebtables watches cni0 (module ebtable_filter)")?;
    lab.ping_all_pairs(2)?;
    host.netns().output("modprobe -r ebtable_filter")?;
    // Nothing tells of a module that goes; the next look at the host, which this brings, does.
    sleep(Duration::from_millis(500));
    for host in lab.hosts() {
        host.netns().ip("link set cni0 txqueuelen 999")?;
    }
    settle(lab, choice)
}

/// With the program that hung on it.
pub(crate) fn gone(lab: &mut Lab, choice: &Choice) -> Result<()> {
    let (host, env) = (lab.host(1), lab.host(1).agent()?.subnet_env()?);
    host.netns().ip("link del dev cni0")?;
    left(host, "no bridge has an address in")?;
    for line in [
        format!("link add cni0 mtu {} type bridge", env.mtu),
        format!("addr add {}/{} dev cni0", env.gateway, env.prefix),
        "link set cni0 up".to_owned(),
        format!("link set {} master cni0 up", host.pod()?.port),
    ] {
        host.netns().ip(&line)?;
    }
    let pod = host.pod()?;
    let started = Instant::now();
    while Ping::new(&pod.netns, pod.gateway).count(1).run()?.lost() > 0 {
        ensure!(started.elapsed() < LIMIT, "the pod does not reach {}", pod.gateway);
    }
    settle(lab, choice)
}

fn left(host: &Host, reason: &'static str) -> Result<()> {
    let fits = |status: &flannel_tests::agent::Status| {
        status.path() == "tc+gro" && status.reasons().contains(reason)
    };
    host.agent()?.wait_status(reason, fits).map(drop).with_context(|| format!("waiting for {reason:?}"))
}
