//! `--listen`: leases for other nodes, over HTTP (contract §5.1, §5.2).
//!
//! Speaks flanneld 0.7.0's protocol, whose nodes can't tell the difference. The server joins no network itself. Any store
//! of several networks will do behind it; what changes there is watched once and told to all who wait ([`feed`]).
//!
//! Those who send slowly, half, too much or nonsense are let go by limits of time, size and number ([`listener`]), and
//! everybody else is served meanwhile.

mod api;
mod feed;
mod listener;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio_util::sync::CancellationToken;

use self::feed::{LeaseFeed, NetworkFeed};
pub use self::listener::{ListenAddress, Listener, ListenerError, ServerTlsFiles};
use crate::domain::network_name::NetworkName;
use crate::stores::{LeaseStore, NetworkStores, StoreError};

/// Everything that is served.
struct Server {
    networks: Arc<dyn NetworkStores>,
    names: NetworkFeed,
    /// Made when first asked for, of networks that have a configuration.
    open: Mutex<HashMap<Option<NetworkName>, Arc<Network>>>,
}

/// One network.
struct Network {
    store: Arc<dyn LeaseStore>,
    feed: LeaseFeed,
    /// Nodes that come at once would race for the same subnets: one after the other.
    acquiring: tokio::sync::Mutex<()>,
}

impl Server {
    fn new(networks: Arc<dyn NetworkStores>, stop: CancellationToken) -> Self {
        let names = NetworkFeed::follow(networks.as_ref(), stop);
        Self { networks, names, open: Mutex::default() }
    }

    /// # Errors
    /// There is no such network, or the store can't be asked.
    async fn network(&self, name: Option<NetworkName>) -> Result<Arc<Network>, StoreError> {
        if name.as_ref().is_some_and(|name| self.names.without(name)) {
            self.lock().remove(&name);
        }
        if let Some(network) = self.lock().get(&name) {
            return Ok(network.clone());
        }
        let store = self.networks.network(name.as_ref());
        store.network_config().await?;
        let network = Network {
            feed: LeaseFeed::follow(store.as_ref()),
            store,
            acquiring: tokio::sync::Mutex::default(),
        };
        // Whoever was faster made it.
        Ok(self.lock().entry(name).or_insert_with(|| Arc::new(network)).clone())
    }

    /// One insert or remove at a time: usable after a panic elsewhere.
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Option<NetworkName>, Arc<Network>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Serves `networks` until `stop`.
pub async fn serve(listener: Listener, networks: Arc<dyn NetworkStores>, stop: CancellationToken) {
    let server = Arc::new(Server::new(networks, stop.clone()));
    listener.serve(api::router(server), stop).await;
}
