//! etcd's v3 API (contract §3.4), over etcd-client.
//!
//! The client library balances over its endpoints without trying another one when a call fails
//! (etcdv3/etcd-client#12), so each endpoint has a client of its own here. A call goes to the endpoint that worked
//! last and moves on when that fails. All calls may therefore be sent twice: each one is written so that the second
//! time does no harm.

mod server;

use std::future::Future;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use etcd_client::{
    Client, Compare, CompareOp, Error, GetOptions, KeyValue, LeaseTimeToLiveOptions, PutOptions, Txn, TxnOp,
    TxnOpResponse, WatchOptions, WatchResponse, WatchStream,
};
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use self::server::{Fault, NO_USER, Server, describe};
use super::options::Checked;
use crate::stores::registry::{
    Deleted, Entry, Lifetime, Listing, Notice, Registry, RegistryError, WatchEnd, Written,
};

/// For one call at one endpoint, connecting included.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Entries per answer when leases are listed: answers stay far below the 4 MiB a client takes.
const PAGE: i64 = 1000;

pub(super) struct V3 {
    name: String,
    servers: Arc<Servers>,
}

struct Servers {
    list: Vec<Server>,
    user: Option<(String, String)>,
    /// Index of the server that answered last.
    current: AtomicUsize,
    /// Cancelled when the connections of its time are to be left.
    era: Mutex<CancellationToken>,
}

impl V3 {
    pub(super) fn new(options: Checked) -> Self {
        let urls: Vec<_> = options.endpoints.iter().map(|endpoint| endpoint.url.as_str()).collect();
        let name = format!("etcd at {}", urls.join(","));
        let list = options.endpoints.into_iter().map(Server::new).collect();
        let servers =
            Servers { list, user: options.user, current: AtomicUsize::new(0), era: Mutex::default() };
        Self { name, servers: Arc::new(servers) }
    }

    /// Runs `call` at one server after the other until one answers. Gives the answer and the server's index.
    async fn call<T, F>(&self, call: impl Fn(Client) -> F + Send) -> Result<(T, usize), RegistryError>
    where
        T: Send,
        F: Future<Output = Result<T, Error>> + Send,
    {
        let servers = &*self.servers;
        let first = servers.current.load(Ordering::Relaxed);
        let (mut reasons, mut all_lasting) = (Vec::new(), true);
        for offset in 0..servers.list.len() {
            let index = (first + offset) % servers.list.len();
            let Some(server) = servers.list.get(index) else { continue };
            let answer = timeout(CALL_TIMEOUT, async {
                let client = server.client(servers.user.as_ref()).await?;
                call(client).await.map_err(|error| server.judge(&error))
            });
            let fault = match answer.await {
                Ok(Ok(answer)) => {
                    servers.current.store(index, Ordering::Relaxed);
                    return Ok((answer, index));
                }
                Ok(Err(fault)) => fault,
                Err(_) => {
                    // Whoever asks may not wait until all were tried: the next call goes on with another one.
                    servers.suspect(index);
                    Fault::Passing(format!("no answer within {} s", CALL_TIMEOUT.as_secs()))
                }
            };
            let (Fault::Passing(reason) | Fault::Lasting(reason)) = &fault;
            // Who we are is said anew where a login is worth nothing. It names how far etcd had come, and an etcd that was
            // restored or replaced lets those who name more wait for an answer until it has come as far. And where
            // authentication was off there was none.
            let is_unknown = matches!(fault, Fault::Passing(_)) || reason.contains(NO_USER);
            if is_unknown && servers.user.is_some() {
                server.forget();
            }
            all_lasting &= matches!(fault, Fault::Lasting(_));
            reasons.push(match servers.list.len() {
                1 => reason.clone(),
                _ => format!("{}: {reason}", server.endpoint.url),
            });
        }
        let reasons = reasons.join("; ");
        Err(if all_lasting { RegistryError::Refused(reasons) } else { RegistryError::Unreachable(reasons) })
    }

    async fn grant(&self, ttl: Duration) -> Result<i64, RegistryError> {
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
        let (granted, _) =
            self.call(|mut client| async move { client.lease_grant(seconds, None).await }).await?;
        Ok(granted.id())
    }

