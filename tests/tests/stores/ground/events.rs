//! What a node is told, one event at a time, each within a limit.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use flannel_agent::domain::lease::{Lease, LeaseEvent, Unreadable};
use futures_util::StreamExt;
use futures_util::stream::BoxStream;

/// Longer than anything a healthy store needs, also on a busy machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) type Events = BoxStream<'static, LeaseEvent>;

/// Keys, attributes and what can't be read, comparable.
pub(super) async fn known(events: &mut Events) -> Result<Vec<String>> {
    loop {
        if let LeaseEvent::Snapshot(leases, unreadable) = next(events).await? {
            let leases = leases.iter().map(|lease| format!("{} {}", lease.subnets, lease.attrs.to_json()));
            let unreadable = unreadable.iter().map(|entry| format!("{} {}", entry.key, entry.reason));
            let mut all: Vec<_> = leases.chain(unreadable).collect();
            all.sort();
            return Ok(all);
        }
    }
}

/// The next event, which tells an entry that can't be read: by itself, or, as a server does, with everything.
pub(crate) async fn next_unreadable(events: &mut Events) -> Result<Unreadable> {
    match next(events).await? {
        LeaseEvent::Unreadable(entry) => Ok(entry),
        LeaseEvent::Snapshot(_, unreadable) => {
            unreadable.into_iter().next().context("a snapshot in which everything can be read")
        }
        other => bail!("an entry that can't be read was due, not {other:?}"),
    }
}

pub(crate) async fn next(events: &mut Events) -> Result<LeaseEvent> {
    next_within(events, PATIENCE).await
}

pub(crate) async fn next_within(events: &mut Events, limit: Duration) -> Result<LeaseEvent> {
    let started = Instant::now();
    match tokio::time::timeout(limit, events.next()).await {
        Ok(Some(event)) => Ok(event),
        Ok(None) => bail!("the stream ended"),
        Err(_) => bail!("no event within {:.1} s", started.elapsed().as_secs_f64()),
    }
}

pub(crate) async fn first(events: &mut Events) -> Result<(Vec<Lease>, Vec<Unreadable>)> {
    match next(events).await? {
        LeaseEvent::Snapshot(leases, unreadable) => Ok((leases, unreadable)),
        other => bail!("a snapshot was due, not {other:?}"),
    }
}

pub(crate) async fn interrupted(events: &mut Events, limit: Duration) -> Result<String> {
    match next_within(events, limit).await? {
        LeaseEvent::Interrupted(reason) => Ok(reason),
        other => bail!("an interruption was due, not {other:?}"),
    }
}
