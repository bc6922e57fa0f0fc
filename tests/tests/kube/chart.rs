//! The Helm chart, rendered by helm and applied to a real API server.

use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use flannel_agent::domain::config::{BackendConfig, NetworkConfig};
use flannel_tests::{scenario::scenario, topology::Lab};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::{Cluster, MANIFEST};

const DAEMONSET: &str = "/apis/apps/v1/namespaces/kube-flannel/daemonsets/kube-flannel-ds";
const CONFIGMAP: &str = "/api/v1/namespaces/kube-flannel/configmaps/kube-flannel-cfg";
const ROLE: &str = "/apis/rbac.authorization.k8s.io/v1/clusterroles/flannel";

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        scenario(
            "the_chart_gives_what_the_manifest_gives_and_follows_its_values",
            Lab::new("kube-chart").hosts(1),
            follows,
        ),
        scenario(
            "the_chart_adds_a_network_policy_controller_and_its_rights_only_when_asked",
            Lab::new("kube-netpol").hosts(1),
            network_policies,
        ),
    ]
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

/// What helm makes of the chart with these values, in place of what is there.
fn apply(cluster: &Cluster, values: &[&str]) -> Result<()> {
    for path in [DAEMONSET, CONFIGMAP, ROLE] {
        cluster.api.delete(path)?;
    }
    cluster.api.create_from(&rendered(values)?.map_err(anyhow::Error::msg)?)
}

/// The DaemonSet's pods.
fn pods(cluster: &Cluster) -> Result<Value> {
    Ok(cluster.api.get(DAEMONSET)?["spec"]["template"]["spec"].clone())
}

