//! Two registries that shall hold the same networks: etcd's keyspaces, while a cluster moves from one to the other.
//!
//! [`Mirror::plan`] and [`Mirror::copy`] bring what the old one has to the new one, once. [`Mirror::follow`] then keeps
//! both alike, in both directions, for as long as there are nodes in either: each sees all others and takes no subnet of
//! theirs. Values go over byte for byte, and ends as they are.

mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::stream::{self, BoxStream, StreamExt, TryStreamExt};
use tokio::time::sleep;

use self::rules::{Agreed, Seen, Side, Step, decide};
use super::transfer::{Content, is_ours};
use super::{Deleted, Entry, Notice, Registry, RegistryError, WatchEnd, join};
use crate::domain::lease::Subnets;
use crate::stores::back_off::{BackOff, jittered};
use crate::stores::{LEASE_TTL, StoreError};

/// How many ends are asked for at once.
const AT_ONCE: usize = 16;
/// How often a change is tried again that somebody was faster with.
const TRIES: u32 = 10;
/// Watches are never trusted alone.
const RESYNC: Duration = Duration::from_secs(60);

/// Two registries with one prefix.
pub struct Mirror {
    old: Arc<dyn Registry>,
    new: Arc<dyn Registry>,
    folder: String,
}

/// An entry of the old registry, and what copying it means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Planned {
    pub content: Content,
    pub fate: Fate,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is not there yet.
    Copy,
    /// It is, and would end before its original.
    Prolong,
    /// Nothing is to be done.
    There,
    /// Something else is there, which says why it can't be.
    Clash(String),
}

/// How following ended.
#[derive(Debug)]
pub enum FollowEnd {
    /// A configuration was deleted from one of the two: whoever takes a keyspace away does not mean the other.
    ConfigDeleted(String),
}

/// What was said of both together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Begins,
    Alike,
    /// A trouble is waited for.
    Away,
}

type Notices = BoxStream<'static, Result<Vec<Notice>, WatchEnd>>;

impl Mirror {
    pub(in crate::stores) fn new(old: Arc<dyn Registry>, new: Arc<dyn Registry>, prefix: &str) -> Self {
        Self { old, new, folder: join(prefix, "") }
    }

    fn at(&self, side: Side) -> &Arc<dyn Registry> {
        match side {
            Side::Old => &self.old,
            Side::New => &self.new,
        }
    }

    fn failed(&self, side: Side, error: RegistryError) -> StoreError {
        let store = format!("{} ({})", self.at(side).name(), side_name(side));
        match error {
            RegistryError::Unreachable(reason) => StoreError::Unreachable { store, reason },
            RegistryError::Refused(reason) => StoreError::Refused { store, reason },
        }
    }

    /// Everything of ours at one side, by its key below the prefix, and the revision it is as of.
    async fn list(&self, side: Side) -> Result<(BTreeMap<String, Entry>, u64), StoreError> {
        let listing = self.at(side).list(&self.folder).await.map_err(|error| self.failed(side, error))?;
        let ours = listing.entries.into_iter().filter_map(|entry| {
            let key = entry.key.strip_prefix(&self.folder).filter(|key| is_ours(key))?.to_owned();
            Some((key, entry))
        });
        Ok((ours.collect(), listing.revision))
    }

    /// An entry with its end; `None` when it is not text, which no lease and no configuration is.
    async fn seen(&self, side: Side, entry: &Entry) -> Result<Option<Seen>, StoreError> {
        let left = self.at(side).remaining(entry.lifetime).await.map_err(|error| self.failed(side, error))?;
        let Ok(value) = String::from_utf8(entry.value.clone()) else { return Ok(None) };
        let ends = left.map(|left| Instant::now() + left);
        Ok(Some(Seen { value, revision: entry.revision, ends }))
    }

    async fn all_seen(
        &self,
        side: Side,
        entries: &BTreeMap<String, Entry>,
    ) -> Result<BTreeMap<String, Seen>, StoreError> {
        let asked = entries.iter().map(|(key, entry)| async move {
            Ok(self.seen(side, entry).await?.map(|seen| (key.clone(), seen)))
        });
        stream::iter(asked)
            .buffer_unordered(AT_ONCE)
            .try_filter_map(|found| async { Ok(found) })
            .try_collect()
            .await
    }

    /// What is in the old registry, and what is to be done with it: leases first, configurations last, so that a node
    /// which waits for a network in the new one finds its leases too.
    ///
    /// # Errors
    /// One of them can't be reached.
    pub async fn plan(&self) -> Result<Vec<Planned>, StoreError> {
        let (old, new) = (self.list(Side::Old).await?.0, self.list(Side::New).await?.0);
        let (old, new) = (self.all_seen(Side::Old, &old).await?, self.all_seen(Side::New, &new).await?);
        let mut planned: Vec<_> = old
            .iter()
            .map(|(key, seen)| Planned {
                content: Content { key: key.clone(), value: seen.value.clone(), left: left(seen) },
                fate: fate(key, &old, &new),
            })
            .collect();
        planned.sort_by_key(|planned| is_config(&planned.content.key));
        Ok(planned)
    }

