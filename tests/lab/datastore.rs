//! An etcd server in a namespace of the lab, and what the lab says to it.
//!
//! Debian's `etcd-server` 3.4 or newer; its data lies in the lab's folder. Talking goes through `etcdctl`, and for many
//! entries at once through the JSON gateway, so this needs no client library and the answers are etcd's own.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Child,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::etcd_v2::V2Keys;
use crate::namespace::Namespace;

/// Prefix of every key (flanneld's default).
pub const PREFIX: &str = "/coreos.com/network";

const CLIENT_PORT: u16 = 2379;

/// A running etcd; killed when dropped.
#[derive(Debug)]
pub struct Datastore {
    namespace: Arc<Namespace>,
    address: Ipv4Addr,
    folder: PathBuf,
    server: Option<Child>,
}

impl Datastore {
    /// An etcd that will listen on `address` of the namespace once it is started with [`Self::restart`].
    pub fn new(namespace: &Arc<Namespace>, address: Ipv4Addr, folder: &Path) -> Self {
        Self { namespace: Arc::clone(namespace), address, folder: folder.to_owned(), server: None }
    }

    /// What goes into `--etcd-endpoints`.
    pub fn endpoint(&self) -> String {
        format!("http://{}:{CLIENT_PORT}", self.address)
    }

    /// Kills the server. Its data stays.
    ///
    /// # Errors
    /// The kernel refuses to kill or reap it.
    pub fn stop(&mut self) -> Result<()> {
        if let Some(mut server) = self.server.take() {
            server.kill().context("kill etcd")?;
            server.wait().context("wait for etcd")?;
        }
        Ok(())
    }

