//! The steps before the loop that wait for the store: the network's configuration, then our lease.
//!
//! A store that is away, or holds no usable configuration yet, is waited for; the log has one line per change of
//! state, `/readyz` says what is awaited at any time. What can't get better by itself ends the start.

use std::time::Duration;

use rand::Rng as _;

use crate::domain::config::NetworkConfig;
use crate::domain::interface::PublicAddresses;
use crate::domain::lease::Lease;
use crate::health::Health;
use crate::stores::{LeaseRequest, LeaseStore, StoreError};

/// How often the store is asked again, as flanneld does (contract §10.1).
const PAUSE: Duration = Duration::from_secs(1);

/// Waits until there is a configuration that can be used, and returns it.
///
/// # Errors
/// The store refuses us: credentials, certificates, permissions.
pub async fn wait_for_config(store: &dyn LeaseStore, health: &Health) -> Result<NetworkConfig, StoreError> {
    let mut waiting = Waiting::new("config", health);
    loop {
        let reason = match store.network_config().await {
            Ok(text) => match NetworkConfig::parse(&text)
                .and_then(|config| config.require_family_of_backend().map(|()| config))
            {
                Ok(config) => {
                    waiting.over();
                    return Ok(config);
                }
                Err(error) => format!("the network configuration can't be used: {error}"),
            },
            Err(refused @ StoreError::Refused { .. }) => return Err(refused),
            Err(error) => error.to_string(),
        };
        waiting.still(reason);
        pause().await;
    }
}

/// The addresses other nodes are to send to, as the operator gave them: what the store has for this node goes before
/// flags (contract §4.1).
///
/// # Errors
/// The store refuses us, or has something there that is no address.
pub async fn public_addresses(
    store: &dyn LeaseStore,
    given: PublicAddresses,
    health: &Health,
) -> Result<PublicAddresses, StoreError> {
    let mut waiting = Waiting::new("address", health);
    loop {
        match store.node_addresses().await {
            Ok(PublicAddresses { v4, v6 }) => {
                waiting.over();
                return Ok(PublicAddresses { v4: v4.or(given.v4), v6: v6.or(given.v6) });
            }
            Err(error @ (StoreError::Unreachable { .. } | StoreError::NotYet { .. })) => {
                waiting.still(error.to_string());
            }
            Err(error) => return Err(error),
        }
        pause().await;
    }
}

/// Waits until we hold a lease.
///
/// # Errors
/// No subnet is free, or the store refuses us.
pub async fn take_lease(
    store: &dyn LeaseStore,
    request: &LeaseRequest,
    health: &Health,
) -> Result<Lease, StoreError> {
    let mut waiting = Waiting::new("lease", health);
    loop {
        match store.acquire(request).await {
            Ok(lease) => {
                waiting.over();
                return Ok(lease);
            }
            Err(error @ (StoreError::Unreachable { .. } | StoreError::NotYet { .. })) => {
                waiting.still(error.to_string());
            }
            Err(error) => return Err(error),
        }
        pause().await;
    }
}

async fn pause() {
    let jitter = crate::chance::rng().random_range(0..=200);
    tokio::time::sleep(PAUSE + Duration::from_millis(jitter)).await;
}

/// Reasons that one wait says; a store that fails in ever new words fills no log. The latest is always in `/readyz`.
const REASONS: usize = 8;

/// Says each reason to wait once, and once that what was awaited came.
struct Waiting<'a> {
    part: &'static str,
    health: &'a Health,
    /// A server that hangs fails in two ways by turns: without an answer, and by pings without one.
    said: Vec<String>,
}

impl<'a> Waiting<'a> {
    fn new(part: &'static str, health: &'a Health) -> Self {
        health.wait(part, format!("no {part} yet"));
        Self { part, health, said: Vec::new() }
    }

    fn still(&mut self, reason: String) {
        self.health.wait(self.part, reason.clone());
        if self.said.len() < REASONS && !self.said.contains(&reason) {
            tracing::warn!("waiting for the {}: {reason}", self.part);
            self.said.push(reason);
        }
    }

    fn over(&mut self) {
        if !std::mem::take(&mut self.said).is_empty() {
            tracing::info!("the {} is there", self.part);
        }
        self.health.done(self.part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::lease::LeaseAttrs;
    use crate::stores::memory::MemoryStore;

    #[tokio::test(start_paused = true)]
    async fn an_unusable_configuration_is_waited_out() {
        let store = MemoryStore::new(r#"{"Network":"10.1.0.0/29"}"#);
        let health = Health::default();
        let node = store.open();
        let waiting = wait_for_config(node.as_ref(), &health);
        let edit = async {
            tokio::time::sleep(Duration::from_secs(5)).await;
            let reasons = health.reasons();
            assert!(reasons.iter().any(|reason| reason.contains("Network")), "{reasons:?}");
            store.set_config(r#"{"Network":"10.1.0.0/16"}"#);
        };
        let (config, ()) = tokio::join!(waiting, edit);
        assert!(config.is_ok());
        assert!(health.reasons().is_empty());
    }

    #[test]
    fn reasons_that_come_by_turns_are_said_once_each() {
        let health = Health::default();
        let mut waiting = Waiting::new("config", &health);
        for reason in ["no answer", "no pong", "no answer", "no pong"] {
            waiting.still(reason.to_owned());
            assert_eq!(health.reasons(), [reason]);
        }
        assert_eq!(waiting.said, ["no answer", "no pong"]);
        (0..100).for_each(|number| waiting.still(format!("request {number}")));
        assert_eq!(waiting.said.len(), REASONS);
        waiting.over();
        assert!(health.reasons().is_empty() && waiting.said.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_that_is_away_is_waited_for() {
        let store = MemoryStore::new(r#"{"Network":"10.1.0.0/16"}"#);
        let node = store.open();
        let health = Health::default();
        let config = wait_for_config(node.as_ref(), &health).await.unwrap();
        store.cut();
        let request = LeaseRequest {
            config,
            attrs: LeaseAttrs::new("192.0.2.1".parse().unwrap()),
            previous: None,
            previous_only: false,
        };
        let back = async {
            tokio::time::sleep(Duration::from_secs(5)).await;
            assert_eq!(health.reasons().len(), 1);
            store.mend();
        };
        let (lease, ()) = tokio::join!(take_lease(node.as_ref(), &request, &health), back);
        assert!(lease.is_ok());
    }
}
