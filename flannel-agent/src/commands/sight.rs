//! What there is to be seen of a node: an agent's answer, or what the kernel does without one.

use serde::Serialize;

use crate::cli::LookAt;
use crate::host::HostError;
use crate::host::leftovers;
use crate::host::netlink::Netlink;
use crate::host::udp::TunnelReport;
use crate::host::udp::unattended::{self, UnattendedTunnel};
use crate::status::{self, Answer, Starting, Status, StatusError};

/// Each is one JSON document, and each has `tunnels` of one form.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Sight {
    Agent(Box<Status>),
    Starting(Awaiting),
    Kernel(Unattended),
}

/// A node whose agent waits for something before it looks after the host.
#[derive(Debug, Serialize)]
pub(super) struct Awaiting {
    #[serde(flatten)]
    pub(super) agent: Starting,
    #[serde(flatten)]
    pub(super) kernel: InKernel,
}

/// A node whose agent does not answer.
#[derive(Debug, Serialize)]
pub(super) struct Unattended {
    /// Why there is no answer.
    pub(super) no_agent: String,
    #[serde(flatten)]
    pub(super) kernel: InKernel,
}

/// What is there without an agent's doing.
#[derive(Debug, Default, Serialize)]
pub(super) struct InKernel {
    pub(super) tunnels: Vec<UnattendedTunnel>,
    /// Tunnels of which it can't be told what they do, and why.
    pub(super) not_told: Vec<String>,
    /// As `ip route` says them.
    pub(super) routes: Vec<String>,
}

impl Sight {
    pub(super) fn tunnels(&self) -> Vec<&TunnelReport> {
        match self {
            Self::Agent(status) => status.tunnels.iter().collect(),
            Self::Starting(awaiting) => awaiting.kernel.tunnels(),
            Self::Kernel(unattended) => unattended.kernel.tunnels(),
        }
    }
}

/// Looks once.
///
/// # Errors
/// In one sentence: no agent answers, and nothing is there without it.
pub(super) async fn look(at: &LookAt) -> Result<Sight, String> {
    let socket = match &at.network {
        Some(name) => status::socket_of(&at.socket, name),
        None => at.socket.clone(),
    };
    match status::read(&socket).await {
        Ok(Answer::Running(status)) => Ok(Sight::Agent(status)),
        Ok(Answer::Starting(agent)) => {
            let kernel = in_kernel(at).await.unwrap_or_else(|error| InKernel {
                not_told: vec![error.to_string()],
                ..InKernel::default()
            });
            Ok(Sight::Starting(Awaiting { agent, kernel }))
        }
        // An agent of another version runs: what it does is for the client of that version to say.
        Err(error @ StatusError::Garbled { .. }) => Err(error.to_string()),
        Err(error) => {
            let no_agent = match status::networks_beside(&at.socket).as_slice() {
                names if at.network.is_none() && !names.is_empty() => {
                    let names: Vec<_> = names.iter().map(|name| format!("--network={name}")).collect();
                    return Err(format!(
                        "the agent here has several networks, name one: {}",
                        names.join(" or ")
                    ));
                }
                _ => error.to_string(),
            };
            match in_kernel(at).await {
                Ok(kernel) if kernel.is_empty() => Err(format!(
                    "{no_agent}; and nothing carries packets without it: no tunnel is pinned below {}, no route is there",
                    at.bpffs_path.display()
                )),
                Ok(kernel) => Ok(Sight::Kernel(Unattended { no_agent, kernel })),
                Err(error) => Err(format!("{no_agent}; {error}")),
            }
        }
    }
}

impl InKernel {
    fn tunnels(&self) -> Vec<&TunnelReport> {
        self.tunnels.iter().map(|tunnel| &tunnel.report).collect()
    }

    fn is_empty(&self) -> bool {
        self.tunnels.is_empty() && self.not_told.is_empty() && self.routes.is_empty()
    }
}

async fn in_kernel(at: &LookAt) -> Result<InKernel, HostError> {
    let netlink = Netlink::new()?;
    let mut seen = InKernel::default();
    for tunnel in unattended::find(&netlink, &at.bpffs_path).await? {
        match tunnel {
            Ok(tunnel) => seen.tunnels.push(tunnel),
            Err(error) => seen.not_told.push(error.to_string()),
        }
    }
    let routes = leftovers::routes(&netlink, &netlink.links().await?).await?;
    seen.routes = routes.iter().map(ToString::to_string).collect();
    Ok(seen)
}