fn follows(lab: &mut Lab) -> Result<()> {
    let cluster = Cluster::start(lab)?;
    let get = |path: &str| -> Result<Value> { cluster.api.get(path) };
    let config = |map: &Value| -> Result<NetworkConfig> {
        Ok(NetworkConfig::parse(map["data"]["net-conf.json"].as_str().context("net-conf.json")?)?)
    };
    ensure!(MANIFEST.contains("kube-flannel-ds"), "another manifest");
    let (by_hand, role) = (pods(&cluster)?, get(ROLE)?["rules"].clone());
    let network = config(&get(CONFIGMAP)?)?;

    // With its defaults it is the manifest.
    apply(&cluster, &[])?;
    let mut by_chart = pods(&cluster)?;
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
    ensure!(get(ROLE)?["rules"] == role, "other rights");
    ensure!(config(&get(CONFIGMAP)?)? == network, "another network");

    // With others they are followed, and what comes out is a configuration.
    apply(
        &cluster,
        &[
            "podCidr=10.1.0.0/16",
            "podCidrv6=fd00::/48",
            "flannel.backendPort=8286",
            "flannel.mtu=1400",
            "flannel.healthz.port=9000",
            "flannel.healthz.livenessProbe.initialDelaySeconds=10",
            "flannel.healthz.readinessProbe=false",
            "flannel.args[0]=--kube-subnet-mgr",
            "flannel.args[1]=--iface=eth0",
            "flannel.nodeSelector.zone=a",
            "flannel.flannel_cni.image.repository=cni",
            "flannel.flannel_cni.image.tag=v1",
            "global.imagePullSecrets[0].name=secret",
        ],
    )?;
    let network = config(&get(CONFIGMAP)?)?;
    ensure!(network.v4.is_some_and(|range| range.network.to_string() == "10.1.0.0/16"), "{network}");
    ensure!(network.v6.is_some_and(|range| range.network.to_string() == "fd00::/48"), "{network}");
    ensure!(network.backend == BackendConfig::Udp { port: 8286, mtu: Some(1400) }, "{network}");
    let pods = pods(&cluster)?;
    let agent = &pods["containers"][0];
    let wanted = serde_json::json!(["--kube-subnet-mgr", "--iface=eth0", "--healthz-port=9000"]);
    ensure!(agent["args"] == wanted, "{}", agent["args"]);
    let alive = &agent["livenessProbe"];
    ensure!(alive["httpGet"]["path"] == "/healthz" && alive["initialDelaySeconds"] == 10, "{agent:#}");
    ensure!(agent.get("readinessProbe").is_none(), "{agent:#}");
    ensure!(pods["nodeSelector"]["zone"] == "a", "{pods:#}");
    ensure!(pods["initContainers"][0]["image"] == "cni:v1", "{pods:#}");

    refused(&["flannel.backend=ipsec"], "flannel.psk: the ipsec backend needs one")?;
    // IPv4 off, and no way to break the JSON.
    let odd = rendered(&["podCidr=", "podCidrv6=fd00::/48", r#"flannel.macPrefix=a"b"#])?
        .map_err(anyhow::Error::msg)?;
    ensure!(odd.contains(r#""EnableIPv4": false"#) && odd.contains(r#""MacPrefix": "a\"b""#), "{odd}");
    Ok(())
}

/// helm says what is wrong with these values.
fn refused(values: &[&str], wanted: &str) -> Result<()> {
    let error = rendered(values)?.err().with_context(|| format!("{values:?} is taken"))?;
    ensure!(error.contains(wanted), "{values:?} should be refused with `{wanted}`, not\n{error}");
    Ok(())
}

fn network_policies(lab: &mut Lab) -> Result<()> {
    let cluster = Cluster::start(lab)?;
    let token = cluster.api.service_account_token("kube-flannel", "flannel")?;
    let rules = || -> Result<Vec<Value>> {
        let role = cluster.api.get(ROLE)?;
        role["rules"].as_array().cloned().context("a role without rules")
    };
    let by_hand = rules()?;
    // Read by the controller alone; those of a later group are answered with 404 while nobody has defined them.
    let policies = "/apis/networking.k8s.io/v1/networkpolicies";
    let of_admins = "/apis/policy.networking.k8s.io/v1alpha1/adminnetworkpolicies";
    let defaults = "/apis/policy.networking.k8s.io/v1alpha1/baselineadminnetworkpolicies";
    let reads = [
        ("/api/v1/pods", 200),
        ("/api/v1/namespaces", 200),
        (policies, 200),
        (of_admins, 404),
        (defaults, 404),
    ];

    let asked = ["netpol.enabled=true", "netpol.image.repository=policies", "netpol.image.tag=v9"];
    apply(&cluster, &asked)?;
    let with = pods(&cluster)?;
    let containers = with["containers"].as_array().context("containers")?;
    let controller = containers.iter().find(|container| container["name"] == "kube-network-policies");
    let controller = controller.with_context(|| format!("no controller in {containers:#?}"))?;
    ensure!(containers.len() == 2 && controller["image"] == "policies:v9", "{containers:#?}");
    ensure!(controller["command"] == json!(["/bin/netpol"]), "{controller:#}");
    let arguments = json!(["--hostname-override=$(MY_NODE_NAME)", "--v=2"]);
    ensure!(controller["args"] == arguments, "{controller:#}");
    let (name, source) = (&controller["env"][0]["name"], &controller["env"][0]["valueFrom"]["fieldRef"]);
    ensure!(name == "MY_NODE_NAME" && source["fieldPath"] == "spec.nodeName", "{controller:#}");
    let may = &controller["securityContext"]["capabilities"]["add"];
    ensure!(*may == json!(["NET_ADMIN"]), "{controller:#}");
    ensure!(controller["volumeMounts"].as_array().is_some_and(|all| all.len() == 1), "{controller:#}");
    let modules = &controller["volumeMounts"][0];
    ensure!(modules["mountPath"] == "/lib/modules" && modules["readOnly"] == true, "{controller:#}");
    let extended = rules()?;
    ensure!(extended.starts_with(&by_hand) && extended.len() == by_hand.len() + 3, "{extended:#?}");
    for (path, answer) in reads {
        answers(&cluster, &token, ("GET", path), answer)?;
        answers(&cluster, &token, ("DELETE", path), 403)?;
    }
    for path in ["/api/v1/secrets", "/api/v1/services", "/apis/policy/v1beta1/poddisruptionbudgets"] {
        answers(&cluster, &token, ("GET", path), 403)?;
    }
    let more = ["netpol.args[0]=--nfqueue-id=98", "netpol.args[1]=7"];
    apply(&cluster, &[asked.as_slice(), more.as_slice()].concat())?;
    let arguments = &pods(&cluster)?["containers"][1]["args"];
    ensure!(*arguments == json!(["--nfqueue-id=98", "7"]), "{arguments}");

    // Not asked for, there is nothing of it, and no right more than without.
    for without in [&[][..], &["netpol.image.repository=policies"], &["netpol.enabled=null"]] {
        apply(&cluster, without)?;
        let pods = pods(&cluster)?;
        ensure!(pods["containers"].as_array().is_some_and(|all| all.len() == 1), "{without:?}: {pods:#}");
        ensure!(!pods["volumes"].to_string().contains("/lib/modules"), "{without:?}: {pods:#}");
        ensure!(rules()? == by_hand, "{without:?}: other rights");
        for (path, _) in reads {
            answers(&cluster, &token, ("GET", path), 403)?;
        }
    }

    for (values, wanted) in [
        (
            &asked[..1],
            r#"netpol.image.repository: "" names no image, and netpol.enabled is true: name where"#,
        ),
        (
            &[asked[0], asked[1], "netpol.image.tag="],
            r#"netpol.image.tag: "" is no tag of policies; name one"#,
        ),
        (&[asked[0], "netpol.image=policies:v9"], r#"netpol.image: "policies:v9" is no image; it takes two"#),
        (&[asked[0], asked[1], "netpol.args=--v=2"], r#"netpol.args: "--v=2" is no list; it takes one"#),
        (&[asked[0], asked[1], "netpol.args[0].v=2"], r#"netpol.args[0]: {"v":2} is no argument; it takes"#),
        (&["netpol.enabled=yes"], r#"netpol.enabled: "yes" is neither true nor false"#),
    ] {
        refused(values, wanted)?;
    }
    Ok(())
}

/// Until the API server answers a call with this token so: it learns of other rights within a moment.
fn answers(cluster: &Cluster, token: &str, (method, path): (&str, &str), wanted: u16) -> Result<()> {
    let started = Instant::now();
    loop {
        let answer = cluster.api.request(token, method, path, None)?;
        if answer.status == wanted {
            return Ok(());
        }
        ensure!(
            started.elapsed() < Duration::from_secs(10),
            "{method} {path}: {} {} instead of {wanted}",
            answer.status,
            answer.body["message"]
        );
        std::thread::sleep(Duration::from_millis(100));
    }
}
