//! Several networks on one node (contract §5.4): each an agent of its own, with its backend, lease, env file and socket.
//!
//! ```text
//!   store ── NetworkEvent ──► this file ──► network blue: prepare, loop ──┐ ended or failed: started again, alone
//!                                      └──► network red:  prepare, loop ──┘
//! ```
//!
//! One that fails says so and is tried again; the others don't notice. A configuration that is edited takes effect at
//! once: the network is left and joined anew, while one that can't be used changes nothing. A network that is deleted is
//! left, and its env file stays, as with flanneld.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::Instrument as _;

use super::claims::Claims;
use super::network::Network;
use super::open::{self, OpenError};
use crate::agent::{Company, End, Orders};
use crate::cli::{NetworksSettings, Settings};
use crate::domain::config::NetworkConfig;
use crate::domain::network_name::NetworkName;
use crate::health::{self, Health};
use crate::status;
use crate::stores::{NetworkEvent, NetworkStores};

/// Wait before a network that ended or failed is started again; doubles up to a minute.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How often it is looked whether all networks are ready, until they are.
const READY_LOOK: Duration = Duration::from_millis(100);

/// What the health endpoint waits for until the networks are known.
const PART: &str = "networks";

/// Runs the networks until `stop`.
///
/// # Errors
/// The store can't be opened.
pub(super) async fn run(
    settings: &Settings,
    networks: &NetworksSettings,
    health: &Health,
    stop: CancellationToken,
) -> Result<(), OpenError> {
    let stores = open::networks(&settings.store)?;
    health.wait(PART, "the networks are not known yet");
    let mut supervisor = Supervisor {
        settings: Arc::new(settings.clone()),
        networks: networks.clone(),
        stores,
        health: health.clone(),
        claims: Claims::default(),
        running: BTreeMap::new(),
        known: false,
    };
    let mut events = supervisor.stores.watch_networks();
    // Those that are named are joined as soon as they have a configuration.
    for name in networks.allowed.clone() {
        supervisor.join(&name);
    }
    let mut announced = false;
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            event = events.next() => match event {
                Some(event) => supervisor.take(event).await,
                None => break,
            },
            () = tokio::time::sleep(READY_LOOK), if supervisor.known && !announced => {
                announced = health.all_reasons().is_empty();
                if announced {
                    tracing::info!(networks = supervisor.running.len(), "all networks are ready");
                    health::tell_systemd();
                }
            }
        }
    }
    supervisor.stop().await;
    Ok(())
}

struct Supervisor {
    settings: Arc<Settings>,
    networks: NetworksSettings,
    stores: Arc<dyn NetworkStores>,
    health: Health,
    claims: Claims,
    running: BTreeMap<NetworkName, Running>,
    /// The first snapshot came.
    known: bool,
}

/// A network that was joined.
struct Running {
    orders: Orders,
    task: JoinHandle<()>,
    /// The configuration it runs with, once it was read.
    config: Option<NetworkConfig>,
    health: Health,
}

impl Supervisor {
    async fn take(&mut self, event: NetworkEvent) {
        match event {
            NetworkEvent::Snapshot(names) => {
                let joins = !self.known || self.networks.watch;
                for name in &names {
                    if joins || self.running.contains_key(name) {
                        self.written(name).await;
                    }
                }
                // Those that are named are waited for.
                let gone: Vec<_> = self
                    .running
                    .iter()
                    .filter(|(name, running)| running.config.is_some() && !names.contains(name))
                    .map(|(name, _)| name.clone())
                    .collect();
                for name in gone {
                    self.removed(&name).await;
                }
                if !std::mem::replace(&mut self.known, true) {
                    self.health.done(PART);
                }
            }
            NetworkEvent::Written(name) => {
                if self.networks.watch || self.running.contains_key(&name) {
                    self.written(&name).await;
                }
            }
            NetworkEvent::Removed(name) => self.removed(&name).await,
            NetworkEvent::Interrupted(reason) => {
                tracing::warn!("the networks can't be watched, those that run go on: {reason}");
                if !self.known {
                    self.health.wait(PART, format!("the networks are not known yet: {reason}"));
                }
            }
        }
    }

