//! A real etcd, started for one test: its own folder, its own ports, and gone with its handle.
//!
//! Relies on Debian's `etcd-server` and `etcd-client` (3.4 or 3.5, both APIs in one process), on an etcd 3.6, which has
//! no package there, out of a crate whose hash `Cargo.lock` knows, and on `openssl` for certificates. Starts in about a
//! second.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::etcd_v2::V2Keys;
use crate::port::Port;

/// How long a start may take on a busy machine.
const START_LIMIT: Duration = Duration::from_secs(20);

/// Which etcd runs.
#[derive(Clone, Copy, Debug)]
pub enum Version {
    /// The first on `PATH`; tests of the v2 API need one that has it, which are those before 3.6.
    Installed,
    V3_6,
}

impl Version {
    fn program(self) -> &'static Path {
        match self {
            Self::Installed => Path::new("etcd"),
            Self::V3_6 => {
                let Ok(path) = etcd_3_6::etcd_bin_path();
                path
            }
        }
    }
}

/// How the server listens.
#[derive(Clone, Debug)]
pub struct Setup {
    pub version: Version,
    /// Clients are served here.
    pub address: IpAddr,
    pub tls: Option<ServerTls>,
    /// Has the v2 API too, if the version knows it.
    pub v2: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Self { version: Version::Installed, address: Ipv4Addr::LOCALHOST.into(), tls: None, v2: true }
    }
}

/// TLS of the server. With `client_ca`, clients must show a certificate this authority signed.
#[derive(Clone, Debug)]
pub struct ServerTls {
    pub server: Certificate,
    pub ca: PathBuf,
    pub client_ca: Option<PathBuf>,
    /// What the lab itself shows when it talks to the server.
    pub operator: Option<Certificate>,
}

/// A certificate and its key, PEM files.
#[derive(Clone, Debug)]
pub struct Certificate {
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// A running etcd. Dropping it kills the server and deletes its data.
#[derive(Debug)]
pub struct Etcd {
    folder: TempDir,
    setup: Setup,
    client: Port,
    peer: Port,
    /// `--initial-cluster` of one with several members.
    cluster: Option<String>,
    child: Option<Child>,
}

impl Etcd {
    /// Plain HTTP on a free port of the loopback.
    pub fn start() -> Result<Self> {
        Self::start_with(Setup::default())
    }

    /// Returns when the server answers.
    pub fn start_with(setup: Setup) -> Result<Self> {
        let mut etcd = Self::new(setup, None)?;
        etcd.restart()?;
        Ok(etcd)
    }

    fn new(setup: Setup, cluster: Option<String>) -> Result<Self> {
        let (client, peer) = (Port::hold(setup.address)?, Port::hold(Ipv4Addr::LOCALHOST.into())?);
        let folder = tempfile::Builder::new().prefix("flannel-etcd-").tempdir()?;
        Ok(Self { folder, setup, client, peer, cluster, child: None })
    }

    /// `http://127.0.0.1:12345`
    pub fn endpoint(&self) -> String {
        let scheme = if self.setup.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address())
    }

    pub fn address(&self) -> SocketAddr {
        self.client.address()
    }

