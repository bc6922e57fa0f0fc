//! udp: every way a packet takes through a node that is not simply pod to pod (`datapath.md` of the design: §1.2 and §2.4).

use std::net::{Ipv4Addr, SocketAddrV4};

use anyhow::{Context as _, Result, ensure};
use flannel_tests::{
    agent::{AgentOptions, Status},
    probe::{
        capture::{Capture, ipv4},
        ping::Ping,
        raw::send_packets,
        tcp::TcpPath,
    },
    scenario::{over, scenario},
    topology::{Host, Lab},
};
use libtest_mimic::Trial;

use crate::{
    TIERS,
    traffic::{PORT, all_pairs, pings, stream},
};

const STREAM: u64 = 4 << 20;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(over(&TIERS, "pods_and_hosts_reach_every_address_of_the_other_node", "paths", |lab, _| {
        every_address(lab)
    }));
    trials.extend(over(&TIERS, "forward_rules_see_every_packet", "forward", |lab, _| {
        forward_sees_everything(lab)
    }));
    trials.extend(over(&TIERS, "pods_of_the_underlays_mtu_are_told_the_tunnels", "larger", |lab, _| {
        larger_pods(lab)
    }));
    trials.extend(over(&TIERS, "a_node_costs_two_hops_of_ttl", "ttl", |lab, _| time_to_live(lab)));
    trials.extend(over(&TIERS, "a_destination_nobody_leases_is_not_sent_anywhere", "nobody", |lab, _| {
        nobody(lab)
    }));
    for tier in TIERS {
        trials.push(scenario(
            format!("strict_rp_filter_lets_the_overlay_pass_over_{tier}"),
            Lab::new(&format!("strict-{tier}")).rp_filter(1),
            move |lab| {
                lab.bring_up(&[tier; 2])?;
                for host in lab.hosts() {
                    let seen = host.netns().read_sysctl("net.ipv4.conf.flannel0.rp_filter")?;
                    ensure!(seen == "1", "rp_filter of flannel0 is {seen}: the test would prove nothing");
                }
                all_pairs(lab, pings)?;
                all_pairs(lab, |from, to| stream(from, to, STREAM))
            },
        ));
        trials.push(scenario(
            format!("a_forged_sender_is_delivered_when_observed_and_dropped_when_enforced_over_{tier}"),
            Lab::new(&format!("forged-{tier}")),
            move |lab| forged(lab, tier),
        ));
    }
    trials
}

fn every_address(lab: &mut Lab) -> Result<()> {
    lab.host_mut(0).attach_pod()?;
    let (a, b) = (lab.host(0), lab.host(1));
    let (pod_a, pod_b) = (a.pod()?, b.pod()?);
    let reach = |from, to: Ipv4Addr, what: &str| -> Result<()> {
        let report = Ping::new(from, to).run()?;
        ensure!(report.lost() == 0, "{what}: {report}");
        Ok(())
    };
    let connect = |client, server, to: Ipv4Addr, what: &str| {
        let path = TcpPath::new(client, server, SocketAddrV4::new(to, PORT));
        path.transfer(STREAM).with_context(|| what.to_owned())
    };

    let before = a.status()?;
    let neighbour = a.pods().last().context("two pods")?;
    reach(&pod_a.netns, neighbour.address, "pod → pod on the same node")?;
    let after = a.status()?;
    ensure!(
        before.counted("encapsulated") == after.counted("encapsulated"),
        "traffic inside a node went through the tunnel"
    );

    // The kernel takes flannel0's address as source, which the other node routes back through the tunnel.
    reach(a.netns(), pod_b.address, "host → pod")?;
    let done = connect(a.netns(), &pod_b.netns, pod_b.address, "host → pod")?;
    let own = a.agent()?.subnet_env()?.base();
    ensure!(done.peer.ip() == own, "a host's connection came from {}, not from flannel0's {own}", done.peer);

    // Not overlay on the way there; the answer returns through the tunnel.
    reach(&pod_a.netns, b.address(), "pod → the other host")?;
    connect(&pod_a.netns, b.netns(), b.address(), "pod → the other host")?;

    for (what, address) in [("cni0", pod_b.gateway), ("flannel0", b.agent()?.subnet_env()?.base())] {
        let what = format!("pod → {what} of the other host");
        reach(&pod_a.netns, address, &what)?;
        connect(&pod_a.netns, b.netns(), address, &what)?;
    }
    reach(a.netns(), pod_b.gateway, "host → cni0 of the other host")
}

fn forward_sees_everything(lab: &mut Lab) -> Result<()> {
    // They count, and decide nothing.
    let rules =
        [("FORWARD -p icmp", 40), ("FORWARD -i flannel0 -p icmp", 20), ("FORWARD -o flannel0 -p icmp", 20)];
    for host in lab.hosts() {
        for (rule, _) in rules {
            host.netns().iptables(&format!("-A {rule}"))?;
        }
    }
    let report = Ping::new(&lab.host(0).pod()?.netns, lab.host(1).pod()?.address).count(20).run()?;
    ensure!(report.lost() == 0, "{report}");
    for host in lab.hosts() {
        for (rule, wanted) in rules {
            let seen = host.netns().iptables_packets(rule)?;
            ensure!(seen == wanted, "{}: {rule} saw {seen} packets, not {wanted}", host.name());
        }
    }
    Ok(())
}

