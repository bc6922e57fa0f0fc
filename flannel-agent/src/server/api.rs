//! The endpoints of contract §5.2: paths, bodies and status codes are flanneld 0.7.0's.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get};
use serde::{Deserialize, Serialize};

use super::feed::{Change, Told};
use super::{Network, Server};
use crate::domain::config::NetworkConfig;
use crate::domain::lease::{LeaseAttrs, Reservation, Subnets};
use crate::domain::network_name::NetworkName;
use crate::stores::remote::wire::{
    self, Clocks, ERROR_HEADER, Kind, LeasesPage, NetworksPage, UNNAMED, WireEvent, WireLease,
    WireReservation, WireUnreadable,
};
use crate::stores::{LeaseRequest, StoreError};

/// Bytes of a request's body; the largest real one has a few hundred.
const MAX_BODY: usize = 128 * 1024;

/// How long a body may take to arrive.
const BODY_LIMIT: Duration = Duration::from_secs(10);

/// How long the store may take to answer, all its endpoints together. A client waits ten seconds, connecting included
/// (`stores/remote/client.rs`), and is told the reason only if it is there before.
const STORE_LIMIT: Duration = Duration::from_secs(8);

/// The longest a client can ask an empty poll to last.
const LONGEST_WAIT: Duration = Duration::from_secs(120);

type Served = State<Arc<Server>>;

pub(super) fn router(server: Arc<Server>) -> Router {
    Router::new()
        .route("/v1/", get(networks).fallback(not_found))
        .route("/v1/{network}/config", get(config).fallback(not_found))
        .route("/v1/{network}/leases", get(leases).post(acquire).fallback(not_found))
        .route("/v1/{network}/leases/{key}", get(lease).put(renew).delete(revoke).fallback(not_found))
        .route("/v1/{network}/reservations", get(reservations).post(reserve).fallback(not_found))
        .route("/v1/{network}/reservations/{key}", delete(unreserve).fallback(not_found))
        .fallback(not_found)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn(logged))
        .with_state(server)
}

/// As flanneld logs, but not by default: a thousand nodes ask several times a minute each.
async fn logged(method: Method, uri: Uri, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    tracing::debug!("{method} {uri} - {}", response.status().as_u16());
    response
}

/// Go's words.
async fn not_found() -> Response {
    text(StatusCode::NOT_FOUND, "404 page not found\n".to_owned())
}

/// What can go wrong with a request.
enum Failure {
    /// The request makes no sense.
    Bad(String),
    Store(StoreError),
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let error = match self {
            Self::Bad(reason) => return text(StatusCode::BAD_REQUEST, reason),
            Self::Store(error) => error,
        };
        let kind = HeaderValue::from_static(kind_of(&error));
        let mut response = text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string());
        response.headers_mut().insert(ERROR_HEADER, kind);
        response
    }
}

/// What `flannel-error` says; read by `stores/remote/client.rs`.
fn kind_of(error: &StoreError) -> &'static str {
    match error {
        StoreError::Unreachable { .. } => "unreachable",
        StoreError::NotYet { .. } => "not-yet",
        StoreError::NoConfig { .. } => "no-config",
        StoreError::OutOfSubnets(_) => "out-of-subnets",
        StoreError::LeaseLost { .. } => "lease-lost",
        StoreError::Conflict(_) => "conflict",
        StoreError::NoReservations => "no-reservations",
        StoreError::Refused { .. } => "refused",
    }
}

fn text(status: StatusCode, text: String) -> Response {
    (status, [(header::CONTENT_TYPE, "text/plain; charset=utf-8")], text).into_response()
}

/// With the newline that Go's encoder puts behind it.
fn json(value: &impl Serialize) -> Response {
    match serde_json::to_string(value) {
        Ok(text) => raw_json(text),
        Err(error) => {
            text(StatusCode::INTERNAL_SERVER_ERROR, format!("can't say the answer in JSON: {error}"))
        }
    }
}

fn raw_json(mut text: String) -> Response {
    text.push('\n');
    ([(header::CONTENT_TYPE, "application/json; charset=utf-8")], text).into_response()
}

async fn network_of(server: &Server, name: &str) -> Result<Arc<Network>, Failure> {
    let name: Option<NetworkName> = match name {
        UNNAMED => None,
        name => Some(name.parse().map_err(|error| Failure::Bad(format!("{error}")))?),
    };
    Ok(server.network(name).await?)
}

/// What the store answers, or that it does not.
async fn in_time<T>(server: &Server, asked: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    tokio::time::timeout(STORE_LIMIT, asked).await.unwrap_or_else(|_| {
        let reason = format!("no answer within {} s", STORE_LIMIT.as_secs());
        Err(StoreError::Unreachable { store: server.networks.name().to_owned(), reason }.into())
    })
}

fn subnets_of(key: &str, wrong: &str) -> Result<Subnets, Failure> {
    key.parse().map_err(|error| Failure::Bad(format!("{wrong}: {error}")))
}

