//! Leases from a flannel server: it serves, it dies, it comes back; its nodes go on.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use flannel_tests::{
    agent::AgentOptions, agent_binary, lease_server::LeaseServer, scenario::scenario, topology::Lab,
};
use libtest_mimic::{Failed, Trial};

use crate::Traffic;

pub(crate) fn trials() -> Vec<Trial> {
    let binary = match agent_binary() {
        Ok(binary) => binary,
        Err(error) => {
            let error = format!("{error:#}");
            return vec![Trial::test("servers_need_the_agents_binary", move || Err(Failed::from(error)))];
        }
    };
    vec![
        scenario(
            "traffic_does_not_notice_that_the_server_is_killed_and_comes_back",
            Lab::new("server-dies").hosts(3).served_by(&binary),
            dies,
        ),
        scenario(
            "an_agent_waits_for_its_server_and_keeps_its_subnet",
            Lab::new("server-late").served_by(&binary),
            late,
        ),
        scenario(
            "a_node_of_a_server_and_one_of_its_etcd_reach_each_other",
            Lab::new("server-etcd"),
            beside_etcd,
        ),
    ]
}

fn dies(lab: &mut Lab) -> Result<()> {
    lab.bring_up(&["auto"; 3])?;
    let subnets = |lab: &Lab| -> Result<Vec<String>> {
        lab.hosts().iter().map(|host| Ok(host.status()?.subnet)).collect()
    };
    let before = subnets(lab)?;
    // Rest, before lines are counted: what the pods' bridge brings comes when the pods are there.
    for host in lab.hosts() {
        host.agent()?.wait_status("the shortcut", |status| status.ready && status.path() == "tc+bridge")?;
    }
    let lines = lab.host(0).agent()?.log().lines().count();
    let traffic = Traffic::start(lab)?;
    lab.server_mut()?.kill()?;
    sleep(Duration::from_secs(4));
    let said = lab.host(0).agent()?.log().lines().count() - lines;
    ensure!(said <= 6, "{said} lines logged in four seconds:\n{}", lab.host(0).agent()?.log());
    lab.server_mut()?.restart()?;
    lab.wait_connected()?;
    traffic.stop_without_loss()?;
    ensure!(subnets(lab)? == before, "subnets changed");

    // The polls are alive again: a node that has no lease any more is seen to go.
    let third = lab.host(2).agent()?.subnet_env()?.key();
    lab.host_mut(2).agent_mut()?.crash()?;
    lab.server_mut()?.revoke(&third)?;
    lab.host(0).agent()?.wait_status("one peer fewer", |status| status.peers.len() == 1)?;
    // It comes back, under the subnet its pods have.
    let options = AgentOptions::new()?;
    lab.host_mut(2).start_agent(&options)?;
    lab.wait_connected()?;
    ensure!(subnets(lab)? == before, "the third node has another subnet");
    lab.ping_all_pairs(2)
}

fn late(lab: &mut Lab) -> Result<()> {
    lab.bring_up(&["auto"; 2])?;
    let before = lab.host(0).status()?.subnet;
    lab.host_mut(0).agent_mut()?.crash()?;
    lab.server_mut()?.kill()?;
    let options = AgentOptions::new()?;
    lab.host_mut(0).start_agent(&options)?;
    lab.host(0).agent()?.wait_not_ready("the flannel server at")?;
    // What its predecessor left carries on.
    lab.ping_all_pairs(3)?;
    lab.server_mut()?.restart()?;
    lab.wait_connected()?;
    ensure!(lab.host(0).status()?.subnet == before, "another subnet");
    lab.ping_all_pairs(3)
}

fn beside_etcd(lab: &mut Lab) -> Result<()> {
    let address = "10.99.0.1:8888".parse().context("an address")?;
    let mut server = LeaseServer::new(lab.switch(), &agent_binary()?, address, lab.folder())
        .with_flags(&[format!("--etcd-endpoints={}", lab.datastore().endpoint())]);
    server.restart()?;
    let options = AgentOptions::new()?;
    lab.bring_up_with(&[options.clone().flag(format!("--remote={address}")), options])?;
    lab.ping_all_pairs(3)?;
    let leases = lab.datastore().leases()?;
    ensure!(leases.len() == 2, "{leases:?}");
    ensure!(leases.iter().all(|(_, value)| value.contains(r#""PublicIPv6":null"#)), "{leases:?}");
    Ok(())
}
