//! etcd's v2 API (contract §3.3): the keyspace of flanneld up to 0.17, over HTTP. etcd 3.6 has it no more.
//!
//! As flanneld asks, with two exceptions: what is there already is changed by compare-and-swap only, and a watch has a
//! way to find out that its server hangs (`poll`).

mod poll;
mod wire;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use rand::seq::SliceRandom;
use reqwest::header::HeaderMap;
use reqwest::{Client, Method, RequestBuilder, StatusCode};
use tokio_util::sync::CancellationToken;

use self::poll::Poll;
use self::wire::{Action, ApiError, COMPARE_FAILED, KEY_EXISTS, KEY_NOT_FOUND, NOT_A_FILE, Node, Place};
use super::options::Checked;
use crate::stores::http::{Answer, Servers, Unanswered};
use crate::stores::registry::{Deleted, Entry, Listing, Notice, Registry, RegistryError, WatchEnd, Written};

/// For one call at one endpoint, connecting included.
const CALL_LIMIT: Duration = Duration::from_secs(5);

/// Says how far etcd has come: the highest `modifiedIndex` there is.
const INDEX_HEADER: &str = "x-etcd-index";

pub(super) struct V2 {
    name: String,
    etcd: Arc<Etcd>,
    /// Cancelled when the connections of its time are to be left.
    era: Mutex<CancellationToken>,
}

/// The servers, and who we are to them.
struct Etcd {
    servers: Servers,
    user: Option<(String, String)>,
    /// What may be missing where a server hangs up.
    hint: &'static str,
}

/// What etcd says to a question it understood.
enum Said {
    Done(Box<Action>, HeaderMap),
    No(ApiError),
}

impl V2 {
    /// # Errors
    /// The TLS library does not take the certificates.
    pub(super) fn new(options: Checked) -> Result<Self, reqwest::Error> {
        let mut urls: Vec<_> = options.endpoints.into_iter().map(|endpoint| endpoint.url).collect();
        let name = format!("etcd at {}", urls.join(","));
        // Once, so that not every node asks the same one (contract §3.3).
        urls.shuffle(&mut rand::rng());
        let hint = match (urls.iter().any(|url| url.starts_with("https:")), &options.http_tls.identity) {
            (false, _) => "if it speaks TLS, write https:// in --etcd-endpoints",
            (true, Some(_)) => "it may not accept the certificate of --etcd-certfile",
            (true, None) => "it may want a client certificate, give --etcd-certfile and --etcd-keyfile",
        };
        let servers = Servers::new(urls, options.http_tls, |status| status.is_server_error())?;
        let etcd = Etcd { servers, user: options.user, hint };
        Ok(Self { name, etcd: Arc::new(etcd), era: Mutex::default() })
    }

    /// Whether these servers are too old to have the v3 API.
    pub(super) async fn is_all_there_is(&self) -> bool {
        #[derive(serde::Deserialize)]
        struct Version {
            etcdserver: String,
        }
        let asked = self.etcd.call(|client, base| client.get(format!("{base}/version"))).await;
        let version: Option<Version> =
            asked.ok().and_then(|(answer, _)| serde_json::from_slice(&answer.body).ok());
        version.is_some_and(|version| version.etcdserver.starts_with("2."))
    }

    /// `asked` is the moment before a call that wrote `node`.
    fn written(node: &Node, asked: Instant) -> Written {
        Written { revision: node.modified_index, lifetime: node.lifetime(asked) }
    }

    /// Writes a value where `condition` holds; `None` where it does not.
    async fn put(
        &self,
        key: &str,
        value: String,
        ttl: Option<Duration>,
        condition: (&'static str, String),
    ) -> Result<Option<Written>, RegistryError> {
        let path = Place::new(key).path();
        let mut form = vec![("value", value)];
        // Without one the key never ends, even if it had an end.
        form.extend(ttl.map(|ttl| ("ttl", whole_seconds(ttl).to_string())));
        let asked = Instant::now();
        let request = |client: &Client, base: &str| {
            client.put(format!("{base}{path}")).query(&[&condition]).form(&form)
        };
        match self.etcd.ask(request).await? {
            Said::Done(done, _) => Ok(Some(Self::written(&done.node, asked))),
            Said::No(no) => match no.error_code {
                KEY_NOT_FOUND | COMPARE_FAILED | KEY_EXISTS | NOT_A_FILE => Ok(None),
                _ => Err(RegistryError::Unreachable(no.text())),
            },
        }
    }
}

/// etcd ends a key of no seconds at once.
fn whole_seconds(ttl: Duration) -> u64 {
    let whole = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
    whole.max(1)
}

impl Etcd {
    fn with_user(&self, request: RequestBuilder) -> RequestBuilder {
        match &self.user {
            Some((name, password)) => request.basic_auth(name, Some(password)),
            None => request,
        }
    }

