//! udp: three hosts, every pair of data paths, both directions.

use anyhow::{Result, ensure};
use flannel_tests::{
    agent::AgentOptions,
    scenario::scenario,
    topology::{Lab, PodLink, Underlay},
};
use libtest_mimic::Trial;

use crate::{
    TIERS,
    traffic::{all_pairs, datagrams, nothing_refused, pings, stream},
};

const STREAM: u64 = 16 << 20;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for tier in TIERS {
        trials.push(scenario(
            format!("three_hosts_on_{tier}_reach_each_other_with_every_kind_of_packet"),
            Lab::new(&format!("three-{tier}")).hosts(3),
            move |lab| everything(lab, &[tier; 3]),
        ));
        trials.push(scenario(
            format!("routed_pods_reach_each_other_over_{tier}"),
            Lab::new(&format!("routed-{tier}")).pods(PodLink::Routed),
            move |lab| everything(lab, &[tier; 2]),
        ));
        trials.push(scenario(
            format!("hosts_on_one_cable_reach_each_other_over_{tier}"),
            Lab::new(&format!("cable-{tier}")).underlay(Underlay::Direct),
            move |lab| everything(lab, &[tier; 2]),
        ));
    }
    trials.push(scenario(
        "hosts_on_different_tiers_understand_each_other",
        Lab::new("mixed").hosts(3),
        |lab| everything(lab, &TIERS),
    ));
    trials.push(scenario("auto_takes_tc_on_a_veth_and_says_why", Lab::new("auto"), auto));
    trials.push(scenario(
        "an_underlay_of_another_mtu_sets_the_overlays",
        Lab::new("mtu").mtu(1400),
        other_mtu,
    ));
    trials.push(scenario(
        "another_port_of_the_configuration_is_used_on_the_wire",
        Lab::new("port").config(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp","Port":9285}}"#),
        other_port,
    ));
    trials
}

fn everything(lab: &mut Lab, tiers: &[&str]) -> Result<()> {
    lab.bring_up(tiers)?;
    for (host, tier) in lab.hosts().iter().zip(tiers) {
        let status = host.status()?;
        ensure!(status.tier() == *tier, "{} was told {tier}: {}", host.name(), status.reasons());
        ensure!(!status.tunnels.iter().any(|tunnel| tunnel.reason.is_empty()), "no reason is given");
    }
    all_pairs(lab, pings)?;
    all_pairs(lab, |from, to| stream(from, to, STREAM))?;
    all_pairs(lab, datagrams)?;
    nothing_refused(lab)?;
    for (host, tier) in lab.hosts().iter().zip(tiers) {
        carried_by(host, tier)?;
    }
    Ok(())
}

/// The packets went the way the tier's name says, and were counted for each peer.
fn carried_by(host: &flannel_tests::topology::Host, tier: &str) -> Result<()> {
    let status = host.status()?;
    let way = match tier {
        "xdp" => "decap_xdp",
        "tc" => "decap_tc",
        _ => "decap_user",
    };
    ensure!(status.counted(way) > 1000, "{}: {way} is {}", host.name(), status.counted(way));
    if tier == "xdp" {
        let (decapsulated, delivered) = (status.counted("decap_xdp"), status.counted("mark_seen"));
        // GRO merges between the two programs, so the second sees fewer and larger packets.
        ensure!(delivered > 0 && delivered <= decapsulated, "{delivered} of {decapsulated} delivered");
    }
    for tunnel in &status.tunnels {
        for peer in &tunnel.peers {
            ensure!(
                peer.tx_packets > 0 && peer.rx_packets > 0,
                "{}: nothing counted for {}: {peer:?}",
                host.name(),
                peer.subnet
            );
        }
    }
    Ok(())
}

fn auto(lab: &mut Lab) -> Result<()> {
    lab.bring_up(&["auto"; 2])?;
    for host in lab.hosts() {
        let status = host.status()?;
        ensure!(status.tier() == "tc", "{}", status.reasons());
        ensure!(status.reasons().contains("eth0 is a veth"), "{}", status.reasons());
        let log = host.agent()?.log();
        ensure!(log.contains("udp datapath tc"), "the log does not say what was taken:\n{log}");
    }
    lab.ping_all_pairs(3)
}

fn other_mtu(lab: &mut Lab) -> Result<()> {
    lab.bring_up(&["auto", "tun"])?;
    for host in lab.hosts() {
        ensure!(host.agent()?.subnet_env()?.mtu == 1372);
        ensure!(host.netns().ip("link show dev flannel0")?.contains("mtu 1372"));
    }
    all_pairs(lab, pings)
}

fn other_port(lab: &mut Lab) -> Result<()> {
    let options = AgentOptions::new()?;
    lab.bring_up_with(&[options.clone().datapath("auto"), options.datapath("tun")])?;
    let host = lab.host(1);
    ensure!(host.netns().output("ss -lun")?.contains(&format!("{}:9285", host.address())));
    all_pairs(lab, pings)
}
