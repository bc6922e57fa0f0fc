//! Nodes that are as they should be: what is written, what is read, what is left alone.

use std::{fs, thread::sleep, time::Duration};

use anyhow::{Result, ensure};
use flannel_tests::{scenario::scenario, topology::Lab};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use super::{Cluster, PREFIX, annotation, network_unavailable, recorded, version};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        scenario(
            "nodes_are_written_as_flanneld_writes_them_and_pods_reach_each_other",
            Lab::new("kube"),
            as_recorded,
        ),
        scenario("addresses_in_annotations_go_before_our_own", Lab::new("kube-addresses"), addresses),
        scenario("nodes_come_and_go_move_and_are_none_of_ours", Lab::new("kube-others").hosts(1), others),
        scenario("both_families_of_pod_cidrs_are_leased_and_routed", Lab::new("kube-dual"), both_families),
        scenario("pod_cidrs_of_only_ipv6_are_leased_and_routed", Lab::new("kube-only-ipv6"), only_ipv6),
        scenario("a_pod_finds_its_node_by_its_own_name", Lab::new("kube-pod").hosts(1), by_pod),
    ]
}

/// The Node after our start is the one after flanneld's, where flannel has a say, and a second start writes nothing.
fn as_recorded(lab: &mut Lab) -> Result<()> {
    let cluster = Cluster::start(lab)?;
    cluster.bring_up(lab)?;
    lab.ping_all_pairs(3)?;
    let up = |node: &Value| network_unavailable(node).is_some();
    let node = cluster.api.wait_node("h1", "to say that its network works", up)?;
    let wanted = recorded("node-h1.json")?;
    ensure!(
        node["metadata"]["annotations"] == wanted["metadata"]["annotations"],
        "annotations are {:#}",
        node["metadata"]["annotations"]
    );
    ensure!(
        network_unavailable(&node) == network_unavailable(&wanted),
        "the condition is {:?}",
        network_unavailable(&node)
    );
    let env = fs::read_to_string(lab.host(0).files().subnet_env())?;
    ensure!(
        env == "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n",
        "{env}"
    );

    lab.host_mut(0).agent_mut()?.crash()?;
    let options = cluster.options(lab.host(0))?;
    lab.host_mut(0).start_agent(&options)?;
    lab.wait_connected()?;
    sleep(Duration::from_secs(1));
    let again = cluster.api.node("h1")?;
    ensure!(version(&again) == version(&node), "the second start wrote to the Node: {again:#}");

    // Another controller sets the condition back, as clouds do when they adopt a Node.
    let taken = json!([{"type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated"}]);
    cluster.api.patch_node("h1/status", &json!({"status": {"conditions": taken}}))?;
    cluster.api.wait_node("h1", "to say again that its network works", |node| {
        network_unavailable(node) == network_unavailable(&wanted)
    })?;
    Ok(())
}

/// `fd99::1NUMBER` on the underlay, and the first address of the pod CIDR.
fn speak_ipv6(lab: &Lab) -> Result<()> {
    for (number, host) in (1..).zip(lab.hosts()) {
        for device in ["all", "eth0", "lo"] {
            host.netns().sysctl(&format!("net.ipv6.conf.{device}.disable_ipv6"), "0")?;
        }
        host.netns().sysctl("net.ipv6.conf.all.forwarding", "1")?;
        host.netns().ip(&format!("addr add fd99::1{number}/64 dev eth0 nodad"))?;
        host.netns().ip(&format!("addr add fd00:244:0:{number}::1/128 dev lo"))?;
    }
    Ok(())
}

fn only_ipv6(lab: &mut Lab) -> Result<()> {
    let cluster = Cluster::start(lab)?;
    speak_ipv6(lab)?;
    let config = |backend: &str| {
        format!(
            r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:244::/48","Backend":{{"Type":"{backend}"}}}}"#
        )
    };
    fs::write(&cluster.net_config, config("host-gw"))?;
    for number in 1..=2 {
        let cidr = format!("fd00:244:0:{number}::/64");
        cluster.api.create_node(&format!("h{number}"), &[&cidr], None)?;
    }
    for index in 0..2 {
        let options = cluster.options(lab.host(index))?.flag("--iface=eth0");
        lab.host_mut(index).start_agent(&options)?;
    }
    lab.wait_connected()?;
    for (suffix, wanted) in
        [("public-ip", "0.0.0.0"), ("public-ipv6", "fd99::11"), ("backend-type", "host-gw")]
    {
        let node = cluster.api.node("h1")?;
        ensure!(annotation(&node, suffix) == Some(wanted), "{suffix}: {node:#}");
    }
    let host = lab.host(0);
    host.wait_output("ip -6 route", "fd00:244:0:2::/64 via fd99::12", Duration::from_secs(10))?;
    host.netns().output("ping -6 -c 5 -i 0.05 -W 1 fd00:244:0:2::1")?;
    let wanted = "FLANNEL_IPV6_NETWORK=fd00:244::/48\nFLANNEL_IPV6_SUBNET=fd00:244:0:1::1/64\nFLANNEL_MTU=1500\n\
                  FLANNEL_IPMASQ=false\n";
    ensure!(fs::read_to_string(host.files().subnet_env())? == wanted);
    let lost = json!({"metadata": {"annotations": {format!("{PREFIX}/public-ipv6"): null}}});
    cluster.api.patch_node("h1", &lost)?;
    let written = |node: &Value| annotation(node, "public-ipv6") == Some("fd99::11");
    cluster.api.wait_node("h1", "to have its address again", written)?;

    // Where no other node needs the address, it is known all the same.
    lab.host_mut(1).agent_mut()?.crash()?;
    fs::write(&cluster.net_config, config("alloc"))?;
    let options = cluster.options(lab.host(1))?.flag("--iface=eth0");
    lab.host_mut(1).start_agent(&options)?.wait_ready()?;
    let node = cluster.api.node("h2")?;
    ensure!(annotation(&node, "public-ipv6") == Some("fd99::12"), "{node:#}");
    ensure!(annotation(&node, "backend-type") == Some(""), "{node:#}");
    Ok(())
}

