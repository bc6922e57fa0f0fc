//! What changes, for any number of listeners at the price of one store watch.
//!
//! All that is told comes from that watch, also what was written through this server: a list that the watch made a
//! moment before the write would otherwise say that the new lease is gone, and the next change that it is there again.
//! Who wrote is answered when the watch has told it, so that the next question finds it ([`LeaseFeed::has_told`]).
//!
//! Changes are numbered; a listener names the last one it knows and gets what came after, or everything when that is no
//! longer known. Numbers begin anew, far from any other, with every start: a listener that comes from another server or
//! from a former life of this one names a number nobody here gave out, and gets everything.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use rand::Rng as _;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::domain::lease::{Lease, LeaseEvent, Subnets, Unreadable};
use crate::domain::network_name::NetworkName;
use crate::stores::{LeaseStore, NetworkEvent, NetworkStores, StoreError};

/// Changes a listener can be behind before it gets everything.
const HISTORY: usize = 1024;

/// How long a listener who asks for everything waits for the store's first word.
const FIRST_WORD: Duration = Duration::from_secs(5);

/// How long a writer waits for the watch to tell what was written. It takes a millisecond, unless the watch is broken;
/// then who asks next is told once it is back.
const TOLD_LIMIT: Duration = Duration::from_secs(1);

/// One thing that happened.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Change<K, V> {
    Added(K, V),
    Removed(K),
}

/// What a listener is told.
#[derive(Debug, PartialEq)]
pub(super) enum Told<K, V> {
    Everything(Vec<(K, V)>),
    Change(Change<K, V>),
}

/// The state of something that is watched, with its latest changes.
struct Log<K, V> {
    present: BTreeMap<K, V>,
    unreadable: BTreeMap<String, Unreadable>,
    /// Number of the latest change.
    head: u64,
    /// The first changes that are still known, and their numbers.
    recent: VecDeque<(u64, Change<K, V>)>,
    /// Listeners that know less than this get everything.
    oldest: u64,
    /// Why the state can't be told now.
    away: Option<String>,
}

impl<K: Ord + Clone, V: Clone + PartialEq> Log<K, V> {
    fn new() -> Self {
        // Apart from every other start's; ends far below what a signed number holds.
        let base = u64::from(crate::chance::rng().random_range(1..=0x3fff_ffff_u32)) << 32;
        Self {
            present: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            head: base,
            recent: VecDeque::new(),
            oldest: base,
            away: Some("the store has not answered yet".to_owned()),
        }
    }

    fn add(&mut self, key: K, value: V) {
        if self.present.get(&key) != Some(&value) {
            self.present.insert(key.clone(), value.clone());
            self.note(Change::Added(key, value));
        }
    }

    fn remove(&mut self, key: K) {
        if self.present.remove(&key).is_some() {
            self.note(Change::Removed(key));
        }
    }

    /// Makes the state what `all` says, one change at a time.
    fn replace(&mut self, all: BTreeMap<K, V>) {
        let gone: Vec<K> = self.present.keys().filter(|key| !all.contains_key(key)).cloned().collect();
        gone.into_iter().for_each(|key| self.remove(key));
        all.into_iter().for_each(|(key, value)| self.add(key, value));
    }

    fn note(&mut self, change: Change<K, V>) {
        self.head += 1;
        self.recent.push_back((self.head, change));
        if self.recent.len() > HISTORY
            && let Some((number, _)) = self.recent.pop_front()
        {
            self.oldest = number;
        }
    }

    /// Everybody gets everything: something changed that a change can't say.
    fn forget(&mut self) {
        self.head += 1;
        self.recent.clear();
        self.oldest = self.head;
    }

    /// What comes after `cursor`; `None` when nothing does yet.
    fn after(&self, cursor: u64, wanted: impl Fn(&K) -> bool) -> Option<(Told<K, V>, u64)> {
        if cursor < self.oldest || cursor > self.head {
            return Some(self.everything(wanted));
        }
        let known = usize::try_from(cursor - self.oldest).unwrap_or(usize::MAX);
        let next = self.recent.iter().skip(known).find(|(_, change)| match change {
            Change::Added(key, _) | Change::Removed(key) => wanted(key),
        });
        next.map(|(number, change)| (Told::Change(change.clone()), *number))
    }

    fn everything(&self, wanted: impl Fn(&K) -> bool) -> (Told<K, V>, u64) {
        let all = self.present.iter().filter(|(key, _)| wanted(key));
        let all = all.map(|(key, value)| (key.clone(), value.clone())).collect();
        (Told::Everything(all), self.head)
    }
}

/// A [`Log`] and those who wait for it.
struct Feed<K, V> {
    log: Mutex<Log<K, V>>,
    /// Changes with every change of the log.
    news: watch::Sender<()>,
}

impl<K: Ord + Clone, V: Clone + PartialEq> Feed<K, V> {
    fn new() -> Self {
        Self { log: Mutex::new(Log::new()), news: watch::channel(()).0 }
    }

