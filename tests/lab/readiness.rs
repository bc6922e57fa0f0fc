//! The moment an agent says `READY=1` (sd_notify(3)): no polling, which on few cores would take the agent's time.

use std::{
    io::ErrorKind,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::agent::AgentOptions;

/// A socket that agents are told of as systemd would.
#[derive(Debug)]
pub struct Readiness {
    socket: UnixDatagram,
    path: PathBuf,
}

impl Readiness {
    /// Listens in `folder`.
    ///
    /// # Errors
    /// The socket can't be made.
    pub fn listen(folder: &Path) -> Result<Self> {
        let path = folder.join("notify.sock");
        let socket = UnixDatagram::bind(&path).with_context(|| format!("bind {}", path.display()))?;
        Ok(Self { socket, path })
    }

    /// Options of an agent that will say it here.
    #[must_use]
    pub fn told_by(&self, options: AgentOptions) -> AgentOptions {
        options.env("NOTIFY_SOCKET", &self.path.to_string_lossy())
    }

    /// When it said so.
    ///
    /// # Errors
    /// Not within `limit`.
    pub fn wait(&self, limit: Duration) -> Result<Instant> {
        let started = Instant::now();
        let mut text = [0; 4096];
        loop {
            let left = limit.saturating_sub(started.elapsed());
            if left.is_zero() {
                bail!("the agent is not ready after {limit:?}");
            }
            self.socket.set_read_timeout(Some(left)).context("set a time limit")?;
            match self.socket.recv(&mut text) {
                Ok(length) => {
                    let now = Instant::now();
                    let said = text.get(..length).unwrap_or_default();
                    if said.split(|byte| *byte == b'\n').any(|line| line == b"READY=1") {
                        return Ok(now);
                    }
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(e) => return Err(e).context("wait for READY=1"),
            }
        }
    }
}
