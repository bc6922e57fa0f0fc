//! One call per method of [`LeaseStore`].

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::{self, BoxStream, StreamExt};
use reqwest::header::CONTENT_TYPE;
use reqwest::{Client, Method, RequestBuilder, StatusCode};
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use super::poll::{LeasePoll, NetworkPoll};
use super::wire::{Clocks, ERROR_HEADER, UNNAMED, WireLease, WireReservation, attrs_json};
use crate::domain::etcd::{Endpoint, Scheme};
use crate::domain::lease::{Lease, LeaseAttrs, LeaseEvent, Reservation, Subnets};
use crate::domain::network_name::NetworkName;
use crate::stores::http::{Answer, ClientTls, Servers};
use crate::stores::pem::{self, PemError};
use crate::stores::{CONFIG_EXAMPLE, LeaseRequest, LeaseStore, NetworkEvent, NetworkStores, StoreError};

/// For one call at one server, connecting included.
pub(super) const CALL_LIMIT: Duration = Duration::from_secs(10);

const CA_FILE: &str = "--remote-cafile";
const CERT_FILE: &str = "--remote-certfile";
const KEY_FILE: &str = "--remote-keyfile";

/// The `--remote*` flags.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemoteOptions {
    /// `host:port`, or a URL of one; any that answers will do.
    pub servers: Vec<String>,
    pub ca_file: Option<PathBuf>,
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
}

/// A flag that can't be right.
#[derive(Debug, thiserror::Error)]
pub enum RemoteOptionsError {
    #[error("--remote names no server; write it like 10.0.0.1:8888")]
    NoServer,
    #[error("--remote: {server:?} {reason}; write it like 10.0.0.1:8888, several separated by commas")]
    Server { server: String, reason: &'static str },
    #[error("{given} is given without {missing}: both or neither")]
    Incomplete { given: &'static str, missing: &'static str },
    #[error(transparent)]
    Pem(#[from] PemError),
    #[error("--remote: the TLS files can't be used: {0}")]
    Tls(String),
}

/// All networks of a server.
#[derive(Clone)]
pub struct RemoteNetworks {
    pub(super) servers: Arc<Remote>,
}

/// The servers, and who must leave their connections.
pub(super) struct Remote {
    pub(super) http: Servers,
    name: String,
    /// Changes when connections are to be left.
    pub(super) era: watch::Sender<u32>,
}

impl RemoteNetworks {
    /// Checks the options; the servers may be down.
    ///
    /// # Errors
    /// An option can't be right.
    pub fn open(options: &RemoteOptions) -> Result<Self, RemoteOptionsError> {
        let identity = match (&options.cert_file, &options.key_file) {
            (Some(cert), Some(key)) => Some(pem::identity(CERT_FILE, cert, KEY_FILE, key)?),
            (None, None) => None,
            (Some(_), None) => {
                return Err(RemoteOptionsError::Incomplete { given: CERT_FILE, missing: KEY_FILE });
            }
            (None, Some(_)) => {
                return Err(RemoteOptionsError::Incomplete { given: KEY_FILE, missing: CERT_FILE });
            }
        };
        let authorities = options.ca_file.as_ref().map(|path| pem::authorities(CA_FILE, path)).transpose()?;
        let secure = identity.is_some() || authorities.is_some();
        let bases =
            options.servers.iter().map(|text| base(text.trim(), secure)).collect::<Result<Vec<_>, _>>()?;
        if bases.is_empty() {
            return Err(RemoteOptionsError::NoServer);
        }
        for plain in bases.iter().filter(|base| secure && base.starts_with("http:")) {
            tracing::warn!(
                "--remote says {plain}, so the TLS files are not used there and the connection is not protected"
            );
        }
        let tls = ClientTls { authorities, identity };
        // An answer of 500 is about what was asked; another server would say the same.
        let passes = |status: StatusCode| {
            matches!(
                status,
                StatusCode::BAD_GATEWAY | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT
            )
        };
        let http =
            Servers::new(bases, tls, passes).map_err(|error| RemoteOptionsError::Tls(error.to_string()))?;
        let name = format!("the flannel server at {}", http.names());
        Ok(Self { servers: Arc::new(Remote { http, name, era: watch::channel(0).0 }) })
    }
}

/// The URL of a server; TLS where there is a file for it, or where the operator says so.
fn base(text: &str, secure: bool) -> Result<String, RemoteOptionsError> {
    let wrong = |reason| RemoteOptionsError::Server { server: text.to_owned(), reason };
    let (_, rest) = text.split_once("://").unwrap_or(("", text));
    if rest.strip_suffix('/').unwrap_or(rest).contains(['/', '?', '#', '@']) {
        return Err(wrong("is more than host:port"));
    }
    let Endpoint { scheme, authority } = Endpoint::parse(text).map_err(wrong)?;
    let secure = scheme.map_or(secure, |scheme| scheme == Scheme::Https);
    Ok(format!("{}://{authority}", if secure { "https" } else { "http" }))
}

impl NetworkStores for RemoteNetworks {
    fn name(&self) -> &str {
        &self.servers.name
    }

    fn network(&self, name: Option<&NetworkName>) -> Arc<dyn LeaseStore> {
        let network = name.map_or(UNNAMED, NetworkName::as_str);
        Arc::new(RemoteStore { servers: self.servers.clone(), network: network.to_owned() })
    }

    fn watch_networks(&self) -> BoxStream<'static, NetworkEvent> {
        let poll = NetworkPoll::new(self.servers.clone(), "/v1/".to_owned());
        stream::unfold(poll, |mut poll| async move { Some((poll.next().await, poll)) })
            .flat_map(stream::iter)
            .boxed()
    }
}

/// The leases of one network.
struct RemoteStore {
    servers: Arc<Remote>,
    /// As it stands in a path.
    network: String,
}

impl Remote {
    /// Sends a request to whichever server answers, and gives what it says with 200.
    pub(super) async fn ask(
        &self,
        limit: Duration,
        request: impl Fn(&Client, &str) -> RequestBuilder,
    ) -> Result<(Answer, usize), StoreError> {
        let answered = self.http.call(limit, request).await.map_err(|unanswered| {
            let (store, reason) = (self.name.clone(), unanswered.reason);
            if unanswered.lasting {
                StoreError::Refused {
                    store,
                    reason: format!("{reason}; check {CA_FILE}, {CERT_FILE} and {KEY_FILE}"),
                }
            } else {
                StoreError::Unreachable { store, reason: with_hint(reason) }
            }
        })?;
        if answered.0.status.is_success() {
            return Ok(answered);
        }
        Err(self.failure(&answered.0))
    }

