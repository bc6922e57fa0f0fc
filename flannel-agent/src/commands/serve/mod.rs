//! `--listen`: the server's life (contract §5.1). It joins no network and changes nothing on the host.

mod config_files;

use std::sync::Arc;

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio_util::sync::CancellationToken;

use super::open::{self, OpenError};
use crate::cli::{ServeSettings, StoreSettings};
use crate::health::{self, Health};
use crate::server::{self, ListenAddress, Listener, ListenerError, ServerTlsFiles};
use crate::stores::NetworkStores;
use crate::stores::embedded::Embedded;

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Listener(#[from] ListenerError),
    #[error(transparent)]
    Store(#[from] OpenError),
}

/// What the health endpoint waits for until the socket is open.
const PART: &str = "server";

/// Serves until `stop`.
///
/// # Errors
/// The address or a file can't be used. flanneld goes on as a process that does nothing (contract §14, T28); this ends.
pub(super) async fn run(
    settings: &ServeSettings,
    store: &StoreSettings,
    health: &Health,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    health.wait(PART, "the server does not listen yet");
    allow_many_connections();
    let address = ListenAddress::parse(&settings.listen)?;
    let tls = settings.identity.as_ref().map(|identity| ServerTlsFiles {
        cert_file: identity.cert_file.clone(),
        key_file: identity.key_file.clone(),
        ca_file: settings.ca_file.clone(),
    });
    let listener = Listener::bind(&address, tls.as_ref()).await?;
    let networks: Arc<dyn NetworkStores> = match store {
        StoreSettings::Embedded(embedded) => {
            let file = Embedded::open(&embedded.path).map_err(OpenError::from)?;
            config_files::read(&embedded.net_config, &file).await;
            tokio::spawn(config_files::follow(embedded.net_config.clone(), file.clone(), stop.clone()));
            Arc::new(file.networks())
        }
        others => open::networks(others)?,
    };
    let where_ = listener.address().map_or_else(|_| settings.listen.clone(), |address| address.to_string());
    tracing::info!("serving leases on {where_}{}", if tls.is_some() { ", over TLS" } else { "" });
    health.done(PART);
    health::tell_systemd();
    let heart = tokio::spawn(beat(health.clone(), stop.clone()));
    server::serve(listener, networks, stop).await;
    heart.abort();
    Ok(())
}

/// The usual limit of 1024 open files is that of programs that use select(2); a thousand nodes have three connections
/// each. What the administrator set as the most stays.
fn allow_many_connections() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        tracing::warn!("the limit of open files can't be raised, and with it that of clients: {error}");
    }
}

/// A server that hangs as a whole stops this too.
async fn beat(health: Health, stop: CancellationToken) {
    while !stop.is_cancelled() {
        health.turn(std::time::Instant::now());
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    }
}