    /// Changes are made whole: a panic elsewhere leaves the log usable.
    fn lock(&self) -> MutexGuard<'_, Log<K, V>> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Log<K, V>)) {
        change(&mut self.lock());
        self.news.send_replace(());
    }

    /// Everything there is, once the store has said it.
    async fn everything(&self, wanted: impl Fn(&K) -> bool) -> Result<(Told<K, V>, u64), StoreError> {
        let mut news = self.news.subscribe();
        let known = async {
            loop {
                news.borrow_and_update();
                let answer = {
                    let log = self.lock();
                    log.away.is_none().then(|| log.everything(&wanted))
                };
                if let Some(answer) = answer {
                    return answer;
                }
                if news.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        match tokio::time::timeout(FIRST_WORD, known).await {
            Ok(answer) => Ok(answer),
            Err(_) => {
                let reason = self.lock().away.clone().unwrap_or_default();
                Err(StoreError::Unreachable { store: "the server's store".into(), reason })
            }
        }
    }

    /// Waits, but not for long, until the log is so.
    async fn until(&self, is_so: impl Fn(&Log<K, V>) -> bool) {
        let mut news = self.news.subscribe();
        let told = async {
            while !is_so(&self.lock()) {
                if news.changed().await.is_err() {
                    return;
                }
            }
        };
        // The write is done either way.
        let _ = tokio::time::timeout(TOLD_LIMIT, told).await;
    }

    /// Waits for what comes after `cursor`.
    async fn after(&self, mut cursor: u64, wanted: impl Fn(&K) -> bool) -> (Told<K, V>, u64) {
        let mut news = self.news.subscribe();
        loop {
            news.borrow_and_update();
            let answer = {
                let log = self.lock();
                // Who waits is not told of what may be old.
                let answer = if log.away.is_some() { None } else { log.after(cursor, &wanted) };
                if answer.is_none() && log.away.is_none() {
                    // What others wait for does not make this one fall behind.
                    cursor = log.head;
                }
                answer
            };
            if let Some(answer) = answer {
                return answer;
            }
            if news.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

/// The leases of one network.
pub(super) struct LeaseFeed {
    feed: Arc<Feed<Subnets, Lease>>,
    stop: CancellationToken,
}

impl LeaseFeed {
    /// Watches the store until it is dropped.
    pub(super) fn follow(store: &dyn LeaseStore) -> Self {
        let (feed, stop) = (Arc::new(Feed::new()), CancellationToken::new());
        let mut events = store.watch();
        let (following, stopped) = (feed.clone(), stop.clone());
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = stopped.cancelled() => return,
                    event = events.next() => match event {
                        Some(event) => following.change(|log| fold(log, event)),
                        None => return,
                    },
                }
            }
        });
        Self { feed, stop }
    }

    /// Waits until the watch has told what a write through this server made of a lease.
    pub(super) async fn has_told(&self, lease: &Lease) {
        let known = |known: &Lease| known.revision >= lease.revision;
        self.feed.until(|log| log.present.get(&lease.subnets).is_some_and(known)).await;
    }

    /// The same of one that was taken away.
    pub(super) async fn has_told_the_end_of(&self, subnets: Subnets) {
        self.feed.until(|log| log.away.is_none() && !log.present.contains_key(&subnets)).await;
    }

    /// Everything, or what comes after the change numbered `after`; of one lease only, where one is named.
    ///
    /// # Errors
    /// The store can't be reached.
    pub(super) async fn tell(
        &self,
        after: Option<u64>,
        only: Option<Subnets>,
    ) -> Result<(Told<Subnets, Lease>, u64), StoreError> {
        let wanted = |subnets: &Subnets| only.is_none_or(|only| only == *subnets);
        match after {
            None => self.feed.everything(wanted).await,
            Some(cursor) => Ok(self.feed.after(cursor, wanted).await),
        }
    }

    pub(super) fn unreadable(&self) -> Vec<Unreadable> {
        self.feed.lock().unreadable.values().cloned().collect()
    }
}

