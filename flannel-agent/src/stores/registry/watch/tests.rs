//! The watch against a store that says what a script says, in paused time.

use super::*;
use crate::stores::registry::{Deleted, Written};
use async_trait::async_trait;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

const FOLDER: &str = "/n/subnets/";

/// What the next list says, and the one after it; the last one is repeated.
type Lists = VecDeque<Result<(u64, &'static [&'static str]), &'static str>>;
/// What each watch says before it falls silent, or ends when its last item is an error.
type Watches = VecDeque<Vec<Said>>;

#[derive(Clone, Copy)]
enum Said {
    Put(u64, &'static str),
    Deleted(u64, &'static str),
    Compacted,
    Broken,
}

#[derive(Default)]
struct Script {
    lists: Mutex<Lists>,
    watches: Mutex<Watches>,
    listed: AtomicU32,
    asked: AtomicU32,
}

fn entry(key: &str, revision: u64) -> Entry {
    Entry {
        key: format!("{FOLDER}{key}"),
        value: br#"{"PublicIP":"192.0.2.1"}"#.to_vec(),
        revision,
        lifetime: Lifetime::Lease(7),
    }
}

#[async_trait]
impl Registry for Script {
    fn name(&self) -> &str {
        "a script"
    }

    async fn get(&self, _: &str) -> Result<Option<Entry>, RegistryError> {
        Ok(None)
    }

    async fn list(&self, _: &str) -> Result<Listing, RegistryError> {
        self.listed.fetch_add(1, Ordering::SeqCst);
        let mut lists = self.lists.lock().unwrap();
        let list = if lists.len() > 1 { lists.pop_front() } else { lists.front().copied() };
        let (revision, keys) =
            list.unwrap_or(Err("nothing")).map_err(|error| RegistryError::Unreachable(error.into()))?;
        Ok(Listing { entries: keys.iter().map(|key| entry(key, 1)).collect(), revision })
    }

    async fn create(
        &self,
        _: &str,
        _: String,
        _: Option<Duration>,
    ) -> Result<Option<Written>, RegistryError> {
        Ok(None)
    }

    async fn update(
        &self,
        _: &Entry,
        _: String,
        _: Option<Duration>,
    ) -> Result<Option<Written>, RegistryError> {
        Ok(None)
    }

    async fn delete(&self, _: &Entry) -> Result<Deleted, RegistryError> {
        Ok(Deleted::Changed)
    }

    async fn remaining(&self, _: Lifetime) -> Result<Option<Duration>, RegistryError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        Ok(Some(Duration::from_secs(60)))
    }

    fn reconnect(&self) {}

    async fn watch(
        &self,
        _: &str,
        _: u64,
    ) -> Result<BoxStream<'static, Result<Vec<Notice>, WatchEnd>>, RegistryError> {
        let mut watches = self.watches.lock().unwrap();
        let said = if watches.len() > 1 { watches.pop_front() } else { watches.front().cloned() }
            .unwrap_or_default();
        let ends = matches!(said.last(), Some(Said::Compacted | Said::Broken));
        let items: Vec<_> = said
            .into_iter()
            .map(|said| match said {
                Said::Put(revision, key) => Ok(vec![Notice::Put(entry(key, revision))]),
                Said::Deleted(revision, key) => {
                    Ok(vec![Notice::Deleted { key: format!("{FOLDER}{key}"), revision }])
                }
                Said::Compacted => Err(WatchEnd::Compacted),
                Said::Broken => Err(WatchEnd::Broken("broken".into())),
            })
            .collect();
        let items = stream::iter(items);
        Ok(if ends { items.boxed() } else { items.chain(stream::pending()).boxed() })
    }
}

fn watch(lists: &[Result<(u64, &'static [&'static str]), &'static str>], watches: &[&[Said]]) -> Watch {
    let script = Arc::new(Script {
        lists: Mutex::new(lists.iter().copied().collect()),
        watches: Mutex::new(watches.iter().map(|said| said.to_vec()).collect()),
        ..Script::default()
    });
    let watcher = Watcher::new(script.clone(), FOLDER.into(), HeldEntry::default(), Duration::from_secs(300));
    Watch { script, events: watcher.stream() }
}

struct Watch {
    script: Arc<Script>,
    events: BoxStream<'static, LeaseEvent>,
}

impl Watch {
    async fn next(&mut self) -> String {
        match self.events.next().await.unwrap() {
            LeaseEvent::Snapshot(leases, unreadable) => {
                let keys: Vec<_> = leases.iter().map(|lease| lease.subnets.to_string()).collect();
                format!("snapshot [{}] {} unreadable", keys.join(" "), unreadable.len())
            }
            LeaseEvent::Added(lease) => format!("added {} at {}", lease.subnets, lease.revision),
            LeaseEvent::Removed(subnets) => format!("removed {subnets}"),
            LeaseEvent::Unreadable(entry) => format!("unreadable {}", entry.key),
            LeaseEvent::Interrupted(reason) => format!("interrupted: {reason}"),
        }
    }

    /// What is said within an hour, at most `count` times.
    async fn all(&mut self, count: usize) -> Vec<String> {
        let mut said = Vec::new();
        while said.len() < count {
            match tokio::time::timeout(Duration::from_secs(3600), self.next()).await {
                Ok(text) => said.push(text),
                Err(_) => break,
            }
        }
        said
    }
}

#[tokio::test(start_paused = true)]
async fn changes_the_list_already_showed_are_not_told_again() {
    let notices =
        [Said::Deleted(9, "10.5.1.0-24"), Said::Put(10, "10.5.1.0-24"), Said::Put(11, "10.5.2.0-24")];
    let mut watch = watch(&[Ok((10, &["10.5.1.0-24"]))], &[&notices]);
    assert_eq!(watch.all(2).await, ["snapshot [10.5.1.0-24] 0 unreadable", "added 10.5.2.0-24 at 11"]);
}