    /// Carries out what was planned, unless somebody was faster.
    ///
    /// # Errors
    /// The new registry can't be reached.
    pub async fn copy(&self, planned: &Planned) -> Result<Fate, StoreError> {
        let Content { key, value, left } = &planned.content;
        let failed = |error| self.failed(Side::New, error);
        let whole = format!("{}{key}", self.folder);
        for _ in 0..TRIES {
            let (fate, entry) = match self.new.get(&whole).await.map_err(failed)? {
                None => (Fate::Copy, None),
                Some(entry) => {
                    let Some(there) = self.seen(Side::New, &entry).await? else {
                        return Ok(Fate::Clash("what is there is not text".into()));
                    };
                    let ends = left.map(|left| Instant::now() + left);
                    let original = Seen { value: value.clone(), revision: 0, ends };
                    (fate_of_same_key(&original, &there), Some(entry))
                }
            };
            let written = match (&fate, &entry) {
                (Fate::Copy, None) => self.new.create(&whole, value.clone(), *left).await,
                (Fate::Prolong, Some(entry)) => {
                    self.new.update(entry, String::from_utf8_lossy(&entry.value).into_owned(), *left).await
                }
                _ => return Ok(fate),
            };
            if written.map_err(failed)?.is_some() {
                return Ok(fate);
            }
        }
        Err(self.failed(Side::New, RegistryError::Unreachable(format!("{key} changes all the time"))))
    }

    /// Keeps both alike until a configuration is deleted. `say` hears when they are for the first time, of every change that
    /// is passed on, and of troubles, which are waited for.
    pub async fn follow(&self, mut say: impl FnMut(String)) -> FollowEnd {
        let mut agreed = BTreeMap::new();
        let (mut back_off, mut state) = (BackOff::default(), State::Begins);
        loop {
            match self.follow_for_a_while(&mut agreed, &mut say, &mut state).await {
                Ok(Some(end)) => return end,
                Ok(None) => back_off = BackOff::default(),
                Err(reason) => {
                    if std::mem::replace(&mut state, State::Away) != State::Away {
                        say(format!("waiting: {reason}"));
                    }
                    sleep(back_off.next()).await;
                }
            }
        }
    }

    /// Compares everything, then follows both watches until a compare is due again.
    async fn follow_for_a_while(
        &self,
        agreed: &mut BTreeMap<String, Agreed>,
        say: &mut impl FnMut(String),
        state: &mut State,
    ) -> Result<Option<FollowEnd>, String> {
        let text = |error: StoreError| error.to_string();
        let (old, old_revision) = self.list(Side::Old).await.map_err(text)?;
        let (new, new_revision) = self.list(Side::New).await.map_err(text)?;
        let keys: BTreeSet<String> = agreed.keys().chain(old.keys()).chain(new.keys()).cloned().collect();
        if let Some(gone) = keys.iter().find(|key| {
            is_config(key) && agreed.contains_key(*key) && !(old.contains_key(*key) && new.contains_key(*key))
        }) {
            return Ok(Some(FollowEnd::ConfigDeleted(gone.clone())));
        }
        let mut watches = [
            self.watch(Side::Old, old_revision).await.map_err(text)?,
            self.watch(Side::New, new_revision).await.map_err(text)?,
        ];
        let [old_watch, new_watch] = &mut watches;
        for key in keys {
            let revisions = old.get(&key).zip(new.get(&key)).map(|(old, new)| (old.revision, new.revision));
            let known = agreed.get(&key).map(|agreed| (agreed.old.revision, agreed.new.revision));
            if known.is_some() && known == revisions {
                continue;
            }
            if let Some(end) = self.settle(&key, agreed, say).await.map_err(text)? {
                return Ok(Some(end));
            }
        }
        match std::mem::replace(state, State::Alike) {
            State::Begins => say("both keyspaces are alike, and kept so".into()),
            State::Away => say("both keyspaces answer again, and are alike".into()),
            State::Alike => {}
        }
        let compare = sleep(jittered(RESYNC));
        tokio::pin!(compare);
        loop {
            let said = tokio::select! {
                said = old_watch.next() => said,
                said = new_watch.next() => said,
                () = &mut compare => return Ok(None),
            };
            let notices = match said {
                Some(Ok(notices)) => notices,
                Some(Err(WatchEnd::Compacted)) => return Ok(None),
                Some(Err(WatchEnd::Broken(reason))) => return Err(reason),
                None => return Err("a watch ended".into()),
            };
            for notice in notices {
                let (Notice::Put(Entry { key, .. }) | Notice::Deleted { key, .. }) = &notice;
                let Some(key) = key.strip_prefix(&self.folder).filter(|key| is_ours(key)) else { continue };
                if is_config(key) && matches!(notice, Notice::Deleted { .. }) {
                    return Ok(Some(FollowEnd::ConfigDeleted(key.to_owned())));
                }
                if let Some(end) = self.settle(key, agreed, say).await.map_err(text)? {
                    return Ok(Some(end));
                }
            }
        }
    }

