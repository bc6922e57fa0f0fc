//! The Helm chart, rendered by helm and applied to a real API server.

use std::{path::PathBuf, process::Command};

use anyhow::{Context as _, Result, ensure};
use flannel_agent::domain::config::{BackendConfig, NetworkConfig};
use flannel_tests::{scenario::scenario, topology::Lab};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::{Cluster, MANIFEST};

pub(crate) fn trials() -> Vec<Trial> {
    vec![scenario(
        "the_chart_gives_what_the_manifest_gives_and_follows_its_values",
        Lab::new("kube-chart").hosts(1),
        follows,
    )]
}

/// What helm makes of the chart with these values.
fn rendered(values: &[&str]) -> Result<Result<String, String>> {
    let workspace = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let output = Command::new(workspace.join("target/tools/bin/helm"))
        .args(["template", "flannel", "--namespace", "kube-flannel"])
        .args(values.iter().flat_map(|value| ["--set", value]))
        .arg(workspace.join("deploy/helm/flannel"))
        .output()
        .context("start helm; `cargo xtask setup --kube` brings it")?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) })
}

fn follows(lab: &mut Lab) -> Result<()> {
    let cluster = Cluster::start(lab)?;
    let get = |path: &str| -> Result<Value> { cluster.api.get(path) };
    let daemonset = "/apis/apps/v1/namespaces/kube-flannel/daemonsets/kube-flannel-ds";
    let configmap = "/api/v1/namespaces/kube-flannel/configmaps/kube-flannel-cfg";
    let roles = "/apis/rbac.authorization.k8s.io/v1/clusterroles/flannel";
    let pods = |daemonset: &Value| daemonset["spec"]["template"]["spec"].clone();
    let config = |map: &Value| -> Result<NetworkConfig> {
        Ok(NetworkConfig::parse(map["data"]["net-conf.json"].as_str().context("net-conf.json")?)?)
    };
    ensure!(MANIFEST.contains("kube-flannel-ds"), "another manifest");
    let (by_hand, role) = (pods(&get(daemonset)?), get(roles)?["rules"].clone());
    let network = config(&get(configmap)?)?;

    // With its defaults it is the manifest.
    let apply = |values: &[&str]| -> Result<()> {
        for path in [daemonset, configmap, roles] {
            cluster.api.delete(path)?;
        }
        cluster.api.create_from(&rendered(values)?.map_err(anyhow::Error::msg)?)
    };
    apply(&[])?;
    let mut by_chart = pods(&get(daemonset)?);
    let volumes = by_chart["volumes"].as_array_mut().context("volumes")?;
    volumes.retain(|volume| volume["name"] != "cni-plugin");
    let sorted = |pods: &Value| -> Result<Value> {
        let mut pods = pods.clone();
        let volumes = pods["volumes"].as_array_mut().context("volumes")?;
        volumes.sort_by_key(|volume| volume["name"].to_string());
        Ok(pods)
    };
    let (by_hand, by_chart) = (sorted(&by_hand)?, sorted(&by_chart)?);
    ensure!(by_hand == by_chart, "by hand {by_hand:#}\nby the chart {by_chart:#}");
    ensure!(get(roles)?["rules"] == role, "other rights");
    ensure!(config(&get(configmap)?)? == network, "another network");

    // With others they are followed, and what comes out is a configuration.
    apply(&[
        "podCidr=10.1.0.0/16",
        "podCidrv6=fd00::/48",
        "flannel.backendPort=8286",
        "flannel.mtu=1400",
        "flannel.healthz.port=9000",
        "flannel.args[0]=--kube-subnet-mgr",
        "flannel.args[1]=--iface=eth0",
        "flannel.nodeSelector.zone=a",
        "flannel.flannel_cni.image.repository=cni",
        "flannel.flannel_cni.image.tag=v1",
        "global.imagePullSecrets[0].name=secret",
    ])?;
    let network = config(&get(configmap)?)?;
    ensure!(network.v4.is_some_and(|range| range.network.to_string() == "10.1.0.0/16"), "{network}");
    ensure!(network.v6.is_some_and(|range| range.network.to_string() == "fd00::/48"), "{network}");
    ensure!(network.backend == BackendConfig::Udp { port: 8286, mtu: Some(1400) }, "{network}");
    let pods = pods(&get(daemonset)?);
    let agent = &pods["containers"][0];
    let wanted = serde_json::json!(["--kube-subnet-mgr", "--iface=eth0", "--healthz-port=9000"]);
    ensure!(agent["args"] == wanted, "{}", agent["args"]);
    ensure!(agent["readinessProbe"]["httpGet"]["path"] == "/readyz", "{agent:#}");
    ensure!(pods["nodeSelector"]["zone"] == "a", "{pods:#}");
    ensure!(pods["initContainers"][0]["image"] == "cni:v1", "{pods:#}");

    for (values, wanted) in [
        (["netpol.enabled=true"], "netpol.enabled: this chart brings no network policy controller"),
        (["flannel.backend=ipsec"], "flannel.psk: the ipsec backend needs one"),
    ] {
        let error = rendered(&values)?.err().with_context(|| format!("{values:?} can't be had"))?;
        ensure!(error.contains(wanted), "{error}");
    }
    // IPv4 off, and no way to break the JSON.
    let odd = rendered(&["podCidr=", "podCidrv6=fd00::/48", r#"flannel.macPrefix=a"b"#])?
        .map_err(anyhow::Error::msg)?;
    ensure!(odd.contains(r#""EnableIPv4": false"#) && odd.contains(r#""MacPrefix": "a\"b""#), "{odd}");
    Ok(())
}
