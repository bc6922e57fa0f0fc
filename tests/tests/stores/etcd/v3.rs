//! What only the v3 API has: lease objects, transactions, compaction.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use etcd_client::{Client, LeaseTimeToLiveOptions, PutOptions, Txn, TxnOp};
use flannel_agent::domain::lease::LeaseEvent;
use flannel_agent::stores::etcd::{self, EtcdApi, EtcdOptions};
use flannel_agent::stores::{LeaseRequest, NetworkStores, StoreError};
use flannel_tests::etcd::Version;

use super::{PEER, restart, snapshot_of, start_of, store};
use crate::ground::{Ground, first, interrupted, network, next, next_within, request, subnets};
use crate::relay::Relay;

/// Between the list and the watch that follows it, history is compacted away.
pub(crate) async fn history_compacted_before_the_watch_began_means_a_fresh_snapshot(
    version: Version,
) -> Result<()> {
    let etcd = start_of(version).await?;
    let ground = Ground::etcd(&etcd, EtcdApi::V3, "compacted").await?;
    ground.put("10.5.1.0-24", PEER, None).await?;
    ground.put("10.5.2.0-24", &PEER.replace("2.9", "2.8"), None).await?;
    let options = ground.etcd_options().context("it is etcd")?;
    let mut client = Client::connect([etcd.endpoint()], None).await?;
    let relay = Relay::start(etcd.address()).await?;
    let node =
        etcd::open(&EtcdOptions { endpoints: vec![relay.endpoint()], ..options.clone() })?.network(None);
    // Opens the connection, so that the next large answer is the list.
    ensure!(matches!(node.network_config().await, Err(StoreError::NoConfig { .. })));
    relay.hold_requests_after_the_next_answer();
    let mut events = node.watch();
    let held = relay.is_holding();
    let meddle = tokio::spawn(async move {
        while !held.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let mut revision = 0;
        for third in 3..=6 {
            let key = format!("/compacted/network/subnets/10.5.{third}.0-24");
            let put = client.put(key, PEER.replace("2.9", &format!("2.{third}")), None).await?;
            revision = put.header().context("a header")?.revision();
        }
        client.compact(revision, None).await?;
        anyhow::Ok(())
    });
    let release = async {
        let done = meddle.await;
        relay.release();
        done?
    };
    let (seen, meddled) = tokio::join!(first(&mut events), release);
    meddled?;
    ensure!(seen?.0.len() == 2, "the list came before the changes");
    // No interruption: nothing was away.
    snapshot_of(&mut events, 6).await?;
    ground.delete("10.5.6.0-24").await?;
    assert_eq!(next(&mut events).await?, LeaseEvent::Removed(subnets("10.5.6.0-24")));
    Ok(())
}

pub(crate) async fn a_restart_after_a_compaction_means_a_fresh_snapshot(version: Version) -> Result<()> {
    let mut etcd = start_of(version).await?;
    let node = store(EtcdApi::V3, &[etcd.endpoint()])?;
    let mut client = Client::connect([etcd.endpoint()], None).await?;
    let relay = Relay::start(etcd.address()).await?;
    let behind = store(EtcdApi::V3, &[relay.endpoint()])?;
    let mut events = behind.watch();
    snapshot_of(&mut events, 0).await?;
    // This one is cut off while the world goes on and forgets.
    relay.stall();
    let lease = node.acquire(&request(&network("10.5.255.0"), "192.0.2.1")).await?;
    // Not one of the first hundred, of which the lease is.
    let gone = "/coreos.com/network/subnets/10.5.200.0-24";
    client.put(gone, PEER, None).await?;
    let deleted = client.delete(gone, None).await?;
    let revision = deleted.header().context("a header")?.revision();
    client.compact(revision, None).await?;
    etcd.kill();
    interrupted(&mut events, Duration::from_secs(12)).await?;
    relay.release();
    let _etcd = restart(etcd).await?;
    let (leases, _) = first(&mut events).await?;
    assert_eq!(leases.iter().map(|lease| lease.subnets).collect::<Vec<_>>(), [lease.subnets]);
    Ok(())
}