    /// The answer's meaning; from a server that does not say what kind of failure it is, everything may pass.
    fn failure(&self, answer: &Answer) -> StoreError {
        let (store, reason) = (self.name.clone(), answer.text());
        let kind = answer.headers.get(ERROR_HEADER).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        match kind {
            "not-yet" => StoreError::NotYet { store, reason },
            "out-of-subnets" => StoreError::OutOfSubnets(reason),
            "conflict" => StoreError::Conflict(reason),
            // Whoever asked knows which lease it is about.
            "lease-lost" => {
                let text = reason.split_once(" is lost: ").map_or(reason.as_str(), |(_, why)| why);
                StoreError::Conflict(text.to_owned())
            }
            "no-reservations" => StoreError::NoReservations,
            "no-config" => self.no_config(),
            "refused" => StoreError::Refused { store, reason },
            // 0.7.0's texts.
            _ if reason.contains("out of subnets") => StoreError::OutOfSubnets(reason),
            _ if reason.starts_with("100: Key not found") => self.no_config(),
            _ if answer.status == StatusCode::BAD_REQUEST => {
                StoreError::Conflict(format!("{store} did not understand: {reason}"))
            }
            _ if answer.status == StatusCode::NOT_FOUND => {
                StoreError::Unreachable { store, reason: "it is no flannel server".into() }
            }
            _ => StoreError::Unreachable { store, reason: format!("{}: {reason}", answer.status) },
        }
    }

    fn no_config(&self) -> StoreError {
        StoreError::NoConfig { place: self.name.clone(), example: CONFIG_EXAMPLE.into() }
    }

    pub(super) fn decode<T: DeserializeOwned>(&self, answer: &Answer) -> Result<T, StoreError> {
        serde_json::from_slice(&answer.body).map_err(|error| StoreError::Unreachable {
            store: self.name.clone(),
            reason: format!("its answer can't be understood: {error}"),
        })
    }
}

/// What to do where one side speaks TLS and the other does not.
fn with_hint(reason: String) -> String {
    // hyper's words for a TLS alert, rustls's for HTTP.
    if reason.contains("invalid HTTP version") {
        format!("{reason}; if it speaks TLS, write https:// in --remote, or give {CA_FILE}")
    } else if reason.contains("InvalidContentType") {
        format!(
            "{reason}; if it speaks no TLS, write http:// in --remote, or leave {CA_FILE} and {CERT_FILE} out"
        )
    } else {
        reason
    }
}

/// By the server's clock.
pub(super) fn clocks(answer: &Answer) -> Clocks {
    Clocks::of_answer(answer.headers.get("date").and_then(|date| date.to_str().ok()))
}

impl RemoteStore {
    fn path(&self, rest: &str) -> String {
        format!("/v1/{}/{rest}", self.network)
    }

    async fn send(&self, method: Method, path: &str, body: Option<String>) -> Result<Answer, StoreError> {
        let request = |client: &Client, base: &str| {
            let request = client.request(method.clone(), format!("{base}{path}"));
            match &body {
                Some(body) => request.header(CONTENT_TYPE, "application/json").body(body.clone()),
                None => request,
            }
        };
        self.servers.ask(CALL_LIMIT, request).await.map(|(answer, _)| answer)
    }

