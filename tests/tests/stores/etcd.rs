//! What only a server on a network can do: die, hang, forget its history, ask for a password.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use etcd_client::{Client, LeaseTimeToLiveOptions, PutOptions, Txn, TxnOp};
use flannel_agent::domain::lease::LeaseEvent;
use flannel_agent::stores::etcd::{self, EtcdOptions};
use flannel_agent::stores::{LeaseStore, NetworkStores, StoreError};
use flannel_tests::etcd::{Authority, Certificate, Etcd, ServerTls, Setup, free_port};
use tokio::net::TcpListener;

use crate::ground::{Events, Ground, first, interrupted, network, next, next_within, request, subnets};
use crate::relay::Relay;

pub(crate) const PASSWORD: &str = "correct-horse-battery";
const PEER: &str = r#"{"PublicIP":"192.0.2.9","PublicIPv6":null}"#;

async fn start() -> Result<Etcd> {
    tokio::task::spawn_blocking(Etcd::start).await?
}

async fn restart(mut etcd: Etcd) -> Result<Etcd> {
    tokio::task::spawn_blocking(move || etcd.restart().map(|()| etcd)).await?
}

fn options(endpoints: &[String]) -> EtcdOptions {
    EtcdOptions { endpoints: endpoints.to_vec(), ..EtcdOptions::default() }
}

fn store(endpoints: &[String]) -> Result<Arc<dyn LeaseStore>> {
    Ok(etcd::open(&options(endpoints))?.network(None))
}

/// Waits for a snapshot that holds `count` leases; nothing but snapshots may come.
async fn snapshot_of(events: &mut Events, count: usize) -> Result<()> {
    let (leases, _) = first(events).await?;
    ensure!(leases.len() == count, "{} leases instead of {count}", leases.len());
    Ok(())
}

pub(crate) async fn an_etcd_that_is_killed_is_one_interruption_and_then_a_snapshot() -> Result<()> {
    let mut etcd = start().await?;
    let node = store(&[etcd.endpoint()])?;
    let lease = node.acquire(&request(&network("10.5.255.0"), "192.0.2.1")).await?;
    let mut events = node.watch();
    snapshot_of(&mut events, 1).await?;
    etcd.kill();
    interrupted(&mut events, Duration::from_secs(2)).await?;
    // One word about it, however long it takes.
    let more = next_within(&mut events, Duration::from_secs(3)).await;
    ensure!(more.is_err(), "{more:?}");
    let error = node.renew(&lease).await.unwrap_err();
    ensure!(matches!(error, StoreError::Unreachable { .. }), "{error}");
    ensure!(error.to_string().contains("onnect"), "{error}");

    let etcd = restart(etcd).await?;
    snapshot_of(&mut events, 1).await?;
    node.renew(&lease).await?;
    ensure!(matches!(next(&mut events).await?, LeaseEvent::Added(_)));
    drop(etcd);
    Ok(())
}

pub(crate) async fn a_frozen_etcd_is_noticed_within_ten_seconds() -> Result<()> {
    let etcd = start().await?;
    let node = store(&[etcd.endpoint()])?;
    let mut events = node.watch();
    snapshot_of(&mut events, 0).await?;
    etcd.freeze()?;
    let frozen = Instant::now();
    interrupted(&mut events, Duration::from_secs(12)).await?;
    ensure!(frozen.elapsed() < Duration::from_secs(11), "after {:?}", frozen.elapsed());
    let asked = Instant::now();
    let error = node.network_config().await.unwrap_err();
    ensure!(matches!(error, StoreError::Unreachable { .. }), "{error}");
    ensure!(asked.elapsed() < Duration::from_secs(7), "a call waited {:?}", asked.elapsed());
    etcd.thaw()?;
    snapshot_of(&mut events, 0).await?;
    Ok(())
}

