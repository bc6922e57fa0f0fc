//! A store tells what is there and what changes.

use std::time::Duration;

use anyhow::{Result, ensure};
use flannel_agent::domain::lease::{LeaseAttrs, LeaseEvent};
use flannel_agent::stores::LEASE_TTL;

use super::ALL;
use crate::ground::{Ground, first, network, next, next_unreadable, request, subnets};

pub(crate) async fn what_changes_is_told_after_a_snapshot(ground: Ground) -> Result<()> {
    let own = ground.node();
    let lease = own.acquire(&request(&network(ALL), "192.0.2.1")).await?;
    let (mut events, mut others) = (own.watch(), ground.node().watch());
    for events in [&mut events, &mut others] {
        let (leases, unreadable) = first(events).await?;
        assert_eq!(leases.iter().map(|lease| lease.subnets).collect::<Vec<_>>(), [lease.subnets]);
        assert!(unreadable.is_empty());
    }
    let peer = ground.node().acquire(&request(&network(ALL), "192.0.2.2")).await?;
    let moved = r#"{"PublicIP":"192.0.2.3"}"#;
    ground.put(&peer.subnets.to_string(), moved, Some(LEASE_TTL)).await?;
    ground.delete(&peer.subnets.to_string()).await?;
    for events in [&mut events, &mut others] {
        let LeaseEvent::Added(seen) = next(events).await? else { panic!("an addition") };
        assert_eq!((seen.subnets, &seen.attrs, seen.revision), (peer.subnets, &peer.attrs, peer.revision));
        assert!(ground.is_fresh(seen.expires), "{:?}", seen.expires);
        let LeaseEvent::Added(seen) = next(events).await? else { panic!("a change") };
        assert_eq!((seen.subnets, seen.attrs), (peer.subnets, LeaseAttrs::from_json(moved)?));
        assert_eq!(next(events).await?, LeaseEvent::Removed(peer.subnets));
    }
    Ok(())
}

pub(crate) async fn a_lease_that_ends_is_told(ground: Ground) -> Result<()> {
    ground.put("10.5.7.0-24", r#"{"PublicIP":"192.0.2.7"}"#, Some(Duration::from_secs(10))).await?;
    ground.put("10.5.8.0-24", r#"{"PublicIP":"192.0.2.8"}"#, None).await?;
    let mut events = ground.node().watch();
    assert_eq!(first(&mut events).await?.0.len(), 2);
    assert_eq!(next(&mut events).await?, LeaseEvent::Removed(subnets("10.5.7.0-24")));
    assert_eq!(ground.snapshot().await?.len(), 1);
    Ok(())
}

pub(crate) async fn an_entry_that_cannot_be_read_hides_nothing(ground: Ground) -> Result<()> {
    let good = r#"{"PublicIP":"192.0.2.8"}"#;
    ground.put("10.5.8.0-24", good, None).await?;
    for (key, value) in [
        ("foo", good),
        ("10.5.9.0-24", "nonsense"),
        ("10.5.10.0-24", r#"{"PublicIP":7}"#),
        ("10.5.11.0-32", good),
        ("10.5.12.7-24", good),
    ] {
        let mut events = ground.node().watch();
        assert_eq!(first(&mut events).await?.0.len(), 1);
        ground.put(key, value, None).await?;
        let entry = next_unreadable(&mut events).await?;
        ensure!(entry.key.ends_with(key) && !entry.reason.is_empty(), "{entry}");
        let (leases, unreadable) = first(&mut ground.node().watch()).await?;
        assert_eq!(leases.len(), 1, "{key}");
        assert_eq!(unreadable, [entry]);
        // The next good one still comes through.
        ground.put("10.5.20.0-24", good, None).await?;
        let LeaseEvent::Added(lease) = next(&mut events).await? else { panic!("an addition") };
        assert_eq!(lease.subnets, subnets("10.5.20.0-24"));
        ground.delete("10.5.20.0-24").await?;
        ground.delete(key).await?;
    }
    // What can't be read is not free either.
    ground.put("10.5.1.0-24", "nonsense", None).await?;
    let lease = ground.node().acquire(&request(&network("10.5.2.0"), "192.0.2.1")).await?;
    assert_eq!(lease.subnets, subnets("10.5.2.0-24"));
    Ok(())
}
