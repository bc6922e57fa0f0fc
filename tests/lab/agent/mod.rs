//! The real agent on a host of the lab: started with files and sockets of its own, asked by its own interfaces
//! (`/readyz`, `flannel-agent status --json`), and killed when dropped.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::PathBuf,
    process::{Child, ExitStatus},
    sync::Arc,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::namespace::Namespace;

mod status;
mod subnet_env;
mod unrest;

pub use status::{Count, Peer, PeerCount, Refused, Status, Tunnel, status};
pub use subnet_env::SubnetEnv;
pub use unrest::{Repetition, at_rest, repetitions};

const HEALTH_PORT: u16 = 10256;

/// How an agent is started, apart from what the lab sets by itself (etcd, files, sockets, bpffs).
#[derive(Clone, Debug)]
pub struct AgentOptions {
    binary: PathBuf,
    flags: Vec<String>,
    environment: Vec<(String, String)>,
}

impl AgentOptions {
    /// The binary that was built with this test (see [`crate::agent_binary`]).
    ///
    /// # Errors
    /// It was not built.
    pub fn new() -> Result<Self> {
        Ok(Self::with_binary(crate::agent_binary()?))
    }

    /// Another binary.
    pub fn with_binary(binary: PathBuf) -> Self {
        Self { binary, flags: Vec::new(), environment: Vec::new() }
    }

    /// `--udp-datapath=TIER`.
    #[must_use]
    pub fn datapath(self, tier: &str) -> Self {
        self.flag(format!("--udp-datapath={tier}"))
    }

    /// One more flag; a later one of the same name wins.
    #[must_use]
    pub fn flag(mut self, flag: impl Into<String>) -> Self {
        self.flags.push(flag.into());
        self
    }

    /// One more environment variable.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }
}

/// Where an agent of the lab keeps its things.
#[derive(Clone, Debug)]
pub struct AgentFiles {
    /// A folder of its own for each host.
    pub folder: PathBuf,
    /// `--bpffs-path`; none where no bpffs can be mounted.
    pub bpffs: Option<PathBuf>,
}

impl AgentFiles {
    /// `--subnet-file`.
    pub fn subnet_env(&self) -> PathBuf {
        self.folder.join("subnet.env")
    }

    /// `--status-socket`.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("agent.sock")
    }

    /// Standard output and error of every agent started here, one after the other.
    pub fn log(&self) -> PathBuf {
        self.folder.join("agent.log")
    }
}

/// A running (or ended) agent.
#[derive(Debug)]
pub struct Agent {
    namespace: Arc<Namespace>,
    binary: PathBuf,
    files: AgentFiles,
    process: Child,
}

impl Agent {
    /// Starts the agent inside `namespace` on the store that the flags in `store` name.
    ///
    /// # Errors
    /// The binary can't be started.
    pub fn start(
        namespace: &Arc<Namespace>,
        files: &AgentFiles,
        store: &[String],
        options: &AgentOptions,
    ) -> Result<Self> {
        let log = files.log();
        let output = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("open {}", log.display()))?;
        let mut command = namespace.command(&options.binary);
        command
            .args(store)
            .arg(format!("--subnet-file={}", files.subnet_env().display()))
            .arg(format!("--status-socket={}", files.socket().display()))
            .args(["--healthz-ip=127.0.0.1", &format!("--healthz-port={HEALTH_PORT}")]);
        if let Some(bpffs) = &files.bpffs {
            command.arg(format!("--bpffs-path={}", bpffs.display()));
        }
        let process = command
            .args(&options.flags)
            .envs(options.environment.iter().cloned())
            .stdout(output.try_clone().context("share the agent's log")?)
            .stderr(output)
            .spawn()
            .with_context(|| format!("start {}", options.binary.display()))?;
        Ok(Self {
            namespace: Arc::clone(namespace),
            binary: options.binary.clone(),
            files: files.clone(),
            process,
        })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// What it printed so far (and its predecessors on this host).
    pub fn log(&self) -> String {
        fs::read_to_string(self.files.log()).unwrap_or_default()
    }

    /// Waits until `/readyz` says 200.
    ///
    /// # Errors
    /// It ends, or is not ready in time: with the last answer and the end of the log.
    pub fn wait_ready(&mut self) -> Result<()> {
        let (started, limit) = (Instant::now(), crate::patience());
        loop {
            let answer = self.readyz();
            if let Ok((200, _)) = answer {
                return Ok(());
            }
            if let Some(status) = self.process.try_wait().context("look after the agent")? {
                bail!(
                    "the agent on {} ended with {status}:\n{}",
                    self.namespace.name(),
                    crate::tail(&self.files.log())
                );
            }
            ensure!(
                started.elapsed() < limit,
                "the agent on {} is not ready after {limit:?}; /readyz: {answer:?}\n{}",
                self.namespace.name(),
                crate::tail(&self.files.log())
            );
            sleep(Duration::from_millis(25));
        }
    }

