//! A host without a kernel, for tests of what sits on [`Host`].
//!
//! It remembers what it was told, refuses what it was told to refuse, and prints itself. A clone is a second handle
//! on the same host: one goes into the agent, the test keeps the other to look at it and to do damage.
//!
//! It behaves as the kernel in the one thing callers must cope with: what hangs on a device goes when it goes.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use ipnet::Ipv4Net;
use tokio::sync::Notify;

use super::{Host, HostError, News};
use crate::domain::host_state::{Change, HostItem, HostState, Key};
use crate::domain::interface::{HostFacts, Selector};
use crate::domain::path_mtu::{Heard, Probe};

/// A handle on a made-up host; see the module.
#[derive(Clone, Default)]
pub struct FakeHost {
    inner: Arc<Mutex<Inner>>,
    disturbed: Arc<Notify>,
}

#[derive(Default)]
struct Inner {
    state: HostState,
    facts: HostFacts,
    refused: HashMap<Key, String>,
    undone: HashSet<Key>,
    unobservable: Option<String>,
    calls: Calls,
    log: Vec<String>,
    /// MTU of the narrowest link to a node.
    links: HashMap<Ipv4Addr, u32>,
    heard: Vec<Heard>,
    /// Someone did damage that was not told yet.
    touched: bool,
    /// How long changes take.
    takes: Duration,
    packets: u64,
}

/// How often the host was asked for what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    pub observe: usize,
    /// Calls of `apply`, the empty ones too.
    pub apply: usize,
    /// Changes in them.
    pub changes: usize,
    /// Changes that were refused.
    pub refused: usize,
}

impl FakeHost {
    /// A host with nothing of ours on it.
    pub fn new() -> Self {
        Self::default()
    }

    /// A host on which a former run has left something.
    pub fn with(state: HostState) -> Self {
        let host = Self::new();
        host.lock().state = state;
        host
    }

    /// What is there now.
    pub fn state(&self) -> HostState {
        self.lock().state.clone()
    }

    pub fn calls(&self) -> Calls {
        self.lock().calls
    }

    /// Every change that was made, in order, as its `Display` says it; what was refused ends in `: <reason>`.
    pub fn log(&self) -> Vec<String> {
        self.lock().log.clone()
    }

    /// From now on every change of the item with this key fails with this reason.
    pub fn refuse(&self, key: Key, reason: impl Into<String>) {
        self.lock().refused.insert(key, reason.into());
    }

    /// Ends [`FakeHost::refuse`].
    pub fn allow(&self, key: &Key) {
        self.lock().refused.remove(key);
    }

    /// From now on someone else removes the item with this key as soon as it is put.
    pub fn undo(&self, key: &Key) {
        self.lock().undone.insert(key.clone());
        self.lose(key);
    }

    /// Ends [`FakeHost::undo`].
    pub fn keep(&self, key: &Key) {
        self.lock().undone.remove(key);
    }

    /// From now on `observe` fails with this reason.
    pub fn refuse_to_be_observed(&self, reason: impl Into<String>) {
        self.lock().unobservable = Some(reason.into());
    }

    /// Ends [`FakeHost::refuse_to_be_observed`].
    pub fn allow_to_be_observed(&self) {
        self.lock().unobservable = None;
    }

    /// Changes take so long, however many they are.
    pub fn take(&self, time: Duration) {
        self.lock().takes = time;
    }

    /// The way to `node` carries no more than `mtu` bytes. Every peer has traffic, and all others answer any probe.
    pub fn narrow(&self, node: Ipv4Addr, mtu: u32) {
        self.lock().links.insert(node, mtu);
    }

    /// The host's interfaces are others now; wakes `news`.
    pub fn rewire(&self, change: impl FnOnce(&mut HostFacts)) {
        change(&mut self.lock().facts);
        self.lock().touched = true;
        self.disturbed.notify_one();
    }

    /// Someone else changes what is ours; wakes `news`.
    pub fn disturb(&self, damage: impl FnOnce(&mut HostState)) {
        damage(&mut self.lock().state);
        self.lock().touched = true;
        self.disturbed.notify_one();
    }

