//! `/healthz` and `/readyz` (contract §10.6), and the facts behind them.
//!
//! `/healthz`: the agent's loop turns. `/readyz`: nothing is awaited any more; the body of a 503 says what is.
//! Reasons are held by name: whoever begins a part adds its reason, whoever finishes it takes the reason away.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::any;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// The loop is stuck when it did not turn for this long: more than any batch of changes takes.
const STUCK: Duration = Duration::from_secs(60);

/// What the agent still waits for. Cheap to clone; all clones are one.
#[derive(Clone, Debug, Default)]
pub struct Health {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Debug, Default)]
struct Inner {
    waiting_for: BTreeMap<&'static str, String>,
    /// Set once the loop runs.
    last_turn: Option<Instant>,
}

impl Health {
    /// Not ready for this reason; replaces an earlier reason of the same part.
    pub fn wait(&self, part: &'static str, reason: impl Into<String>) {
        self.lock().waiting_for.insert(part, reason.into());
    }

    /// This part is done; whether it was awaited until now.
    pub fn done(&self, part: &'static str) -> bool {
        self.lock().waiting_for.remove(part).is_some()
    }

    /// The loop turned.
    pub fn turn(&self, now: Instant) {
        self.lock().last_turn = Some(now);
    }

    /// Why the agent is not ready; empty when it is.
    pub fn reasons(&self) -> Vec<String> {
        self.lock().waiting_for.values().cloned().collect()
    }

    /// Whether the loop still turns; before it runs, starting counts as alive.
    pub fn alive(&self, now: Instant) -> bool {
        self.lock().last_turn.is_none_or(|turn| now.saturating_duration_since(turn) < STUCK)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // Every critical section is one map operation: a poisoned lock still holds a whole map.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Listens at once, so that a port in use is an error at start.
pub async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Serves until `stop`, then lets running requests finish for at most 3 s.
pub async fn serve(listener: TcpListener, health: Health, stop: CancellationToken) {
    let router =
        Router::new().route("/healthz", any(healthz)).route("/readyz", any(readyz)).with_state(health);
    let served = axum::serve(listener, router).with_graceful_shutdown({
        let stop = stop.clone();
        async move { stop.cancelled().await }
    });
    tokio::select! {
        result = served => {
            if let Err(error) = result {
                tracing::error!("health server ended: {error}");
            }
        }
        () = async { stop.cancelled().await; tokio::time::sleep(Duration::from_secs(3)).await } => {}
    }
}

async fn healthz(State(health): State<Health>) -> (StatusCode, &'static str) {
    if health.alive(Instant::now()) {
        (StatusCode::OK, "flanneld is running")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "flanneld is stuck: its loop has not turned for a minute")
    }
}

async fn readyz(State(health): State<Health>) -> (StatusCode, String) {
    let reasons = health.reasons();
    if reasons.is_empty() {
        (StatusCode::OK, "flanneld is ready".to_owned())
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, format!("flanneld is not ready yet: {}", reasons.join("; ")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_means_that_nothing_is_awaited() {
        let health = Health::default();
        assert!(health.reasons().is_empty());
        health.wait("lease", "no lease");
        health.wait("lease", "no lease yet: etcd is unreachable");
        assert_eq!(health.reasons(), ["no lease yet: etcd is unreachable"]);
        health.done("lease");
        assert!(health.reasons().is_empty());
    }

    #[test]
    fn a_loop_that_stopped_turning_is_not_alive() {
        let health = Health::default();
        let start = Instant::now();
        assert!(
            health.alive(start + Duration::from_secs(3600)),
            "starting may take as long as the store does"
        );
        health.turn(start);
        assert!(health.alive(start + STUCK / 2));
        assert!(!health.alive(start + STUCK));
    }
}
