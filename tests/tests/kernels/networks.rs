//! Several udp networks on one node: their programs stand side by side on its interface, as TCX links and on clsact.

use std::{
    path::PathBuf,
    process::Command,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use flannel_tests::{
    agent::{AgentOptions, SubnetEnv},
    agent_binary,
    probe::ping::Ping,
    scenario::scenario,
    topology::{Host, Lab},
};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::hosts::{self, Hosts};

const LIMIT: Duration = Duration::from_secs(60);
const NETWORKS: [&str; 2] = ["blue", "green"];

pub(crate) fn trial() -> Trial {
    scenario(
        "two_udp_networks_on_one_node_are_both_carried_in_the_kernel_and_one_leaves_without_the_other",
        Lab::new("kernels-networks").without_config(),
        |lab| {
            let _turn = hosts::turn();
            two(lab, ["tc+gro"; 2])
        },
    )
}

/// Native XDP has room for one program on an interface: one network has it, and the other's packets pass it.
pub(crate) fn trial_on_cards(hosts: &Hosts) -> Trial {
    hosts.trial(
        "between_cards_two_udp_networks_are_carried_by_xdp_and_by_tc_and_the_one_that_stays_takes_xdp",
        |lab| {
            two(lab, ["tc+gro", "xdp"])?;
            for host in lab.hosts() {
                let started = Instant::now();
                while tiers(host, &NETWORKS[..1])? != ["xdp"] {
                    ensure!(started.elapsed() < LIMIT, "{}: {}", host.name(), tunnel(host, NETWORKS[0])?);
                    sleep(Duration::from_millis(50));
                }
            }
            Ok(())
        },
    )
}

/// The tiers that both are to have between them, in the order of their names.
fn two(lab: &mut Lab, wanted: [&str; 2]) -> Result<()> {
    for (name, json) in NETWORKS.into_iter().zip([
        r#"{"Network":"10.1.0.0/16"}"#,
        r#"{"Network":"10.2.0.0/16","Backend":{"Type":"udp","Port":8286}}"#,
    ]) {
        lab.datastore().put(&format!("{name}/config"), json)?;
    }
    for index in 0..lab.hosts().len() {
        let options = AgentOptions::new()?
            .flag("--watch-networks")
            .flag(format!("--subnet-dir={}", folder(lab.host(index)).display()));
        lab.host_mut(index).start_agent(&options)?.wait_ready()?;
    }
    for name in NETWORKS {
        let to = SubnetEnv::read(&folder(lab.host(1)).join(format!("{name}.env")))?.base();
        let started = Instant::now();
        loop {
            let report = Ping::new(lab.host(0).netns(), to).count(10).run()?;
            if report.lost() == 0 {
                break;
            }
            ensure!(started.elapsed() < LIMIT, "{name}: {report}");
        }
    }
    for host in lab.hosts() {
        let started = Instant::now();
        loop {
            let tiers = tiers(host, &NETWORKS)?;
            if tiers == wanted {
                break;
            }
            ensure!(started.elapsed() < LIMIT, "{}: {tiers:?}", host.name());
            sleep(Duration::from_millis(50));
        }
    }
    // One leaves, and takes nothing of the other's along.
    let to = SubnetEnv::read(&folder(lab.host(1)).join("blue.env"))?.base();
    let pings =
        Ping::new(lab.host(0).netns(), to).count(100_000).interval(Duration::from_millis(10)).start()?;
    lab.datastore().delete("green/config")?;
    for host in lab.hosts() {
        host.agent()?.wait_log("network green was deleted and is left")?;
        let started = Instant::now();
        while host.netns().output("ip addr")?.contains("10.2.") {
            ensure!(started.elapsed() < LIMIT, "{}: green's device stays", host.name());
            sleep(Duration::from_millis(50));
        }
    }
    sleep(Duration::from_millis(500));
    pings.wait_sent(21)?;
    let report = pings.stop()?;
    ensure!(report.sent > 20 && report.lost() == 0, "blue noticed it: {report}");
    Ok(())
}

/// The tiers of these networks' tunnels, in the order of their names. None takes the other for a stranger.
fn tiers(host: &Host, networks: &[&str]) -> Result<Vec<String>> {
    let mut tiers = Vec::new();
    for name in networks {
        let tunnel = tunnel(host, name)?;
        let reason = tunnel["reason"].as_str().unwrap_or_default();
        ensure!(!reason.contains("displaced") && !reason.contains("before ours"), "{name}: {reason}");
        tiers.push(tunnel["tier"].as_str().unwrap_or_default().to_owned());
    }
    tiers.sort();
    Ok(tiers)
}

fn tunnel(host: &Host, network: &str) -> Result<Value> {
    let output = Command::new(agent_binary()?)
        .args(["status", "--json", &format!("--network={network}"), "--socket"])
        .arg(host.files().socket())
        .output()
        .context("start `status`")?;
    let status: Value = serde_json::from_slice(&output.stdout)
        .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    Ok(status["tunnels"][0].clone())
}

fn folder(host: &Host) -> PathBuf {
    host.files().folder.join("networks")
}