fn both_families(lab: &mut Lab) -> Result<()> {
    let cluster = Cluster::start(lab)?;
    fs::write(
        &cluster.net_config,
        r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:244::/48","Backend":{"Type":"host-gw"}}"#,
    )?;
    for number in 1..=lab.hosts().len() {
        cluster.api.create_node(
            &format!("h{number}"),
            &[&format!("10.244.{number}.0/24"), &format!("fd00:244:0:{number}::/64")],
            Some(json!({"node.alpha.kubernetes.io/ttl": "0"})),
        )?;
    }
    speak_ipv6(lab)?;
    for index in 0..2 {
        let options = cluster.options(lab.host(index))?.flag("--iface=eth0");
        lab.host_mut(index).start_agent(&options)?;
    }
    lab.wait_connected()?;
    let node = cluster.api.node("h1")?;
    ensure!(annotation(&node, "public-ip") == Some("10.99.0.11"), "{node:#}");
    ensure!(annotation(&node, "public-ipv6") == Some("fd99::11"), "{node:#}");
    ensure!(annotation(&node, "backend-type") == Some("host-gw"), "{node:#}");
    let host = lab.host(0);
    let limit = Duration::from_secs(10);
    host.wait_output("ip route", "10.244.2.0/24 via 10.99.0.12", limit)?;
    host.wait_output("ip -6 route", "fd00:244:0:2::/64 via fd99::12", limit)?;
    host.netns().output("ping -6 -c 5 -i 0.05 -W 1 fd00:244:0:2::1")?;
    let env = fs::read_to_string(host.files().subnet_env())?;
    ensure!(
        env.contains("FLANNEL_IPV6_NETWORK=fd00:244::/48\nFLANNEL_IPV6_SUBNET=fd00:244:0:1::1/64\n"),
        "{env}"
    );
    // A peer that goes takes both of its routes.
    cluster.api.delete_node("h2")?;
    host.agent()?.wait_status("no peers", |status| status.peers.is_empty())?;
    let left = host.netns().output("ip -6 route")? + &host.netns().output("ip route")?;
    ensure!(!left.contains("fd99::12") && !left.contains("10.99.0.12"), "{left}");
    Ok(())
}

fn addresses(lab: &mut Lab) -> Result<()> {
    let cluster = Cluster::start(lab)?;
    // h1 is behind a NAT that only the operator knows of; h2's interface is chosen by an annotation.
    let overwrite = json!({format!("{PREFIX}/public-ip-overwrite"): "10.99.0.77"});
    cluster.api.create_node("h1", &["10.244.1.0/24"], Some(overwrite))?;
    lab.host(1).netns().ip("addr add 10.99.0.22/24 dev eth0")?;
    let own = json!({format!("{PREFIX}/node-public-ip"): "10.99.0.22"});
    cluster.api.create_node("h2", &["10.244.2.0/24"], Some(own))?;
    let options =
        [cluster.options(lab.host(0))?, cluster.options(lab.host(1))?.flag("--public-ip=10.99.0.12")];
    for (index, options) in options.iter().enumerate() {
        lab.host_mut(index).start_agent(options)?;
    }
    lab.wait_connected()?;
    for (name, address) in [("h1", "10.99.0.77"), ("h2", "10.99.0.22")] {
        let node = cluster.api.node(name)?;
        ensure!(
            annotation(&node, "public-ip") == Some(address),
            "{name}: {:#}",
            node["metadata"]["annotations"]
        );
    }
    let seen = lab.host(1).status()?.peers;
    ensure!(seen.iter().any(|peer| peer.public_ip == "10.99.0.77"), "{seen:?}");

    // The operator changes his mind while the agent runs.
    let changed =
        json!({"metadata": {"annotations": {format!("{PREFIX}/public-ip-overwrite"): "10.99.0.78"}}});
    cluster.api.patch_node("h1", &changed)?;
    lab.host(1).agent()?.wait_status("h1 at its new address", |status| {
        status.peers.iter().any(|peer| peer.public_ip == "10.99.0.78")
    })?;
    let h1 = lab.host_mut(0).agent_mut()?;
    h1.wait_ready()?;
    sleep(Duration::from_millis(500));
    // An address that is the operator's, not the agent's, is nothing to write again.
    let log = h1.log();
    ensure!(log.matches("the lease is renewed").count() <= 1, "{log}");
    Ok(())
}