    /// Puts an entry in place of what `guard` compares, with a lease of its own when it shall end.
    async fn put(
        &self,
        key: &str,
        value: String,
        guard: Compare,
        ttl: Option<Duration>,
    ) -> Result<Option<Written>, RegistryError> {
        let lease = match ttl {
            Some(ttl) => self.grant(ttl).await?,
            None => 0,
        };
        let put = TxnOp::put(key, value, Some(PutOptions::new().with_lease(lease)));
        let txn = Txn::new().when([guard]).and_then([put]);
        let (answer, _) = self
            .call(|mut client| {
                let txn = txn.clone();
                async move { client.txn(txn).await }
            })
            .await?;
        if !answer.succeeded() {
            self.release(lease).await;
            return Ok(None);
        }
        let revision = answer.header().map_or(0, |header| header.revision());
        Ok(Some(Written { revision: unsigned(revision), lifetime: lifetime(lease) }))
    }

    /// Revokes a lease object nothing hangs on any more. Revoking deletes what hangs on it, and others may have put
    /// keys there, so that is asked first. What fails here is no harm: the object ends by itself within a day.
    async fn release(&self, lease: i64) {
        if lease == 0 {
            return;
        }
        let options = LeaseTimeToLiveOptions::new().with_keys();
        let asked = self
            .call(|mut client| {
                let options = options.clone();
                async move { client.lease_time_to_live(lease, Some(options)).await }
            })
            .await;
        match asked {
            Ok((answer, _)) if answer.ttl() >= 0 && answer.keys().is_empty() => {
                let revoked = self.call(|mut client| async move { client.lease_revoke(lease).await }).await;
                if let Err(error) = revoked {
                    tracing::debug!(
                        lease,
                        ?error,
                        "could not revoke a lease object that is not used any more"
                    );
                }
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(lease, ?error, "could not ask what hangs on a lease object"),
        }
    }
}

#[async_trait]
impl Registry for V3 {
    fn name(&self) -> &str {
        &self.name
    }

    async fn get(&self, key: &str) -> Result<Option<Entry>, RegistryError> {
        let (answer, _) = self.call(|mut client| async move { client.get(key, None).await }).await?;
        Ok(answer.kvs().first().map(entry))
    }

    async fn list(&self, folder: &str) -> Result<Listing, RegistryError> {
        let mut end = folder.as_bytes().to_vec();
        // The first key behind all that begin with `folder`, whose last byte is a slash.
        if let Some(last) = end.last_mut() {
            *last = last.saturating_add(1);
        }
        let mut start = folder.as_bytes().to_vec();
        let mut listing = Listing { entries: Vec::new(), revision: 0 };
        loop {
            let at = i64::try_from(listing.revision).unwrap_or_default();
            let options = GetOptions::new().with_range(end.clone()).with_limit(PAGE).with_revision(at);
            let (answer, _) = self
                .call(|mut client| {
                    let (start, options) = (start.clone(), options.clone());
                    async move { client.get(start, Some(options)).await }
                })
                .await?;
            if listing.revision == 0 {
                listing.revision = unsigned(answer.header().map_or(0, |header| header.revision()));
            }
            listing.entries.extend(answer.kvs().iter().map(entry));
            match answer.kvs().last() {
                Some(last) if answer.more() => {
                    start = last.key().to_vec();
                    start.push(0);
                }
                _ => return Ok(listing),
            }
        }
    }

    async fn create(
        &self,
        key: &str,
        value: String,
        ttl: Option<Duration>,
    ) -> Result<Option<Written>, RegistryError> {
        self.put(key, value, Compare::version(key, CompareOp::Equal, 0), ttl).await
    }

    async fn update(
        &self,
        old: &Entry,
        value: String,
        ttl: Option<Duration>,
    ) -> Result<Option<Written>, RegistryError> {
        let written = self.put(&old.key, value, unchanged(old), ttl).await?;
        if let (Some(_), Lifetime::Lease(lease)) = (&written, old.lifetime) {
            self.release(lease).await;
        }
        Ok(written)
    }

    async fn delete(&self, old: &Entry) -> Result<Deleted, RegistryError> {
        let txn = Txn::new().when([unchanged(old)]).and_then([TxnOp::delete(old.key.as_str(), None)]);
        let (answer, _) = self
            .call(|mut client| {
                let txn = txn.clone();
                async move { client.txn(txn).await }
            })
            .await?;
        let deleted = answer.succeeded()
            && answer
                .op_responses()
                .iter()
                .any(|op| matches!(op, TxnOpResponse::Delete(delete) if delete.deleted() > 0));
        if !deleted {
            return Ok(Deleted::Changed);
        }
        if let Lifetime::Lease(lease) = old.lifetime {
            self.release(lease).await;
        }
        Ok(Deleted::Yes)
    }

