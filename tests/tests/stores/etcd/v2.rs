//! What only the v2 API has: a history of a thousand changes, directories, one change per answer.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flannel_agent::domain::lease::LeaseEvent;
use flannel_agent::stores::etcd::{self, EtcdApi};
use flannel_agent::stores::{LEASE_TTL, NetworkStores, StoreError};
use flannel_tests::etcd::{Etcd, Version};
use flannel_tests::etcd_v2::V2Keys;

use super::{PEER, options, snapshot_of, start, start_of, store};
use crate::CASE_LIMIT;
use crate::ground::{Ground, first, network, next, next_unreadable, next_within, request, subnets};
use crate::relay::Relay;

const FOLDER: &str = "/coreos.com/network/subnets";

/// Writes `count` keys below `folder`, several at a time: etcd waits for the disk once for all of them.
async fn write(keys: &V2Keys, folder: &'static str, count: u32, name: fn(u32) -> String) -> Result<()> {
    const WRITERS: u32 = 16;
    let writers = (0..WRITERS).map(|writer| {
        let keys = keys.clone();
        tokio::task::spawn_blocking(move || {
            (writer..count)
                .step_by(WRITERS as usize)
                .try_for_each(|number| keys.put(&format!("{folder}/{}", name(number)), PEER, None))
        })
    });
    for writer in futures_util::future::join_all(writers).await {
        writer??;
    }
    Ok(())
}

/// Ten less than a /24 for each.
fn lease(number: u32) -> String {
    format!("10.{}.{}.0-24", 16 + number / 256, number % 256)
}

/// Between the list and the poll that follows it, etcd forgets what was in between (its error 401).
pub(crate) async fn a_thousand_changes_elsewhere_while_it_is_cut_off_mean_a_fresh_snapshot() -> Result<()> {
    let etcd = start().await?;
    let keys = etcd.v2();
    keys.put(&format!("{FOLDER}/10.5.1.0-24"), PEER, None)?;
    let relay = Relay::start(etcd.address()).await?;
    let node = store(EtcdApi::V2, &[relay.endpoint()])?;
    ensure!(matches!(node.network_config().await, Err(StoreError::NoConfig { .. })));
    relay.hold_requests_after_the_next_answer();
    let mut events = node.watch();
    let held = relay.is_holding();
    let meddle = async {
        while !held.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        keys.put(&format!("{FOLDER}/10.5.2.0-24"), PEER, None)?;
        let written = write(&keys, "/elsewhere", 1100, |number| number.to_string()).await;
        relay.release();
        written
    };
    let (seen, meddled) = tokio::join!(first(&mut events), meddle);
    meddled?;
    ensure!(seen?.0.len() == 1, "the list came before the changes");
    // No interruption: nothing was away.
    snapshot_of(&mut events, 2).await?;
    keys.delete(&format!("{FOLDER}/10.5.2.0-24"))?;
    assert_eq!(next(&mut events).await?, LeaseEvent::Removed(subnets("10.5.2.0-24")));
    Ok(())
}

pub(crate) async fn a_busy_keyspace_does_not_disturb_a_quiet_watch() -> Result<()> {
    let etcd = start().await?;
    let keys = etcd.v2();
    let mut events = store(EtcdApi::V2, &[etcd.endpoint()])?.watch();
    snapshot_of(&mut events, 0).await?;
    for third in 1..=2 {
        let key = format!("10.5.{third}.0-24");
        let meddle = async {
            write(&keys, "/elsewhere", 1300, |number| number.to_string()).await?;
            keys.put(&format!("{FOLDER}/{key}"), PEER, None)
        };
        // However long all those writes take.
        let (seen, meddled) = tokio::join!(next_within(&mut events, CASE_LIMIT), meddle);
        meddled?;
        let LeaseEvent::Added(seen) = seen? else { panic!("nothing but the change") };
        assert_eq!(seen.subnets, subnets(&key));
    }
    Ok(())
}

pub(crate) async fn a_burst_of_changes_is_told_in_order() -> Result<()> {
    let etcd = start().await?;
    let mut events = store(EtcdApi::V2, &[etcd.endpoint()])?.watch();
    snapshot_of(&mut events, 0).await?;
    let keys = etcd.v2();
    let burst = tokio::task::spawn_blocking(move || {
        for number in 0..300 {
            let key = format!("{FOLDER}/{}", lease(number % 7));
            match number % 14 {
                0..7 => keys.put(&key, PEER, Some(LEASE_TTL))?,
                _ => keys.delete(&key)?,
            }
        }
        anyhow::Ok(())
    });
    for number in 0..300 {
        let (wanted, seen) = (subnets(&lease(number % 7)), next(&mut events).await?);
        match (number % 14, seen) {
            (0..7, LeaseEvent::Added(seen)) => assert_eq!(seen.subnets, wanted),
            (7.., LeaseEvent::Removed(seen)) => assert_eq!(seen, wanted),
            (_, other) => panic!("change {number} is {other:?}"),
        }
    }
    burst.await?
}

/// Deleting a directory is one change, told without its keys.
pub(crate) async fn a_folder_that_is_deleted_takes_its_leases_along() -> Result<()> {
    let etcd = start().await?;
    let keys = etcd.v2();
    let mut events = store(EtcdApi::V2, &[etcd.endpoint()])?.watch();
    snapshot_of(&mut events, 0).await?;
    for gone in [FOLDER, "/coreos.com"] {
        for key in ["10.5.1.0-24", "10.5.2.0-24"] {
            keys.put(&format!("{FOLDER}/{key}"), PEER, Some(LEASE_TTL))?;
            ensure!(matches!(next(&mut events).await?, LeaseEvent::Added(_)));
        }
        keys.delete(gone)?;
        snapshot_of(&mut events, 0).await?;
    }
    Ok(())
}

