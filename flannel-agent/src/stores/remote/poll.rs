//! Long polls: what changes on the server, for as long as the agent lives.
//!
//! ```text
//!             GET → everything                       GET ?next= → event, or nothing for a while
//!   unknown ──────────────────────────► following ─────────────────────────────────► following
//!      ▲  failed: Interrupted once, wait longer │  a list is due → everything
//!      └────────────────────────────────────────┘
//! ```
//!
//! Our server ends a poll in which nothing happened when we ask it to (`Prefer: wait`, RFC 7240 §4.3), so silence means
//! that it hangs. flanneld 0.7.0 does not know that and is silent for as long as nothing happens: there the poll is
//! ended from here after a while, and everything is asked for again.

use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use reqwest::{Client, StatusCode};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use super::client::{CALL_LIMIT, Remote, clocks};
use super::wire::{Clocks, Kind, LeasesPage, NetworksPage};
use crate::domain::lease::{LeaseEvent, Unreadable};
use crate::stores::back_off::{BackOff, jittered};
use crate::stores::{NetworkEvent, StoreError};

/// How long a poll in which nothing happens may last.
const WAIT: Duration = Duration::from_secs(20);
/// How much later than that our server's answer may come.
const SLACK: Duration = Duration::from_secs(5);
/// How long a server that does not know `Prefer: wait` may be silent.
const SILENCE: Duration = Duration::from_secs(60);
/// A poll is never trusted alone: everything is asked for this often, give or take a fifth.
const RESYNC: Duration = Duration::from_secs(300);

/// What a poll's answers mean.
pub(super) trait Page: DeserializeOwned + Send + Sync + 'static {
    type Event: Send;

    fn cursor(&self) -> &str;

    fn events(self, clocks: Clocks) -> Vec<Self::Event>;

    fn interrupted(reason: String) -> Self::Event;
}

pub(super) type LeasePoll = Poll<LeasesPage>;
pub(super) type NetworkPoll = Poll<NetworksPage>;

pub(super) struct Poll<P> {
    servers: Arc<Remote>,
    path: String,
    /// Where we are; `None` when everything is to be asked for.
    cursor: Option<String>,
    /// The server ends quiet polls.
    answers_in_time: bool,
    list_at: Instant,
    back_off: BackOff,
    retry_at: Instant,
    /// `interrupted` was said and nothing since.
    away: bool,
    era: watch::Receiver<u32>,
    page: PhantomData<P>,
}

impl<P: Page> Poll<P> {
    pub(super) fn new(servers: Arc<Remote>, path: String) -> Self {
        let era = servers.era.subscribe();
        Self {
            servers,
            path,
            cursor: None,
            answers_in_time: false,
            list_at: Instant::now(),
            back_off: BackOff::default(),
            retry_at: Instant::now(),
            away: false,
            era,
            page: PhantomData,
        }
    }

    pub(super) async fn next(&mut self) -> Vec<P::Event> {
        loop {
            sleep_until(self.retry_at).await;
            let asked = match self.cursor.clone() {
                Some(cursor) if Instant::now() < self.list_at => self.follow(&cursor).await,
                _ => self.list().await,
            };
            match asked {
                Ok(events) if events.is_empty() => {}
                Ok(events) => {
                    self.away = false;
                    return events;
                }
                Err(error) => {
                    self.cursor = None;
                    self.retry_at = Instant::now() + self.back_off.next();
                    if !std::mem::replace(&mut self.away, true) {
                        return vec![P::interrupted(error.to_string())];
                    }
                }
            }
        }
    }

    async fn list(&mut self) -> Result<Vec<P::Event>, StoreError> {
        let path = self.path.clone();
        let request = |client: &Client, base: &str| client.get(format!("{base}{path}"));
        let (answer, _) = self.servers.ask(CALL_LIMIT, request).await?;
        let page: P = self.servers.decode(&answer)?;
        self.cursor = Some(page.cursor().to_owned());
        self.list_at = Instant::now() + jittered(RESYNC);
        self.back_off = BackOff::default();
        Ok(page.events(clocks(&answer)))
    }

    async fn follow(&mut self, cursor: &str) -> Result<Vec<P::Event>, StoreError> {
        let path = format!("{}?next={}", self.path, escaped(cursor));
        let request = |client: &Client, base: &str| {
            client.get(format!("{base}{path}")).header("Prefer", format!("wait={}", WAIT.as_secs()))
        };
        let limit = if self.answers_in_time { WAIT + SLACK } else { SILENCE };
        self.era.borrow_and_update();
        let servers = self.servers.clone();
        let asked = tokio::select! {
            // The connection was made from an address this node has no more.
            _ = self.era.changed() => return Ok(Vec::new()),
            asked = servers.ask(limit, request) => asked,
        };
        let (answer, index) = match asked {
            Ok(asked) => asked,
            Err(error) if self.answers_in_time => return Err(error),
            Err(_) => {
                // Quiet, or dead: a list tells.
                self.list_at = Instant::now();
                return Ok(Vec::new());
            }
        };
        self.back_off = BackOff::default();
        if answer.status == StatusCode::NO_CONTENT {
            self.answers_in_time = true;
            return Ok(Vec::new());
        }
        if answer.body.is_empty() {
            servers.http.suspect(index);
            return Err(StoreError::Unreachable {
                store: servers.http.names(),
                reason: "it ended a poll without an answer".into(),
            });
        }
        let page: P = servers.decode(&answer)?;
        self.cursor = Some(page.cursor().to_owned());
        Ok(page.events(clocks(&answer)))
    }
}

/// Cursors are numbers so far, and whatever a server likes by contract.
fn escaped(cursor: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~');
    cursor
        .bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

impl Page for LeasesPage {
    type Event = LeaseEvent;

    fn cursor(&self) -> &str {
        &self.cursor
    }

    fn events(self, clocks: Clocks) -> Vec<LeaseEvent> {
        if let Some(events) = self.events.filter(|events| !events.is_empty()) {
            return events.iter().map(|event| event.heard(clocks)).collect();
        }
        let (mut leases, mut unreadable) = (Vec::new(), Vec::new());
        for lease in self.snapshot.unwrap_or_default() {
            match lease.lease(clocks) {
                Ok(lease) => leases.push(lease),
                Err(entry) => unreadable.push(entry),
            }
        }
        let told = self.unreadable.into_iter();
        unreadable.extend(told.map(|entry| Unreadable { key: entry.key, reason: entry.reason }));
        vec![LeaseEvent::Snapshot(leases, unreadable)]
    }

    fn interrupted(reason: String) -> LeaseEvent {
        LeaseEvent::Interrupted(reason)
    }
}

impl Page for NetworksPage {
    type Event = NetworkEvent;

    fn cursor(&self) -> &str {
        &self.cursor
    }

    fn events(self, _: Clocks) -> Vec<NetworkEvent> {
        if let Some(events) = self.events.filter(|events| !events.is_empty()) {
            let heard = events.iter().filter_map(|event| {
                let name = event.network.as_deref()?.parse().ok()?;
                Some(match event.kind {
                    Kind::Added => NetworkEvent::Written(name),
                    Kind::Removed => NetworkEvent::Removed(name),
                })
            });
            return heard.collect();
        }
        let names = self.snapshot.unwrap_or_default();
        vec![NetworkEvent::Snapshot(names.iter().filter_map(|name| name.parse().ok()).collect())]
    }

    fn interrupted(reason: String) -> NetworkEvent {
        NetworkEvent::Interrupted(reason)
    }
}