    /// SIGKILL: no goodbye. Data stay on disk. That it is dead already is fine.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGSTOP: connections stay open and nothing answers, like a machine that hangs.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)
    }

    /// Ends [`freeze`](Self::freeze).
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    /// Starts the server on the same data and ports, after killing it when it runs, and waits until it answers.
    pub fn restart(&mut self) -> Result<()> {
        self.spawn()?;
        self.wait_until_it_answers()
    }

    /// An empty one takes its place: nothing that was written is there, and etcd counts from the beginning.
    pub fn replace(&mut self) -> Result<()> {
        self.kill();
        std::fs::remove_dir_all(self.folder.path().join("data"))?;
        self.restart()
    }

    /// The name in a cluster.
    fn name(&self) -> String {
        if self.cluster.is_some() { format!("m{}", self.address().port()) } else { "lab".to_owned() }
    }

    fn peer_url(&self) -> String {
        format!("http://{}", self.peer.address())
    }

    fn spawn(&mut self) -> Result<()> {
        self.kill();
        let log = File::create(self.folder.path().join("etcd.log"))?;
        let (client, peer) = (self.endpoint(), self.peer_url());
        let name = self.name();
        let cluster = self.cluster.clone().unwrap_or_else(|| format!("{name}={peer}"));
        // One member agrees with itself quickly; several on a busy machine need what etcd has by itself.
        let timing: &[&str] = match self.cluster {
            None => &["--heartbeat-interval", "20", "--election-timeout", "200"],
            Some(_) => &[],
        };
        let mut command = Command::new(self.setup.version.program());
        command
            // A flag that 3.6 does not know; of no effect there as a variable.
            .env("ETCD_ENABLE_V2", self.setup.v2.to_string())
            .args(["--name", &name, "--logger", "zap", "--log-outputs", "stderr"])
            .args(["--log-level", "warn", "--max-txn-ops", "10240"])
            .args(timing)
            .arg("--data-dir")
            .arg(self.folder.path().join("data"))
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &cluster]);
        if let Some(tls) = &self.setup.tls {
            command.arg("--cert-file").arg(&tls.server.cert).arg("--key-file").arg(&tls.server.key);
            if let Some(ca) = &tls.client_ca {
                command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(ca);
            }
        }
        let child = command
            .env_remove("ETCDCTL_API")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .context("starting etcd; apt-get install etcd-server etcd-client")?;
        self.child = Some(child);
        Ok(())
    }

    /// Runs `etcdctl` (v3) against the server and gives its output.
    pub fn ctl(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new("etcdctl");
        command.env("ETCDCTL_API", "3").args(["--endpoints", &self.endpoint(), "--command-timeout", "5s"]);
        if let Some(tls) = &self.setup.tls {
            command.arg("--cacert").arg(&tls.ca);
            if let Some(operator) = &tls.operator {
                command.arg("--cert").arg(&operator.cert).arg("--key").arg(&operator.key);
            }
        }
        let output = command.args(args).output().context("running etcdctl; apt-get install etcd-client")?;
        if !output.status.success() {
            bail!("etcdctl {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// The keys of the other API; without TLS.
    pub fn v2(&self) -> V2Keys {
        let address = self.address();
        V2Keys::new(move || Ok(TcpStream::connect_timeout(&address, Duration::from_secs(5))?))
    }

    /// Forgets all history before the newest revision.
    pub fn compact(&self, revision: i64) -> Result<()> {
        self.ctl(&["compaction", "--physical=true", &revision.to_string()]).map(drop)
    }

    /// Number of lease objects the server knows.
    pub fn lease_objects(&self) -> Result<usize> {
        let list = self.ctl(&["lease", "list"])?;
        let count =
            list.lines().next().and_then(|line| line.split_whitespace().nth(1)).and_then(|n| n.parse().ok());
        count.with_context(|| format!("etcdctl lease list says {list:?}"))
    }

    /// Adds `root` and switches etcd's authentication on. [`ctl`](Self::ctl) then needs `--user`.
    pub fn require_password(&self, password: &str) -> Result<()> {
        self.ctl(&["user", "add", &format!("root:{password}")])?;
        self.ctl(&["user", "grant-role", "root", "root"])?;
        self.ctl(&["auth", "enable"]).map(drop)
    }

    /// The same for the v2 API, which has users of its own: only `root` may do anything from then on.
    pub fn require_v2_password(&self, password: &str) -> Result<()> {
        let v2 = self.v2();
        let user = serde_json::json!({"user": "root", "password": password});
        v2.put_json("/v2/auth/users/root", &user.to_string())?;
        v2.put_json("/v2/auth/enable", "")?;
        let revoke =
            serde_json::json!({"role": "guest", "revoke": {"kv": {"read": ["/*"], "write": ["/*"]}}});
        v2.with_login("root", password).put_json("/v2/auth/roles/guest", &revoke.to_string()).map(drop)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let child = self.child.as_ref().context("etcd does not run")?;
        Ok(kill(Pid::from_raw(i32::try_from(child.id())?), signal)?)
    }

    fn wait_until_it_answers(&mut self) -> Result<()> {
        let end = Instant::now() + START_LIMIT;
        loop {
            if let Some(status) = self.child.as_mut().and_then(|child| child.try_wait().ok().flatten()) {
                bail!("etcd ended at start ({status}): {}", self.log());
            }
            // `endpoint health` fails with "permission denied" where a password is required, which is an answer too.
            match self.ctl(&["endpoint", "health"]) {
                Ok(_) => return Ok(()),
                Err(error) if error.to_string().contains("user name is empty") => return Ok(()),
                Err(error) if Instant::now() > end => {
                    return Err(error.context(format!("etcd does not answer: {}", self.log())));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }

    fn log(&self) -> String {
        let log = std::fs::read_to_string(self.folder.path().join("etcd.log")).unwrap_or_default();
        let lines: Vec<_> = log.lines().collect();
        lines.get(lines.len().saturating_sub(5)..).unwrap_or_default().join("\n")
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Several members of one cluster.
#[derive(Debug)]
pub struct Cluster {
    pub members: Vec<Etcd>,
}

impl Cluster {
    /// Of `count` members, on free ports of the loopback; returns when all answer.
    pub fn start(count: usize) -> Result<Self> {
        // Named once it is known.
        let new = |_| Etcd::new(Setup::default(), Some(String::new()));
        let mut members = (0..count).map(new).collect::<Result<Vec<_>>>()?;
        let list: Vec<String> =
            members.iter().map(|member| format!("{}={}", member.name(), member.peer_url())).collect();
        for member in &mut members {
            member.cluster = Some(list.join(","));
            member.spawn()?;
        }
        members.iter_mut().try_for_each(Etcd::wait_until_it_answers)?;
        Ok(Self { members })
    }

    /// Of all members.
    pub fn endpoints(&self) -> Vec<String> {
        self.members.iter().map(Etcd::endpoint).collect()
    }

    /// Index of the member that leads, as it says itself.
    pub fn leader(&self) -> Result<usize> {
        let end = Instant::now() + START_LIMIT;
        loop {
            for (index, member) in self.members.iter().enumerate() {
                let Ok(text) = member.ctl(&["endpoint", "status", "--write-out=json"]) else { continue };
                let status: serde_json::Value = serde_json::from_str(&text)?;
                let leads = status.pointer("/0/Status/leader");
                if leads.is_some() && leads == status.pointer("/0/Status/header/member_id") {
                    return Ok(index);
                }
            }
            if Instant::now() > end {
                bail!("no member leads");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// A certificate authority made for one test.
#[derive(Debug)]
pub struct Authority {
    folder: TempDir,
    config: PathBuf,
}

impl Authority {
    pub fn new(name: &str) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("flannel-ca-").tempdir()?;
        let config = folder.path().join("openssl.cnf");
        std::fs::write(&config, "[req]\ndistinguished_name=dn\n[dn]\n")?;
        let authority = Self { folder, config };
        authority.openssl("ca", name, &["-addext", "basicConstraints=critical,CA:TRUE"])?;
        Ok(authority)
    }

    /// The authority's own certificate.
    pub fn ca(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// A certificate for a server at `address`.
    pub fn server(&self, address: IpAddr) -> Result<Certificate> {
        self.leaf("server", &format!("IP:{address}"), "serverAuth,clientAuth")
    }

    /// A certificate a client may show.
    pub fn client(&self, name: &str) -> Result<Certificate> {
        self.leaf(name, &format!("DNS:{name}"), "clientAuth")
    }

    fn leaf(&self, name: &str, alternative: &str, usage: &str) -> Result<Certificate> {
        let ca = self.ca();
        let ca_key = self.folder.path().join("ca.key");
        let (ca, ca_key) = (ca.to_string_lossy(), ca_key.to_string_lossy());
        let (alternative, usage) =
            (format!("subjectAltName={alternative}"), format!("extendedKeyUsage={usage}"));
        self.openssl(name, name, &["-CA", &ca, "-CAkey", &ca_key, "-addext", &alternative, "-addext", &usage])
    }

    fn openssl(&self, file: &str, name: &str, extra: &[&str]) -> Result<Certificate> {
        let path =
            |suffix: &str| -> PathBuf { Path::new(self.folder.path()).join(format!("{file}.{suffix}")) };
        let (cert, key) = (path("pem"), path("key"));
        let output = Command::new("openssl")
            .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"])
            .args(["-days", "2", "-subj", &format!("/CN={name}"), "-config"])
            .arg(&self.config)
            .arg("-keyout")
            .arg(&key)
            .arg("-out")
            .arg(&cert)
            .args(extra)
            .output()
            .context("running openssl; apt-get install openssl")?;
        if !output.status.success() {
            bail!("openssl: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(Certificate { cert, key })
    }
}