pub(crate) async fn directories_among_the_leases_are_passed_over() -> Result<()> {
    let etcd = start().await?;
    let keys = etcd.v2();
    let node = store(EtcdApi::V2, &[etcd.endpoint()])?;
    let mut events = node.watch();
    snapshot_of(&mut events, 0).await?;
    let deep = format!("{FOLDER}/10.5.1.0-24/a/b");
    keys.put(&deep, PEER, None)?;
    let entry = next_unreadable(&mut events).await?;
    assert_eq!(entry.key, deep);
    assert_eq!(first(&mut node.watch()).await?.1, [entry]);
    keys.delete(&deep)?;
    snapshot_of(&mut events, 0).await?;
    // The directory is still there, in the place of a lease: it is no lease, and no place for one.
    for ip in 1..=4 {
        let lease = node.acquire(&request(&network("10.5.5.0"), &format!("192.0.2.{ip}"))).await?;
        assert_ne!(lease.subnets, subnets("10.5.1.0-24"));
    }
    Ok(())
}

pub(crate) async fn a_server_without_the_api_says_so(version: Version) -> Result<()> {
    let etcd = start_of(version).await?;
    let error = store(EtcdApi::V2, &[etcd.endpoint()])?.network_config().await.unwrap_err();
    ensure!(matches!(error, StoreError::Refused { .. }), "{error}");
    ensure!(error.to_string().contains("has no v2 API"), "{error}");
    Ok(())
}

pub(crate) async fn our_lease_written_by_another_has_its_true_end() -> Result<()> {
    let etcd = start().await?;
    let node = store(EtcdApi::V2, &[etcd.endpoint()])?;
    node.acquire(&request(&network("10.5.1.0"), "192.0.2.1")).await?;
    let mut events = node.watch();
    snapshot_of(&mut events, 1).await?;
    let value = r#"{"PublicIP":"192.0.2.1"}"#;
    for seconds in [Some(600), None] {
        etcd.v2().put(&format!("{FOLDER}/10.5.1.0-24"), value, seconds.map(Duration::from_secs))?;
        let LeaseEvent::Added(seen) = next(&mut events).await? else { panic!("a change") };
        let (listed, _) = first(&mut node.watch()).await?;
        for end in [seen.expires, listed[0].expires] {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()).as_secs());
            match (left, seconds) {
                (None, None) => {}
                (Some(left), Some(seconds)) => ensure!((seconds - 30..=seconds).contains(&left), "{left} s"),
                other => panic!("{other:?}"),
            }
        }
    }
    Ok(())
}

/// flanneld's renewal overwrites whoever has the key by now.
pub(crate) async fn a_renewal_that_raced_with_another_writer_overwrites_nothing() -> Result<()> {
    let etcd = start().await?;
    let relay = Relay::start(etcd.address()).await?;
    let node = store(EtcdApi::V2, &[relay.endpoint()])?;
    let lease = node.acquire(&request(&network("10.5.1.0"), "192.0.2.1")).await?;
    relay.hold_requests_after_the_next_answer();
    let held = relay.is_holding();
    let other = async {
        while !held.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let written = etcd.v2().put(&format!("{FOLDER}/10.5.1.0-24"), PEER, Some(LEASE_TTL));
        relay.release();
        written
    };
    let (renewed, written) = tokio::join!(node.renew(&lease), other);
    written?;
    let error = renewed.unwrap_err();
    assert_eq!(error.to_string(), "lease 10.5.1.0-24 is lost: it belongs to 192.0.2.9 now");
    assert_eq!(etcd.v2().list(FOLDER)?[0].value, PEER);
    Ok(())
}

/// `etcd --proxy`, which many a node of that time has on port 4001, passes the head of a poll on with its first change.
pub(crate) async fn a_proxy_that_holds_back_heads_is_no_dead_server() -> Result<()> {
    let etcd = start().await?;
    let relay = Relay::start(etcd.address()).await?;
    let mut events = store(EtcdApi::V2, &[relay.endpoint()])?.watch();
    snapshot_of(&mut events, 0).await?;
    relay.keep_heads();
    for key in ["10.5.1.0-24", "10.5.2.0-24"] {
        let noise = next_within(&mut events, Duration::from_secs(10)).await;
        ensure!(noise.is_err(), "{noise:?}");
        etcd.v2().put(&format!("{FOLDER}/{key}"), PEER, None)?;
        ensure!(matches!(next(&mut events).await?, LeaseEvent::Added(_)));
    }
    Ok(())
}

/// The answer comes in chunks, from a server that does not sort it.
pub(crate) async fn leases_of_a_whole_cluster_are_listed() -> Result<()> {
    const LEASES: u32 = 1500;
    let etcd = start().await?;
    let ground = Ground::etcd(&etcd, EtcdApi::V2, "whole").await?;
    write(&etcd.v2(), "/whole/network/subnets", LEASES, lease).await?;
    let options = ground.etcd_options().context("it is etcd")?;
    let mut events = etcd::open(options)?.network(None).watch();
    let started = Instant::now();
    let (leases, unreadable) = first(&mut events).await?;
    assert_eq!((leases.len(), unreadable.len()), (LEASES as usize, 0));
    ensure!(leases.is_sorted_by_key(|lease| lease.subnets.to_string()), "they are in the keys' order");
    ensure!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    ground.delete(&lease(0)).await?;
    assert_eq!(next(&mut events).await?, LeaseEvent::Removed(subnets(&lease(0))));
    // Of another network nothing is seen.
    snapshot_of(&mut etcd::open(&options_of(&etcd))?.network(None).watch(), 0).await
}

fn options_of(etcd: &Etcd) -> etcd::EtcdOptions {
    options(EtcdApi::V2, &[etcd.endpoint()])
}
