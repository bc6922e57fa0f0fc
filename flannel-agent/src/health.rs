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

/// What the agent still waits for. Cheap to clone; all clones are one. Of several networks each has a view of its own,
/// and what is served is all of them.
#[derive(Clone, Debug, Default)]
pub struct Health {
    inner: Arc<Mutex<Inner>>,
    /// The network's name; empty without one.
    scope: Arc<str>,
}

type Scope = Arc<str>;

#[derive(Debug, Default)]
struct Inner {
    waiting_for: BTreeMap<(Scope, &'static str), String>,
    /// Of each loop, once it runs.
    last_turns: BTreeMap<Scope, Instant>,
}

impl Health {
    /// Not ready for this reason; replaces an earlier reason of the same part.
    pub fn wait(&self, part: &'static str, reason: impl Into<String>) {
        self.lock().waiting_for.insert((self.scope.clone(), part), reason.into());
    }

    /// This part is done; whether it was awaited until now.
    pub fn done(&self, part: &'static str) -> bool {
        self.lock().waiting_for.remove(&(self.scope.clone(), part)).is_some()
    }

    /// This part is done, and what comes of it is awaited in its place; whether it was awaited until now. If it was not,
    /// nothing changes. Nobody may find nothing awaited in between.
    pub fn done_and_wait(&self, part: &'static str, next: &'static str, reason: impl Into<String>) -> bool {
        let mut inner = self.lock();
        let awaited = inner.waiting_for.remove(&(self.scope.clone(), part)).is_some();
        if awaited {
            inner.waiting_for.insert((self.scope.clone(), next), reason.into());
        }
        awaited
    }

    /// A start begins, whose last step is done when subnet.env is written: nobody may find nothing awaited between two
    /// steps of it.
    pub fn begin(&self) {
        self.wait("subnet.env", "subnet.env is not written yet");
    }

    /// The loop turned.
    pub fn turn(&self, now: Instant) {
        self.lock().last_turns.insert(self.scope.clone(), now);
    }

    /// Why this network is not ready; empty when it is.
    pub fn reasons(&self) -> Vec<String> {
        let inner = self.lock();
        let own = inner.waiting_for.iter().filter(|((scope, _), _)| *scope == self.scope);
        own.map(|(_, reason)| reason.clone()).collect()
    }

    /// Why the agent is not ready, of all networks.
    pub fn all_reasons(&self) -> Vec<String> {
        let inner = self.lock();
        let said = |((scope, _), reason): (&(Scope, _), &String)| match scope.as_ref() {
            "" => reason.clone(),
            scope => format!("network {scope}: {reason}"),
        };
        inner.waiting_for.iter().map(said).collect()
    }

    /// Whether every loop still turns; before one runs, starting counts as alive.
    pub fn alive(&self, now: Instant) -> bool {
        self.lock().last_turns.values().all(|turn| now.saturating_duration_since(*turn) < STUCK)
    }

    /// The view of one network.
    pub fn of_network(&self, name: &str) -> Self {
        Self { inner: self.inner.clone(), scope: name.into() }
    }

    /// Nothing is awaited here any more, and no loop runs.
    pub fn forget(&self) {
        let mut inner = self.lock();
        inner.waiting_for.retain(|(scope, _), _| *scope != self.scope);
        inner.last_turns.remove(&self.scope);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        // Every critical section is one map operation: a poisoned lock still holds a whole map.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `READY=1` to a supervisor that wants to know (sd_notify(3), contract §10.2).
pub fn tell_systemd() {
    if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
        tracing::warn!("can't tell systemd that we are ready: {error}");
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
    let reasons = health.all_reasons();
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
    fn networks_are_told_apart_and_served_together() {
        let all = Health::default();
        let (blue, red) = (all.of_network("blue"), all.of_network("red"));
        blue.wait("lease", "no lease");
        red.wait("lease", "out of subnets");
        assert_eq!(blue.reasons(), ["no lease"]);
        assert_eq!(all.all_reasons(), ["network blue: no lease", "network red: out of subnets"]);
        blue.done("lease");
        red.turn(Instant::now());
        red.forget();
        assert!(all.all_reasons().is_empty() && all.alive(Instant::now() + 2 * STUCK));
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