impl Drop for LeaseFeed {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn add_lease(log: &mut Log<Subnets, Lease>, lease: Lease) {
    let key = log.unreadable.keys().find(|key| key.ends_with(&lease.subnets.to_string())).cloned();
    let was_unreadable = key.is_some_and(|key| log.unreadable.remove(&key).is_some());
    log.add(lease.subnets, lease);
    if was_unreadable {
        log.forget();
    }
}

fn fold(log: &mut Log<Subnets, Lease>, event: LeaseEvent) {
    match event {
        LeaseEvent::Snapshot(leases, unreadable) => {
            log.away = None;
            let known = |lease: &Lease| {
                let known = log.present.get(&lease.subnets)?;
                // Ends of others' leases are upper bounds that move with every list: no change.
                (known.revision == lease.revision && known.attrs == lease.attrs).then(|| known.clone())
            };
            let all =
                leases.into_iter().map(|lease| (lease.subnets, known(&lease).unwrap_or(lease))).collect();
            log.replace(all);
            let unreadable: BTreeMap<_, _> =
                unreadable.into_iter().map(|entry| (entry.key.clone(), entry)).collect();
            if unreadable != log.unreadable {
                log.unreadable = unreadable;
                log.forget();
            }
        }
        LeaseEvent::Added(lease) => add_lease(log, lease),
        LeaseEvent::Removed(subnets) => {
            let text = subnets.to_string();
            let before = log.unreadable.len();
            log.unreadable.retain(|key, _| !key.ends_with(&text));
            log.remove(subnets);
            if log.unreadable.len() != before {
                log.forget();
            }
        }
        LeaseEvent::Unreadable(entry) => {
            // A list would not have the lease either that it was before.
            if let Some(Ok(subnets)) = entry.key.rsplit('/').next().map(str::parse::<Subnets>) {
                log.present.remove(&subnets);
            }
            log.unreadable.insert(entry.key.clone(), entry);
            log.forget();
        }
        LeaseEvent::Interrupted(reason) => log.away = Some(reason),
    }
}

/// The named networks, each with the count of times its configuration was written.
pub(super) struct NetworkFeed {
    feed: Arc<Feed<NetworkName, u64>>,
}

impl NetworkFeed {
    pub(super) fn follow(networks: &dyn NetworkStores, stop: CancellationToken) -> Self {
        let feed = Arc::new(Feed::new());
        let (following, mut events) = (feed.clone(), networks.watch_networks());
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    event = events.next() => match event {
                        Some(event) => following.change(|log| fold_networks(log, event)),
                        None => return,
                    },
                }
            }
        });
        Self { feed }
    }

    pub(super) async fn tell(&self, after: Option<u64>) -> Result<(Told<NetworkName, u64>, u64), StoreError> {
        match after {
            None => self.feed.everything(|_| true).await,
            Some(cursor) => Ok(self.feed.after(cursor, |_| true).await),
        }
    }

    /// Which networks there are not, any more.
    pub(super) fn without(&self, name: &NetworkName) -> bool {
        let log = self.feed.lock();
        log.away.is_none() && !log.present.contains_key(name)
    }
}

fn fold_networks(log: &mut Log<NetworkName, u64>, event: NetworkEvent) {
    let times = |log: &Log<NetworkName, u64>, name: &NetworkName| log.present.get(name).copied().unwrap_or(0);
    match event {
        NetworkEvent::Snapshot(names) => {
            log.away = None;
            let names: BTreeSet<_> = names.into_iter().collect();
            let all = names.into_iter().map(|name| (name.clone(), times(log, &name))).collect();
            log.replace(all);
        }
        NetworkEvent::Written(name) => {
            let next = times(log, &name) + 1;
            log.add(name, next);
        }
        NetworkEvent::Removed(name) => log.remove(name),
        NetworkEvent::Interrupted(reason) => log.away = Some(reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Numbers = Log<u8, u8>;

    fn changes(log: &Numbers, mut cursor: u64) -> Vec<Told<u8, u8>> {
        let mut told = Vec::new();
        while let Some((next, number)) = log.after(cursor, |_| true) {
            told.push(next);
            cursor = number;
        }
        told
    }

    #[test]
    fn a_listener_gets_each_change_once_and_in_order() {
        let mut log = Numbers::new();
        let start = log.head;
        log.add(1, 10);
        log.add(1, 10);
        log.add(2, 20);
        log.remove(1);
        log.remove(9);
        let told = [Change::Added(1, 10), Change::Added(2, 20), Change::Removed(1)].map(Told::Change);
        assert_eq!(changes(&log, start), told);
        assert_eq!(changes(&log, start + 2), [Told::Change(Change::Removed(1))]);
        assert_eq!(changes(&log, log.head), []);
    }

    #[test]
    fn a_number_nobody_here_gave_out_gets_everything() {
        let mut log = Numbers::new();
        log.add(1, 10);
        for cursor in [0, 8, log.head + 1, u64::MAX] {
            let (told, number) = log.after(cursor, |_| true).unwrap();
            assert_eq!((told, number), (Told::Everything(vec![(1, 10)]), log.head));
        }
    }

    #[test]
    fn a_listener_too_far_behind_gets_everything() {
        let mut log = Numbers::new();
        let start = log.head;
        for turn in 0..=HISTORY {
            log.add(1, u8::try_from(turn % 251).unwrap());
        }
        assert!(matches!(log.after(start, |_| true), Some((Told::Everything(_), _))));
        assert!(matches!(log.after(start + 1, |_| true), Some((Told::Change(_), _))));
    }

    #[test]
    fn a_list_that_says_the_same_is_no_change() {
        let mut log = Numbers::new();
        log.add(1, 10);
        log.add(2, 20);
        let head = log.head;
        log.replace([(1, 10), (2, 20)].into());
        assert_eq!(log.head, head);
        log.replace([(2, 21), (3, 30)].into());
        let told = [Change::Removed(1), Change::Added(2, 21), Change::Added(3, 30)].map(Told::Change);
        assert_eq!(changes(&log, head), told);
    }

    #[test]
    fn who_listens_to_one_hears_of_no_other() {
        let mut log = Numbers::new();
        let start = log.head;
        log.add(1, 10);
        log.add(2, 20);
        let (told, number) = log.after(start, |key| *key == 2).unwrap();
        assert_eq!((told, number), (Told::Change(Change::Added(2, 20)), start + 2));
    }
}