/// The whole body, in time.
async fn body_of(body: Body) -> Result<Bytes, Failure> {
    match tokio::time::timeout(BODY_LIMIT, axum::body::to_bytes(body, MAX_BODY)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) => {
            Err(Failure::Bad(format!("the body is cut off or has more than {MAX_BODY} bytes: {error}")))
        }
        Err(_) => Err(Failure::Bad(format!("the body did not arrive within {} s", BODY_LIMIT.as_secs()))),
    }
}

fn decode<'a, T: Deserialize<'a>>(body: &'a Bytes) -> Result<T, Failure> {
    serde_json::from_slice(body).map_err(|error| Failure::Bad(format!("JSON decoding error: {error}")))
}

/// Where a listener is.
#[derive(Deserialize)]
struct Poll {
    next: Option<String>,
}

impl Poll {
    fn cursor(&self) -> Result<Option<u64>, Failure> {
        let number = |text: &String| {
            text.parse().map_err(|_| {
                // 500, as flanneld has it.
                Failure::Store(StoreError::Conflict(format!("failed to parse cursor: {text:?} is no number")))
            })
        };
        self.next.as_ref().map(number).transpose()
    }
}

/// How long the client wants to wait at most (RFC 7240 §4.3); flanneld's clients wait for ever.
fn patience(headers: &HeaderMap) -> Option<Duration> {
    let preferences = headers.get_all("prefer").iter().filter_map(|value| value.to_str().ok());
    let mut waits = preferences
        .flat_map(|value| value.split(','))
        .filter_map(|part| part.trim().strip_prefix("wait=")?.trim().parse::<u64>().ok());
    waits.next().map(|seconds| Duration::from_secs(seconds).min(LONGEST_WAIT))
}

/// `None` when nothing happened for as long as the client wants to wait.
async fn within<T>(
    patience: Option<Duration>,
    answer: impl Future<Output = Result<T, StoreError>>,
) -> Result<Option<T>, StoreError> {
    match patience {
        None => answer.await.map(Some),
        Some(limit) => match tokio::time::timeout(limit, answer).await {
            Ok(answer) => answer.map(Some),
            Err(_) => Ok(None),
        },
    }
}

fn nothing() -> Response {
    (StatusCode::NO_CONTENT, [("preference-applied", "wait")]).into_response()
}

async fn networks(
    State(server): Served,
    Query(poll): Query<Poll>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let answer = within(patience(&headers), server.names.tell(poll.cursor()?)).await?;
    let Some((told, cursor)) = answer else { return Ok(nothing()) };
    let (events, snapshot) = match told {
        Told::Everything(all) => (None, Some(all.into_iter().map(|(name, _)| name.to_string()).collect())),
        Told::Change(change) => {
            let (kind, name) = match change {
                Change::Added(name, _) => (Kind::Added, name),
                Change::Removed(name) => (Kind::Removed, name),
            };
            (Some(vec![WireEvent::of_network(kind, name.to_string())]), None)
        }
    };
    Ok(json(&NetworksPage { events, snapshot, cursor: cursor.to_string() }))
}

async fn config(State(server): Served, Path(network): Path<String>) -> Result<Response, Failure> {
    let text = in_time(&server, async {
        let network = network_of(&server, &network).await?;
        Ok(network.store.network_config().await?)
    });
    Ok(raw_json(wire::config_json(&text.await?)?))
}

async fn leases(
    State(server): Served,
    Path(network): Path<String>,
    Query(poll): Query<Poll>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    listen(&server, &network, &poll, (None, &headers)).await
}

async fn lease(
    State(server): Served,
    Path((network, key)): Path<(String, String)>,
    Query(poll): Query<Poll>,
    headers: HeaderMap,
) -> Result<Response, Failure> {
    let subnets = subnets_of(&key, "bad subnet")?;
    listen(&server, &network, &poll, (Some(subnets), &headers)).await
}

async fn listen(
    server: &Server,
    network: &str,
    poll: &Poll,
    (only, headers): (Option<Subnets>, &HeaderMap),
) -> Result<Response, Failure> {
    let cursor = poll.cursor()?;
    let (network, answer) = match cursor {
        None => {
            let listed = async {
                let network = network_of(server, network).await?;
                let everything = network.feed.tell(None, only).await?;
                Ok((network, Some(everything)))
            };
            in_time(server, listed).await?
        }
        // How long that lasts is the client's to say.
        Some(_) => {
            let network = in_time(server, network_of(server, network)).await?;
            let change = within(patience(headers), network.feed.tell(cursor, only)).await?;
            (network, change)
        }
    };
    let Some((told, cursor)) = answer else { return Ok(nothing()) };
    let clocks = Clocks::now();
    let mut page =
        LeasesPage { events: None, snapshot: None, cursor: cursor.to_string(), unreadable: Vec::new() };
    match told {
        Told::Everything(all) => {
            if let (Some(subnets), true) = (only, all.is_empty()) {
                return Err(StoreError::Conflict(format!("subnet {subnets} is not leased")).into());
            }
            page.snapshot = Some(all.iter().map(|(_, lease)| WireLease::new(lease, clocks)).collect());
            if only.is_none() {
                let entries = network.feed.unreadable().into_iter();
                page.unreadable =
                    entries.map(|entry| WireUnreadable { key: entry.key, reason: entry.reason }).collect();
            }
        }
        Told::Change(change) => {
            let (kind, lease) = match change {
                Change::Added(_, lease) => (Kind::Added, WireLease::new(&lease, clocks)),
                Change::Removed(subnets) => (Kind::Removed, WireLease::gone(subnets)),
            };
            page.events = Some(vec![WireEvent::of_lease(kind, lease)]);
        }
    }
    Ok(json(&page))
}

