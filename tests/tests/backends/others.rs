//! host-gw and alloc.

use std::{
    fs,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use flannel_tests::{
    agent::AgentOptions,
    probe::ping::Ping,
    scenario::scenario,
    topology::{Host, Lab},
};
use libtest_mimic::Trial;

use crate::traffic::{all_pairs, datagrams, pings, stream};

const HOST_GW: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#;
const ALLOC: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"alloc"}}"#;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        scenario(
            "host_gw_routes_to_every_peer_with_the_underlays_mtu",
            Lab::new("host-gw").hosts(3).config(HOST_GW),
            host_gw,
        ),
        scenario(
            "host_gw_puts_a_deleted_route_back_within_a_second",
            Lab::new("host-gw-heal").hosts(2).config(HOST_GW),
            healing,
        ),
        scenario("alloc_leases_and_touches_nothing", Lab::new("alloc").config(ALLOC), alloc),
        scenario(
            "a_network_of_only_ipv6_is_leased_routed_healed_and_renumbered",
            Lab::new("only-ipv6").hosts(2).config(&only_ipv6("host-gw")),
            routes_only_ipv6,
        ),
        scenario(
            "of_only_ipv6_alloc_leases_and_udp_says_why_it_can_not",
            Lab::new("only-ipv6-alloc").hosts(1).config(&only_ipv6("udp")),
            leases_only_ipv6,
        ),
    ]
}

fn only_ipv6(backend: &str) -> String {
    format!(
        r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:244::/48","Backend":{{"Type":"{backend}"}}}}"#
    )
}

/// Hosts get `fd99::11` and so on, and an IPv6 default route; IPv4 stays, as the way to etcd.
fn speak_ipv6(lab: &Lab) -> Result<()> {
    for (number, host) in (1..).zip(lab.hosts()) {
        // Nobody has the addresses already, and none is waited for.
        for (key, value) in [("accept_dad", "0"), ("disable_ipv6", "0")] {
            for device in ["all", "eth0", "lo"] {
                host.netns().sysctl(&format!("net.ipv6.conf.{device}.{key}"), value)?;
            }
        }
        host.netns().sysctl("net.ipv6.conf.all.forwarding", "1")?;
        host.netns().ip(&format!("addr add fd99::1{number}/64 dev eth0 nodad"))?;
        host.netns().ip("-6 route add default via fd99::1 dev eth0")?;
    }
    Ok(())
}

/// `FLANNEL_IPV6_SUBNET` without its length, from a file that has exactly what flanneld would write.
fn first_ipv6(host: &Host) -> Result<String> {
    let text = fs::read_to_string(host.files().subnet_env())?;
    let subnet = text.lines().find_map(|line| line.strip_prefix("FLANNEL_IPV6_SUBNET="));
    let first = subnet.and_then(|subnet| subnet.strip_suffix("/64")).with_context(|| text.clone())?;
    let wanted = format!(
        "FLANNEL_IPV6_NETWORK=fd00:244::/48\nFLANNEL_IPV6_SUBNET={first}/64\nFLANNEL_MTU=1500\nFLANNEL_IPMASQ=false\n"
    );
    ensure!(text == wanted, "{text}");
    Ok(first.to_owned())
}

fn routes_only_ipv6(lab: &mut Lab) -> Result<()> {
    speak_ipv6(lab)?;
    for index in 0..2 {
        lab.host_mut(index).start_agent(&AgentOptions::new()?)?;
    }
    lab.wait_connected()?;
    let limit = Duration::from_secs(10);
    let mut firsts = Vec::new();
    for (index, node) in [(0, "fd99::12"), (1, "fd99::11")] {
        let host = lab.host(index);
        let peers = host.status()?.peers;
        let [peer] = &peers[..] else { bail!("{} has the peers {peers:?}", host.name()) };
        ensure!(peer.public_ip == node, "{peer:?}");
        host.wait_output("ip -6 route", &format!("{} via {node} dev eth0", peer.subnet), limit)?;
        let first = first_ipv6(host)?;
        host.netns().ip(&format!("addr add {first}/128 dev lo"))?;
        let key = format!("0.0.0.0-0&{}-64", first.trim_end_matches('1'));
        let value = format!(
            r#"{{"PublicIP":"0.0.0.0","PublicIPv6":"fd99::1{}","BackendType":"host-gw"}}"#,
            index + 1
        );
        ensure!(
            lab.datastore().leases()?.contains(&(key.clone(), value)),
            "{key}: {:?}",
            lab.datastore().leases()?
        );
        firsts.push((first, key, peer.subnet.clone()));
    }
    let [(first, key, others), (far, _, own)] = &firsts[..] else { bail!("two hosts") };
    let ping = format!("ping -6 -c 5 -i 0.05 -W 1 -I {first} {far}");
    lab.host(0).netns().output(&ping)?;

    // A route that somebody deletes is back at once.
    lab.host(0).netns().ip(&format!("-6 route del {others}"))?;
    lab.host(0).wait_output("ip -6 route", &format!("{others} via fd99::12"), Duration::from_secs(1))?;
    // So is a lease, under the same subnet.
    ensure!(lab.datastore().delete(&format!("subnets/{key}"))?);
    // The other node may not have noticed yet that it was gone: the store is asked first.
    let started = Instant::now();
    while !lab.datastore().leases()?.iter().any(|(there, _)| there == key) {
        ensure!(started.elapsed() < limit, "{key} is not taken again: {:?}", lab.datastore().leases()?);
        sleep(Duration::from_millis(20));
    }
    lab.host(1).agent()?.wait_status("its peer again", |status| status.peers.len() == 1)?;
    // And the same after a crash.
    lab.host_mut(0).agent_mut()?.crash()?;
    lab.host_mut(0).start_agent(&AgentOptions::new()?)?.wait_ready()?;
    ensure!(first_ipv6(lab.host(0))? == *first);
    // The node gets another address and keeps its subnet.
    lab.host(0).netns().ip("addr add fd99::21/64 dev eth0 nodad")?;
    lab.host(0).netns().ip("addr del fd99::11/64 dev eth0")?;
    lab.host(1).wait_output("ip -6 route", &format!("{own} via fd99::21 dev eth0"), limit)?;
    ensure!(first_ipv6(lab.host(0))? == *first);
    lab.host(0).netns().output(&ping).map(drop)
}

