//! A flannel server in a namespace of the lab: the agent's own binary with `--listen`, its leases in a file.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::Child,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::namespace::Namespace;

const START_LIMIT: Duration = Duration::from_secs(20);

/// A running (or ended) server; killed when dropped. Its leases stay in the folder.
#[derive(Debug)]
pub struct LeaseServer {
    namespace: Arc<Namespace>,
    binary: PathBuf,
    address: SocketAddr,
    folder: PathBuf,
    flags: Vec<String>,
    process: Option<Child>,
}

impl LeaseServer {
    /// A server that will listen on `address` of the namespace once it is started with [`Self::restart`]. Without flags
    /// about the store, that is a file in `folder`.
    pub fn new(namespace: &Arc<Namespace>, binary: &Path, address: SocketAddr, folder: &Path) -> Self {
        Self {
            namespace: Arc::clone(namespace),
            binary: binary.to_owned(),
            address,
            folder: folder.to_owned(),
            flags: vec![
                format!("--store=embedded:{}", folder.join("leases.redb").display()),
                format!("--net-config-path={}", folder.join("net-conf.json").display()),
            ],
            process: None,
        }
    }

    /// Other flags than those of the file.
    #[must_use]
    pub fn with_flags(mut self, flags: &[String]) -> Self {
        self.flags = flags.to_vec();
        self
    }

    /// What goes into `--remote`.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Writes the network configuration (JSON), which a running server finds within a second.
    ///
    /// # Errors
    /// The disk is full.
    pub fn put_config(&self, json: &str) -> Result<()> {
        let path = self.folder.join("net-conf.json");
        fs::write(&path, json).with_context(|| format!("write {}", path.display()))
    }

    /// SIGKILL: no goodbye. That it is dead already is fine.
    ///
    /// # Errors
    /// The kernel refuses to kill or reap it.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut process) = self.process.take() {
            process.kill().context("kill the server")?;
            process.wait().context("wait for the server")?;
        }
        Ok(())
    }

    /// Its process.
    ///
    /// # Errors
    /// It does not run.
    pub fn pid(&self) -> Result<u32> {
        self.process.as_ref().map(Child::id).context("the server does not run")
    }

    /// Starts it (again) on the same file and waits until it listens.
    ///
    /// # Errors
    /// It ends, or stays silent; the text has the end of its log.
    pub fn restart(&mut self) -> Result<()> {
        self.kill()?;
        let path = self.log();
        let log = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("open {}", path.display()))?;
        let process = self
            .namespace
            .command(&self.binary)
            .arg(format!("--listen={}", self.address))
            .args(&self.flags)
            .stdout(log.try_clone().context("share the server's log")?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {}", self.binary.display()))?;
        let process = self.process.insert(process);
        let started = Instant::now();
        loop {
            if let Some(status) = process.try_wait().context("look after the server")? {
                bail!("the server ended with {status}:\n{}", crate::tail(&self.folder.join("server.log")));
            }
            let address = self.address;
            let open = self
                .namespace
                .run(|| Ok(TcpStream::connect_timeout(&address, Duration::from_millis(200)).is_ok()))?;
            if open {
                return Ok(());
            }
            ensure!(started.elapsed() < START_LIMIT, "the server does not listen:\n{}", crate::tail(&path));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Takes a lease away, as an operator does.
    ///
    /// # Errors
    /// It does not answer, or refuses.
    pub fn revoke(&self, key: &str) -> Result<()> {
        self.ask("DELETE", &format!("leases/{key}"), "")
    }

    /// Takes a lease for a node with these attributes (JSON).
    ///
    /// # Errors
    /// It does not answer, or refuses.
    pub fn lease(&self, attrs: &str) -> Result<()> {
        self.ask("POST", "leases", attrs)
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> Result<()> {
        let limit = Duration::from_secs(5);
        let address = self.address;
        let mut socket = self.namespace.run(|| Ok(TcpStream::connect_timeout(&address, limit)?))?;
        socket.set_read_timeout(Some(limit))?;
        let head = format!("{method} /v1/_/{path} HTTP/1.1\r\nHost: {address}\r\nConnection: close");
        // In one piece: of several the kernel holds the later ones back until the first is acknowledged.
        let request = format!("{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        socket.write_all(request.as_bytes())?;
        let mut answer = String::new();
        socket.take(1 << 16).read_to_string(&mut answer)?;
        ensure!(answer.starts_with("HTTP/1.1 200 "), "{method} {path}: {answer}");
        Ok(())
    }

    /// Standard output and error of every server started here.
    pub fn log(&self) -> PathBuf {
        self.folder.join("server.log")
    }
}

impl Drop for LeaseServer {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}