/// A server that takes connections and closes them is the worst case for a loop: every attempt succeeds at first.
pub(crate) async fn an_etcd_that_is_away_is_not_asked_in_a_loop() -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let endpoint = format!("http://{}", listener.local_addr()?);
    let attempts = Arc::new(AtomicU32::new(0));
    let counter = attempts.clone();
    let server = tokio::spawn(async move {
        while let Ok((connection, _)) = listener.accept().await {
            counter.fetch_add(1, Ordering::Relaxed);
            drop(connection);
        }
    });
    let mut events = store(&[endpoint])?.watch();
    interrupted(&mut events, Duration::from_secs(5)).await?;
    let more = next_within(&mut events, Duration::from_secs(8)).await;
    ensure!(more.is_err(), "{more:?}");
    server.abort();
    // Waits of 0.1, 0.2 … 3.2, 5 s and at least half of each.
    let attempts = attempts.load(Ordering::Relaxed);
    ensure!((4..=30).contains(&attempts), "{attempts} connections in 8 s");
    Ok(())
}

/// etcd answers pings that come more often than every five seconds by closing the connection.
pub(crate) async fn a_quiet_watch_is_not_broken_by_our_own_pings() -> Result<()> {
    let etcd = start().await?;
    let mut events = store(&[etcd.endpoint()])?.watch();
    snapshot_of(&mut events, 0).await?;
    let noise = next_within(&mut events, Duration::from_secs(26)).await;
    ensure!(noise.is_err(), "{noise:?}");
    Ok(())
}

pub(crate) async fn a_dead_endpoint_is_passed_over() -> Result<()> {
    let etcd = start().await?;
    let dead = format!("http://{}", free_port("127.0.0.1".parse()?)?);
    let list = [dead.clone(), etcd.endpoint(), dead.clone()];
    let config = network("10.5.255.0");
    for _ in 0..5 {
        let node = store(&list)?;
        let lease = node.acquire(&request(&config, "192.0.2.1")).await?;
        node.renew(&lease).await?;
        let mut events = node.watch();
        snapshot_of(&mut events, 1).await?;
    }
    let error = store(&[dead.clone(), dead.clone()])?.network_config().await.unwrap_err().to_string();
    ensure!(error.matches(&dead).count() == 4, "both endpoints are named with their reasons: {error}");
    Ok(())
}

pub(crate) async fn a_watch_moves_to_another_endpoint_when_its_own_dies() -> Result<()> {
    let etcd = start().await?;
    let relay = Relay::start(etcd.address()).await?;
    let node = store(&[relay.endpoint(), etcd.endpoint()])?;
    let mut events = node.watch();
    snapshot_of(&mut events, 0).await?;
    ensure!(relay.connections() > 0, "the first endpoint is used first");
    drop(relay);
    interrupted(&mut events, Duration::from_secs(2)).await?;
    let away = Instant::now();
    snapshot_of(&mut events, 0).await?;
    ensure!(away.elapsed() < Duration::from_secs(3), "{:?}", away.elapsed());
    node.acquire(&request(&network("10.5.255.0"), "192.0.2.1")).await?;
    ensure!(matches!(next(&mut events).await?, LeaseEvent::Added(_)));
    Ok(())
}

