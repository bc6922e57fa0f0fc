//! host-gw and alloc.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use flannel_tests::{agent::AgentOptions, probe::ping::Ping, scenario::scenario, topology::Lab};
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
    ]
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