fn others(lab: &mut Lab) -> Result<()> {
    let cluster = Cluster::start(lab)?;
    cluster.add_node(1)?;
    let managed = |ip: &str| {
        json!({format!("{PREFIX}/kube-subnet-manager"): "true", format!("{PREFIX}/backend-type"): "",
            format!("{PREFIX}/backend-data"): "null", format!("{PREFIX}/public-ip"): ip})
    };
    cluster.api.create_node("h2", &["10.244.2.0/24"], Some(managed("10.99.0.12")))?;
    // Nobody's, and one that can't be read: neither hides the others.
    cluster.api.create_node("plain", &["10.244.8.0/24"], Some(json!({"a": "b"})))?;
    cluster.api.create_node("broken", &["10.244.9.0/24"], Some(managed("nowhere")))?;
    let options = cluster.options(lab.host(0))?;
    let agent = lab.host_mut(0).start_agent(&options)?;
    let peers = |wanted: &[(&str, &str)]| {
        let wanted: Vec<(String, String)> = wanted.iter().map(|(s, a)| ((*s).into(), (*a).into())).collect();
        move |status: &flannel_tests::agent::Status| {
            let mut peers: Vec<_> =
                status.peers.iter().map(|peer| (peer.subnet.clone(), peer.public_ip.clone())).collect();
            peers.sort();
            peers == wanted
        }
    };
    agent.wait_ready()?;
    agent.wait_status("h2 alone", peers(&[("10.244.2.0/24", "10.99.0.12")]))?;
    ensure!(agent.log().contains("node broken"), "nothing said of the broken node:\n{}", agent.log());

    cluster.api.create_node("h3", &["10.244.3.0/24"], Some(managed("10.99.0.13")))?;
    agent
        .wait_status("h3 too", peers(&[("10.244.2.0/24", "10.99.0.12"), ("10.244.3.0/24", "10.99.0.13")]))?;
    let moved = json!({"metadata": {"annotations": {format!("{PREFIX}/public-ip"): "10.99.0.33"}}});
    cluster.api.patch_node("h3", &moved)?;
    agent.wait_status(
        "h3 moved",
        peers(&[("10.244.2.0/24", "10.99.0.12"), ("10.244.3.0/24", "10.99.0.33")]),
    )?;
    // A Node's pod CIDR can't change; its name comes back with another one.
    cluster.api.delete_node("h3")?;
    agent.wait_status("h3 gone", peers(&[("10.244.2.0/24", "10.99.0.12")]))?;
    cluster.api.create_node("h3", &["10.244.7.0/24"], Some(managed("10.99.0.33")))?;
    agent.wait_status(
        "h3 again",
        peers(&[("10.244.2.0/24", "10.99.0.12"), ("10.244.7.0/24", "10.99.0.33")]),
    )?;
    let unmanaged = json!({"metadata": {"annotations": {format!("{PREFIX}/kube-subnet-manager"): null}}});
    cluster.api.patch_node("h2", &unmanaged)?;
    agent.wait_status("h2 no longer flannel's", peers(&[("10.244.7.0/24", "10.99.0.33")]))?;

    // Ours are written again when somebody takes them away.
    let cleared = json!({"metadata": {"annotations": {format!("{PREFIX}/kube-subnet-manager"): null}}});
    cluster.api.patch_node("h1", &cleared)?;
    let written = |node: &Value| annotation(node, "kube-subnet-manager") == Some("true");
    cluster.api.wait_node("h1", "to be ours again", written)?;
    Ok(())
}

fn by_pod(lab: &mut Lab) -> Result<()> {
    let cluster = Cluster::start(lab)?;
    cluster.add_node(1)?;
    let pod = r#"{"metadata":{"name":"kube-flannel-ds-x"},"spec":{"nodeName":"h1","containers":[{"name":"a","image":"b"}]}}"#;
    let path = "/api/v1/namespaces/kube-flannel/pods";
    let answer = cluster.api.request("admin-token", "POST", path, Some(("application/json", pod)))?;
    ensure!(answer.status == 201, "{} {}", answer.status, answer.body);
    let options = cluster
        .options_with(&cluster.kubeconfig)?
        .env("POD_NAME", "kube-flannel-ds-x")
        .env("POD_NAMESPACE", "kube-flannel");
    lab.host_mut(0).start_agent(&options)?.wait_ready()?;
    ensure!(annotation(&cluster.api.node("h1")?, "public-ip") == Some("10.99.0.11"));
    Ok(())
}
