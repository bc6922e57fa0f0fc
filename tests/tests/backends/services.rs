//! udp under kube-proxy-like rules: addresses translated in front of and behind the tunnel, with a rule that drops what
//! conntrack finds INVALID. A data path that bypasses netfilter on one side only fails here.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use flannel_tests::{agent::AgentOptions, probe::tcp::TcpPath, scenario::scenario, topology::Lab};
use libtest_mimic::Trial;

use crate::{
    TIERS,
    traffic::{PORT, nothing_refused},
};

const CLUSTER_IP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
const STREAM: u64 = 8 << 20;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for tier in TIERS {
        trials.push(scenario(
            format!("a_cluster_ip_works_from_pod_and_host_with_invalid_dropped_over_{tier}"),
            Lab::new(&format!("service-{tier}")),
            move |lab| {
                without_probes(lab, tier)?;
                cluster_ip(lab)
            },
        ));
        trials.push(scenario(
            format!("a_node_port_sends_back_into_the_tunnel_over_{tier}"),
            Lab::new(&format!("hairpin-{tier}")).hosts(3),
            move |lab| {
                without_probes(lab, tier)?;
                hairpin(lab)
            },
        ));
    }
    trials
}

/// Conntrack sees no request of the probes that ask how much a path carries, so it finds their answers INVALID, one about a
/// second after the first packet to a peer: with the MTU told there are none, and every other INVALID packet is a fault.
fn without_probes(lab: &mut Lab, tier: &str) -> Result<()> {
    let options = AgentOptions::new()?.datapath(tier).flag("--udp-mtu=1472");
    lab.bring_up_with(&vec![options; lab.hosts().len()])
}

fn drop_invalid(lab: &Lab) -> Result<()> {
    for host in lab.hosts() {
        host.netns().iptables("-A FORWARD -m conntrack --ctstate INVALID -j DROP")?;
        host.netns().iptables("-A INPUT -m conntrack --ctstate INVALID -j DROP")?;
    }
    Ok(())
}

fn none_invalid(lab: &Lab) -> Result<()> {
    // What is late is seen too.
    sleep(Duration::from_millis(1500));
    for host in lab.hosts() {
        for chain in ["FORWARD", "INPUT"] {
            let rule = format!("{chain} -m conntrack --ctstate INVALID -j DROP");
            let dropped = host.netns().iptables_packets(&rule)?;
            ensure!(dropped == 0, "{}: conntrack found {dropped} packets INVALID in {chain}", host.name());
        }
    }
    Ok(())
}

fn cluster_ip(lab: &mut Lab) -> Result<()> {
    drop_invalid(lab)?;
    let (a, b) = (lab.host(0), lab.host(1));
    let server = b.pod()?;
    let backend = SocketAddrV4::new(server.address, PORT);
    for chain in ["PREROUTING", "OUTPUT"] {
        a.netns().iptables(&format!(
            "-t nat -A {chain} -d {CLUSTER_IP}/32 -p tcp --dport 80 -j DNAT --to-destination {backend}"
        ))?;
    }
    // A host asks with its underlay address, chosen before the translation; kube-proxy masquerades it.
    a.netns().iptables("-t nat -A POSTROUTING -o flannel0 ! -s 10.244.0.0/16 -j MASQUERADE")?;

    let service = SocketAddrV4::new(CLUSTER_IP, 80);
    let pod = a.pod()?;
    let done = TcpPath::new(&pod.netns, &server.netns, backend)
        .by_way_of(service)
        .transfer(STREAM)
        .context("pod → ClusterIP")?;
    ensure!(done.peer.ip() == pod.address, "the server sees {}, not the pod", done.peer);
    TcpPath::new(a.netns(), &server.netns, backend)
        .by_way_of(service)
        .transfer(STREAM)
        .context("host → ClusterIP")?;
    none_invalid(lab)?;
    nothing_refused(lab)
}

/// Node B gets a connection through the tunnel and passes it on through the tunnel, masqueraded: to a third node, and back
/// to the node it came from.
fn hairpin(lab: &mut Lab) -> Result<()> {
    drop_invalid(lab)?;
    lab.host_mut(0).attach_pod()?;
    let (a, b, c) = (lab.host(0), lab.host(1), lab.host(2));
    let node_port = b.agent()?.subnet_env()?.base();
    b.netns().iptables("-t nat -A POSTROUTING -o flannel0 -p tcp --dport 5001 -j MASQUERADE")?;
    let client = a.pod()?;
    let servers = [("a third node", c.pod()?), ("the same node", a.pods().last().context("two pods")?)];
    for (port, (what, server)) in (30080..).zip(servers) {
        let backend = SocketAddrV4::new(server.address, PORT);
        b.netns().iptables(&format!(
            "-t nat -A PREROUTING -d {node_port}/32 -p tcp --dport {port} -j DNAT --to-destination {backend}"
        ))?;
        let done = TcpPath::new(&client.netns, &server.netns, backend)
            .by_way_of(SocketAddrV4::new(node_port, port))
            .transfer(STREAM)
            .with_context(|| format!("by way of node {} to {what}", b.name()))?;
        ensure!(done.peer.ip() == node_port, "not masqueraded: {}", done.peer);
    }
    none_invalid(lab)
}
