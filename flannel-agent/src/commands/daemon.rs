//! The daemon: puts the parts together in flanneld's order (contract §10.1) and runs the loop.
//!
//! Everything that can be wrong with the flags or the host is said before a lease is taken, so that a start that
//! fails leaves nothing behind.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use ipnet::IpNet;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::open::{self, OpenError};
use super::serve::{self, ServeError};
use crate::agent::{Agent, AgentOptions, End, Node};
use crate::backends::{self, BackendContext, BackendError};
use crate::cli::{Settings, VERSION};
use crate::domain::config::{BackendConfig, NetworkConfig};
use crate::domain::interface::{self, ExistingLink, Families, InterfaceError, Selection};
use crate::domain::lease::Lease;
use crate::health::{self, Health};
use crate::host::linux::{LinuxHost, LinuxHostOptions, Scope};
use crate::host::netlink::Netlink;
use crate::host::{HostError, interfaces, sysctl};
use crate::startup;
use crate::status::StatusSocket;
use crate::stores::{LeaseRequest, StoreError};
use crate::subnet_env::PreviousSubnets;

/// Questions that may wait while the loop is busy.
const QUESTIONS: usize = 16;

/// A device name nobody has before our lease says which one is ours.
const PROVISIONAL_DEVICE: &str = "flannel0";

/// Why the daemon could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error("can't serve /healthz on {address}: {source}; is --healthz-port in use?")]
    Health { address: std::net::SocketAddr, source: std::io::Error },
    #[error("can't listen on --status-socket {path}: {source}")]
    Status { path: PathBuf, source: std::io::Error },
    #[error("can't watch for signals: {0}")]
    Signals(std::io::Error),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Interface(#[from] InterfaceError),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Host(#[from] HostError),
}

/// Runs until a signal, or until it can't go on. The exit code is flanneld's (contract §1.5): 0 after a signal and
/// after the lease was lost, 1 when the start failed.
pub async fn run(settings: Settings) -> ExitCode {
    tracing::info!("flannel-agent {VERSION} starts");
    tracing::info!("settings: {settings:?}");
    for warning in &settings.warnings {
        tracing::warn!("{warning}");
    }
    let stays = match settings.serve {
        Some(_) => "nodes keep their leases",
        None => "devices, routes and programs stay and carry traffic on",
    };
    let stop = CancellationToken::new();
    match start_and_run(settings, stop).await {
        Ok(End::Stopped) => {
            tracing::info!("exiting; {stays}");
            ExitCode::SUCCESS
        }
        Ok(End::LeaseLost(reason)) => {
            tracing::error!(
                "the lease is lost and a running node never changes its subnet, exiting: {reason}"
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            tracing::error!("can't start: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn start_and_run(settings: Settings, stop: CancellationToken) -> Result<End, StartError> {
    listen_for_signals(stop.clone())?;
    let health = Health::default();
    // The last thing of all: nobody may find nothing awaited between two steps of the start.
    health.wait("subnet.env", "subnet.env is not written yet");
    if let Some(address) = settings.healthz {
        let listener =
            health::bind(address).await.map_err(|source| StartError::Health { address, source })?;
        tokio::spawn(health::serve(listener, health.clone(), stop.clone()));
    }
    if let Some(serve) = &settings.serve {
        health.done("subnet.env");
        serve::run(serve, &settings.store, &health, stop).await?;
        return Ok(End::Stopped);
    }
    let status = match &settings.status_socket {
        Some(path) => Some(
            StatusSocket::bind(path)
                .await
                .map_err(|source| StartError::Status { path: path.clone(), source })?,
        ),
        None => None,
    };
    let prepared = tokio::select! {
        () = stop.cancelled() => return Ok(End::Stopped),
        prepared = prepare(&settings, &health) => prepared?,
    };
    let (node, host) = prepared;
    let options = AgentOptions {
        subnet_file: settings.subnet_file.clone(),
        renew_margin: settings.renew_margin,
        path_mtu_lifetime: path_mtu_lifetime(),
    };
    let (ask, questions) = mpsc::channel(QUESTIONS);
    let serving = status.map(|socket| tokio::spawn(socket.serve(ask)));
    let end = Agent::new(node, host, options, health).run(stop, questions).await;
    if let Some(serving) = serving {
        serving.abort();
        // Lets the socket's file go.
        let _ = serving.await;
    }
    Ok(end)
}

/// Everything up to the lease, and the host that will be kept as the lease says.
async fn prepare(settings: &Settings, health: &Health) -> Result<(Node, LinuxHost), StartError> {
    let previous = PreviousSubnets::read(&settings.subnet_file);
    for reason in &previous.ignored {
        tracing::warn!("{}: {reason}", settings.subnet_file.display());
    }
    let store = open::store(&settings.store).await?;
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

    let netlink = Netlink::new()?;
    let public = startup::public_addresses(store.as_ref(), settings.public, health).await?;
    let selection =
        Selection { selectors: settings.selectors.clone(), public, families: Families::from(&config) };
    let facts = interfaces::facts(&netlink, &selection.selectors).await?;
    let interface = interface::choose(&selection.selectors, &facts, selection.public, selection.families)?;
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
    tracing::info!("lease {} of {}", lease.subnets, lease.attrs.public_ip);

    // Only now it is known which of several tunnel devices carries our subnet.
    context.tunnel_device = tunnel_device(&netlink, &lease).await?;
    let backend = backends::choose(&config, context.clone())?;
    let scope = Scope { devices: backend.devices(), networks: networks(&config) };
    let host = LinuxHost::new(scope, LinuxHostOptions { bpffs: settings.bpffs.clone() })?;
    Ok((Node { config, selection, context, backend, store, lease }, host))
}

/// How long the kernel believes in a learned path MTU (ip-sysctl, `route/mtu_expires`) is how long we do. Ten minutes
/// (RFC 1191 §6.3, RFC 8899 §5.1.1) where it does not say, and no less than it takes to search a path.
fn path_mtu_lifetime() -> Duration {
    const LEAST: Duration = Duration::from_secs(5);
    let kernels = sysctl::read("net/ipv4/route/mtu_expires").ok().and_then(|text| text.trim().parse().ok());
    Duration::from_secs(kernels.unwrap_or(600)).max(LEAST)
}

async fn tunnel_device(netlink: &Netlink, lease: &Lease) -> Result<String, StartError> {
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
    Ok(interface::tunnel_device_name(&links, subnet.network()))
}

fn networks(config: &NetworkConfig) -> Vec<IpNet> {
    let v4 = config.v4.map(|range| IpNet::V4(range.network));
    let v6 = config.v6.map(|range| IpNet::V6(range.network));
    v4.into_iter().chain(v6).collect()
}

/// The first SIGINT or SIGTERM ends the daemon in order, a second one at once (contract §10.3).
fn listen_for_signals(stop: CancellationToken) -> Result<(), StartError> {
    let listen = |kind| signal(kind).map_err(StartError::Signals);
    let (mut interrupt, mut terminate) = (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?);
    tokio::spawn(async move {
        let name = either(&mut interrupt, &mut terminate).await;
        tracing::info!("{name}: stopping, a second one stops at once");
        stop.cancel();
        either(&mut interrupt, &mut terminate).await;
        std::process::exit(130);
    });
    Ok(())
}

async fn either(interrupt: &mut Signal, terminate: &mut Signal) -> &'static str {
    tokio::select! {
        _ = interrupt.recv() => "SIGINT",
        _ = terminate.recv() => "SIGTERM",
    }
}