/// Between the list and the watch that follows it, history is compacted away.
pub(crate) async fn history_compacted_before_the_watch_began_means_a_fresh_snapshot() -> Result<()> {
    let etcd = start().await?;
    let ground = Ground::etcd(&etcd, "compacted").await?;
    ground.put("10.5.1.0-24", PEER, None).await?;
    ground.put("10.5.2.0-24", &PEER.replace("2.9", "2.8"), None).await?;
    let (options, client, _) = ground.etcd_parts().context("it is etcd")?;
    let relay = Relay::start(etcd.address()).await?;
    let node =
        etcd::open(&EtcdOptions { endpoints: vec![relay.endpoint()], ..options.clone() })?.network(None);
    // Opens the connection, so that the next large answer is the list.
    ensure!(matches!(node.network_config().await, Err(StoreError::NoConfig { .. })));
    relay.hold_requests_after_the_next_answer();
    let mut events = node.watch();
    let (mut client, held) = (client.clone(), relay.is_holding());
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

pub(crate) async fn a_restart_after_a_compaction_means_a_fresh_snapshot() -> Result<()> {
    let mut etcd = start().await?;
    let node = store(&[etcd.endpoint()])?;
    let ground = Ground::etcd(&etcd, "unused").await?;
    let (_, client, _) = ground.etcd_parts().context("it is etcd")?;
    let mut client = client.clone();
    let relay = Relay::start(etcd.address()).await?;
    let behind = store(&[relay.endpoint()])?;
    let mut events = behind.watch();
    snapshot_of(&mut events, 0).await?;
    // This one is cut off while the world goes on and forgets.
    relay.stall();
    let lease = node.acquire(&request(&network("10.5.255.0"), "192.0.2.1")).await?;
    let gone = "/coreos.com/network/subnets/10.5.1.0-24";
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

pub(crate) async fn user_and_password_open_the_door() -> Result<()> {
    let etcd = start().await?;
    let endpoint = etcd.endpoint();
    let with = |user: &str, password: &str| EtcdOptions {
        username: Some(user.into()),
        password: Some(password.into()),
        ..options(std::slice::from_ref(&endpoint))
    };
    let good = with("root", PASSWORD);
    ensure!(!format!("{good:?}").contains(PASSWORD), "Debug shows the password");
    // A user where none is wanted is no reason to stop.
    let early = etcd::open(&good)?.network(None);
    ensure!(matches!(early.network_config().await, Err(StoreError::NoConfig { .. })));

    let etcd = {
        let password = PASSWORD.to_owned();
        tokio::task::spawn_blocking(move || etcd.require_password(&password).map(|()| etcd)).await??
    };
    let node = etcd::open(&good)?.network(None);
    let lease = node.acquire(&request(&network("10.5.255.0"), "192.0.2.1")).await?;
    let mut events = node.watch();
    snapshot_of(&mut events, 1).await?;

    for (options, wanted) in [
        (options(std::slice::from_ref(&endpoint)), "--etcd-username"),
        (with("root", "wrong-password"), "authentication failed"),
        (with("nobody", PASSWORD), "authentication failed"),
    ] {
        let error = etcd::open(&options)?.network(None).network_config().await.unwrap_err();
        ensure!(matches!(error, StoreError::Refused { .. }), "{error}");
        let text = format!("{error} {error:?}");
        ensure!(text.contains(wanted), "{wanted}: {text}");
        ensure!(!text.contains(PASSWORD) && !text.contains("wrong-password"), "{text}");
        let reason =
            interrupted(&mut etcd::open(&options)?.network(None).watch(), Duration::from_secs(5)).await?;
        ensure!(reason.contains(wanted), "{reason}");
    }

    // Tokens do not survive a restart; the agent does.
    let _etcd = restart(etcd).await?;
    interrupted(&mut events, Duration::from_secs(5)).await?;
    snapshot_of(&mut events, 1).await?;
    node.renew(&lease).await?;
    Ok(())
}

fn tls_server(
    authority: &Authority,
    client_ca: Option<&Authority>,
    operator: Option<Certificate>,
) -> Result<Etcd> {
    let setup = Setup::default();
    let server = authority.server(setup.address)?;
    let tls = ServerTls { server, ca: authority.ca(), client_ca: client_ca.map(Authority::ca), operator };
    Etcd::start_with(Setup { tls: Some(tls), ..setup })
}

pub(crate) async fn mutual_tls_works_and_says_what_is_missing() -> Result<()> {
    let authority = Authority::new("lab")?;
    let stranger = Authority::new("stranger")?;
    let client = authority.client("node")?;
    let foreign = stranger.client("node")?;
    let etcd = tls_server(&authority, Some(&authority), Some(client.clone()))?;
    let base = EtcdOptions { ca_file: Some(authority.ca()), ..options(&[etcd.endpoint()]) };
    let with = |client: &Certificate| EtcdOptions {
        cert_file: Some(client.cert.clone()),
        key_file: Some(client.key.clone()),
        ..base.clone()
    };

    let node = etcd::open(&with(&client))?.network(None);
    let lease = node.acquire(&request(&network("10.5.255.0"), "192.0.2.1")).await?;
    node.renew(&lease).await?;
    let mut events = node.watch();
    snapshot_of(&mut events, 1).await?;

    for (options, wanted) in [
        (base.clone(), "--etcd-certfile"),
        (with(&foreign), "--etcd-certfile"),
        (EtcdOptions { ca_file: Some(stranger.ca()), ..with(&client) }, "--etcd-cafile"),
        (EtcdOptions { ca_file: None, ..with(&client) }, "--etcd-cafile"),
        (
            EtcdOptions { endpoints: vec![format!("http://{}", etcd.address())], ..with(&client) },
            "write https://",
        ),
    ] {
        let error = etcd::open(&options)?.network(None).network_config().await.unwrap_err().to_string();
        ensure!(error.contains(wanted), "{wanted}: {error}");
    }

    let error = etcd::open(&EtcdOptions { key_file: Some(foreign.key), ..with(&client) }).err();
    let error = error.context("a key of another certificate")?.to_string();
    ensure!(
        error.starts_with("--etcd-keyfile ") && error.contains("does not belong to --etcd-certfile"),
        "{error}"
    );
    let error = etcd::open(&EtcdOptions { key_file: Some(authority.ca()), ..with(&client) }).err();
    let error = error.context("a certificate for a key")?.to_string();
    ensure!(error.contains("holds no unencrypted private key"), "{error}");
    Ok(())
}

pub(crate) async fn an_authority_alone_verifies_the_server() -> Result<()> {
    let authority = Authority::new("lab")?;
    let stranger = Authority::new("stranger")?;
    let etcd = tls_server(&authority, None, None)?;
    // Without a scheme, the authority says that TLS is meant.
    for endpoint in [etcd.endpoint(), etcd.address().to_string()] {
        let good = EtcdOptions { ca_file: Some(authority.ca()), ..options(&[endpoint]) };
        etcd::open(&good)?.network(None).acquire(&request(&network("10.5.255.0"), "192.0.2.1")).await?;
    }
    for ca in [Some(stranger.ca()), None] {
        let bad = EtcdOptions { ca_file: ca, ..options(&[etcd.endpoint()]) };
        let error = etcd::open(&bad)?.network(None).network_config().await.unwrap_err();
        ensure!(matches!(error, StoreError::Refused { .. }), "{error}");
        ensure!(error.to_string().contains("--etcd-cafile"), "{error}");
    }
    Ok(())
}

pub(crate) async fn renewals_leave_no_lease_objects_behind() -> Result<()> {
    let etcd = start().await?;
    let node = store(&[etcd.endpoint()])?;
    let config = network("10.5.255.0");
    let mut lease = node.acquire(&request(&config, "192.0.2.1")).await?;
    for _ in 0..3 {
        lease = node.renew(&lease).await?;
    }
    store(&[etcd.endpoint()])?.acquire(&request(&config, "192.0.2.1")).await?;
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
        let (store, request) = (store(&[etcd.endpoint()]), request(&tight, &format!("192.0.2.{node}")));
        tokio::spawn(async move { store?.acquire(&request).await.map_err(anyhow::Error::from) })
    });
    let taken: Vec<_> = futures_util::future::join_all(nodes).await;
    let won = taken.iter().filter(|result| matches!(result, Ok(Ok(_)))).count();
    assert_eq!(etcd.lease_objects()?, 1 + won);
    Ok(())
}

