//! What stands behind a server, at its worst: a list that was made a moment ago, endpoints that all hang.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use flannel_agent::domain::lease::LeaseEvent;
use flannel_agent::server::{self, ListenAddress, Listener};
use flannel_agent::stores::etcd::{self, EtcdApi, EtcdOptions};
use flannel_agent::stores::{NetworkStores, StoreError};
use flannel_tests::etcd::Etcd;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::{CONFIG, asking, node};
use crate::ground::{Keys, first, next_within};
use crate::relay::Relay;

/// A server in this process, of leases in etcd.
async fn serve(options: &EtcdOptions) -> Result<(std::net::SocketAddr, DropGuard)> {
    let networks: Arc<dyn NetworkStores> = Arc::new(etcd::open(options)?);
    let listener = Listener::bind(&ListenAddress::Tcp("127.0.0.1:0".into()), None).await?;
    let (address, stop) = (listener.address()?, CancellationToken::new());
    tokio::spawn(server::serve(listener, networks, stop.clone()));
    Ok((address, stop.drop_guard()))
}

/// The server compares its watch with a list twice a second, which is on the way for a while; leases are taken meanwhile.
pub(crate) async fn a_lease_that_stays_is_never_told_as_gone() -> Result<()> {
    let etcd = tokio::task::spawn_blocking(Etcd::start).await??;
    Keys::of(&etcd, EtcdApi::V2).await?.put("/coreos.com/network/config", CONFIG, None).await?;
    let relay = Relay::start(etcd.address()).await?;
    let options = EtcdOptions {
        endpoints: vec![relay.endpoint()],
        api: EtcdApi::V2,
        resync: Duration::from_millis(500),
        ..EtcdOptions::default()
    };
    let (address, _stop) = serve(&options).await?;
    let mut events = node(&[address])?.watch();
    first(&mut events).await?;
    relay.delay_lists(Duration::from_millis(300));
    let taken = tokio::spawn(async move {
        let (mut taken, started) = (BTreeSet::new(), Instant::now());
        // One at a time: whoever has a lease finds it at once.
        for number in 1..=200 {
            if started.elapsed() > Duration::from_secs(8) {
                break;
            }
            let node = node(&[address])?;
            taken.insert(node.acquire(&asking(&format!("192.0.2.{number}"))).await?.subnets);
            let (known, _) = first(&mut node.watch()).await?;
            let known: BTreeSet<_> = known.iter().map(|lease| lease.subnets).collect();
            ensure!(taken.is_subset(&known), "{taken:?} were taken, {known:?} are told");
        }
        anyhow::Ok(taken)
    });
    let mut told = BTreeSet::new();
    let check = |event: LeaseEvent, told: &mut BTreeSet<_>| {
        match event {
            LeaseEvent::Added(lease) => drop(told.insert(lease.subnets)),
            LeaseEvent::Snapshot(leases, _) => {
                let all: BTreeSet<_> = leases.iter().map(|lease| lease.subnets).collect();
                ensure!(told.is_subset(&all), "{told:?} were told, then all were {all:?}");
                told.extend(all);
            }
            other => bail!("{other:?}, and nothing went"),
        }
        Ok(())
    };
    while !taken.is_finished() {
        if let Ok(event) = next_within(&mut events, Duration::from_millis(100)).await {
            check(event, &mut told)?;
        }
    }
    let taken = taken.await??;
    ensure!(taken.len() >= 5, "only {} leases were taken", taken.len());
    while told.len() < taken.len() {
        check(next_within(&mut events, Duration::from_secs(10)).await?, &mut told)?;
    }
    // Whatever the last list said.
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(2) {
        if let Ok(event) = next_within(&mut events, Duration::from_millis(200)).await {
            check(event, &mut told)?;
        }
    }
    ensure!(told == taken, "{told:?} were told, {taken:?} taken");
    Ok(())
}

/// Both of its endpoints hang. A client waits ten seconds, and must hear from the server what is wrong, not that it waits.
pub(crate) async fn a_store_that_hangs_is_named_before_the_client_gives_up(api: EtcdApi) -> Result<()> {
    let etcd = tokio::task::spawn_blocking(Etcd::start).await??;
    Keys::of(&etcd, api).await?.put("/coreos.com/network/config", CONFIG, None).await?;
    let relay = Relay::start(etcd.address()).await?;
    let options =
        EtcdOptions { endpoints: vec![etcd.endpoint(), relay.endpoint()], api, ..EtcdOptions::default() };
    let (address, _stop) = serve(&options).await?;
    let node = node(&[address])?;
    let lease = node.acquire(&asking("192.0.2.1")).await?;
    etcd.freeze()?;
    let request = asking("192.0.2.2");
    let (renewed, taken, config, listed) =
        tokio::join!(node.renew(&lease), node.acquire(&request), node.network_config(), node.reservations(),);
    let (one, other) = (etcd.endpoint(), relay.endpoint());
    for answer in [renewed.map(drop), taken.map(drop), config.map(drop), listed.map(drop)] {
        let Err(error) = answer else { bail!("a frozen etcd answered") };
        ensure!(matches!(error, StoreError::Unreachable { .. }), "{error:?}");
        let text = error.to_string();
        let named = text.contains(&format!("etcd at {one},{other} is unreachable: "));
        ensure!(named && !text.contains("no answer within 10 s"), "{text}");
    }
    etcd.thaw()?;
    let started = Instant::now();
    while let Err(error) = node.renew(&lease).await {
        ensure!(started.elapsed() < Duration::from_secs(20), "{error}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}