    /// Waits until `/readyz` says 503 and `reason` is in its reasons.
    ///
    /// # Errors
    /// Not in time: with the last answer and the end of the log.
    pub fn wait_not_ready(&self, reason: &str) -> Result<()> {
        let (started, limit) = (Instant::now(), crate::patience());
        loop {
            let answer = self.readyz();
            if answer.as_ref().is_ok_and(|(code, body)| *code == 503 && body.contains(reason)) {
                return Ok(());
            }
            ensure!(
                started.elapsed() < limit,
                "{}: /readyz does not say `{reason}` but {answer:?}\n{}",
                self.namespace.name(),
                crate::tail(&self.files.log())
            );
            sleep(Duration::from_millis(25));
        }
    }

    /// Status and body of `/readyz`.
    ///
    /// # Errors
    /// Nothing listens, or the answer is no HTTP.
    pub fn readyz(&self) -> Result<(u16, String)> {
        self.http_get("/readyz")
    }

    /// Status and body of a GET to the health server.
    ///
    /// # Errors
    /// Nothing listens, or the answer is no HTTP.
    pub fn http_get(&self, path: &str) -> Result<(u16, String)> {
        let limit = Duration::from_secs(2);
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, HEALTH_PORT));
        let mut socket = self.namespace.run(|| Ok(TcpStream::connect_timeout(&address, limit)?))?;
        socket.set_read_timeout(Some(limit))?;
        write!(socket, "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        socket.take(1 << 20).read_to_end(&mut answer)?;
        let answer = String::from_utf8_lossy(&answer);
        let (head, body) = answer.split_once("\r\n\r\n").context("no HTTP answer")?;
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).context("no HTTP status")?;
        Ok((status, body.to_owned()))
    }

    /// `flannel-agent status --json`.
    ///
    /// # Errors
    /// The command fails, or prints something else.
    pub fn status(&self) -> Result<Status> {
        status(&self.binary, &self.files.socket())
    }

    /// Waits until the agent knows `count` peers and is ready; returns what it then says.
    ///
    /// # Errors
    /// Not in time.
    pub fn wait_peers(&mut self, count: usize) -> Result<Status> {
        self.wait_ready()?;
        self.wait_status(&format!("{count} peers, and ready"), |status| {
            status.ready && status.peers.len() == count
        })
    }

    /// Waits until `fits` is true of its status.
    ///
    /// # Errors
    /// Not in time: with `wanted`, the last status and the end of the log.
    pub fn wait_status(&self, wanted: &str, fits: impl Fn(&Status) -> bool) -> Result<Status> {
        let (started, limit) = (Instant::now(), crate::patience());
        loop {
            let status = self.status();
            if let Ok(status) = &status
                && fits(status)
            {
                return Ok(status.clone());
            }
            ensure!(
                started.elapsed() < limit,
                "{}: waited {limit:?} for {wanted}; last status: {status:?}\n{}",
                self.namespace.name(),
                crate::tail(&self.files.log())
            );
            sleep(Duration::from_millis(25));
        }
    }

    /// Waits until `line` is in its log.
    ///
    /// # Errors
    /// Not in time: with the end of the log.
    pub fn wait_log(&self, line: &str) -> Result<()> {
        let (started, limit) = (Instant::now(), crate::patience());
        while !self.log().contains(line) {
            ensure!(
                started.elapsed() < limit,
                "{}: does not log `{line}`\n{}",
                self.namespace.name(),
                crate::tail(&self.files.log())
            );
            sleep(Duration::from_millis(25));
        }
        Ok(())
    }

    /// What it wrote for the container runtime.
    ///
    /// # Errors
    /// Not written yet, or a key is missing.
    pub fn subnet_env(&self) -> Result<SubnetEnv> {
        SubnetEnv::read(&self.files.subnet_env())
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// It does not run any more.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.process.id()).context("the agent's pid")?;
        kill(Pid::from_raw(pid), signal).with_context(|| format!("send {signal} to the agent"))
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// It still runs after `limit`.
    pub fn wait_end(&mut self, limit: Duration) -> Result<ExitStatus> {
        let started = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().context("look after the agent")? {
                return Ok(status);
            }
            ensure!(
                started.elapsed() < limit,
                "the agent on {} still runs after {limit:?}:\n{}",
                self.namespace.name(),
                crate::tail(&self.files.log())
            );
            sleep(Duration::from_millis(10));
        }
    }

    /// SIGKILL, and waits for the end: a crash.
    ///
    /// # Errors
    /// The kernel refuses to kill or reap it.
    pub fn crash(&mut self) -> Result<()> {
        self.process.kill().context("kill the agent")?;
        self.process.wait().context("wait for the agent")?;
        Ok(())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.crash();
    }
}