pub(crate) async fn renewals_leave_no_lease_objects_behind(version: Version) -> Result<()> {
    let etcd = start_of(version).await?;
    let node = store(EtcdApi::V3, &[etcd.endpoint()])?;
    let config = network("10.5.255.0");
    let mut lease = node.acquire(&request(&config, "192.0.2.1")).await?;
    for _ in 0..3 {
        lease = node.renew(&lease).await?;
    }
    store(EtcdApi::V3, &[etcd.endpoint()])?.acquire(&request(&config, "192.0.2.1")).await?;
    assert_eq!(etcd.lease_objects()?, 1);
    // A lease that no longer fits takes its object along.
    let mut smaller = network("10.5.255.0");
    if let Some(v4) = &mut smaller.v4 {
        v4.subnet_len = 25;
    }
    node.acquire(&request(&smaller, "192.0.2.1")).await?;
    assert_eq!(etcd.lease_objects()?, 1);
    // Lost races too.
    let tight = network("10.5.6.0");
    let nodes = (2..=7).map(|node| {
        let (store, request) =
            (store(EtcdApi::V3, &[etcd.endpoint()]), request(&tight, &format!("192.0.2.{node}")));
        tokio::spawn(async move { store?.acquire(&request).await.map_err(anyhow::Error::from) })
    });
    let taken: Vec<_> = futures_util::future::join_all(nodes).await;
    let won = taken.iter().filter(|result| matches!(result, Ok(Ok(_)))).count();
    assert_eq!(etcd.lease_objects()?, 1 + won);
    Ok(())
}

