//! A node keeps its lease, or hears that it is lost.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flannel_agent::domain::lease::{LeaseAttrs, LeaseEvent};
use flannel_agent::stores::{LEASE_TTL, StoreError};

use super::ALL;
use crate::ground::{
    Ground, first, network, next, next_unreadable, next_within, only_ipv6, request, subnets,
};

pub(crate) async fn fields_of_others_survive_a_reuse_and_a_renewal(ground: Ground) -> Result<()> {
    let key = "10.5.7.0-24";
    let value = r#"{"PublicIP":"192.0.2.1","BackendType":"old","Zone":{"z":1,"a":"<2>"}}"#;
    ground.put(key, value, Some(LEASE_TTL)).await?;
    let node = ground.node();
    let lease = node.acquire(&request(&network(ALL), "192.0.2.1")).await?;
    let wanted = r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"Zone":{"z":1,"a":"\u003c2\u003e"}}"#;
    assert_eq!(ground.value(key).await?, wanted);
    node.renew(&lease).await?;
    assert_eq!(ground.value(key).await?, wanted);
    Ok(())
}

pub(crate) async fn a_reservation_keeps_having_no_end(ground: Ground) -> Result<()> {
    ground.put("10.5.7.0-24", r#"{"PublicIP":"192.0.2.1"}"#, None).await?;
    let node = ground.node();
    let mut request = request(&network(ALL), "192.0.2.1");
    request.attrs.backend_type = "host-gw".into();
    let lease = node.acquire(&request).await?;
    assert_eq!((lease.subnets, lease.expires), (subnets("10.5.7.0-24"), None));
    let renewed = node.renew(&lease).await?;
    assert_eq!(renewed.expires, None);
    assert_eq!(ground.snapshot().await?[0].expires, None);
    let value = r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"host-gw"}"#;
    assert_eq!(ground.value("10.5.7.0-24").await?, value);
    // An operator ends the reservation: it is a lease like any other again.
    ground.put("10.5.7.0-24", value, Some(LEASE_TTL)).await?;
    assert!(ground.is_fresh(node.renew(&renewed).await?.expires));
    Ok(())
}

pub(crate) async fn a_renewal_moves_the_end(ground: Ground) -> Result<()> {
    let value = r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1}}"#;
    let (put, short) = (Instant::now(), Duration::from_secs(10));
    ground.put("10.5.7.0-24", value, Some(short)).await?;
    let node = ground.node();
    let mut events = node.watch();
    let (leases, _) = first(&mut events).await?;
    let before = leases.first().context("the lease is there")?.clone();
    let after = node.renew(&before).await?;
    assert!(ground.is_fresh(after.expires));
    assert_eq!(after.attrs, LeaseAttrs::from_json(value)?);
    assert_eq!(ground.value("10.5.7.0-24").await?, value);
    let LeaseEvent::Added(seen) = next(&mut events).await? else { panic!("the watch tells the renewal") };
    assert_eq!((seen.subnets, seen.revision), (after.subnets, after.revision));
    assert!(ground.is_fresh(seen.expires));
    // The old end passes without effect.
    let past = short + Duration::from_secs(2);
    let quiet = next_within(&mut events, past.saturating_sub(put.elapsed())).await;
    assert!(quiet.is_err(), "{quiet:?}");
    Ok(())
}