fn leases_only_ipv6(lab: &mut Lab) -> Result<()> {
    speak_ipv6(lab)?;
    let agent = lab.host_mut(0).start_agent(&AgentOptions::new()?)?;
    agent.wait_not_ready("backend udp carries IPv4 only")?;
    lab.datastore().put_config(&only_ipv6("alloc"))?;
    lab.host_mut(0).agent_mut()?.wait_ready()?;
    let key = format!("0.0.0.0-0&{}-64", first_ipv6(lab.host(0))?.trim_end_matches('1'));
    let value = r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd99::11"}"#.to_owned();
    ensure!(lab.datastore().leases()? == [(key, value)], "{:?}", lab.datastore().leases()?);
    Ok(())
}

fn bring_up(lab: &mut Lab) -> Result<()> {
    let options = vec![AgentOptions::new()?; lab.hosts().len()];
    lab.bring_up_with(&options)
}

fn host_gw(lab: &mut Lab) -> Result<()> {
    bring_up(lab)?;
    for host in lab.hosts() {
        let status = host.status()?;
        ensure!(status.backend == "host-gw" && status.tunnels.is_empty(), "{status:?}");
        ensure!(host.agent()?.subnet_env()?.mtu == 1500);
        let routes = host.netns().ip("route show")?;
        for peer in lab.hosts().iter().filter(|peer| peer.address() != host.address()) {
            let base = peer.agent()?.subnet_env()?.base();
            let route = format!("{base}/24 via {} dev eth0", peer.address());
            ensure!(routes.contains(&route), "{} has no route `{route}`:\n{routes}", host.name());
        }
    }
    all_pairs(lab, pings)?;
    all_pairs(lab, |from, to| stream(from, to, 8 << 20))?;
    all_pairs(lab, |from, to| if from.address() < to.address() { datagrams(from, to) } else { Ok(()) })?;

    // flanneld's own words, so that it and we can share a cluster.
    for (key, value) in lab.datastore().leases()? {
        let host = lab
            .hosts()
            .iter()
            .find(|host| host.agent().and_then(|a| a.subnet_env()).is_ok_and(|env| env.key() == key))
            .with_context(|| format!("nobody holds {key}"))?;
        let wanted =
            format!(r#"{{"PublicIP":"{}","PublicIPv6":null,"BackendType":"host-gw"}}"#, host.address());
        ensure!(value == wanted, "{key} holds {value}, not {wanted}");
    }
    Ok(())
}

fn healing(lab: &mut Lab) -> Result<()> {
    bring_up(lab)?;
    let (host, peer) = (lab.host(0), lab.host(1));
    let base = peer.agent()?.subnet_env()?.base();
    let limit = Duration::from_secs(1);
    for damage in [
        format!("route del {base}/24"),
        format!("route replace {base}/24 via 10.99.0.1"),
        format!("route replace blackhole {base}/24"),
    ] {
        host.netns().ip(&damage)?;
        host.wait_output(&format!("ip route show {base}/24"), &format!("via {}", peer.address()), limit)
            .with_context(|| format!("after `ip {damage}`"))?;
    }
    lab.ping_all_pairs(2)
}

fn alloc(lab: &mut Lab) -> Result<()> {
    let before: Vec<String> =
        lab.hosts().iter().map(|host| host.netns().ip("route show")).collect::<Result<_>>()?;
    for index in 0..2 {
        lab.host_mut(index).start_agent(&AgentOptions::new()?)?;
    }
    lab.wait_connected()?;
    for (host, before) in lab.hosts().iter().zip(before) {
        ensure!(host.agent()?.subnet_env()?.mtu == 1500);
        ensure!(host.netns().ip("route show")? == before, "{} got routes", host.name());
        ensure!(!host.netns().has_device("flannel0"));
    }
    ensure!(lab.datastore().leases()?.len() == 2);
    for index in 0..2 {
        lab.host_mut(index).attach_pod()?;
    }
    let (a, b) = (lab.host(0).pod()?, lab.host(1).pod()?);
    let report = Ping::new(&a.netns, b.address).count(1).run()?;
    ensure!(report.received == 0, "alloc carries no packets, but: {report}");
    Ok(())
}
