//! One network's life on this node: the steps before the loop, in flanneld's order (contract §10.1), and the loop.
//!
//! Everything that can be wrong with the flags or the host is said before a lease is taken, so that a start that
//! fails leaves nothing behind.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::mpsc;

use super::claims::{Claimed, Claims};
use super::daemon::StartError;
use crate::agent::{Agent, AgentOptions, Company, End, Node, Orders};
use crate::backends::{self, BackendContext};
use crate::cli::Settings;
use crate::domain::config::{BackendConfig, NetworkConfig};
use crate::domain::interface::{self, ExistingLink, Families, Selection};
use crate::domain::lease::Lease;
use crate::health::Health;
use crate::host::linux::{LinuxHost, LinuxHostOptions, Scope};
use crate::host::netlink::Netlink;
use crate::host::{interfaces, sysctl};
use crate::startup;
use crate::status::{Answer, Question, Starting, StatusSocket};
use crate::stores::{LeaseRequest, LeaseStore};
use crate::subnet_env::PreviousSubnets;

/// Questions that may wait while the loop is busy.
const QUESTIONS: usize = 16;

/// A device name nobody has before our lease says which one is ours.
const PROVISIONAL_DEVICE: &str = "flannel0";

/// What a network has for itself.
pub(super) struct Network {
    pub(super) store: Arc<dyn LeaseStore>,
    pub(super) subnet_file: PathBuf,
    pub(super) status_socket: Option<PathBuf>,
    pub(super) health: Health,
    pub(super) company: Company,
    /// What others of this process have.
    pub(super) claims: Claims,
}

impl Network {
    /// Runs until it is told to end, or until it can't go on.
    ///
    /// # Errors
    /// It could not start.
    pub(super) async fn run(&self, settings: &Settings, orders: &Orders) -> Result<End, StartError> {
        let (ask, mut questions) = mpsc::channel(QUESTIONS);
        let serving = match &self.status_socket {
            Some(path) => {
                let socket = StatusSocket::bind(path)
                    .await
                    .map_err(|source| StartError::Status { path: path.clone(), source })?;
                Some(tokio::spawn(socket.serve(ask)))
            }
            None => None,
        };
        let end = self.run_answering(settings, orders, &mut questions).await;
        if let Some(serving) = serving {
            serving.abort();
            // Lets the socket's file go.
            let _ = serving.await;
        }
        end
    }

    /// Answers what it is asked from the first moment on.
    async fn run_answering(
        &self,
        settings: &Settings,
        orders: &Orders,
        questions: &mut mpsc::Receiver<Question>,
    ) -> Result<End, StartError> {
        // Nothing is on the host yet that could be left there.
        let (node, host, _claimed) = tokio::select! {
            () = orders.stop.cancelled() => return Ok(End::Stopped),
            () = orders.leave.cancelled() => return Ok(End::Left),
            prepared = self.prepare(settings) => prepared?,
            never = self.say_what_is_awaited(questions) => never,
        };
        let options = AgentOptions {
            subnet_file: self.subnet_file.clone(),
            renew_margin: settings.renew_margin,
            path_mtu_lifetime: path_mtu_lifetime(),
            company: self.company,
        };
        Ok(Agent::new(node, host, options, self.health.clone()).run(orders.clone(), questions).await)
    }

    async fn say_what_is_awaited<T>(&self, questions: &mut mpsc::Receiver<Question>) -> T {
        while let Some(question) = questions.recv().await {
            // An asker that went away is not our trouble.
            let _ = question.send(Answer::Starting(Starting::waiting_for(self.health.reasons())));
        }
        std::future::pending().await
    }