    async fn watch(&self, side: Side, revision: u64) -> Result<Notices, StoreError> {
        self.at(side).watch(&self.folder, revision).await.map_err(|error| self.failed(side, error))
    }

    /// Makes both sides say the same about one key.
    async fn settle(
        &self,
        key: &str,
        agreed: &mut BTreeMap<String, Agreed>,
        say: &mut impl FnMut(String),
    ) -> Result<Option<FollowEnd>, StoreError> {
        for _ in 0..TRIES {
            let (old, new) = (self.look(Side::Old, key).await?, self.look(Side::New, key).await?);
            let seen = |found: &Option<(Entry, Seen)>| found.as_ref().map(|(_, seen)| seen.clone());
            let (old_seen, new_seen) = (seen(&old), seen(&new));
            let mut step =
                decide(agreed.get(key).copied(), old_seen.as_ref(), new_seen.as_ref(), Instant::now());
            if step == Step::Clash {
                if is_config(key) {
                    say(format!("{key} differs and is left as it is in both keyspaces; make them alike"));
                    return Ok(None);
                }
                say(format!(
                    "{key} was taken in both keyspaces at once: the node in the new one gets another"
                ));
                step = Step::Write(Side::New);
            }
            let done = match step {
                Step::Nothing | Step::Clash => {
                    match old_seen.zip(new_seen) {
                        Some((old, new)) => {
                            agreed.insert(key.to_owned(), Agreed { old: old.point(), new: new.point() });
                        }
                        None => drop(agreed.remove(key)),
                    }
                    return Ok(None);
                }
                Step::Write(Side::New) => self.write(Side::New, key, old, new).await?,
                Step::Write(Side::Old) => self.write(Side::Old, key, new, old).await?,
                Step::Delete(side) => {
                    let (found, gone_from) = match side {
                        Side::Old => (old, Side::New),
                        Side::New => (new, Side::Old),
                    };
                    let Some((entry, _)) = found else { continue };
                    // With the keyspace, maybe.
                    let config = config_of(key);
                    if agreed.contains_key(&config) && self.look(gone_from, &config).await?.is_none() {
                        return Ok(Some(FollowEnd::ConfigDeleted(config)));
                    }
                    let deleted = self.at(side).delete(&entry).await;
                    match deleted.map_err(|error| self.failed(side, error))? {
                        Deleted::Yes => Some((format!("deleted from {}: {key}", side_name(side)), None)),
                        Deleted::Changed => None,
                    }
                }
            };
            if let Some((text, points)) = done {
                match points {
                    Some(points) => drop(agreed.insert(key.to_owned(), points)),
                    None => drop(agreed.remove(key)),
                }
                say(text);
                return Ok(None);
            }
        }
        Err(self.failed(Side::New, RegistryError::Unreachable(format!("{key} changes all the time"))))
    }

    async fn look(&self, side: Side, key: &str) -> Result<Option<(Entry, Seen)>, StoreError> {
        let whole = format!("{}{key}", self.folder);
        let entry = self.at(side).get(&whole).await.map_err(|error| self.failed(side, error))?;
        let Some(entry) = entry else { return Ok(None) };
        Ok(self.seen(side, &entry).await?.map(|seen| (entry, seen)))
    }

    /// Writes at `side` what `from` says, over what is `there`: what can be said of it, and where both are then. `None`
    /// when somebody was faster.
    async fn write(
        &self,
        side: Side,
        key: &str,
        from: Option<(Entry, Seen)>,
        there: Option<(Entry, Seen)>,
    ) -> Result<Option<(String, Option<Agreed>)>, StoreError> {
        let Some((_, from)) = from else { return Ok(None) };
        let (value, left) = (from.value.clone(), left(&from));
        let written = match &there {
            Some((entry, _)) => self.at(side).update(entry, value, left).await,
            None => self.at(side).create(&format!("{}{key}", self.folder), value, left).await,
        };
        let Some(written) = written.map_err(|error| self.failed(side, error))? else { return Ok(None) };
        let copy = Seen { revision: written.revision, ..from.clone() }.point();
        let points = match side {
            Side::New => Agreed { old: from.point(), new: copy },
            Side::Old => Agreed { old: copy, new: from.point() },
        };
        let content = Content { key: key.to_owned(), value: from.value, left };
        Ok(Some((format!("to {}: {content}", side_name(side)), Some(points))))
    }
}

