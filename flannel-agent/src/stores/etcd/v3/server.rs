//! One endpoint: its connection, and what its failures mean.

use std::error::Error as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Error};
use tokio::sync::OnceCell;

use super::{CALL_TIMEOUT, lock};
use crate::stores::etcd::options::Target;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// HTTP/2 pings on a quiet watch. etcd counts pings closer than 5 s as abuse (`--grpc-keepalive-min-time`) and those
/// on a connection without calls too, so none are sent there.
const PING_INTERVAL: Duration = Duration::from_secs(6);
const PING_TIMEOUT: Duration = Duration::from_secs(3);

/// gRPC status codes (<https://grpc.io/docs/guides/status-codes/>).
const CANCELLED: i32 = 1;
const INVALID_ARGUMENT: i32 = 3;
const PERMISSION_DENIED: i32 = 7;
const FAILED_PRECONDITION: i32 = 9;
const UNIMPLEMENTED: i32 = 12;
const UNAUTHENTICATED: i32 = 16;

/// What etcd says to somebody without a login.
pub(super) const NO_USER: &str = "user name is empty";

pub(super) struct Server {
    pub(super) endpoint: Target,
    client: Mutex<Arc<OnceCell<Client>>>,
}

/// Why one server did not do what it was asked.
pub(super) enum Fault {
    /// It may do so later, or another one now.
    Passing(String),
    /// It will not.
    Lasting(String),
}

impl Server {
    pub(super) fn new(endpoint: Target) -> Self {
        Self { endpoint, client: Mutex::default() }
    }

    pub(super) async fn client(&self, user: Option<&(String, String)>) -> Result<Client, Fault> {
        let connect = || async {
            let options = self.connect_options();
            let Some((name, password)) = user else {
                return Client::connect([&self.endpoint.url], Some(options)).await;
            };
            let with_user = options.clone().with_user(name, password).with_auto_token_refresh(true);
            match Client::connect([&self.endpoint.url], Some(with_user)).await {
                // As Go's client does: a user too many is no reason to stop.
                Err(error) if is_auth_off(&error) => {
                    tracing::warn!(
                        endpoint = self.endpoint.url,
                        "etcd's authentication is off, --etcd-username and --etcd-password are not used"
                    );
                    Client::connect([&self.endpoint.url], Some(options)).await
                }
                other => other,
            }
        };
        let slot = lock(&self.client).clone();
        let client = slot.get_or_try_init(connect).await;
        client.cloned().map_err(|error| self.judge(&error))
    }

    /// The next call makes a new connection.
    pub(super) fn forget(&self) {
        *lock(&self.client) = Arc::default();
    }

    fn connect_options(&self) -> ConnectOptions {
        let options = ConnectOptions::new()
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_timeout(CALL_TIMEOUT)
            .with_keep_alive(PING_INTERVAL, PING_TIMEOUT)
            .with_require_leader(true);
        match &self.endpoint.tls {
            Some(tls) => options.with_tls(tls.clone()),
            None => options,
        }
    }

    pub(super) fn judge(&self, error: &Error) -> Fault {
        let text = describe(error);
        let code = match error {
            Error::GRpcStatus(status) => Some(status.code() as i32),
            Error::InvalidArgs(_) | Error::InvalidUri(_) | Error::InvalidMetadataValue(_) => {
                Some(INVALID_ARGUMENT)
            }
            _ => None,
        };
        if text.contains("invalid peer certificate") || text.contains("received fatal alert") {
            return Fault::Lasting(format!(
                "TLS failed: {text}; check --etcd-cafile, --etcd-certfile and --etcd-keyfile"
            ));
        }
        match code {
            Some(INVALID_ARGUMENT) if text.contains(NO_USER) => {
                Fault::Lasting(format!("{text}: it wants a user, give --etcd-username and --etcd-password"))
            }
            Some(
                INVALID_ARGUMENT | PERMISSION_DENIED | UNAUTHENTICATED | FAILED_PRECONDITION | UNIMPLEMENTED,
            ) => Fault::Lasting(text),
            // A client that speaks plain HTTP to TLS is hung up on, and with TLS 1.3 so is one whose certificate is
            // missing or refused, after a handshake that went well.
            _ if code == Some(CANCELLED) || hung_up(&text) => {
                let hint = match (&self.endpoint.tls, self.endpoint.has_client_cert) {
                    (None, _) => "if it speaks TLS, write https:// in --etcd-endpoints",
                    (Some(_), true) => "it may not accept the certificate of --etcd-certfile",
                    (Some(_), false) => {
                        "it may want a client certificate, give --etcd-certfile and --etcd-keyfile"
                    }
                };
                Fault::Passing(format!("{text}; {hint}"))
            }
            _ => Fault::Passing(text),
        }
    }
}

fn hung_up(text: &str) -> bool {
    // Pings that nobody answers end a connection too.
    let signs = ["broken pipe", "connection closed", "onnection reset", "http2 error"];
    !text.contains("timed out") && signs.iter().any(|sign| text.contains(sign))
}

fn is_auth_off(error: &Error) -> bool {
    matches!(error, Error::GRpcStatus(status)
        if status.code() as i32 == FAILED_PRECONDITION && status.message().contains("authentication is not enabled"))
}

/// The error with its causes, each said once.
pub(super) fn describe(error: &Error) -> String {
    let (mut text, mut cause) = match error {
        Error::GRpcStatus(status) => (status.message().to_owned(), status.source()),
        Error::TransportError(error) => (error.to_string(), error.source()),
        other => (other.to_string(), None),
    };
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = if text.is_empty() { more } else { format!("{text}: {more}") };
        }
        cause = error.source();
    }
    text
}