/// Pods of the underlay's MTU, as Docker makes them without being told: the node answers for the tunnel.
fn larger_pods(lab: &mut Lab) -> Result<()> {
    let (a, b) = (lab.host(0), lab.host(1).pod()?.address);
    let pod = a.pod()?;
    for (netns, device) in [(&pod.netns, "eth0"), (a.netns(), pod.port.as_str()), (a.netns(), "cni0")] {
        netns.ip(&format!("link set {device} mtu 1500"))?;
    }
    let told = Ping::new(&pod.netns, b).packet(1473).dont_fragment().count(1).run()?;
    ensure!(told.received == 0 && told.said().contains("(mtu = 1472)"), "{told}");
    let host = Ping::new(a.netns(), b).packet(1473).dont_fragment().count(1).run()?;
    ensure!(host.received == 0 && host.said().contains("mtu=1472"), "{host}");
    let full = Ping::new(&pod.netns, b).packet(1472).dont_fragment().run()?;
    ensure!(full.lost() == 0, "{full}");
    let cut = Ping::new(&pod.netns, b).packet(1500).run()?;
    ensure!(cut.lost() == 0, "{cut}");
    let path = TcpPath::new(&pod.netns, &lab.host(1).pod()?.netns, SocketAddrV4::new(b, PORT));
    path.transfer(STREAM).map(drop)
}

fn time_to_live(lab: &mut Lab) -> Result<()> {
    let (a, b) = (lab.host(0).pod()?, lab.host(1).pod()?);
    let seen = |sent: u8, count: u32| -> Result<Vec<u8>> {
        let capture = Capture::start(&b.netns, "eth0")?;
        Ping::new(&a.netns, b.address).count(count).ttl(sent).run()?;
        let frames = capture.finish()?;
        let from = a.address.octets();
        Ok(frames
            .iter()
            .filter_map(|frame| ipv4(frame))
            .filter(|packet| packet.get(12..16) == Some(from.as_slice()))
            .filter_map(|packet| packet.get(8).copied())
            .collect())
    };
    // Routed on both nodes, and lowered by one on entry to and exit from the tunnel, as by flanneld.
    ensure!(seen(64, 2)? == [60, 60]);
    ensure!(seen(5, 1)? == [1]);
    // It runs out at the end of the tunnel at the latest.
    ensure!(seen(3, 1)?.is_empty());
    ensure!(seen(2, 1)?.is_empty());
    Ok(())
}

/// A host sends into the tunnel what does not come out of its subnet.
fn forged(lab: &mut Lab, tier: &str) -> Result<()> {
    let options = AgentOptions::new()?.datapath(tier);
    lab.bring_up_with(&[options.clone(), options.clone()])?;
    let target = lab.host(1).pod()?.address;
    let stranger = Ipv4Addr::new(10, 244, 255, 250);
    // Of three, when the second host has counted them under this name.
    let arrived = |lab: &Lab, name: &str| -> Result<usize> {
        let before = lab.host(1).status()?.counted(name);
        let capture = Capture::start(&lab.host(1).pod()?.netns, "eth0")?;
        send_packets(lab.host(0).netns(), &vec![forged_packet(stranger, target); 3])?;
        let all = |status: &Status| status.counted(name) >= before + 3;
        let counted = lab.host(1).agent()?.wait_status(name, all)?.counted(name) - before;
        ensure!(counted == 3, "{name} grew by {counted}");
        let frames = capture.finish()?;
        let from = stranger.octets();
        Ok(frames
            .iter()
            .filter_map(|frame| ipv4(frame))
            .filter(|packet| packet.get(12..16) == Some(from.as_slice()))
            .count())
    };

    ensure!(arrived(lab, "source_observed")? == 3, "observe is the default and delivers");

    lab.host_mut(1).start_agent(&options.flag("--udp-source-check=enforce"))?;
    lab.wait_connected()?;
    ensure!(arrived(lab, "source_refused")? == 0, "enforce delivers a forged sender");
    lab.ping_all_pairs(3)
}

/// UDP from `source` to the discard port, TTL 64, checksum 0 (none).
fn forged_packet(source: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 36, 0, 1, 0, 0, 64, 17, 0, 0];
    packet.extend_from_slice(&source.octets());
    packet.extend_from_slice(&target.octets());
    packet.extend_from_slice(&[0x30, 0x39, 0, 9, 0, 16, 0, 0]);
    packet.extend_from_slice(b"forgery!");
    packet
}

fn nobody(lab: &mut Lab) -> Result<()> {
    let host: &Host = lab.host(0);
    let capture = Capture::start(lab.switch(), "sw-h1")?;
    let free = Ipv4Addr::new(10, 244, 255, 9);
    let report = Ping::new(&host.pod()?.netns, free).count(2).run()?;
    ensure!(report.received == 0, "{report}");
    let wanted = free.octets();
    let leaked = capture.finish()?;
    let leaked = leaked.iter().filter(|frame| frame.windows(4).any(|w| w == wanted)).count();
    ensure!(leaked == 0, "{leaked} packets for {free} left the node");
    Ok(())
}