pub(crate) async fn a_lease_object_others_use_is_not_revoked(version: Version) -> Result<()> {
    let etcd = start_of(version).await?;
    let mut client = Client::connect([etcd.endpoint()], None).await?;
    let shared = client.lease_grant(3600, None).await?.id();
    let with = || Some(PutOptions::new().with_lease(shared));
    client.put("/coreos.com/network/subnets/10.5.7.0-24", r#"{"PublicIP":"192.0.2.1"}"#, with()).await?;
    client.put("/somebody/elses", "treasure", with()).await?;
    let node = store(EtcdApi::V3, &[etcd.endpoint()])?;
    let lease = node.acquire(&request(&network("10.5.255.0"), "192.0.2.1")).await?;
    assert_eq!(lease.subnets, subnets("10.5.7.0-24"));
    node.renew(&lease).await?;
    assert_eq!(client.get("/somebody/elses", None).await?.count(), 1);
    let options = LeaseTimeToLiveOptions::new().with_keys();
    assert_eq!(client.lease_time_to_live(shared, Some(options)).await?.keys().len(), 1);
    Ok(())
}

/// More than one answer holds.
pub(crate) async fn thousands_of_leases_are_listed_at_one_revision(version: Version) -> Result<()> {
    const LEASES: u32 = 3500;
    let etcd = start_of(version).await?;
    let mut client = Client::connect([etcd.endpoint()], None).await?;
    for start in (0..LEASES).step_by(500) {
        let puts: Vec<_> = (start..start + 500)
            .map(|number| {
                let key =
                    format!("/coreos.com/network/subnets/10.{}.{}.0-24", 16 + number / 256, number % 256);
                TxnOp::put(key, format!(r#"{{"PublicIP":"172.16.{}.{}"}}"#, number / 256, number % 256), None)
            })
            .collect();
        client.txn(Txn::new().and_then(puts)).await?;
    }
    let mut events = store(EtcdApi::V3, &[etcd.endpoint()])?.watch();
    let started = Instant::now();
    let (leases, unreadable) = first(&mut events).await?;
    assert_eq!((leases.len(), unreadable.len()), (LEASES as usize, 0));
    ensure!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    client.delete("/coreos.com/network/subnets/10.16.0.0-24", None).await?;
    assert_eq!(next(&mut events).await?, LeaseEvent::Removed(subnets("10.16.0.0-24")));
    Ok(())
}

pub(crate) async fn our_lease_written_by_another_has_its_true_end(version: Version) -> Result<()> {
    let etcd = start_of(version).await?;
    let node = store(EtcdApi::V3, &[etcd.endpoint()])?;
    let lease = node.acquire(&request(&network("10.5.1.0"), "192.0.2.1")).await?;
    let mut events = node.watch();
    let (leases, _) = first(&mut events).await?;
    assert_eq!(leases, [lease], "our own end is known without asking");
    let mut client = Client::connect([etcd.endpoint()], None).await?;
    let short = client.lease_grant(600, None).await?.id();
    let value = r#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#;
    for (lease, seconds) in [(short, Some(600)), (0, None)] {
        let options = PutOptions::new().with_lease(lease);
        client.put("/coreos.com/network/subnets/10.5.1.0-24", value, Some(options)).await?;
        let LeaseEvent::Added(seen) = next(&mut events).await? else { panic!("a change") };
        let left = seen.expires.map(|end| end.saturating_duration_since(Instant::now()).as_secs());
        match (left, seconds) {
            (None, None) => {}
            (Some(left), Some(seconds)) => ensure!((seconds - 30..=seconds).contains(&left), "{left} s"),
            other => panic!("{other:?}"),
        }
    }
    Ok(())
}

/// A restored backup, or an operator's transaction: a revision is no name.
pub(crate) async fn leases_written_at_one_revision_are_told_apart(version: Version) -> Result<()> {
    let etcd = start_of(version).await?;
    let mut client = Client::connect([etcd.endpoint()], None).await?;
    let own = r#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#;
    let folder = "/coreos.com/network/subnets";
    let put = |third: u8, value: &str| TxnOp::put(format!("{folder}/10.5.{third}.0-24"), value, None);
    client.txn(Txn::new().and_then([put(3, PEER), put(4, own), put(5, PEER)])).await?;
    let node = store(EtcdApi::V3, &[etcd.endpoint()])?;
    assert_eq!(
        node.acquire(&request(&network("10.5.9.0"), "192.0.2.1")).await?.subnets,
        subnets("10.5.4.0-24")
    );
    // It no longer fits: it and nothing else is deleted.
    client.txn(Txn::new().and_then([put(3, PEER), put(4, own), put(5, PEER)])).await?;
    assert_eq!(
        node.acquire(&request(&network("10.5.2.0"), "192.0.2.1"))
            .await?
            .subnets
            .v4
            .map(|net| net.addr().octets()[2] < 3),
        Some(true)
    );
    for (third, count) in [(3, 1), (4, 0), (5, 1)] {
        let key = format!("{folder}/10.5.{third}.0-24");
        let found = client.get(key, None).await?;
        assert_eq!(found.count(), count);
        ensure!(found.kvs().iter().all(|kv| kv.value() == PEER.as_bytes()), "a peer's lease was overwritten");
    }
    Ok(())
}

/// A login of the former etcd is worth nothing at the new one, which does not even say so: it keeps who shows one waiting
/// until it has come as far as the former had.
pub(crate) async fn an_etcd_that_was_replaced_is_logged_in_to_anew(version: Version) -> Result<()> {
    const PASSWORD: &str = super::PASSWORD;
    let etcd = start_of(version).await?;
    let mut etcd = tokio::task::spawn_blocking(move || {
        // The login is to name a later state than the new etcd comes to here.
        for count in 0..40 {
            etcd.ctl(&["put", "/elsewhere", &count.to_string()])?;
        }
        etcd.require_password(PASSWORD).map(|()| etcd)
    })
    .await??;
    let options = EtcdOptions {
        username: Some("root".into()),
        password: Some(PASSWORD.into()),
        ..super::options(EtcdApi::V3, &[etcd.endpoint()])
    };
    let node = etcd::open(&options)?.network(None);
    let lease = node.acquire(&request(&network("10.5.255.0"), "192.0.2.1")).await?;
    let mut events = node.watch();
    snapshot_of(&mut events, 1).await?;
    for with_password in [false, true] {
        etcd = tokio::task::spawn_blocking(move || {
            etcd.replace()?;
            if with_password {
                etcd.require_password(PASSWORD)?;
            }
            anyhow::Ok(etcd)
        })
        .await??;
        loop {
            match next_within(&mut events, Duration::from_secs(30)).await? {
                LeaseEvent::Snapshot(leases, _) if leases.is_empty() => break,
                LeaseEvent::Interrupted(_) | LeaseEvent::Snapshot(..) => {}
                other => bail!("nothing was written, but {other:?} told"),
            }
        }
        let again =
            LeaseRequest { previous: Some(lease.subnets), ..request(&network("10.5.255.0"), "192.0.2.1") };
        assert_eq!(node.acquire(&again).await?.subnets, lease.subnets);
        let told = next_within(&mut events, Duration::from_secs(10)).await?;
        ensure!(matches!(&told, LeaseEvent::Added(told) if told.subnets == lease.subnets), "{told:?}");
    }
    Ok(())
}