    async fn call(
        &self,
        request: impl Fn(&Client, &str) -> RequestBuilder,
    ) -> Result<(Answer, usize), RegistryError> {
        let request = |client: &Client, base: &str| self.with_user(request(client, base));
        self.servers.call(CALL_LIMIT, request).await.map_err(|error| self.unanswered(error))
    }

    fn unanswered(&self, error: Unanswered) -> RegistryError {
        let Unanswered { reason, lasting } = error;
        if lasting {
            return RegistryError::Refused(format!(
                "TLS failed: {reason}; check --etcd-cafile, --etcd-certfile and --etcd-keyfile"
            ));
        }
        // A server that misses a client's certificate may hang up after a handshake that went well.
        let hung_up = ["onnection reset", "broken pipe", "connection closed"];
        match hung_up.iter().any(|sign| reason.contains(sign)) {
            true => RegistryError::Unreachable(format!("{reason}; {}", self.hint)),
            false => RegistryError::Unreachable(reason),
        }
    }

    async fn ask(&self, request: impl Fn(&Client, &str) -> RequestBuilder) -> Result<Said, RegistryError> {
        let (answer, _) = self.call(request).await?;
        understand(answer)
    }
}

fn understand(answer: Answer) -> Result<Said, RegistryError> {
    if answer.status.is_success() {
        return match serde_json::from_slice(&answer.body) {
            Ok(action) => Ok(Said::Done(Box::new(action), answer.headers)),
            Err(error) => Err(RegistryError::Unreachable(format!("its answer can't be understood: {error}"))),
        };
    }
    let said = serde_json::from_slice::<ApiError>(&answer.body);
    if let StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN = answer.status
        && !said.as_ref().is_ok_and(|error| error.error_code == NOT_A_FILE)
    {
        let text = said.map_or_else(|_| answer.text(), |error| error.text());
        return Err(RegistryError::Refused(format!(
            "authentication failed: {text}; check --etcd-username and --etcd-password"
        )));
    }
    if let Ok(error) = said {
        return Ok(Said::No(error));
    }
    let text = answer.text();
    Err(match answer.status {
        StatusCode::NOT_FOUND => RegistryError::Refused(
            "it has no v2 API: etcd 3.6 has none, earlier ones have it with --enable-v2".into(),
        ),
        // Go's words.
        _ if text.contains("HTTP request to an HTTPS server") => {
            RegistryError::Refused(format!("{text} If it speaks TLS, write https:// in --etcd-endpoints"))
        }
        status => RegistryError::Unreachable(format!("{status}: {text}")),
    })
}

fn index(headers: &HeaderMap) -> Option<u64> {
    headers.get(INDEX_HEADER)?.to_str().ok()?.parse().ok()
}

#[async_trait]
impl Registry for V2 {
    fn name(&self) -> &str {
        &self.name
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, RegistryError> {
        let path = Place::new(key).path();
        let asked = Instant::now();
        let request = |client: &Client, base: &str| {
            let query = [("quorum", "true"), ("recursive", "false"), ("sorted", "false")];
            client.get(format!("{base}{path}")).query(&query)
        };
        match self.etcd.ask(request).await? {
            Said::Done(done, _) if done.node.dir => Ok(None),
            Said::Done(done, _) => Ok(Some(done.node.entry(key.to_owned(), asked))),
            Said::No(no) if no.error_code == KEY_NOT_FOUND => Ok(None),
            Said::No(no) => Err(RegistryError::Unreachable(no.text())),
        }
    }

    async fn list(&self, folder: &str) -> Result<Listing, RegistryError> {
        let place = Place::new(folder);
        let path = place.path();
        let asked = Instant::now();
        let request = |client: &Client, base: &str| {
            let query = [("quorum", "true"), ("recursive", "true"), ("sorted", "false")];
            client.get(format!("{base}{path}")).query(&query)
        };
        let (root, headers) = match self.etcd.ask(request).await? {
            Said::Done(done, headers) => (done.node, headers),
            Said::No(no) if no.error_code == KEY_NOT_FOUND => {
                return Ok(Listing { entries: Vec::new(), revision: no.index });
            }
            Said::No(no) => return Err(RegistryError::Unreachable(no.text())),
        };
        let revision = index(&headers).ok_or_else(|| {
            RegistryError::Unreachable("its answer has no X-Etcd-Index: it is no etcd".into())
        })?;
        let mut files = Vec::new();
        root.files(&mut files);
        let entries = files.into_iter().filter_map(|node| {
            let key = place.key_inside(&node.key)?;
            Some(node.entry(key, asked))
        });
        let mut entries: Vec<_> = entries.collect();
        entries.sort_unstable_by(|one, other| one.key.cmp(&other.key));
        Ok(Listing { entries, revision })
    }

    async fn create(
        &self,
        key: &str,
        value: String,
        ttl: Option<Duration>,
    ) -> Result<Option<Written>, RegistryError> {
        self.put(key, value, ttl, ("prevExist", "false".to_owned())).await
    }

    async fn update(
        &self,
        old: &Entry,
        value: String,
        ttl: Option<Duration>,
    ) -> Result<Option<Written>, RegistryError> {
        self.put(&old.key, value, ttl, ("prevIndex", old.revision.to_string())).await
    }

    async fn delete(&self, old: &Entry) -> Result<Deleted, RegistryError> {
        let path = Place::new(&old.key).path();
        let request = |client: &Client, base: &str| {
            let query = [("prevIndex", old.revision)];
            client.request(Method::DELETE, format!("{base}{path}")).query(&query)
        };
        match self.etcd.ask(request).await? {
            Said::Done(..) => Ok(Deleted::Yes),
            Said::No(no) => match no.error_code {
                KEY_NOT_FOUND | COMPARE_FAILED | NOT_A_FILE => Ok(Deleted::Changed),
                _ => Err(RegistryError::Unreachable(no.text())),
            },
        }
    }

    async fn watch(
        &self,
        folder: &str,
        revision: u64,
    ) -> Result<BoxStream<'static, Result<Vec<Notice>, WatchEnd>>, RegistryError> {
        let era = self.era.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(Poll::new(self.etcd.clone(), Place::new(folder), revision).stream(era))
    }