pub(crate) async fn a_lease_object_others_use_is_not_revoked() -> Result<()> {
    let etcd = start().await?;
    let mut client = Client::connect([etcd.endpoint()], None).await?;
    let shared = client.lease_grant(3600, None).await?.id();
    let with = || Some(PutOptions::new().with_lease(shared));
    client.put("/coreos.com/network/subnets/10.5.7.0-24", r#"{"PublicIP":"192.0.2.1"}"#, with()).await?;
    client.put("/somebody/elses", "treasure", with()).await?;
    let node = store(&[etcd.endpoint()])?;
    let lease = node.acquire(&request(&network("10.5.255.0"), "192.0.2.1")).await?;
    assert_eq!(lease.subnets, subnets("10.5.7.0-24"));
    node.renew(&lease).await?;
    assert_eq!(client.get("/somebody/elses", None).await?.count(), 1);
    let options = LeaseTimeToLiveOptions::new().with_keys();
    assert_eq!(client.lease_time_to_live(shared, Some(options)).await?.keys().len(), 1);
    Ok(())
}

/// More than one answer holds.
pub(crate) async fn thousands_of_leases_are_listed_at_one_revision() -> Result<()> {
    const LEASES: u32 = 3500;
    let etcd = start().await?;
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
    let mut events = store(&[etcd.endpoint()])?.watch();
    let started = Instant::now();
    let (leases, unreadable) = first(&mut events).await?;
    assert_eq!((leases.len(), unreadable.len()), (LEASES as usize, 0));
    ensure!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    client.delete("/coreos.com/network/subnets/10.16.0.0-24", None).await?;
    assert_eq!(next(&mut events).await?, LeaseEvent::Removed(subnets("10.16.0.0-24")));
    Ok(())
}

pub(crate) async fn a_running_watch_is_compared_with_a_list() -> Result<()> {
    let etcd = start().await?;
    let options = EtcdOptions { resync: Duration::from_millis(500), ..options(&[etcd.endpoint()]) };
    let node = etcd::open(&options)?.network(None);
    let mut events = node.watch();
    snapshot_of(&mut events, 0).await?;
    let started = Instant::now();
    for _ in 0..3 {
        snapshot_of(&mut events, 0).await?;
    }
    let took = started.elapsed();
    ensure!((Duration::from_millis(1150)..Duration::from_secs(5)).contains(&took), "{took:?}");
    Ok(())
}

pub(crate) async fn our_lease_written_by_another_has_its_true_end() -> Result<()> {
    let etcd = start().await?;
    let node = store(&[etcd.endpoint()])?;
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
pub(crate) async fn leases_written_at_one_revision_are_told_apart() -> Result<()> {
    let etcd = start().await?;
    let mut client = Client::connect([etcd.endpoint()], None).await?;
    let own = r#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#;
    let folder = "/coreos.com/network/subnets";
    let put = |third: u8, value: &str| TxnOp::put(format!("{folder}/10.5.{third}.0-24"), value, None);
    client.txn(Txn::new().and_then([put(3, PEER), put(4, own), put(5, PEER)])).await?;
    let node = store(&[etcd.endpoint()])?;
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

pub(crate) async fn keys_outside_the_folder_are_not_ours() -> Result<()> {
    let etcd = start().await?;
    let mut client = Client::connect([etcd.endpoint()], None).await?;
    let node = store(&[etcd.endpoint()])?;
    let mut events = node.watch();
    snapshot_of(&mut events, 0).await?;
    for key in [
        "/coreos.com/network/subnets-old/10.5.1.0-24",
        "/coreos.com/network/subnets10.5.1.0-24",
        "/coreos.com/network2/subnets/10.5.1.0-24",
        "/coreos.com/network/blue/subnets/10.5.1.0-24",
    ] {
        client.put(key, PEER, None).await?;
    }
    let lease = node.acquire(&request(&network("10.5.1.0"), "192.0.2.1")).await?;
    let LeaseEvent::Added(seen) = next(&mut events).await? else { panic!("our lease") };
    assert_eq!(seen, lease);
    // A longer key that begins like ours comes and goes: ours is not concerned.
    let longer = "/coreos.com/network/subnets/10.5.1.0-24&fd00::-64";
    client.put(longer, PEER, None).await?;
    ensure!(matches!(next(&mut events).await?, LeaseEvent::Added(seen) if seen.subnets != lease.subnets));
    client.delete(longer, None).await?;
    assert_eq!(next(&mut events).await?, LeaseEvent::Removed(subnets("10.5.1.0-24&fd00::-64")));
    node.renew(&lease).await?;
    Ok(())
}

pub(crate) async fn the_prefix_is_cleaned() -> Result<()> {
    let etcd = start().await?;
    let options = EtcdOptions { prefix: "//coreos.com/./network//".into(), ..options(&[etcd.endpoint()]) };
    let node = etcd::open(&options)?.network(None);
    let error = node.network_config().await.unwrap_err().to_string();
    ensure!(
        error.contains("no network configuration at /coreos.com/network/config in etcd at http://"),
        "{error}"
    );
    node.acquire(&request(&network("10.5.1.0"), "192.0.2.1")).await?;
    let mut client = Client::connect([etcd.endpoint()], None).await?;
    assert_eq!(client.get("/coreos.com/network/subnets/10.5.1.0-24", None).await?.count(), 1);
    Ok(())
}

pub(crate) async fn nothing_that_cannot_work_is_accepted() -> Result<()> {
    for (options, wanted) in [
        (options(&[]), "--etcd-endpoints names no endpoint"),
        (options(&["ftp://10.0.0.1:21".into()]), "\"ftp://10.0.0.1:21\" is neither"),
        (options(&["http://10.0.0.1".into()]), "has no :port"),
    ] {
        let error = etcd::open(&options).err().context("an error")?.to_string();
        ensure!(error.contains(wanted), "{error}");
    }
    Ok(())
}
