//! HTTP calls to whichever of several servers answers: what etcd's v2 API and a flannel server have in common.
//!
//! A call goes to the server that worked last and moves on when that fails, so it may be sent twice: each one is written
//! so that the second time does no harm. Every call has an end, and every answer a largest size.

use std::error::Error as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use reqwest::header::HeaderMap;
use reqwest::{Client, ClientBuilder, RequestBuilder, StatusCode};
use tokio::time::timeout;

use super::pem::IdentityPem;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// TCP keep-alive on connections, so that a long poll notices a peer that vanished.
const KEEP_ALIVE: Duration = Duration::from_secs(10);
/// Ten thousand leases have about 3 MiB; a server must not be able to make us hold gigabytes.
const MAX_ANSWER: usize = 64 << 20;

/// What TLS is made of, checked.
#[derive(Clone, Default)]
pub(super) struct ClientTls {
    /// PEM of the authorities that may vouch for the server; the system's where it is `None`.
    pub(super) authorities: Option<Vec<u8>>,
    pub(super) identity: Option<IdentityPem>,
}

/// Servers that say the same.
pub(super) struct Servers {
    /// `scheme://host:port`, at least one.
    bases: Vec<String>,
    tls: ClientTls,
    client: ArcSwap<Client>,
    /// Index of the one that answered last.
    current: AtomicUsize,
    /// Answers of one server that another may not give.
    pass_on: fn(StatusCode) -> bool,
}

/// What a server said.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Vec<u8>,
}

/// An answer of which the head is there.
pub(super) struct Begun {
    response: reqwest::Response,
}

/// Why no server did what it was asked.
#[derive(Debug)]
pub(super) struct Unanswered {
    /// A sentence per server.
    pub(super) reason: String,
    /// It will not get better by itself: TLS does not match.
    pub(super) lasting: bool,
}

impl Servers {
    /// # Errors
    /// The TLS library does not take what is in `tls`.
    pub(super) fn new(
        bases: Vec<String>,
        tls: ClientTls,
        pass_on: fn(StatusCode) -> bool,
    ) -> Result<Self, reqwest::Error> {
        let tls = match bases.iter().any(|base| base.starts_with("https:")) {
            true => tls,
            // Spares reading the system's authorities, which takes tens of milliseconds.
            false => ClientTls { authorities: Some(Vec::new()), identity: None },
        };
        let client = ArcSwap::from_pointee(client(&tls)?);
        Ok(Self { bases, tls, client, current: AtomicUsize::new(0), pass_on })
    }

    /// `http://a:1,http://b:2`, for messages.
    pub(super) fn names(&self) -> String {
        self.bases.join(",")
    }

    /// Runs `request` at one server after the other until one answers within `limit`, and says which it was.
    pub(super) async fn call(
        &self,
        limit: Duration,
        request: impl Fn(&Client, &str) -> RequestBuilder,
    ) -> Result<(Answer, usize), Unanswered> {
        let first = self.current.load(Ordering::Relaxed);
        let (mut reasons, mut lasting) = (Vec::new(), true);
        for offset in 0..self.bases.len() {
            let index = (first + offset) % self.bases.len();
            let Some(base) = self.bases.get(index) else { continue };
            let client = self.client.load_full();
            let fault = match timeout(limit, send(request(&client, base))).await {
                Ok(Ok(answer)) if !(self.pass_on)(answer.status) => {
                    self.current.store(index, Ordering::Relaxed);
                    return Ok((answer, index));
                }
                Ok(Ok(answer)) => {
                    lasting = false;
                    format!("{}: {}", answer.status, answer.text())
                }
                Ok(Err(fault)) => {
                    lasting &= fault.lasting;
                    fault.reason
                }
                Err(_) => {
                    lasting = false;
                    // Whoever asks may not wait until all were tried: the next call goes on with another one.
                    self.suspect(index);
                    format!("no answer within {} s", limit.as_secs())
                }
            };
            reasons.push(match self.bases.len() {
                1 => fault,
                _ => format!("{base}: {fault}"),
            });
        }
        Err(Unanswered { reason: reasons.join("; "), lasting })
    }

    /// Index of the server that the next call asks first.
    pub(super) fn current(&self) -> usize {
        self.current.load(Ordering::Relaxed)
    }

    /// Runs `request` at one server, up to the head of its answer. It has no end: who waits for it sets one.
    pub(super) async fn begin(
        &self,
        index: usize,
        request: impl Fn(&Client, &str) -> RequestBuilder,
    ) -> Result<Begun, Unanswered> {
        let client = self.client.load_full();
        match self.bases.get(index) {
            Some(base) => begin(request(&client, base)).await,
            None => Err(Unanswered { reason: format!("there is no server {index}"), lasting: false }),
        }
    }

    /// The next call asks another server first, if there is one and nobody moved on already.
    pub(super) fn suspect(&self, index: usize) {
        let next = (index + 1) % self.bases.len().max(1);
        let _ = self.current.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Leaves every connection: the next call makes a new one. Calls that are under way are not ended by this.
    pub(super) fn reconnect(&self) {
        match client(&self.tls) {
            Ok(client) => self.client.store(client.into()),
            Err(error) => tracing::debug!("could not leave the connections: {error}"),
        }
    }
}

impl Answer {
    /// The body as a message can show it.
    pub(super) fn text(&self) -> String {
        const SHOWN: usize = 300;
        let text = String::from_utf8_lossy(&self.body);
        text.trim().chars().filter(|c| !c.is_control()).take(SHOWN).collect()
    }
}

fn client(tls: &ClientTls) -> Result<Client, reqwest::Error> {
    // The client asks for the process's. That it is installed already is fine.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut builder = ClientBuilder::new()
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_keepalive(KEEP_ALIVE)
        .redirect(reqwest::redirect::Policy::limited(3))
        .no_proxy();
    if let Some(pem) = &tls.authorities {
        builder = builder.tls_certs_only(reqwest::Certificate::from_pem_bundle(pem)?);
    }
    if let Some(identity) = &tls.identity {
        let both = [identity.key.as_slice(), b"\n", identity.cert.as_slice()].concat();
        builder = builder.identity(reqwest::Identity::from_pem(&both)?);
    }
    builder.build()
}

async fn send(request: RequestBuilder) -> Result<Answer, Unanswered> {
    begin(request).await?.finish().await
}

async fn begin(request: RequestBuilder) -> Result<Begun, Unanswered> {
    Ok(Begun { response: request.send().await.map_err(|error| fault(&error))? })
}

impl Begun {
    pub(super) fn status(&self) -> StatusCode {
        self.response.status()
    }

    pub(super) fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    /// The whole answer.
    pub(super) async fn finish(self) -> Result<Answer, Unanswered> {
        let mut response = self.response;
        let (status, headers) = (response.status(), response.headers().clone());
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| fault(&error))? {
            if body.len() + chunk.len() > MAX_ANSWER {
                let reason = format!("the answer is longer than {} MiB", MAX_ANSWER >> 20);
                return Err(Unanswered { reason, lasting: false });
            }
            body.extend_from_slice(&chunk);
        }
        Ok(Answer { status, headers, body })
    }
}

/// The error with its causes, each said once.
fn fault(error: &reqwest::Error) -> Unanswered {
    let mut reason = String::new();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !reason.contains(&more) {
            reason = if reason.is_empty() { more } else { format!("{reason}: {more}") };
        }
        cause = error.source();
    }
    if reason.is_empty() {
        reason = error.to_string();
    }
    let lasting =
        ["invalid peer certificate", "received fatal alert"].iter().any(|sign| reason.contains(sign));
    Unanswered { reason, lasting }
}
