//! A cluster whose leases move from etcd's v2 keyspace to v3's while it runs.

use std::fs::File;
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use flannel_tests::{
    agent::AgentOptions, agent_binary, datastore::PREFIX, scenario::scenario, tail, topology::Lab,
};
use libtest_mimic::Trial;

use crate::Traffic;

const CONFIG: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}"#;

pub(crate) fn trials() -> Vec<Trial> {
    let lab = |name| Lab::new(name).hosts(3).without_config();
    vec![
        scenario("nodes_change_from_v2_to_v3_one_by_one_side_by_side", lab("v2-v3"), side_by_side),
        scenario("nodes_keep_their_subnets_after_leases_were_copied_once", lab("v2-once"), once),
    ]
}

/// Three nodes in v2, found by `auto`, with their subnets.
fn in_v2(lab: &mut Lab) -> Result<Vec<String>> {
    lab.datastore().v2().put(&format!("{PREFIX}/config"), CONFIG, None)?;
    let (auto, v2) = (AgentOptions::new()?, AgentOptions::new()?.flag("--etcd-api=v2"));
    lab.bring_up_with(&[auto, v2.clone(), v2])?;
    lab.ping_all_pairs(2)?;
    ensure!(lab.datastore().leases()?.is_empty(), "nothing is in v3");
    subnets(lab)
}

fn subnets(lab: &Lab) -> Result<Vec<String>> {
    lab.hosts().iter().map(|host| Ok(host.status()?.subnet)).collect()
}

/// `migrate-etcd`, from the first host.
fn migrate(lab: &Lab) -> Result<Command> {
    let mut command = lab.host(0).netns().command(agent_binary()?);
    command.arg("migrate-etcd").arg(format!("--etcd-endpoints={}", lab.datastore().endpoint()));
    Ok(command)
}

struct Follower(Child);

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn side_by_side(lab: &mut Lab) -> Result<()> {
    let before = in_v2(lab)?;
    let log = lab.folder().join("follow.log");
    let output = File::create(&log).context("the follower's log")?;
    let follower = migrate(lab)?.arg("--follow").stdout(output.try_clone()?).stderr(output).spawn()?;
    let follower = Follower(follower);
    let started = Instant::now();
    while !tail(&log).contains("both keyspaces are alike") {
        ensure!(started.elapsed() < Duration::from_secs(20), "it does not follow: {}", tail(&log));
        sleep(Duration::from_millis(50));
    }
    let traffic = Traffic::start(lab)?;
    let v3 = AgentOptions::new()?.flag("--etcd-api=v3");
    for index in 0..3 {
        lab.host_mut(index).start_agent(&v3)?;
        lab.wait_connected()?;
        ensure!(subnets(lab)? == before, "subnets changed with node {index}");
        lab.ping_all_pairs(2)?;
        if index == 0 {
            // A lease that is taken away in v3 is gone for the nodes in v2 too, and its agent, still in v2, comes back to it.
            let key = lab.host(2).agent()?.subnet_env()?.key();
            lab.host_mut(2).agent_mut()?.crash()?;
            ensure!(lab.datastore().delete(&format!("subnets/{key}"))?, "the lease was in v3");
            for seer in [0, 1] {
                lab.host(seer).agent()?.wait_status("one peer fewer", |status| status.peers.len() == 1)?;
            }
            lab.host_mut(2).start_agent(&AgentOptions::new()?.flag("--etcd-api=v2"))?;
            lab.wait_connected()?;
            ensure!(subnets(lab)? == before, "the node has another subnet");
        }
    }
    drop(follower);
    lab.datastore().v2().delete("/coreos.com")?;
    sleep(Duration::from_secs(1));
    traffic.stop_without_loss()?;
    ensure!(lab.datastore().leases()?.len() == 3, "{:?}", lab.datastore().leases()?);
    lab.ping_all_pairs(2)
}

fn once(lab: &mut Lab) -> Result<()> {
    let before = in_v2(lab)?;
    let output = migrate(lab)?.output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success() && said.contains("4 copied"), "{output:?}");
    let v3 = AgentOptions::new()?.flag("--etcd-api=v3");
    for index in 0..3 {
        lab.host_mut(index).start_agent(&v3)?;
        lab.wait_connected()?;
        ensure!(subnets(lab)? == before, "subnets changed with node {index}");
        lab.ping_all_pairs(2)?;
    }
    Ok(())
}
