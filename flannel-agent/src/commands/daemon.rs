//! The daemon: what is asked for by the flags (a network, several, or serving leases), signals, and the exit code.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::claims::{Claims, ClaimsError};
use super::network::Network;
use super::networks;
use super::open::{self, OpenError};
use super::serve::{self, ServeError};
use crate::agent::{Company, End, Orders};
use crate::backends::BackendError;
use crate::cli::{Settings, VERSION};
use crate::domain::interface::InterfaceError;
use crate::health::{self, Health};
use crate::host::{HostError, memory};
use crate::stores::StoreError;

/// How often it is looked whether the start is over.
const READY_LOOK: Duration = Duration::from_millis(250);
/// After ready: other nodes' leases, the first look at what was made.
const START_IS_OVER: Duration = Duration::from_millis(500);
/// A little more than the time between two looks at the whole host.
const GIVE_BACK_EVERY: Duration = Duration::from_secs(40);

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
    #[error(transparent)]
    Claims(#[from] ClaimsError),
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
        Ok(End::Stopped | End::Left) => {
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
    health.begin();
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
    tokio::spawn(rest(health.clone()));
    let orders = Orders { stop, ..Orders::default() };
    if let Some(networks) = &settings.networks {
        health.forget();
        networks::run(&settings, networks, &health, orders.stop).await?;
        return Ok(End::Stopped);
    }
    let network = Network {
        store: open::store(&settings.store).await?,
        subnet_file: settings.subnet_file.clone(),
        status_socket: settings.status_socket.clone(),
        health,
        company: Company::Alone,
        claims: Claims::default(),
    };
    network.run(&settings, &orders).await
}

/// When the start is over, what only it needed is given back; from then on, what each burst of work leaves behind.
async fn rest(health: Health) {
    while !health.all_reasons().is_empty() {
        tokio::time::sleep(READY_LOOK).await;
    }
    tokio::time::sleep(START_IS_OVER).await;
    memory::give_back_code();
    loop {
        memory::give_back_free_memory();
        tokio::time::sleep(GIVE_BACK_EVERY).await;
    }
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