    /// Starts it (again) on the same data and waits until it answers.
    ///
    /// # Errors
    /// No `etcd` on this machine, or it ends or stays silent; the text has the end of its log.
    pub fn restart(&mut self) -> Result<()> {
        self.stop()?;
        let log = self.folder.join("etcd.log");
        let output = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("open {}", log.display()))?;
        let client = self.endpoint();
        let peer = "http://127.0.0.1:2380";
        let server = self
            .namespace
            .command("etcd")
            // Outside x86-64 etcd 3.4 wants to be asked for; without effect elsewhere.
            // Both APIs where it has both; of no effect from 3.6.
            .env("ETCD_ENABLE_V2", "true")
            .env("ETCD_UNSUPPORTED_ARCH", std::env::consts::ARCH.replace("aarch64", "arm64"))
            .args(["--name", "lab", "--log-level", "warn", "--logger", "zap", "--log-outputs", "stderr"])
            .arg("--data-dir")
            .arg(self.folder.join("etcd"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer])
            .args(["--initial-cluster", &format!("lab={peer}"), "--max-txn-ops", "10240"])
            .stdout(output.try_clone().context("share etcd's log")?)
            .stderr(output)
            .spawn()
            .context("start `etcd` (Debian and Ubuntu: package etcd-server)")?;
        self.server = Some(server);
        self.wait_until_it_answers()
    }

    /// Stops the server's processes without closing its connections: an etcd that hangs.
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
        let server = self.server.as_ref().context("etcd does not run")?;
        let pid = i32::try_from(server.id()).context("etcd's pid")?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("send {signal} to etcd"))
    }

    fn wait_until_it_answers(&mut self) -> Result<()> {
        let (started, limit) = (Instant::now(), crate::patience());
        let address = SocketAddr::from((self.address, CLIENT_PORT));
        loop {
            if let Some(server) = &mut self.server
                && let Some(status) = server.try_wait().context("look after etcd")?
            {
                bail!("etcd ended with {status}:\n{}", crate::tail(&self.folder.join("etcd.log")));
            }
            let open = self
                .namespace
                .run(|| Ok(TcpStream::connect_timeout(&address, Duration::from_millis(200)).is_ok()))?;
            if open && self.etcdctl(&["endpoint", "health"]).is_ok() {
                return Ok(());
            }
            ensure!(
                started.elapsed() < limit,
                "etcd does not answer on {address} after {limit:?}:\n{}",
                crate::tail(&self.folder.join("etcd.log"))
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// The keys of the v2 API.
    pub fn v2(&self) -> V2Keys {
        let (namespace, address) = (self.namespace.clone(), SocketAddr::from((self.address, CLIENT_PORT)));
        V2Keys::new(move || {
            namespace.run(|| Ok(TcpStream::connect_timeout(&address, Duration::from_secs(5))?))
        })
    }

    /// Publishes the network configuration (JSON).
    ///
    /// # Errors
    /// etcd is away.
    pub fn put_config(&self, json: &str) -> Result<()> {
        self.put("config", json)
    }

    /// Writes `PREFIX/key`.
    ///
    /// # Errors
    /// etcd is away.
    pub fn put(&self, key: &str, value: &str) -> Result<()> {
        self.etcdctl(&["put", &format!("{PREFIX}/{key}"), "--", value]).map(drop)
    }

    /// Writes many entries, thousands in a second, through etcd's JSON gateway
    /// (<https://etcd.io/docs/v3.4/dev-guide/api_grpc_gateway/>); returns when the first request left and when the last was
    /// answered.
    ///
    /// # Errors
    /// etcd is away, or refuses.
    pub fn put_all(&self, entries: &[(String, String)]) -> Result<(Instant, Instant)> {
        // etcd takes requests of up to 1.5 MiB.
        const AT_ONCE: usize = 2000;
        let requests: Vec<String> = entries
            .chunks(AT_ONCE)
            .map(|chunk| {
                let puts: Vec<_> = chunk
                    .iter()
                    .map(|(key, value)| {
                        let key = BASE64.encode(format!("{PREFIX}/{key}"));
                        serde_json::json!({"requestPut": {"key": key, "value": BASE64.encode(value)}})
                    })
                    .collect();
                serde_json::json!({ "success": puts }).to_string()
            })
            .collect();
        let started = Instant::now();
        for request in requests {
            self.post("/v3/kv/txn", &request)?;
        }
        Ok((started, Instant::now()))
    }

    fn post(&self, path: &str, body: &str) -> Result<()> {
        let address = SocketAddr::from((self.address, CLIENT_PORT));
        let doing = || format!("POST {path} to etcd");
        let mut socket = self
            .namespace
            .run(|| Ok(TcpStream::connect_timeout(&address, Duration::from_secs(5))?))
            .with_context(doing)?;
        socket.set_read_timeout(Some(Duration::from_secs(30))).with_context(doing)?;
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        socket.write_all(format!("{head}{body}").as_bytes()).with_context(doing)?;
        let mut answer = String::new();
        socket.take(1 << 24).read_to_string(&mut answer).with_context(doing)?;
        ensure!(
            answer.starts_with("HTTP/1.1 200"),
            "{}: {}",
            doing(),
            answer.chars().take(500).collect::<String>()
        );
        Ok(())
    }

    /// Deletes `PREFIX/key`; true when it was there.
    ///
    /// # Errors
    /// etcd is away.
    pub fn delete(&self, key: &str) -> Result<bool> {
        Ok(self.etcdctl(&["del", &format!("{PREFIX}/{key}")])?.trim() == "1")
    }

    /// The value of `PREFIX/key`.
    ///
    /// # Errors
    /// etcd is away.
    pub fn get(&self, key: &str) -> Result<Option<String>> {
        let text = self.etcdctl(&["get", "--print-value-only", &format!("{PREFIX}/{key}")])?;
        Ok(Some(text.trim_end_matches('\n').to_owned()).filter(|text| !text.is_empty()))
    }

    /// The leases: key below `subnets/` and value, sorted by key.
    ///
    /// # Errors
    /// etcd is away.
    pub fn leases(&self) -> Result<Vec<(String, String)>> {
        let folder = format!("{PREFIX}/subnets/");
        let text = self.etcdctl(&["get", "--prefix", &folder])?;
        let mut lines = text.lines();
        let mut leases = Vec::new();
        while let (Some(key), Some(value)) = (lines.next(), lines.next()) {
            let key = key.strip_prefix(&folder).with_context(|| format!("{key} is not below {folder}"))?;
            leases.push((key.to_owned(), value.to_owned()));
        }
        Ok(leases)
    }

    /// Runs `etcdctl ARGUMENTS` (API 3) and returns what it printed.
    ///
    /// # Errors
    /// It fails, or does not exist on this machine.
    pub fn etcdctl(&self, arguments: &[&str]) -> Result<String> {
        let output = self
            .namespace
            .command("etcdctl")
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.endpoint(), "--command-timeout", "5s"])
            .args(arguments)
            .output()
            .context("start `etcdctl` (Debian and Ubuntu: package etcd-client)")?;
        ensure!(
            output.status.success(),
            "`etcdctl {}`: {}; {}",
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Drop for Datastore {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}