    /// Someone else removes an item, and with it what hangs on it; wakes `news`.
    pub fn lose(&self, key: &Key) {
        self.disturb(|state| remove(state, key));
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn remove(state: &mut HostState, key: &Key) {
    state.remove(key);
    if let Key::Link(name) = key {
        let hanging: Vec<Key> =
            state.iter().filter(|item| device_of(item) == Some(name.as_str())).map(HostItem::key).collect();
        for key in hanging {
            state.remove(&key);
        }
    }
}

fn device_of(item: &HostItem) -> Option<&str> {
    match item {
        HostItem::Link(_) | HostItem::Sysctl(_) => None,
        HostItem::Address(address) => Some(&address.device),
        HostItem::Tunnel(tunnel) => Some(&tunnel.device),
        HostItem::TunnelPeer(peer) => Some(&peer.device),
        HostItem::Route(route) => Some(&route.device),
    }
}

#[async_trait]
impl Host for FakeHost {
    async fn observe(&mut self) -> Result<HostState, HostError> {
        let mut inner = self.lock();
        inner.calls.observe += 1;
        match &inner.unobservable {
            Some(reason) => Err(HostError::new("observe the host", reason)),
            None => Ok(inner.state.clone()),
        }
    }

    async fn apply(&mut self, changes: &[Change]) -> Vec<Result<(), HostError>> {
        let takes = self.lock().takes;
        if !takes.is_zero() {
            tokio::time::sleep(takes).await;
        }
        let mut inner = self.lock();
        inner.calls.apply += 1;
        inner.calls.changes += changes.len();
        changes
            .iter()
            .map(|change| {
                let key = change.item().key();
                if let Some(reason) = inner.refused.get(&key).cloned() {
                    inner.calls.refused += 1;
                    inner.log.push(format!("{change}: {reason}"));
                    return Err(HostError::new(change.to_string(), reason));
                }
                match change {
                    Change::Put(_) if inner.undone.contains(&key) => {
                        inner.touched = true;
                        self.disturbed.notify_one();
                    }
                    Change::Put(item) => inner.state.insert(item.clone()),
                    Change::Remove(_) => remove(&mut inner.state, &key),
                }
                inner.log.push(change.to_string());
                Ok(())
            })
            .collect()
    }

    async fn facts(&mut self, _selectors: &[Selector]) -> Result<HostFacts, HostError> {
        Ok(self.lock().facts.clone())
    }

    async fn news(&mut self) -> News {
        loop {
            {
                let mut inner = self.lock();
                if std::mem::take(&mut inner.touched) {
                    return News::Disturbed;
                }
                if !inner.heard.is_empty() {
                    return News::Heard(std::mem::take(&mut inner.heard));
                }
            }
            self.disturbed.notified().await;
        }
    }

    async fn probe(&mut self, probes: &[Probe]) -> Result<(), HostError> {
        let mut inner = self.lock();
        for probe in probes {
            let heard = match inner.links.get(&probe.node).copied() {
                Some(mtu) if probe.size + 28 > mtu => {
                    Heard::TooBig { node: probe.node, mtu: Some(mtu), by: None }
                }
                _ => Heard::Answer { number: probe.number, from: probe.subnet.network() },
            };
            inner.heard.push(heard);
        }
        self.disturbed.notify_one();
        Ok(())
    }

    async fn sent(&mut self, subnets: &[Ipv4Net]) -> Vec<u64> {
        let mut inner = self.lock();
        inner.packets += 1000;
        vec![inner.packets; subnets.len()]
    }
}

impl fmt::Display for FakeHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lock().state.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::host_state::{Address, Link, LinkKind, Route};

    fn items() -> [HostItem; 4] {
        [
            HostItem::Link(Link { name: "flannel0".into(), kind: LinkKind::Tun, mtu: 1472 }),
            HostItem::Address(Address { device: "flannel0".into(), net: "10.5.3.0/32".parse().unwrap() }),
            route("10.5.0.0/16", "flannel0"),
            route("10.5.9.0/24", "eth0"),
        ]
    }

    fn route(destination: &str, device: &str) -> HostItem {
        HostItem::Route(Route {
            destination: destination.parse().unwrap(),
            via: None,
            device: device.into(),
            onlink: false,
            source: None,
            mtu: None,
        })
    }

    #[tokio::test]
    async fn what_is_put_is_observed_and_printed_as_ip_would_take_it() {
        let mut host = FakeHost::new();
        let puts: Vec<Change> = items().into_iter().map(Change::Put).collect();
        assert_eq!(host.apply(&puts).await, vec![Ok(()); 4]);
        assert_eq!(host.observe().await, Ok(items().into_iter().collect()));
        assert_eq!(
            host.to_string(),
            "link flannel0 type tun mtu 1472\naddr 10.5.3.0/32 dev flannel0\n\
             route 10.5.0.0/16 dev flannel0\nroute 10.5.9.0/24 dev eth0\n"
        );
        assert_eq!(host.calls(), Calls { observe: 1, apply: 1, changes: 4, refused: 0 });
    }

    #[tokio::test]
    async fn a_refused_item_stays_as_it_was_and_the_others_go_on() {
        let [link, address, ..] = items();
        let mut host = FakeHost::new();
        host.refuse(link.key(), "no /dev/net/tun");
        let results = host.apply(&[Change::Put(link.clone()), Change::Put(address.clone())]).await;
        assert_eq!(
            results[0].as_ref().unwrap_err().to_string(),
            "put link flannel0 type tun mtu 1472: no /dev/net/tun"
        );
        assert_eq!(results[1], Ok(()));
        assert!(!host.state().contains(&link) && host.state().contains(&address));
        host.allow(&link.key());
        assert_eq!(host.apply(&[Change::Put(link)]).await, vec![Ok(())]);
        assert_eq!(host.log().len(), 3);
    }

    #[tokio::test]
    async fn a_lost_device_takes_along_what_hangs_on_it_and_wakes_the_agent() {
        let mut host = FakeHost::with(items().into_iter().collect());
        host.clone().lose(&Key::Link("flannel0".into()));
        // The damage was done before anybody waited, and is still told.
        assert_eq!(host.news().await, News::Disturbed);
        assert_eq!(host.to_string(), "route 10.5.9.0/24 dev eth0\n");
    }
}
