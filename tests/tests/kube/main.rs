//! Leases from Kubernetes on whole hosts: agents with the rights of flannel's own role, against a real kube-apiserver.
//!
//! Each lab has an API server of its own, on the lab's etcd, because Nodes are the cluster's. There are no controllers
//! and no kubelets: their part is played by the test.

mod chart;
mod faults;
mod nodes;

use std::{fs, net::SocketAddr, path::PathBuf, process::ExitCode, sync::Arc};

use anyhow::{Context as _, Result, ensure};
use flannel_tests::{
    agent::AgentOptions,
    kube::ApiServer,
    scenario::run,
    topology::{Host, Lab},
};
use serde_json::{Value, json};

/// As shipped to users.
const MANIFEST: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/kube-flannel.yml"));

/// flannel's annotations.
const PREFIX: &str = "flannel.alpha.coreos.com";

fn main() -> ExitCode {
    let mut trials = nodes::trials();
    trials.extend(faults::trials());
    trials.extend(chart::trials());
    run(trials)
}

/// A cluster: the API server, and what an agent in it is started with.
struct Cluster {
    api: ApiServer,
    kubeconfig: PathBuf,
    net_config: PathBuf,
}

impl Cluster {
    /// The shipped manifest applied to an empty API server, and a token of its service account.
    fn start(lab: &Lab) -> Result<Self> {
        let address = SocketAddr::from(([10, 99, 0, 1], 6443));
        let api = ApiServer::start(Some(&Arc::clone(lab.switch())), address, &lab.datastore().endpoint())?;
        api.create_from(MANIFEST)?;
        let token = api.service_account_token("kube-flannel", "flannel")?;
        let kubeconfig = api.kubeconfig("flannel", &token)?;
        let net_config = lab.folder().join("net-conf.json");
        fs::write(&net_config, r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp"}}"#)?;
        Ok(Self { api, kubeconfig, net_config })
    }

    /// A Node as it is before flannel comes: `10.244.NUMBER.0/24`.
    fn add_node(&self, number: usize) -> Result<()> {
        let annotations = json!({"node.alpha.kubernetes.io/ttl": "0"});
        self.api.create_node(&format!("h{number}"), &[&format!("10.244.{number}.0/24")], Some(annotations))
    }

    /// How the agent of a host is started.
    fn options(&self, host: &Host) -> Result<AgentOptions> {
        Ok(self.options_with(&self.kubeconfig)?.env("NODE_NAME", &host.name()))
    }

    fn options_with(&self, kubeconfig: &std::path::Path) -> Result<AgentOptions> {
        Ok(AgentOptions::new()?
            .flag("--kube-subnet-mgr")
            .flag(format!("--kubeconfig-file={}", kubeconfig.display()))
            .flag(format!("--net-config-path={}", self.net_config.display())))
    }

    /// A Node for every host, agents that know each other, a pod each.
    fn bring_up(&self, lab: &mut Lab) -> Result<()> {
        for number in 1..=lab.hosts().len() {
            self.add_node(number)?;
        }
        let options: Result<Vec<_>> = lab.hosts().iter().map(|host| self.options(host)).collect();
        lab.bring_up_with(&options?)
    }
}

/// An annotation of flannel's.
fn annotation<'a>(node: &'a Value, suffix: &str) -> Option<&'a str> {
    node["metadata"]["annotations"][format!("{PREFIX}/{suffix}")].as_str()
}

/// The condition that tells Kubernetes that pods may come, without its times.
fn network_unavailable(node: &Value) -> Option<Value> {
    let mut condition =
        node["status"]["conditions"].as_array()?.iter().find(|c| c["type"] == "NetworkUnavailable")?.clone();
    let fields = condition.as_object_mut()?;
    fields.remove("lastTransitionTime");
    fields.remove("lastHeartbeatTime");
    Some(condition)
}

/// A recording of flanneld v0.20.2 against the same API server.
fn recorded(file: &str) -> Result<Value> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures/v0.20.2/kube/udp").join(file);
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    Ok(serde_json::from_str(&text)?)
}

fn version(node: &Value) -> &Value {
    &node["metadata"]["resourceVersion"]
}

/// What an agent said must not have grown into a flood.
fn ensure_few_lines(host: &Host, before: usize, most: usize) -> Result<()> {
    let log = host.agent()?.log();
    let said = log.lines().count() - before;
    ensure!(said <= most, "{}: {said} lines where {most} would do:\n{log}", host.name());
    Ok(())
}
