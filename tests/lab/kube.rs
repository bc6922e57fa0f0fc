//! A real kube-apiserver, and what an operator says to it.
//!
//! The binary is the one `cargo xtask setup --kube` builds; its store is the etcd it is given. There are no controllers
//! and no kubelets: Nodes, their pod CIDRs and their conditions are what a test writes. Talking goes through `curl`, so
//! the answers are the API server's own. Starts in about ten seconds; several tests share one and
//! [delete the Nodes](ApiServer::delete_nodes) in between.

use std::{
    fs::{self, File},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::namespace::Namespace;

const START_LIMIT: Duration = Duration::from_secs(90);
/// The token of somebody who may do everything.
const ADMIN: &str = "admin-token";
/// The token of somebody who may do nothing.
pub const NOBODY: &str = "nobody-token";
const JSON: &str = "application/json";

/// A running kube-apiserver; killed when dropped.
#[derive(Debug)]
pub struct ApiServer {
    namespace: Option<Arc<Namespace>>,
    address: SocketAddr,
    etcd: String,
    folder: TempDir,
    server: Option<Child>,
}

/// What the API server answered.
#[derive(Debug)]
pub struct Answer {
    /// HTTP status code.
    pub status: u16,
    /// JSON, or null for a body that is none.
    pub body: Value,
}

impl ApiServer {
    /// Starts it on `address`, in `namespace` if it is to be one of the lab's, on the etcd at `etcd`, and waits until it
    /// is ready.
    ///
    /// # Errors
    /// It was not built, or ends or stays silent; the text has the end of its log.
    pub fn start(namespace: Option<&Arc<Namespace>>, address: SocketAddr, etcd: &str) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("flannel-kube-").tempdir()?;
        fs::write(
            folder.path().join("tokens.csv"),
            format!("{ADMIN},admin,1,system:masters\n{NOBODY},nobody,2\n"),
        )?;
        let key = folder.path().join("sa.key");
        let made = Command::new("openssl")
            .args(["genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out"])
            .arg(&key)
            .output()
            .context("start `openssl`")?;
        ensure!(made.status.success(), "openssl: {}", String::from_utf8_lossy(&made.stderr));
        let mut server =
            Self { namespace: namespace.cloned(), address, etcd: etcd.to_owned(), folder, server: None };
        server.restart()?;
        Ok(server)
    }

    /// `https://10.99.0.1:6443`
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// Kills it. What it stored stays in etcd.
    ///
    /// # Errors
    /// The kernel refuses to kill or reap it.
    pub fn stop(&mut self) -> Result<()> {
        if let Some(mut server) = self.server.take() {
            server.kill().context("kill kube-apiserver")?;
            server.wait().context("wait for kube-apiserver")?;
        }
        Ok(())
    }

    /// Stops the process without closing its connections: an API server that hangs.
    ///
    /// # Errors
    /// It does not run.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Lets a frozen server go on.
    ///
    /// # Errors
    /// It does not run.
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let server = self.server.as_ref().context("kube-apiserver does not run")?;
        Ok(kill(Pid::from_raw(i32::try_from(server.id())?), signal)?)
    }

    /// Starts it (again) on the same store and waits until it is ready.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn restart(&mut self) -> Result<()> {
        self.stop()?;
        let log = File::options().create(true).append(true).open(self.log())?;
        let binary = binary()?;
        let mut command = match &self.namespace {
            Some(namespace) => namespace.command(&binary),
            None => Command::new(&binary),
        };
        let (ip, port) = (self.address.ip().to_string(), self.address.port().to_string());
        let key = self.folder.path().join("sa.key").display().to_string();
        let server = command
            .args(["--etcd-servers", &self.etcd, "--bind-address", &ip, "--advertise-address", &ip])
            .args(["--secure-port", &port])
            .arg("--cert-dir")
            .arg(self.folder.path().join("certs"))
            .arg("--token-auth-file")
            .arg(self.folder.path().join("tokens.csv"))
            .args(["--authorization-mode", "RBAC", "--service-cluster-ip-range", "10.96.0.0/16"])
            .args(["--endpoint-reconciler-type", "none"])
            .args(["--service-account-issuer", "https://kubernetes.default.svc"])
            .args(["--service-account-key-file", &key, "--service-account-signing-key-file", &key])
            // Two pod CIDRs per Node, as every later version has them.
            .arg("--feature-gates=IPv6DualStack=true")
            // As in every cluster that runs network agents.
            .args(["--allow-privileged=true", "--disable-admission-plugins", "ServiceAccount"])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", binary.display()))?;
        self.server = Some(server);
        self.wait_ready()
    }

    fn wait_ready(&mut self) -> Result<()> {
        let started = Instant::now();
        loop {
            if let Some(server) = &mut self.server
                && let Some(status) = server.try_wait().context("look after kube-apiserver")?
            {
                bail!("kube-apiserver ended with {status}:\n{}", crate::tail(&self.log()));
            }
            if self.ca().exists()
                && self.request(ADMIN, "GET", "/readyz", None).is_ok_and(|a| a.status == 200)
            {
                return Ok(());
            }
            ensure!(
                started.elapsed() < START_LIMIT,
                "kube-apiserver is not ready on {} after {START_LIMIT:?}:\n{}",
                self.address,
                crate::tail(&self.log())
            );
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("apiserver.log")
    }

    /// Its certificate, which is its own authority.
    pub fn ca(&self) -> PathBuf {
        self.folder.path().join("certs/apiserver.crt")
    }

    /// A kubeconfig with this token; `name` is the file's.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn kubeconfig(&self, name: &str, token: &str) -> Result<PathBuf> {
        let path = self.folder.path().join(format!("{name}.kubeconfig"));
        let text = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "lab",
            "clusters": [{"name": "lab", "cluster": {"server": self.url(), "certificate-authority": self.ca()}}],
            "users": [{"name": "lab", "user": {"token": token}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab"}}],
        });
        fs::write(&path, text.to_string()).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }

    /// An object.
    ///
    /// # Errors
    /// There is none, or the server is away.
    pub fn get(&self, path: &str) -> Result<Value> {
        let answer = self.request(ADMIN, "GET", path, None)?;
        ensure!(answer.status == 200, "GET {path}: {} {}", answer.status, answer.body["message"]);
        Ok(answer.body)
    }

    /// Deletes an object, and does not wait for what hangs on it: no controller would end it.
    ///
    /// # Errors
    /// There is none, or the server is away.
    pub fn delete(&self, path: &str) -> Result<()> {
        let body = r#"{"apiVersion":"v1","kind":"DeleteOptions","propagationPolicy":"Background"}"#;
        let answer = self.request(ADMIN, "DELETE", path, Some(("application/json", body)))?;
        ensure!(answer.status == 200, "DELETE {path}: {} {}", answer.status, answer.body["message"]);
        Ok(())
    }

    /// Applies every object of a manifest (YAML documents), as `kubectl create` would; objects that are there stay.
    ///
    /// # Errors
    /// An object the API server refuses.
    pub fn create_from(&self, manifest: &str) -> Result<()> {
        for document in manifest.split("\n---\n").filter(|text| text.contains("kind:")) {
            let field = |name: &str| {
                let line = document.lines().find_map(|line| line.strip_prefix(&format!("{name}:")));
                line.map(|value| value.trim().to_owned()).with_context(|| format!("no {name} in\n{document}"))
            };
            let (version, kind) = (field("apiVersion")?, field("kind")?);
            let group =
                if version.contains('/') { format!("/apis/{version}") } else { format!("/api/{version}") };
            let plural = format!("{}s", kind.to_lowercase());
            let namespace = document.lines().find_map(|line| line.strip_prefix("  namespace: "));
            let path = match namespace {
                Some(namespace) => format!("{group}/namespaces/{namespace}/{plural}"),
                None => format!("{group}/{plural}"),
            };
            let answer = self.request(ADMIN, "POST", &path, Some(("application/yaml", document)))?;
            ensure!(
                matches!(answer.status, 201 | 409),
                "POST {path}: {} {}",
                answer.status,
                answer.body["message"]
            );
        }
        Ok(())
    }

    /// A bound token of a service account.
    ///
    /// # Errors
    /// There is no such account.
    pub fn service_account_token(&self, namespace: &str, account: &str) -> Result<String> {
        let path = format!("/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token");
        let answer = self.admin("POST", &path, &json!({"spec": {"expirationSeconds": 3600}}))?;
        answer["status"]["token"].as_str().map(str::to_owned).context("the answer has no token")
    }

    /// A Node as a kubelet and the controller manager would have made it; `annotations` is `None` for a Node without any.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn create_node(&self, name: &str, pod_cidrs: &[&str], annotations: Option<Value>) -> Result<()> {
        let mut node =
            json!({"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}}, "spec": {}});
        if let Some(annotations) = annotations {
            node["metadata"]["annotations"] = annotations;
        }
        if let Some(first) = pod_cidrs.first() {
            node["spec"] = json!({"podCIDR": first, "podCIDRs": pod_cidrs});
        }
        self.admin("POST", "/api/v1/nodes", &node).map(drop)
    }

    /// The Node as it is.
    ///
    /// # Errors
    /// There is none.
    pub fn node(&self, name: &str) -> Result<Value> {
        let answer = self.request(ADMIN, "GET", &format!("/api/v1/nodes/{name}"), None)?;
        ensure!(answer.status == 200, "node {name}: {} {}", answer.status, answer.body["message"]);
        Ok(answer.body)
    }

    /// A merge patch of the Node, or with `/status` of its status.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn patch_node(&self, name: &str, patch: &Value) -> Result<()> {
        let path = format!("/api/v1/nodes/{name}");
        let body = patch.to_string();
        let answer = self.request(ADMIN, "PATCH", &path, Some(("application/merge-patch+json", &body)))?;
        ensure!(answer.status == 200, "PATCH {path}: {} {}", answer.status, answer.body["message"]);
        Ok(())
    }

    /// Deletes a Node; that there is none is fine.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn delete_node(&self, name: &str) -> Result<()> {
        let answer = self.request(ADMIN, "DELETE", &format!("/api/v1/nodes/{name}"), None)?;
        ensure!(matches!(answer.status, 200 | 404), "DELETE node {name}: {} {}", answer.status, answer.body);
        Ok(())
    }

    /// Deletes all Nodes.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn delete_nodes(&self) -> Result<()> {
        let answer = self.request(ADMIN, "DELETE", "/api/v1/nodes", None)?;
        ensure!(answer.status == 200, "DELETE nodes: {} {}", answer.status, answer.body);
        Ok(())
    }

    /// All Nodes.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn nodes(&self) -> Result<Vec<Value>> {
        let answer = self.request(ADMIN, "GET", "/api/v1/nodes", None)?;
        Ok(answer.body["items"].as_array().cloned().unwrap_or_default())
    }

    /// Waits until the Node is as `fits` wants it.
    ///
    /// # Errors
    /// Not within half a minute: with the Node as it is.
    pub fn wait_node(&self, name: &str, wanted: &str, fits: impl Fn(&Value) -> bool) -> Result<Value> {
        let started = Instant::now();
        loop {
            let node = self.node(name);
            if let Ok(node) = &node
                && fits(node)
            {
                return Ok(node.clone());
            }
            ensure!(
                started.elapsed() < Duration::from_secs(30),
                "waited for node {name} {wanted}; it is {:#}",
                node.unwrap_or_else(|error| json!(error.to_string()))
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn admin(&self, method: &str, path: &str, body: &Value) -> Result<Value> {
        let answer = self.request(ADMIN, method, path, Some((JSON, &body.to_string())))?;
        ensure!(
            matches!(answer.status, 200 | 201),
            "{method} {path}: {} {}",
            answer.status,
            answer.body["message"]
        );
        Ok(answer.body)
    }

    /// One call with the token of `who`; the body with its type.
    ///
    /// # Errors
    /// No answer.
    pub fn request(
        &self,
        token: &str,
        method: &str,
        path: &str,
        body: Option<(&str, &str)>,
    ) -> Result<Answer> {
        let mut command = match &self.namespace {
            Some(namespace) => namespace.command("curl"),
            None => Command::new("curl"),
        };
        command
            .args([
                "--silent",
                "--show-error",
                "--max-time",
                "20",
                "--write-out",
                "\n%{http_code}",
                "--cacert",
            ])
            .arg(self.ca())
            .args(["--header", &format!("Authorization: Bearer {token}"), "--request", method]);
        if let Some((kind, text)) = body {
            command.args(["--header", &format!("Content-Type: {kind}"), "--data-binary", text]);
        }
        let output = command
            .arg(format!("{}{path}", self.url()))
            .output()
            .context("start `curl` (Debian and Ubuntu: package curl)")?;
        ensure!(
            output.status.success(),
            "{method} {path}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        let text = String::from_utf8_lossy(&output.stdout);
        let (body, status) = text.rsplit_once('\n').context("curl printed no status")?;
        Ok(Answer {
            status: status.parse().with_context(|| format!("status {status}"))?,
            body: serde_json::from_str(body).unwrap_or(Value::Null),
        })
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

/// Where `cargo xtask setup --kube` puts it: `target/tools/bin/kube-apiserver`.
fn binary() -> Result<PathBuf> {
    let me = std::env::current_exe().context("find this program's own path")?;
    let found =
        me.ancestors().map(|folder| folder.join("tools/bin/kube-apiserver")).find(|path| is_file(path));
    found.context("kube-apiserver was not built; run `cargo xtask setup --kube`")
}

fn is_file(path: &Path) -> bool {
    path.is_file()
}