    /// A network is there, or its configuration may be another.
    async fn written(&mut self, name: &NetworkName) {
        if !self.networks.allowed.is_empty() && !self.networks.allowed.contains(name) {
            tracing::debug!("network {name} is not among --networks");
            return;
        }
        let text = match self.stores.network(Some(name)).network_config().await {
            Ok(text) => text,
            Err(error) => {
                // What runs goes on; what does not waits for its configuration by itself.
                tracing::warn!("network {name}: {error}");
                self.join(name);
                return;
            }
        };
        let config = NetworkConfig::parse(&text);
        let Some(running) = self.running.get_mut(name) else {
            self.join(name);
            if let Some(running) = self.running.get_mut(name) {
                running.config = config.ok();
            }
            return;
        };
        match (config, &running.config) {
            (Err(error), Some(_)) => {
                tracing::error!(
                    "network {name}: its new configuration can't be used and the old one stays in force: {error}"
                );
            }
            // It waits for one that can be used, and takes it.
            (config, None) => running.config = config.ok(),
            (Ok(config), Some(known)) if config == *known => {}
            (Ok(config), Some(_)) => {
                tracing::info!("network {name}: its configuration changed, it is left and joined anew");
                self.leave(name).await;
                self.join(name);
                if let Some(running) = self.running.get_mut(name) {
                    running.config = Some(config);
                }
            }
        }
    }

    async fn removed(&mut self, name: &NetworkName) {
        if !self.running.contains_key(name) {
            return;
        }
        tracing::info!("network {name} was deleted and is left; its env file stays");
        self.leave(name).await;
        // One that is named by a flag comes back when it is made again.
        if self.networks.allowed.contains(name) {
            self.join(name);
        }
    }

    /// Starts a network that does not run yet.
    fn join(&mut self, name: &NetworkName) {
        if self.running.contains_key(name) {
            return;
        }
        let orders = Orders::default();
        let health = self.health.of_network(name.as_str());
        health.begin();
        let network = Network {
            store: self.stores.network(Some(name)),
            subnet_file: self.networks.subnet_dir.join(format!("{name}.env")),
            status_socket: self.settings.status_socket.as_deref().map(|path| status::socket_of(path, name)),
            health: health.clone(),
            company: Company::AmongNetworks,
            claims: self.claims.of_network(name.as_str()),
        };
        let task = keep(network, self.settings.clone(), orders.clone());
        let task = tokio::spawn(task.instrument(tracing::info_span!("network", name = name.as_str())));
        self.running.insert(name.clone(), Running { orders, task, config: None, health });
    }

    /// Ends a network and takes what it made off the host.
    async fn leave(&mut self, name: &NetworkName) {
        let Some(running) = self.running.remove(name) else { return };
        running.orders.leave.cancel();
        if let Err(error) = running.task.await {
            tracing::error!("network {name} did not end as it should: {error}");
        }
        running.health.forget();
    }

    /// Ends all, and leaves the host as it is.
    async fn stop(self) {
        for running in self.running.values() {
            running.orders.stop.cancel();
        }
        for (name, running) in self.running {
            if let Err(error) = running.task.await {
                tracing::error!("network {name} did not end as it should: {error}");
            }
        }
    }
}

/// Runs a network again and again until it is told to end.
async fn keep(network: Network, settings: Arc<Settings>, orders: Orders) {
    const PART: &str = "start";
    let (mut pause, mut said) = (FIRST_PAUSE, None);
    loop {
        let reason = match network.run(&settings, &orders).await {
            Ok(End::Stopped | End::Left) => return,
            Ok(End::LeaseLost(reason)) => {
                pause = FIRST_PAUSE;
                format!("the lease is lost, joining the network anew: {reason}")
            }
            Err(error) => format!("can't start: {error}"),
        };
        if said.as_ref() != Some(&reason) {
            tracing::error!("{reason}");
            said = Some(reason.clone());
        }
        network.health.wait(PART, reason);
        tokio::select! {
            () = orders.stop.cancelled() => return,
            () = orders.leave.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
        network.health.begin();
        network.health.done(PART);
    }
}