#[tokio::test(start_paused = true)]
async fn the_removal_of_a_key_that_is_no_subnet_brings_a_list() {
    let notices = [Said::Put(2, "foo"), Said::Deleted(3, "foo"), Said::Deleted(4, "10.5.1.0-24")];
    let mut watch = watch(&[Ok((1, &["foo"])), Ok((4, &[]))], &[&notices]);
    let started = Instant::now();
    assert_eq!(
        watch.all(4).await,
        [
            "snapshot [] 1 unreadable",
            "unreadable /n/subnets/foo",
            "removed 10.5.1.0-24",
            "snapshot [] 0 unreadable"
        ]
    );
    assert!(started.elapsed() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn an_outage_of_an_hour_is_one_interruption_and_few_questions() {
    let mut watch = watch(&[Err("away")], &[]);
    assert_eq!(watch.all(2).await, ["interrupted: away"]);
    let listed = watch.script.listed.load(Ordering::SeqCst);
    assert!((700..1500).contains(&listed), "{listed} lists in an hour");
}

#[tokio::test(start_paused = true)]
async fn a_compaction_is_no_interruption() {
    let lists = [Ok((1, &["10.5.1.0-24"][..])), Ok((9, &["10.5.2.0-24"][..]))];
    let mut watch = watch(&lists, &[&[Said::Compacted], &[]]);
    assert_eq!(
        watch.all(2).await,
        ["snapshot [10.5.1.0-24] 0 unreadable", "snapshot [10.5.2.0-24] 0 unreadable"]
    );
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_never_holds_is_not_opened_in_a_loop() {
    for end in [Said::Broken, Said::Compacted] {
        let mut watch = watch(&[Ok((1, &[]))], &[&[end]]);
        let started = Instant::now();
        while started.elapsed() < Duration::from_secs(600) {
            watch.next().await;
        }
        let listed = watch.script.listed.load(Ordering::SeqCst);
        assert!((100..260).contains(&listed), "{listed} lists in ten minutes");
    }
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_held_is_opened_again_at_once() {
    let mut watch = watch(&[Ok((1, &[]))], &[&[]]);
    watch.next().await;
    for _ in 0..5 {
        // Silence, then a compare.
        let started = Instant::now();
        assert_eq!(watch.next().await, "snapshot [] 0 unreadable");
        let waited = started.elapsed().as_secs();
        assert!((239..=361).contains(&waited), "{waited} s between compares");
    }
}

#[tokio::test(start_paused = true)]
async fn a_store_that_went_back_in_time_is_watched_from_there() {
    let lists = [Ok((100, &["10.5.1.0-24"][..])), Ok((5, &[][..])), Ok((5, &["10.5.2.0-24"][..]))];
    let mut watch = watch(&lists, &[&[], &[Said::Put(6, "10.5.3.0-24")]]);
    assert_eq!(
        watch.all(3).await,
        [
            "snapshot [10.5.1.0-24] 0 unreadable",
            "snapshot [10.5.2.0-24] 0 unreadable",
            "added 10.5.3.0-24 at 6"
        ]
    );
}

#[tokio::test(start_paused = true)]
async fn a_compare_that_fails_is_made_soon_again_and_the_watch_goes_on() {
    let lists = [Ok((1, &[][..])), Err("busy"), Ok((2, &["10.5.1.0-24"][..]))];
    let mut watch = watch(&lists, &[&[]]);
    watch.next().await;
    let started = Instant::now();
    assert_eq!(watch.next().await, "snapshot [10.5.1.0-24] 0 unreadable");
    assert!(started.elapsed() < Duration::from_secs(380));
}

#[tokio::test(start_paused = true)]
async fn the_list_our_lease_was_chosen_from_is_not_made_again() {
    let listing = Listing { entries: vec![entry("10.5.1.0-24", 9), entry("10.5.7.0-24", 12)], revision: 10 };
    let listed: Listed = Arc::new(Mutex::new(Some((std::time::Instant::now(), listing))));
    // Our own entry was written after the list, and what was before it at its key is no news either: a lease of
    // somebody else's that ended is not the end of ours.
    let said = vec![
        Said::Put(10, "10.5.1.0-24"),
        Said::Deleted(11, "10.5.7.0-24"),
        Said::Put(12, "10.5.7.0-24"),
        Said::Put(13, "10.5.2.0-24"),
        Said::Put(14, "10.5.7.0-24"),
    ];
    let script = Arc::new(Script { watches: Mutex::new([said].into()), ..Script::default() });
    let watcher = Watcher::new(script.clone(), FOLDER.into(), HeldEntry::default(), Duration::from_secs(300));
    let events = watcher.beginning_with(listed.clone()).stream();
    let mut watch = Watch { script, events };
    assert_eq!(
        [watch.next().await, watch.next().await, watch.next().await],
        [
            "snapshot [10.5.1.0-24 10.5.7.0-24] 0 unreadable",
            "added 10.5.2.0-24 at 13",
            "added 10.5.7.0-24 at 14"
        ]
    );
    assert_eq!(watch.script.listed.load(Ordering::SeqCst), 0);
    assert!(listed.lock().unwrap().is_none(), "it serves once");
}

#[tokio::test(start_paused = true)]
async fn the_ends_of_other_nodes_leases_are_not_asked_for() {
    let mut watch = watch(&[Ok((1, &["10.5.1.0-24", "10.5.2.0-24"]))], &[&[Said::Put(2, "10.5.3.0-24")]]);
    assert_eq!(watch.all(2).await.len(), 2);
    assert_eq!(watch.script.asked.load(Ordering::SeqCst), 0);
}