/// What our own clients say beyond the attributes.
#[derive(Deserialize)]
struct Ask {
    /// The subnet of a former run, as a lease's key.
    previous: Option<String>,
    /// Only that one will do.
    #[serde(default)]
    only: bool,
    /// The public address the lease had before.
    from: Option<std::net::IpAddr>,
}

async fn acquire(
    State(server): Served,
    Path(network): Path<String>,
    Query(ask): Query<Ask>,
    body: Body,
) -> Result<Response, Failure> {
    let body = body_of(body).await?;
    let text =
        std::str::from_utf8(&body).map_err(|error| Failure::Bad(format!("JSON decoding error: {error}")))?;
    let attrs =
        LeaseAttrs::from_json(text).map_err(|error| Failure::Bad(format!("JSON decoding error: {error}")))?;
    let previous = ask.previous.as_deref().map(|key| subnets_of(key, "parameter previous")).transpose()?;
    let lease = in_time(&server, async {
        let network = network_of(&server, &network).await?;
        let config =
            NetworkConfig::parse_ranges(&network.store.network_config().await?).map_err(|error| {
                StoreError::Conflict(format!("the network configuration can't be used: {error}"))
            })?;
        let request = LeaseRequest { config, attrs, previous, previous_only: ask.only };
        let turn = network.acquiring.lock().await;
        let lease = network.store.acquire(&request).await?;
        drop(turn);
        Ok((network, lease))
    });
    let (network, lease) = lease.await?;
    network.feed.has_told(&lease).await;
    Ok(json(&WireLease::new(&lease, Clocks::now())))
}

/// The body decides which lease it is, not the path: flanneld's do agree.
async fn renew(
    State(server): Served,
    Path((network, _)): Path<(String, String)>,
    Query(ask): Query<Ask>,
    body: Body,
) -> Result<Response, Failure> {
    let body = body_of(body).await?;
    let asked: WireLease = decode(&body)?;
    let asked = asked.lease(Clocks::now()).map_err(|error| Failure::Bad(error.to_string()))?;
    let mut known = asked.clone();
    if let Some(from) = ask.from {
        known.attrs = LeaseAttrs::of_node(from);
    }
    let lease = in_time(&server, async {
        let network = network_of(&server, &network).await?;
        let lease = network.store.rewrite(&known, &asked.attrs).await?;
        Ok((network, lease))
    });
    let (network, lease) = lease.await?;
    network.feed.has_told(&lease).await;
    Ok(json(&WireLease::new(&lease, Clocks::now())))
}

async fn revoke(
    State(server): Served,
    Path((network, key)): Path<(String, String)>,
) -> Result<Response, Failure> {
    let subnets = subnets_of(&key, "failed to parse subnet")?;
    let revoked = in_time(&server, async {
        let network = network_of(&server, &network).await?;
        network.store.revoke(subnets).await?;
        Ok(network)
    });
    revoked.await?.feed.has_told_the_end_of(subnets).await;
    Ok(StatusCode::OK.into_response())
}

async fn reservations(State(server): Served, Path(network): Path<String>) -> Result<Response, Failure> {
    let all =
        in_time(&server, async { Ok(network_of(&server, &network).await?.store.reservations().await?) });
    let all = all.await?;
    Ok(json(&all.into_iter().map(WireReservation::from).collect::<Vec<_>>()))
}

async fn reserve(
    State(server): Served,
    Path(network): Path<String>,
    body: Body,
) -> Result<Response, Failure> {
    let body = body_of(body).await?;
    let reservation: Reservation = decode::<WireReservation>(&body)?.into();
    let reserved = in_time(&server, async {
        let network = network_of(&server, &network).await?;
        let _turn = network.acquiring.lock().await;
        Ok(network.store.reserve(&reservation).await?)
    });
    reserved.await?;
    Ok(StatusCode::OK.into_response())
}

async fn unreserve(
    State(server): Served,
    Path((network, key)): Path<(String, String)>,
) -> Result<Response, Failure> {
    let subnets = subnets_of(&key, "bad subnet")?;
    let ended =
        in_time(&server, async { Ok(network_of(&server, &network).await?.store.unreserve(subnets).await?) });
    ended.await?;
    Ok(StatusCode::OK.into_response())
}