pub(crate) async fn a_node_with_a_new_address_keeps_its_lease(ground: Ground) -> Result<()> {
    let node = ground.node();
    let lease = node.acquire(&request(&network("10.5.1.0"), "192.0.2.1")).await?;
    let mut events = node.watch();
    first(&mut events).await?;
    node.reconnect();
    let attrs = LeaseAttrs::new("192.0.2.9".parse()?);
    let moved = node.rewrite(&lease, &attrs).await?;
    assert_eq!((moved.subnets, &moved.attrs), (lease.subnets, &attrs));
    assert_eq!(ground.value("10.5.1.0-24").await?, r#"{"PublicIP":"192.0.2.9","PublicIPv6":null}"#);
    // Asked once more, as after an answer that was lost.
    let moved = node.rewrite(&lease, &attrs).await?;
    node.renew(&moved).await?;
    // With or without an interruption, the watch comes to know it.
    loop {
        let seen = match next(&mut events).await? {
            LeaseEvent::Added(lease) => vec![lease],
            LeaseEvent::Snapshot(leases, _) => leases,
            _ => Vec::new(),
        };
        if seen.iter().any(|lease| lease.attrs == attrs) {
            break;
        }
    }
    Ok(())
}

pub(crate) async fn a_moved_nodes_lease_that_was_taken_over_is_lost(ground: Ground) -> Result<()> {
    let node = ground.node();
    let lease = node.acquire(&request(&network("10.5.1.0"), "192.0.2.1")).await?;
    let moved = node.rewrite(&lease, &LeaseAttrs::new("192.0.2.9".parse()?)).await?;
    let other = r#"{"PublicIP":"192.0.2.66","PublicIPv6":null}"#;
    ground.put("10.5.1.0-24", other, Some(LEASE_TTL)).await?;
    let error = node.rewrite(&moved, &lease.attrs).await.unwrap_err();
    assert_eq!(error.to_string(), "lease 10.5.1.0-24 is lost: it belongs to 192.0.2.66 now");
    Ok(())
}

pub(crate) async fn a_lease_that_was_taken_over_is_not_overwritten(ground: Ground) -> Result<()> {
    let node = ground.node();
    let lease = node.acquire(&request(&network("10.5.1.0"), "192.0.2.1")).await?;
    ground.delete("10.5.1.0-24").await?;
    let other = r#"{"PublicIP":"192.0.2.66","PublicIPv6":null}"#;
    ground.put("10.5.1.0-24", other, Some(LEASE_TTL)).await?;
    let error = node.renew(&lease).await.unwrap_err();
    ensure!(matches!(&error, StoreError::LeaseLost { subnets, .. } if *subnets == lease.subnets), "{error}");
    assert_eq!(error.to_string(), "lease 10.5.1.0-24 is lost: it belongs to 192.0.2.66 now");
    assert_eq!(ground.value("10.5.1.0-24").await?, other);
    Ok(())
}

pub(crate) async fn a_lease_of_only_ipv6_that_was_taken_over_is_lost(ground: Ground) -> Result<()> {
    let node = ground.node();
    let lease = node.acquire(&request(&only_ipv6(), "2001:db8::1")).await?;
    let other = r#"{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::66"}"#;
    ground.put(&lease.subnets.to_string(), other, Some(LEASE_TTL)).await?;
    let error = node.renew(&lease).await.unwrap_err();
    let wanted = format!("lease {} is lost: it belongs to 2001:db8::66 now", lease.subnets);
    assert_eq!(error.to_string(), wanted);
    assert_eq!(ground.value(lease.subnets).await?, other);
    Ok(())
}

pub(crate) async fn a_deleted_lease_is_lost(ground: Ground) -> Result<()> {
    let node = ground.node();
    let lease = node.acquire(&request(&network("10.5.1.0"), "192.0.2.1")).await?;
    ground.delete("10.5.1.0-24").await?;
    let error = node.renew(&lease).await.unwrap_err();
    ensure!(matches!(&error, StoreError::LeaseLost { .. }), "{error:?}");
    assert_eq!(error.to_string(), format!("lease 10.5.1.0-24 is lost: {}", ground.words_for_deleted()));
    assert!(ground.entries().await?.is_empty());
    Ok(())
}

pub(crate) async fn a_damaged_lease_is_put_right(ground: Ground) -> Result<()> {
    let node = ground.node();
    let lease = node.acquire(&request(&network("10.5.1.0"), "192.0.2.1")).await?;
    let mut events = node.watch();
    first(&mut events).await?;
    ground.put("10.5.1.0-24", "nonsense", Some(LEASE_TTL)).await?;
    if ground.tells_unreadable_as_gone() {
        assert_eq!(next(&mut events).await?, LeaseEvent::Removed(lease.subnets));
    }
    next_unreadable(&mut events).await?;
    let lease = node.renew(&lease).await?;
    assert!(ground.is_fresh(lease.expires));
    assert_eq!(ground.value("10.5.1.0-24").await?, r#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#);
    Ok(())
}