    fn reconnect(&self) {
        self.etcd.servers.reconnect();
        std::mem::take(&mut *self.era.lock().unwrap_or_else(PoisonError::into_inner)).cancel();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(status: u16, body: &str) -> Result<Said, RegistryError> {
        let status = StatusCode::from_u16(status).unwrap();
        understand(Answer { status, headers: HeaderMap::new(), body: body.as_bytes().to_vec() })
    }

    #[test]
    fn what_will_not_get_better_is_told_from_what_may() {
        for (status, body, wanted) in [
            (404, "404 page not found", "Refused(\"it has no v2 API"),
            (401, r#"{"message":"Insufficient credentials"}"#, "--etcd-username"),
            (
                401,
                r#"{"errorCode":110,"message":"The request requires user authentication","cause":"","index":0}"#,
                "Refused(\"authentication failed: The request requires user authentication; check",
            ),
            (400, "Client sent an HTTP request to an HTTPS server.\n", "write https:// in --etcd-endpoints"),
            (418, "tea", "Unreachable(\"418 I'm a teapot: tea\")"),
            (200, "tea", "Unreachable(\"its answer can't be understood"),
        ] {
            let error = said(status, body).err().unwrap();
            assert!(format!("{error:?}").contains(wanted), "{error:?}");
        }
        let no = |status, code: u32| {
            let body = format!(r#"{{"errorCode":{code},"message":"m","cause":"c","index":7}}"#);
            matches!(said(status, &body), Ok(Said::No(error)) if error.error_code == code && error.index == 7)
        };
        assert!(no(404, KEY_NOT_FOUND) && no(412, COMPARE_FAILED) && no(403, NOT_A_FILE));
    }

    #[test]
    fn a_rest_of_a_second_is_a_second() {
        for (millis, wanted) in [(0, 1), (1, 1), (1000, 1), (1001, 2), (86_400_000, 86_400)] {
            assert_eq!(whole_seconds(Duration::from_millis(millis)), wanted);
        }
    }
}