    async fn remaining(&self, lifetime: Lifetime) -> Result<Option<Duration>, RegistryError> {
        let Lifetime::Lease(lease) = lifetime else {
            return Ok(None);
        };
        let (answer, _) =
            self.call(|mut client| async move { client.lease_time_to_live(lease, None).await }).await?;
        // -1 stands for a lease that has ended.
        Ok(Some(Duration::from_secs(unsigned(answer.ttl()))))
    }

    async fn watch(
        &self,
        folder: &str,
        revision: u64,
    ) -> Result<BoxStream<'static, Result<Vec<Notice>, WatchEnd>>, RegistryError> {
        let from = i64::try_from(revision.saturating_add(1)).unwrap_or(i64::MAX);
        let options = WatchOptions::new().with_prefix().with_start_revision(from);
        let era = lock(&self.servers.era).clone();
        let (watch, index) = self
            .call(|mut client| {
                let options = options.clone();
                async move { client.watch(folder, Some(options)).await }
            })
            .await?;
        let state = Some((watch, self.servers.clone(), index));
        let notices = stream::unfold(state, |state| async move {
            let (mut watch, servers, index) = state?;
            match next_notices(&mut watch).await {
                Ok(notices) => Some((Ok(notices), Some((watch, servers, index)))),
                Err(end) => {
                    if let WatchEnd::Broken(_) = end {
                        servers.suspect(index);
                    }
                    Some((Err(end), None))
                }
            }
        });
        let end = WatchEnd::Broken("its connection was made from this node's former address".into());
        Ok(notices.take_until(era.cancelled_owned()).chain(stream::once(async { Err(end) })).boxed())
    }

    fn reconnect(&self) {
        self.servers.list.iter().for_each(Server::forget);
        std::mem::take(&mut *lock(&self.servers.era)).cancel();
    }
}

/// Each holds one value that is replaced whole: a panic elsewhere leaves it usable.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Servers {
    /// The next call asks another server first, if there is one and nobody moved on already.
    fn suspect(&self, index: usize) {
        let next = (index + 1) % self.list.len().max(1);
        let _ = self.current.compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
    }
}

async fn next_notices(watch: &mut WatchStream) -> Result<Vec<Notice>, WatchEnd> {
    loop {
        let answer = match watch.message().await {
            Ok(Some(answer)) => answer,
            Ok(None) => return Err(WatchEnd::Broken("the server ended the watch".into())),
            Err(error) => return Err(WatchEnd::Broken(describe(&error))),
        };
        // After this the stream would stay open and silent for ever.
        if answer.canceled() {
            return Err(match answer.compact_revision() {
                0 => WatchEnd::Broken(format!("the server cancelled the watch: {}", answer.cancel_reason())),
                _ => WatchEnd::Compacted,
            });
        }
        let notices = notices(&answer);
        if !notices.is_empty() {
            return Ok(notices);
        }
    }
}

fn notices(answer: &WatchResponse) -> Vec<Notice> {
    let kvs = answer.events().iter().filter_map(|event| event.kv());
    // A deletion has a key and a revision, and version 0 (etcd's mvccpb.KeyValue).
    kvs.map(|kv| match kv.version() {
        0 => Notice::Deleted { key: text(kv.key()), revision: unsigned(kv.mod_revision()) },
        _ => Notice::Put(entry(kv)),
    })
    .collect()
}

fn entry(kv: &KeyValue) -> Entry {
    Entry {
        key: text(kv.key()),
        value: kv.value().to_vec(),
        revision: unsigned(kv.mod_revision()),
        lifetime: lifetime(kv.lease()),
    }
}

fn unchanged(old: &Entry) -> Compare {
    Compare::mod_revision(old.key.as_str(), CompareOp::Equal, i64::try_from(old.revision).unwrap_or_default())
}

fn lifetime(lease: i64) -> Lifetime {
    match lease {
        0 => Lifetime::Forever,
        id => Lifetime::Lease(id),
    }
}

/// A key that is not text never is a subnet, so nothing is lost by replacing what can't be shown.
fn text(key: &[u8]) -> String {
    String::from_utf8_lossy(key).into_owned()
}

/// Revisions and times are never negative; what is, counts as nothing.
fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or_default()
}
