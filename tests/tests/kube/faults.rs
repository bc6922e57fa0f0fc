//! What ends or blinds flanneld: Nodes that are not ready yet, an API server that is away at the wrong moment, missing
//! rights.

use std::{thread::sleep, time::Duration};

use anyhow::{Result, ensure};
use flannel_tests::{kube::NOBODY, scenario::scenario, topology::Lab};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use super::{Cluster, annotation, ensure_few_lines, network_unavailable};

/// Longer than the agent may take to end.
const END: Duration = Duration::from_secs(20);

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        scenario(
            "a_node_that_is_not_there_has_nothing_or_no_pod_cidr_is_waited_for",
            Lab::new("kube-early").hosts(1),
            early,
        ),
        scenario("an_api_server_that_goes_away_costs_nothing_but_news", Lab::new("kube-away"), away),
        scenario(
            "an_api_server_that_hangs_or_is_away_at_the_start_is_waited_for",
            Lab::new("kube-late").hosts(1),
            late,
        ),
        scenario(
            "a_pod_cidr_that_changes_under_a_running_agent_ends_it",
            Lab::new("kube-lost").hosts(1),
            lost,
        ),
        scenario("missing_rights_and_wrong_networks_are_named", Lab::new("kube-refused").hosts(1), refused),
    ]
}

fn early(lab: &mut Lab) -> Result<()> {
    let cluster = Cluster::start(lab)?;
    let options = cluster.options(lab.host(0))?;
    let agent = lab.host_mut(0).start_agent(&options)?;
    agent.wait_not_ready("there is no Node h1")?;
    cluster.api.create_node("h1", &[], None)?;
    agent.wait_not_ready("it has no IPv4 pod CIDR")?;
    cluster
        .api
        .patch_node("h1", &json!({"spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"]}}))?;
    agent.wait_ready()?;
    ensure!(annotation(&cluster.api.node("h1")?, "public-ip") == Some("10.99.0.11"));
    ensure_few_lines(lab.host(0), 0, 25)
}

fn away(lab: &mut Lab) -> Result<()> {
    let mut cluster = Cluster::start(lab)?;
    cluster.bring_up(lab)?;
    let lines = lab.host(0).agent()?.log().lines().count();
    cluster.api.stop()?;
    sleep(Duration::from_secs(8));
    lab.ping_all_pairs(3)?;
    ensure_few_lines(lab.host(0), lines, 4)?;
    let (code, body) = lab.host(0).agent()?.readyz()?;
    ensure!(code == 503 && body.contains("out of date"), "{code} {body}");

    // Its memory of versions is gone with it: the watch is told 410, and everything is listed again.
    cluster.api.restart()?;
    cluster.api.delete_node("h2")?;
    let agent = lab.host(0).agent()?;
    agent.wait_status("ready again, without h2", |status| status.ready && status.peers.is_empty())?;
    ensure_few_lines(lab.host(0), lines, 12)
}

fn late(lab: &mut Lab) -> Result<()> {
    let mut cluster = Cluster::start(lab)?;
    cluster.add_node(1)?;
    cluster.api.stop()?;
    let options = cluster.options(lab.host(0))?;
    let agent = lab.host_mut(0).start_agent(&options)?;
    sleep(Duration::from_secs(4));
    agent.wait_not_ready("")?;
    cluster.api.restart()?;
    agent.wait_ready()?;
    let up = |node: &Value| network_unavailable(node).is_some();
    cluster.api.wait_node("h1", "to say that its network works", up)?;

    // A hanging one: the start goes on where it stood.
    agent.crash()?;
    cluster.api.freeze()?;
    let agent = lab.host_mut(0).start_agent(&options)?;
    sleep(Duration::from_secs(3));
    cluster.api.thaw()?;
    agent.wait_ready()?;
    ensure_few_lines(lab.host(0), 0, 60)
}

/// The API refuses to change a pod CIDR; a Node that is deleted and comes back may have another one.
fn lost(lab: &mut Lab) -> Result<()> {
    let cluster = Cluster::start(lab)?;
    cluster.bring_up(lab)?;
    cluster.api.delete_node("h1")?;
    cluster.api.create_node("h1", &["10.244.9.0/24"], Some(json!({"a": "b"})))?;
    let agent = lab.host_mut(0).agent_mut()?;
    let status = agent.wait_end(END)?;
    ensure!(status.code() == Some(0), "{status}");
    ensure!(agent.log().contains("the Node's pod CIDR is 10.244.9.0-24 now"), "{}", agent.log());
    // As after any end: the next start takes what Kubernetes gives.
    let options = cluster.options(lab.host(0))?;
    let agent = lab.host_mut(0).start_agent(&options)?;
    agent.wait_ready()?;
    ensure!(agent.subnet_env()?.key() == "10.244.9.0-24");
    Ok(())
}

fn refused(lab: &mut Lab) -> Result<()> {
    let cluster = Cluster::start(lab)?;
    cluster.add_node(1)?;
    // Rights may be granted any time: these are waited for.
    for (name, token, text) in [
        ("nobody", NOBODY, "the service account needs flannel's ClusterRole"),
        ("stranger", "no-such-token", "the token or certificate is not accepted"),
    ] {
        let options = cluster.options_with(&cluster.api.kubeconfig(name, token)?)?.env("NODE_NAME", "h1");
        lab.host_mut(0).start_agent(&options)?.wait_not_ready(text)?;
    }
    // These are mistakes.
    let ends_with = |lab: &mut Lab, options, text: &str| -> Result<()> {
        let agent = lab.host_mut(0).start_agent(&options)?;
        let status = agent.wait_end(END)?;
        ensure!(status.code() == Some(1), "{status}");
        let log = agent.log();
        let last = log.lines().last().unwrap_or_default();
        ensure!(last.contains(text), "`{text}` is not in the last line of\n{log}");
        Ok(())
    };
    ends_with(lab, cluster.options_with(&cluster.kubeconfig)?, "Set NODE_NAME")?;
    let prefix = cluster.options(lab.host(0))?.flag("--kube-annotation-prefix=nodots");
    ends_with(lab, prefix, "\"nodots\" has no dot in its domain")?;
    let file = cluster.options(lab.host(0))?.flag("--kubeconfig-file=/nowhere/config");
    ends_with(lab, file, "--kubeconfig-file /nowhere/config")?;
    let url = cluster.options(lab.host(0))?.flag("--kube-api-url=10.0.0.1");
    ends_with(lab, url, "it should look like https://10.0.0.1:6443")?;
    std::fs::write(&cluster.net_config, r#"{"Network":"10.9.0.0/16"}"#)?;
    ends_with(lab, cluster.options(lab.host(0))?, "10.244.1.0/24 is not inside Network 10.9.0.0/16")
}