fn side_name(side: Side) -> &'static str {
    match side {
        Side::Old => "v2",
        Side::New => "v3",
    }
}

fn is_config(key: &str) -> bool {
    key == "config" || key.ends_with("/config")
}

/// The key of the configuration that a lease's network has.
fn config_of(key: &str) -> String {
    match lease_key(key) {
        Some((network, _)) if !network.is_empty() => format!("{network}/config"),
        _ => "config".to_owned(),
    }
}

/// Rounded up, so that a copy does not end before its original.
fn left(seen: &Seen) -> Option<Duration> {
    let left = seen.ends?.saturating_duration_since(Instant::now());
    Some(Duration::from_secs(left.as_secs() + 1).min(LEASE_TTL))
}

/// What is to be done with an entry of the old registry, given everything in both.
fn fate(key: &str, old: &BTreeMap<String, Seen>, new: &BTreeMap<String, Seen>) -> Fate {
    let Some(seen) = old.get(key) else { return Fate::There };
    if let Some(there) = new.get(key) {
        return fate_of_same_key(seen, there);
    }
    let Some((network, subnets)) = lease_key(key) else { return Fate::Copy };
    let others = new.iter().filter_map(|(key, seen)| {
        let (of, subnets) = lease_key(key)?;
        (of == network).then_some((key, subnets, seen))
    });
    for (other, others, there) in others {
        if others.overlaps(&subnets) {
            return Fate::Clash(format!("it overlaps {other} there, which is {}", there.value));
        }
        // Two leases of one node in the old one are its own affair.
        if let (Some(node), Some(same)) = (rules::owner(&seen.value), rules::owner(&there.value))
            && node == same
            && !old.contains_key(other)
        {
            return Fate::Clash(format!("node {node} has {other} there: delete one of the two"));
        }
    }
    Fate::Copy
}

fn fate_of_same_key(original: &Seen, there: &Seen) -> Fate {
    if !rules::same(&original.value, &there.value) && !rules::same_owner(&original.value, &there.value) {
        return Fate::Clash(format!("there it is {}", there.value));
    }
    match original.outlives(there) {
        true => Fate::Prolong,
        // As its node has written it since, maybe.
        false => Fate::There,
    }
}

/// The network of a lease's key, and the lease's subnets.
fn lease_key(key: &str) -> Option<(&str, Subnets)> {
    let (network, last) = match key.strip_prefix("subnets/") {
        Some(last) => ("", last),
        None => key.split_once("/subnets/")?,
    };
    Some((network, last.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = r#"{"PublicIP":"192.0.2.1"}"#;
    const A_TODAY: &str = r#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#;
    const B: &str = r#"{"PublicIP":"192.0.2.2"}"#;

    #[test]
    fn what_the_new_keyspace_has_is_never_overwritten() {
        let seen = |value: &str, seconds: Option<u64>| Seen {
            value: value.into(),
            revision: 1,
            ends: seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds)),
        };
        for (key, old, there, wanted) in [
            ("subnets/10.5.1.0-24", A, None, "Copy"),
            ("subnets/10.5.1.0-24", A, Some(("subnets/10.5.1.0-24", A, 50)), "Prolong"),
            ("subnets/10.5.1.0-24", A, Some(("subnets/10.5.1.0-24", A_TODAY, 86400)), "There"),
            ("subnets/10.5.1.0-24", A, Some(("subnets/10.5.1.0-24", B, 50)), "192.0.2.2"),
            ("subnets/10.5.1.0-24", A, Some(("subnets/10.5.0.0-20", B, 50)), "overlaps subnets/10.5.0.0-20"),
            (
                "subnets/10.5.1.0-24",
                A,
                Some(("subnets/10.5.2.0-24", A, 50)),
                "node 192.0.2.1 has subnets/10.5.2.0-24",
            ),
            ("subnets/10.5.1.0-24", A, Some(("subnets/10.5.2.0-24", B, 50)), "Copy"),
            // Another network.
            ("subnets/10.5.1.0-24", A, Some(("blue/subnets/10.5.1.0-24", B, 50)), "Copy"),
            ("blue/subnets/10.5.1.0-24", A, Some(("blue/subnets/10.5.1.0-25", B, 50)), "overlaps"),
            ("config", r#"{"Network":"10.5.0.0/16"}"#, None, "Copy"),
        ] {
            let new = there.map(|(key, value, left)| (key.to_owned(), seen(value, Some(left))));
            let old = [(key.to_owned(), seen(old, Some(3600)))].into();
            let fate = format!("{:?}", fate(key, &old, &new.into_iter().collect()));
            assert!(fate.contains(wanted), "{key} {there:?}: {fate}");
        }
    }
}