    fn lease(&self, answer: &Answer) -> Result<Lease, StoreError> {
        self.servers.decode::<WireLease>(answer)?.lease(clocks(answer)).map_err(|unreadable| {
            let reason = format!("its answer is no lease: {unreadable}");
            StoreError::Unreachable { store: self.servers.name.clone(), reason }
        })
    }
}

/// A server that refuses to write a lease it has for somebody else says so in words only.
fn lost(subnets: Subnets, error: StoreError) -> StoreError {
    match error {
        StoreError::Conflict(reason) => StoreError::LeaseLost { subnets, reason },
        other => other,
    }
}

#[async_trait]
impl LeaseStore for RemoteStore {
    async fn network_config(&self) -> Result<String, StoreError> {
        let answer = self.send(Method::GET, &self.path("config"), None).await?;
        Ok(String::from_utf8_lossy(&answer.body).trim_end().to_owned())
    }

    async fn acquire(&self, request: &LeaseRequest) -> Result<Lease, StoreError> {
        let mut path = self.path("leases");
        if let Some(previous) = request.previous {
            // A key's `&` would end the parameter.
            let key = previous.to_string().replace('&', "%26");
            path = format!("{path}?previous={key}&only={}", request.previous_only);
        }
        let answer = self.send(Method::POST, &path, Some(attrs_json(&request.attrs))).await;
        match (answer, request.previous) {
            (Ok(answer), _) => self.lease(&answer),
            (Err(error), Some(previous)) if request.previous_only => Err(lost(previous, error)),
            (Err(error), _) => Err(error),
        }
    }

    async fn rewrite(&self, known: &Lease, attrs: &LeaseAttrs) -> Result<Lease, StoreError> {
        let renewed = Lease { attrs: attrs.clone(), ..known.clone() };
        let mut path = self.path(&format!("leases/{}", known.subnets));
        if let Some(node) = known.attrs.node().filter(|node| attrs.node() != Some(*node)) {
            path = format!("{path}?from={node}");
        }
        let body = serde_json::to_string(&WireLease::new(&renewed, Clocks::now())).map_err(|error| {
            StoreError::Conflict(format!("lease {} can't be said in JSON: {error}", known.subnets))
        })?;
        let answer = self.send(Method::PUT, &path, Some(body)).await;
        self.lease(&answer.map_err(|error| lost(known.subnets, error))?)
    }

    async fn reservations(&self) -> Result<Vec<Reservation>, StoreError> {
        let answer = self.send(Method::GET, &self.path("reservations"), None).await?;
        let all: Option<Vec<WireReservation>> = self.servers.decode(&answer)?;
        Ok(all.unwrap_or_default().into_iter().map(Reservation::from).collect())
    }

    async fn reserve(&self, reservation: &Reservation) -> Result<(), StoreError> {
        let body = serde_json::to_string(&WireReservation::from(*reservation)).map_err(|error| {
            StoreError::Conflict(format!(
                "reservation {} can't be said in JSON: {error}",
                reservation.subnets
            ))
        })?;
        self.send(Method::POST, &self.path("reservations"), Some(body)).await.map(drop)
    }

    async fn unreserve(&self, subnets: Subnets) -> Result<(), StoreError> {
        self.send(Method::DELETE, &self.path(&format!("reservations/{subnets}")), None).await.map(drop)
    }

    async fn revoke(&self, subnets: Subnets) -> Result<(), StoreError> {
        self.send(Method::DELETE, &self.path(&format!("leases/{subnets}")), None).await.map(drop)
    }

    fn reconnect(&self) {
        self.servers.http.reconnect();
        self.servers.era.send_modify(|era| *era = era.wrapping_add(1));
    }

    fn watch(&self) -> BoxStream<'static, LeaseEvent> {
        let poll = LeasePoll::new(self.servers.clone(), self.path("leases"));
        stream::unfold(poll, |mut poll| async move { Some((poll.next().await, poll)) })
            .flat_map(stream::iter)
            .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_host_and_port() {
        for (text, secure, wanted) in [
            ("10.0.0.1:8888", false, "http://10.0.0.1:8888"),
            ("10.0.0.1:8888", true, "https://10.0.0.1:8888"),
            ("https://flannel.example:443/", false, "https://flannel.example:443"),
            ("[fd00::1]:8888", false, "http://[fd00::1]:8888"),
        ] {
            assert_eq!(base(text, secure).unwrap(), wanted);
        }
        for (text, reason) in [
            ("10.0.0.1", "has no port from"),
            ("fd00::1:8888", "has no valid host name"),
            ("a b:1", "contains a space"),
            (":8888", "names no host"),
            ("a:0", "has no port from"),
            ("a:b", "has no port from"),
            ("ftp://a:1", "is neither"),
            ("http://a:1/v1", "is more than"),
            ("user@a:1", "is more than"),
        ] {
            let error = base(text, false).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains(&format!("{text:?}")), "{error}");
        }
    }
}
