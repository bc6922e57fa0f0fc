//! etcd goes away, hangs, forgets our lease, or gives it to somebody else.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use flannel_tests::{agent::AgentOptions, scenario::scenario, topology::Lab};
use libtest_mimic::Trial;

use crate::Traffic;

/// Time for a watch event to arrive and be acted on.
const NOTICED: Duration = Duration::from_secs(10);

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for tier in ["xdp", "tun"] {
        trials.push(scenario(
            format!("traffic_does_not_notice_that_etcd_is_gone_over_{tier}"),
            Lab::new(&format!("etcd-gone-{tier}")).hosts(3),
            move |lab| gone(lab, tier),
        ));
    }
    trials.extend([
        scenario("an_etcd_that_hangs_changes_nothing_for_traffic", Lab::new("etcd-hangs"), hangs),
        scenario("an_agent_waits_for_an_etcd_that_is_not_there_yet", Lab::new("etcd-late").hosts(1), late),
        scenario("a_deleted_lease_is_taken_again_under_the_same_subnet", Lab::new("lease-deleted"), deleted),
        scenario("an_agent_whose_subnet_another_holds_ends_and_says_so", Lab::new("lease-taken"), taken),
        scenario("peers_come_and_go_with_their_leases", Lab::new("come-and-go").hosts(3), come_and_go),
    ]);
    trials
}

fn gone(lab: &mut Lab, tier: &str) -> Result<()> {
    lab.bring_up(&[tier; 3])?;
    let leases = lab.datastore().leases()?;
    let lines = lab.host(0).agent()?.log().lines().count();
    let traffic = Traffic::start(lab)?;
    lab.datastore_mut().stop()?;
    sleep(Duration::from_secs(5));
    let said = lab.host(0).agent()?.log().lines().count() - lines;
    ensure!(said <= 6, "{said} lines logged in five seconds without etcd:\n{}", lab.host(0).agent()?.log());
    lab.datastore_mut().restart()?;
    lab.wait_connected()?;
    traffic.stop_without_loss()?;
    ensure!(lab.datastore().leases()? == leases, "the leases changed");

    // The watch is alive again.
    let key = lab.host(2).agent()?.subnet_env()?.key();
    lab.host_mut(2).agent_mut()?.crash()?;
    lab.datastore().delete(&format!("subnets/{key}"))?;
    lab.host(0).agent()?.wait_status("one peer fewer", |status| status.peers.len() == 1).map(drop)
}

fn hangs(lab: &mut Lab) -> Result<()> {
    lab.bring_up(&["auto"; 2])?;
    let traffic = Traffic::start(lab)?;
    lab.datastore().freeze()?;
    sleep(Duration::from_secs(4));
    lab.datastore().thaw()?;
    lab.wait_connected()?;
    traffic.stop_without_loss()
}

fn late(lab: &mut Lab) -> Result<()> {
    lab.datastore_mut().stop()?;
    lab.host_mut(0).start_agent(&AgentOptions::new()?)?;
    sleep(Duration::from_secs(3));
    let log = lab.host(0).agent()?.log();
    ensure!(log.lines().count() < 15, "too many words about a missing etcd:\n{log}");
    lab.datastore_mut().restart()?;
    lab.host_mut(0).agent_mut()?.wait_ready()
}

fn deleted(lab: &mut Lab) -> Result<()> {
    lab.bring_up(&["auto"; 2])?;
    let leases = lab.datastore().leases()?;
    let env = lab.host(1).agent()?.subnet_env()?;
    ensure!(lab.datastore().delete(&format!("subnets/{}", env.key()))?);
    let started = Instant::now();
    while lab.datastore().leases()? != leases {
        ensure!(
            started.elapsed() < NOTICED,
            "the lease was not taken again: {:?}\n{}",
            lab.datastore().leases()?,
            lab.host(1).agent()?.log()
        );
        sleep(Duration::from_millis(50));
    }
    lab.wait_connected()?;
    ensure!(lab.host(1).agent()?.subnet_env()? == env);
    // News come in their order: who knows this one has heard of the deletion, and of its end.
    let last = r#"{"PublicIP":"10.99.0.99","PublicIPv6":null}"#;
    lab.datastore().put("subnets/10.244.255.0-24", last)?;
    for index in 0..2 {
        lab.host_mut(index).agent_mut()?.wait_peers(2)?;
    }
    lab.ping_all_pairs(5)
}

fn taken(lab: &mut Lab) -> Result<()> {
    lab.bring_up(&["auto"; 2])?;
    let env = lab.host(1).agent()?.subnet_env()?;
    let other = r#"{"PublicIP":"10.99.0.99","PublicIPv6":null}"#;
    lab.datastore().put(&format!("subnets/{}", env.key()), other)?;
    let status = lab.host_mut(1).agent_mut()?.wait_end(NOTICED)?;
    let log = lab.host(1).agent()?.log();
    let reason = log.lines().rev().take(5).any(|line| {
        (line.contains(&env.base().to_string()) || line.contains(&env.key())) && line.contains("10.99.0.99")
    });
    ensure!(reason, "ended with {status} without saying who holds its subnet:\n{log}");
    ensure!(
        lab.datastore().get(&format!("subnets/{}", env.key()))?.as_deref() == Some(other),
        "the other's lease was overwritten"
    );
    Ok(())
}

fn come_and_go(lab: &mut Lab) -> Result<()> {
    let options = AgentOptions::new()?;
    for index in 0..2 {
        lab.host_mut(index).start_agent(&options)?;
    }
    for index in 0..2 {
        lab.host_mut(index).agent_mut()?.wait_peers(1)?;
        lab.host_mut(index).attach_pod()?;
    }
    lab.host_mut(2).start_agent(&options)?;
    lab.wait_connected()?;
    lab.host_mut(2).attach_pod()?;
    lab.ping_all_pairs(3)?;

    let env = lab.host(2).agent()?.subnet_env()?;
    lab.host_mut(2).agent_mut()?.crash()?;
    lab.datastore().delete(&format!("subnets/{}", env.key()))?;
    for index in 0..2 {
        lab.host_mut(index).agent_mut()?.wait_peers(1)?;
    }
    lab.host_mut(2).start_agent(&options)?;
    lab.wait_connected()?;
    ensure!(lab.host(2).agent()?.subnet_env()? == env, "another subnet than subnet.env's");
    lab.ping_all_pairs(3)
}