    /// Everything up to the lease, and the host that will be kept as the lease says.
    async fn prepare(&self, settings: &Settings) -> Result<(Node, LinuxHost, Claimed), StartError> {
        let (store, health) = (self.store.clone(), &self.health);
        let previous = PreviousSubnets::read(&self.subnet_file);
        for reason in &previous.ignored {
            tracing::warn!("{}: {reason}", self.subnet_file.display());
        }
        let config = startup::wait_for_config(store.as_ref(), health).await?;
        for warning in &config.warnings {
            tracing::warn!("network configuration: {warning}");
        }
        tracing::info!("network configuration: {config}");
        if config.v6.is_some() && matches!(config.backend, BackendConfig::Udp { .. }) {
            tracing::warn!(
                "EnableIPv6: backend udp carries IPv4 only, as flanneld's; the IPv6 subnet is leased and not reachable \
                 from other nodes"
            );
        }
        let mut claimed = self.claims.claim(&config)?;

        let netlink = Netlink::new()?;
        let public = startup::public_addresses(store.as_ref(), settings.public, health).await?;
        let selection =
            Selection { selectors: settings.selectors.clone(), public, families: Families::from(&config) };
        let facts = interfaces::facts(&netlink, &selection.selectors).await?;
        let interface =
            interface::choose(&selection.selectors, &facts, selection.public, selection.families)?;
        tracing::info!("using interface {interface}");
        let mut context = BackendContext {
            interface,
            tunnel_device: PROVISIONAL_DEVICE.to_owned(),
            tunnel: settings.tunnel,
            tunnel_mtu: settings.tunnel_mtu,
        };
        let backend = backends::choose(&config, context.clone())?;
        let request = LeaseRequest {
            config: config.clone(),
            attrs: backend.lease_attrs(),
            previous: previous.subnets(),
            previous_only: false,
        };
        let lease = startup::take_lease(store.as_ref(), &request, health).await?;
        let node = lease.attrs.node().map_or_else(|| "no address".to_owned(), |node| node.to_string());
        tracing::info!("lease {} of {node}", lease.subnets);

        // Only now it is known which of several tunnel devices carries our subnet.
        if matches!(config.backend, BackendConfig::Udp { .. }) {
            context.tunnel_device = tunnel_device(&netlink, &lease, &mut claimed).await?;
        }
        let backend = backends::choose(&config, context.clone())?;
        let scope = Scope { devices: backend.devices(), networks: networks(&config) };
        let host = LinuxHost::new(scope, LinuxHostOptions { bpffs: settings.bpffs.clone() })?;
        Ok((Node { config, selection, context, backend, store, lease }, host, claimed))
    }
}

async fn tunnel_device(
    netlink: &Netlink,
    lease: &Lease,
    claimed: &mut Claimed,
) -> Result<String, StartError> {
    let Some(subnet) = lease.subnets.v4 else { return Ok(PROVISIONAL_DEVICE.to_owned()) };
    let addresses = netlink.addresses().await?;
    let links: Vec<ExistingLink> = netlink
        .links()
        .await?
        .into_iter()
        .map(|link| ExistingLink {
            is_tun: link.tun.is_some(),
            addresses: addresses
                .iter()
                .filter(|address| address.ifindex == link.index)
                .map(|address| address.net)
                .collect(),
            name: link.name,
        })
        .collect();
    Ok(claimed.device(|others| {
        let named = others.iter().map(|name| ExistingLink {
            name: name.clone(),
            is_tun: true,
            addresses: Vec::new(),
        });
        let links: Vec<ExistingLink> = links.iter().cloned().chain(named).collect();
        interface::tunnel_device_name(&links, subnet.network())
    }))
}

/// How long the kernel believes in a learned path MTU (ip-sysctl, `route/mtu_expires`) is how long we do. Ten minutes
/// (RFC 1191 §6.3, RFC 8899 §5.1.1) where it does not say, and no less than it takes to search a path.
fn path_mtu_lifetime() -> Duration {
    const LEAST: Duration = Duration::from_secs(5);
    let kernels = sysctl::read("net/ipv4/route/mtu_expires").ok().and_then(|text| text.trim().parse().ok());
    Duration::from_secs(kernels.unwrap_or(600)).max(LEAST)
}

fn networks(config: &NetworkConfig) -> Vec<IpNet> {
    let v4 = config.v4.map(|range| IpNet::V4(range.network));
    let v6 = config.v6.map(|range| IpNet::V6(range.network));
    v4.into_iter().chain(v6).collect()
}
