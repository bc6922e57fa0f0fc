//! What a running agent says of itself, and the unix socket it says it on.
//!
//! One connection, one JSON document, end. `flannel-agent status` and the demo read it; the agent's loop writes it,
//! so an answer also shows that the loop is alive. Before the loop runs, whoever waits for the store writes what is
//! awaited. Nothing can be changed through the socket.

use std::io;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};

use crate::domain::network_name::NetworkName;
use crate::host::udp::TunnelReport;

/// What an agent answers.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Answer {
    Running(Box<Status>),
    Starting(Starting),
}

impl Answer {
    /// The agent's process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        match self {
            Self::Running(status) => status.pid,
            Self::Starting(starting) => starting.pid,
        }
    }

    fn parse(text: &[u8]) -> Result<Self, serde_json::Error> {
        match serde_json::from_slice(text) {
            Ok(status) => Ok(Self::Running(status)),
            // The other error would be about a document that nobody sent.
            Err(error) => serde_json::from_slice(text).map(Self::Starting).map_err(|_| error),
        }
    }
}

/// The answer of an agent that has no lease yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Starting {
    pub version: String,
    pub pid: u32,
    /// True; a running agent's answer has no such field.
    pub starting: bool,
    /// False.
    pub ready: bool,
    /// What is awaited.
    pub not_ready: Vec<String>,
}

impl Starting {
    #[must_use]
    pub fn waiting_for(not_ready: Vec<String>) -> Self {
        let version = crate::cli::VERSION.to_owned();
        Self { version, pid: std::process::id(), starting: true, ready: false, not_ready }
    }
}

/// The whole answer of an agent that runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub pid: u32,
    pub interface: InterfaceStatus,
    /// The overlay's IPv4 network, else its IPv6 one.
    pub network: String,
    /// Our lease, as in the lease key (`10.244.3.0-24`).
    pub lease: String,
    /// Our IPv4 subnet, else the IPv6 one.
    pub subnet: String,
    /// Seconds until the lease runs out; absent for a reservation.
    pub lease_expires_in: Option<u64>,
    /// Seconds since this agent took the lease, or took it over from an earlier run.
    pub lease_held_for: u64,
    /// Seconds since it was taken or renewed last.
    pub lease_renewed_ago: u64,
    pub backend: String,
    /// MTU for pods, in bytes.
    pub mtu: u32,
    /// Where it comes from.
    pub mtu_reason: String,
    pub ready: bool,
    pub not_ready: Vec<String>,
    pub peers: Vec<PeerStatus>,
    /// Leases of others that are not believed, and why.
    pub refused: Vec<RefusedStatus>,
    pub tunnels: Vec<TunnelReport>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct InterfaceStatus {
    pub name: String,
    pub address: IpAddr,
    pub public_ip: IpAddr,
    pub mtu: u32,
    /// Why it carries nothing for now.
    pub away: Option<String>,
    /// The interface a restart would choose, when it is another one.
    pub preferred: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its IPv4 subnet, else its IPv6 one.
    pub subnet: String,
    pub public_ip: IpAddr,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RefusedStatus {
    pub key: String,
    pub reason: String,
}

/// A question to the agent.
pub type Question = oneshot::Sender<Answer>;

/// How long a reader waits for the loop's answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// The socket file is removed when this is dropped.
pub struct StatusSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl StatusSocket {
    /// Listens on `path`, readable by root alone. A file left by a killed agent is replaced; a live agent's is not.
    ///
    /// # Errors
    /// The directory can't be made, or another agent answers there.
    pub async fn bind(path: &Path) -> io::Result<Self> {
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        if UnixStream::connect(path).await.is_ok() {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another agent answers there; give each agent of a host its own --status-socket",
            ));
        }
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        Ok(Self { listener, path: path.to_owned() })
    }

    /// Answers until the agent is gone.
    pub async fn serve(self, agent: mpsc::Sender<Question>) {
        loop {
            let Ok((mut stream, _)) = self.listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let (question, answer) = oneshot::channel();
            if agent.send(question).await.is_err() {
                return;
            }
            tokio::spawn(async move {
                let Ok(Ok(answer)) = tokio::time::timeout(PATIENCE, answer).await else { return };
                if let Ok(text) = serde_json::to_vec(&answer) {
                    // A reader that went away is not our trouble.
                    let _ = tokio::time::timeout(PATIENCE, stream.write_all(&text)).await;
                }
            });
        }
    }
}

impl Drop for StatusSocket {
    fn drop(&mut self) {
        // Best effort: a stale file is replaced at the next start.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Why no status could be read.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    #[error("no agent answers on {path}: {source}; is flannel-agent running, as this user or root?")]
    NoAgent { path: String, source: io::Error },
    #[error(
        "the agent on {0} took the connection but gave no answer within 10 s; its log says what it is busy with"
    )]
    NoAnswer(String),
    #[error("the agent on {path} answered something else than a status: {source}")]
    Garbled { path: String, source: serde_json::Error },
}

/// Asks the agent on `path`.
pub async fn read(path: &Path) -> Result<Answer, StatusError> {
    let shown = path.display().to_string();
    let mut stream = UnixStream::connect(path)
        .await
        .map_err(|source| StatusError::NoAgent { path: shown.clone(), source })?;
    let mut text = Vec::new();
    match tokio::time::timeout(2 * PATIENCE, stream.read_to_end(&mut text)).await {
        Ok(Ok(_)) if !text.is_empty() => {}
        _ => return Err(StatusError::NoAnswer(shown)),
    }
    Answer::parse(&text).map_err(|source| StatusError::Garbled { path: shown, source })
}

/// The socket of one of several networks: `/run/flannel/status-blue.sock` beside `/run/flannel/status.sock`.
pub fn socket_of(path: &Path, network: &NetworkName) -> PathBuf {
    let (stem, extension) = parts(path);
    path.with_file_name(format!("{stem}-{network}{extension}"))
}

/// The networks whose sockets lie beside `path`.
pub fn networks_beside(path: &Path) -> Vec<NetworkName> {
    let (stem, extension) = parts(path);
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<NetworkName> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter_map(|file| {
            file.strip_prefix(&format!("{stem}-"))?.strip_suffix(extension.as_str())?.parse().ok()
        })
        .collect();
    names.sort();
    names
}

/// `status` and `.sock`.
fn parts(path: &Path) -> (String, String) {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let extension =
        path.extension().map(|extension| format!(".{}", extension.to_string_lossy())).unwrap_or_default();
    (stem, extension)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_networks_socket_lies_beside_the_agents() {
        let name: NetworkName = "blue".parse().unwrap();
        for (path, wanted) in
            [("/run/flannel/status.sock", "/run/flannel/status-blue.sock"), ("/s", "/s-blue")]
        {
            assert_eq!(socket_of(Path::new(path), &name), PathBuf::from(wanted));
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("status.sock");
        for file in ["status-red.sock", "status-blue.sock", "status.sock", "status-x.lock", "other"] {
            std::fs::write(folder.path().join(file), "").unwrap();
        }
        let names: Vec<_> = networks_beside(&path).iter().map(ToString::to_string).collect();
        assert_eq!(names, ["blue", "red"]);
    }
}
