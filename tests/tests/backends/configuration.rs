//! What stands in etcd, and what the agent makes of it when it is missing, wrong, or somebody else's bad idea.

use std::time::Duration;

use anyhow::{Result, ensure};
use flannel_tests::{
    agent::{Agent, AgentOptions},
    scenario::scenario,
    topology::Lab,
};
use libtest_mimic::Trial;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        scenario(
            "a_missing_configuration_is_waited_for_and_said_once",
            Lab::new("config-missing").hosts(1).without_config(),
            missing,
        ),
        scenario(
            "an_invalid_configuration_is_named_by_field_and_a_new_one_taken",
            Lab::new("config-invalid").hosts(1).config(r#"{"Network":"10.244.0.0/16","SubnetLen":40}"#),
            invalid,
        ),
        scenario(
            "subnets_lie_between_min_and_max",
            Lab::new("config-range").hosts(2).config(
                r#"{"Network":"10.50.0.0/16","SubnetLen":26,"SubnetMin":"10.50.10.0","SubnetMax":"10.50.10.64"}"#,
            ),
            range,
        ),
        scenario("a_peers_impossible_lease_is_refused_and_the_rest_work", Lab::new("claims"), claims),
        scenario(
            "peers_of_a_network_with_more_subnets_than_places_are_reached",
            Lab::new("vast").config(r#"{"Network":"100.64.0.0/10","SubnetLen":28}"#),
            vast,
        ),
        scenario("a_public_ip_that_was_given_is_published", Lab::new("public-ip").hosts(1), public_ip),
    ]
}

fn not_ready_because(agent: &Agent, word: &str) -> Result<()> {
    let started = std::time::Instant::now();
    loop {
        let answer = agent.readyz();
        if let Ok((503, body)) = &answer
            && body.contains(word)
        {
            return Ok(());
        }
        ensure!(
            started.elapsed() < Duration::from_secs(10),
            "/readyz does not say `{word}`: {answer:?}\n{}",
            agent.log()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn missing(lab: &mut Lab) -> Result<()> {
    lab.host_mut(0).start_agent(&AgentOptions::new()?)?;
    not_ready_because(lab.host(0).agent()?, "config")?;
    std::thread::sleep(Duration::from_secs(4));
    let log = lab.host(0).agent()?.log();
    let said = log.lines().filter(|line| line.contains("/coreos.com/network/config")).count();
    ensure!(said == 1, "said {said} times that the configuration is missing:\n{log}");
    lab.datastore().put_config(r#"{"Network":"10.244.0.0/16"}"#)?;
    lab.host_mut(0).agent_mut()?.wait_ready()
}

fn invalid(lab: &mut Lab) -> Result<()> {
    lab.host_mut(0).start_agent(&AgentOptions::new()?)?;
    not_ready_because(lab.host(0).agent()?, "SubnetLen")?;
    ensure!(lab.datastore().leases()?.is_empty(), "a lease was taken under an invalid configuration");
    lab.datastore().put_config(r#"{"Network":"10.244.0.0/16"}"#)?;
    lab.host_mut(0).agent_mut()?.wait_ready()
}

fn range(lab: &mut Lab) -> Result<()> {
    lab.bring_up(&["auto"; 2])?;
    let keys: Vec<String> = lab.datastore().leases()?.into_iter().map(|(key, _)| key).collect();
    ensure!(keys == ["10.50.10.0-26", "10.50.10.64-26"], "{keys:?}");
    lab.ping_all_pairs(3)
}

fn claims(lab: &mut Lab) -> Result<()> {
    lab.bring_up(&["auto"; 2])?;
    let own = lab.host(0).agent()?.subnet_env()?;
    let store = lab.datastore();
    let bad = [
        // Overlaps a lease that is held.
        (format!("subnets/{}-25", own.base()), r#"{"PublicIP":"10.99.0.66","PublicIPv6":null}"#.to_owned()),
        // Outside Network.
        ("subnets/192.0.2.0-24".to_owned(), r#"{"PublicIP":"10.99.0.67","PublicIPv6":null}"#.to_owned()),
        // Names an address that is ours.
        (
            "subnets/10.244.254.0-24".to_owned(),
            format!(r#"{{"PublicIP":"{}","PublicIPv6":null}}"#, lab.host(0).address()),
        ),
        // Not JSON at all.
        ("subnets/10.244.253.0-24".to_owned(), "{PublicIP".to_owned()),
    ];
    for (key, value) in &bad {
        store.put(key, value)?;
    }
    let status = lab
        .host(0)
        .agent()?
        .wait_status("four refused leases", |status| status.refused.len() == bad.len())?;
    for (key, _) in &bad {
        let key = key.trim_start_matches("subnets/");
        let refused = status.refused.iter().find(|refused| refused.key.contains(key));
        ensure!(refused.is_some_and(|refused| !refused.reason.is_empty()), "{key}: {:?}", status.refused);
    }
    ensure!(status.ready, "a peer's bad lease made us unready: {:?}", status.not_ready);
    lab.ping_all_pairs(3)?;

    for (key, _) in &bad {
        lab.datastore().delete(key)?;
    }
    lab.host(0).agent()?.wait_status("no refused lease", |status| status.refused.is_empty())?;
    lab.ping_all_pairs(3)
}

/// 262,144 subnets, of which the programs look peers up by hash.
fn vast(lab: &mut Lab) -> Result<()> {
    lab.bring_up(&["xdp", "tc"])?;
    lab.ping_all_pairs(10)?;
    for host in lab.hosts() {
        let status = host.status()?;
        ensure!(status.counted("encapsulated") >= 20, "user space carried them: {}", status.reasons());
    }
    Ok(())
}

fn public_ip(lab: &mut Lab) -> Result<()> {
    lab.host_mut(0)
        .start_agent(&AgentOptions::new()?.flag("--iface=eth0").flag("--public-ip=192.0.2.77"))?
        .wait_ready()?;
    let leases = lab.datastore().leases()?;
    let [(_, value)] = leases.as_slice() else { anyhow::bail!("{leases:?}") };
    ensure!(value == r#"{"PublicIP":"192.0.2.77","PublicIPv6":null}"#, "{value}");
    Ok(())
}
