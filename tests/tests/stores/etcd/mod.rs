//! What only a server on a network can do: die, hang, ask for a password. By both of etcd's APIs.

pub(crate) mod auto;
pub(crate) mod migrate;
pub(crate) mod v2;
pub(crate) mod v3;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use flannel_agent::domain::lease::{LeaseEvent, Subnets};
use flannel_agent::stores::etcd::{self, EtcdApi, EtcdOptions};
use flannel_agent::stores::{LeaseStore, NetworkStores, StoreError};
use flannel_tests::etcd::{Authority, Certificate, Cluster, Etcd, ServerTls, Setup, Version};
use flannel_tests::port::Port;
use tokio::net::TcpListener;

use crate::ground::{Events, Keys, first, interrupted, network, next, next_within, request, subnets};
use crate::relay::Relay;
use crate::trouble::Middle;

pub(crate) const PASSWORD: &str = "correct-horse-battery";
const PEER: &str = r#"{"PublicIP":"192.0.2.9","PublicIPv6":null}"#;

async fn start() -> Result<Etcd> {
    tokio::task::spawn_blocking(Etcd::start).await?
}

async fn start_of(version: Version) -> Result<Etcd> {
    tokio::task::spawn_blocking(move || Etcd::start_with(Setup { version, v2: false, ..Setup::default() }))
        .await?
}

async fn restart(mut etcd: Etcd) -> Result<Etcd> {
    tokio::task::spawn_blocking(move || etcd.restart().map(|()| etcd)).await?
}

fn options(api: EtcdApi, endpoints: &[String]) -> EtcdOptions {
    EtcdOptions { endpoints: endpoints.to_vec(), api, ..EtcdOptions::default() }
}

fn store(api: EtcdApi, endpoints: &[String]) -> Result<Arc<dyn LeaseStore>> {
    Ok(etcd::open(&options(api, endpoints))?.network(None))
}

/// Waits for a snapshot that holds `count` leases; nothing but snapshots may come.
async fn snapshot_of(events: &mut Events, count: usize) -> Result<()> {
    let (leases, _) = first(events).await?;
    ensure!(leases.len() == count, "{} leases instead of {count}", leases.len());
    Ok(())
}

pub(crate) async fn an_etcd_that_is_killed_is_one_interruption_and_then_a_snapshot(
    api: EtcdApi,
) -> Result<()> {
    let mut etcd = start().await?;
    let node = store(api, &[etcd.endpoint()])?;
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

pub(crate) async fn a_frozen_etcd_is_noticed_within_ten_seconds(api: EtcdApi) -> Result<()> {
    let etcd = start().await?;
    let node = store(api, &[etcd.endpoint()])?;
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
pub(crate) async fn an_etcd_that_is_away_is_not_asked_in_a_loop(api: EtcdApi) -> Result<()> {
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
    let mut events = store(api, &[endpoint])?.watch();
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
pub(crate) async fn a_quiet_watch_is_not_broken_by_our_own_questions(api: EtcdApi) -> Result<()> {
    let etcd = start().await?;
    let mut events = store(api, &[etcd.endpoint()])?.watch();
    snapshot_of(&mut events, 0).await?;
    let noise = next_within(&mut events, Duration::from_secs(26)).await;
    ensure!(noise.is_err(), "{noise:?}");
    Ok(())
}

pub(crate) async fn a_dead_endpoint_is_passed_over(api: EtcdApi) -> Result<()> {
    let etcd = start().await?;
    let nobody = Port::hold("127.0.0.1".parse()?)?;
    let dead = format!("http://{}", nobody.address());
    let list = [dead.clone(), etcd.endpoint(), dead.clone()];
    let config = network("10.5.255.0");
    for _ in 0..5 {
        let node = store(api, &list)?;
        let lease = node.acquire(&request(&config, "192.0.2.1")).await?;
        node.renew(&lease).await?;
        let mut events = node.watch();
        snapshot_of(&mut events, 1).await?;
    }
    let error = store(api, &[dead.clone(), dead.clone()])?.network_config().await.unwrap_err().to_string();
    ensure!(error.matches(&dead).count() == 4, "both endpoints are named with their reasons: {error}");
    Ok(())
}

pub(crate) async fn a_watch_moves_to_another_endpoint_when_its_own_dies(api: EtcdApi) -> Result<()> {
    let etcd = start().await?;
    let relay = Relay::start(etcd.address()).await?;
    // The v2 API's endpoints are shuffled.
    let (node, mut events) = loop {
        let node = store(api, &[relay.endpoint(), etcd.endpoint()])?;
        let mut events = node.watch();
        snapshot_of(&mut events, 0).await?;
        if relay.connections() > 0 {
            break (node, events);
        }
        ensure!(api == EtcdApi::V2, "the first endpoint is used first");
    };
    drop(relay);
    interrupted(&mut events, Duration::from_secs(2)).await?;
    let away = Instant::now();
    snapshot_of(&mut events, 0).await?;
    ensure!(away.elapsed() < Duration::from_secs(3), "{:?}", away.elapsed());
    node.acquire(&request(&network("10.5.255.0"), "192.0.2.1")).await?;
    ensure!(matches!(next(&mut events).await?, LeaseEvent::Added(_)));
    Ok(())
}

/// What a lease was chosen from spares the first watch a list. For a later one it is old: leases taken since are not in it.
pub(crate) async fn a_watch_that_comes_back_right_after_a_lease_was_taken_knows_all(
    api: EtcdApi,
) -> Result<()> {
    let etcd = start().await?;
    let middle = Middle::start(etcd.address()).await?;
    let node = store(api, &[format!("http://{}", middle.address())])?;
    let config = network("10.5.255.0");
    node.acquire(&request(&config, "192.0.2.1")).await?;
    let mut events = node.watch();
    snapshot_of(&mut events, 1).await?;
    node.acquire(&request(&config, "192.0.2.1")).await?;
    ensure!(matches!(next(&mut events).await?, LeaseEvent::Added(_)));
    let other = store(api, &[etcd.endpoint()])?.acquire(&request(&config, "192.0.2.2")).await?;
    let told = next(&mut events).await?;
    ensure!(matches!(&told, LeaseEvent::Added(told) if told.subnets == other.subnets), "{told:?}");
    middle.hang_up();
    interrupted(&mut events, Duration::from_secs(5)).await?;
    snapshot_of(&mut events, 2).await
}

/// Three members: the one that leads dies and comes back, and the next that leads hangs and goes on.
pub(crate) async fn a_cluster_that_loses_its_leader_loses_nothing(api: EtcdApi) -> Result<()> {
    let in_thread = tokio::task::spawn_blocking(|| Cluster::start(3));
    let mut cluster = in_thread.await??;
    let config = network("10.5.255.0");
    let node = store(api, &cluster.endpoints())?;
    let lease = node.acquire(&request(&config, "192.0.2.1")).await?;
    let mut events = node.watch();
    snapshot_of(&mut events, 1).await?;
    let mut known = vec![lease.subnets];
    for hangs in [false, true] {
        let leader;
        (cluster, leader) = tokio::task::spawn_blocking(move || {
            let leader = cluster.leader()?;
            anyhow::Ok((cluster, leader))
        })
        .await??;
        let member = cluster.members.get_mut(leader).context("the member that leads")?;
        if hangs {
            member.freeze()?;
        } else {
            member.kill();
        }
        let since = Instant::now();
        // Who asks in the time without a leader asks again, as the agent's loop does.
        retried(|| node.renew(&lease)).await?;
        let other = store(api, &cluster.endpoints())?;
        let asked = request(&config, &format!("192.0.2.{}", known.len() + 1));
        known.push(retried(|| other.acquire(&asked)).await?.subnets);
        told_of(&mut events, &known).await?;
        ensure!(since.elapsed() < Duration::from_secs(25), "{:?}, hangs: {hangs}", since.elapsed());
        cluster = tokio::task::spawn_blocking(move || {
            let member = cluster.members.get_mut(leader).context("the member that led")?;
            if hangs {
                member.thaw()?
            } else {
                member.restart()?
            }
            anyhow::Ok(cluster)
        })
        .await??;
    }
    Ok(())
}

/// Asks until it is answered, for as long as an election and a dead connection take.
async fn retried<T, F: Future<Output = Result<T, StoreError>>>(ask: impl Fn() -> F) -> Result<T> {
    let started = Instant::now();
    loop {
        match ask().await {
            Ok(answer) => return Ok(answer),
            Err(e) if started.elapsed() > Duration::from_secs(20) => return Err(e.into()),
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

/// Waits until the watch has told of the last of these leases, by itself or in a snapshot, which has to have all.
async fn told_of(events: &mut Events, known: &[Subnets]) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(25);
    loop {
        let left = end.saturating_duration_since(Instant::now());
        match next_within(events, left).await? {
            LeaseEvent::Snapshot(leases, _) => {
                let all: Vec<Subnets> = leases.iter().map(|lease| lease.subnets).collect();
                let before = known.split_last().map(|(_, before)| before).unwrap_or_default();
                ensure!(before.iter().all(|subnets| all.contains(subnets)), "{all:?} without {before:?}");
                if all.len() == known.len() {
                    return Ok(());
                }
            }
            LeaseEvent::Added(lease) if Some(&lease.subnets) == known.last() => return Ok(()),
            LeaseEvent::Removed(subnets) => bail!("{subnets:?} was lost"),
            _ => {}
        }
    }
}

pub(crate) async fn user_and_password_open_the_door(api: EtcdApi) -> Result<()> {
    let etcd = start().await?;
    let endpoint = etcd.endpoint();
    let with = |user: &str, password: &str| EtcdOptions {
        username: Some(user.into()),
        password: Some(password.into()),
        ..options(api, std::slice::from_ref(&endpoint))
    };
    let good = with("root", PASSWORD);
    ensure!(!format!("{good:?}").contains(PASSWORD), "Debug shows the password");
    // A user where none is wanted is no reason to stop.
    let early = etcd::open(&good)?.network(None);
    ensure!(matches!(early.network_config().await, Err(StoreError::NoConfig { .. })));

    let etcd = {
        let password = PASSWORD.to_owned();
        let require = match api {
            EtcdApi::V2 => Etcd::require_v2_password,
            _ => Etcd::require_password,
        };
        tokio::task::spawn_blocking(move || require(&etcd, &password).map(|()| etcd)).await??
    };
    let node = etcd::open(&good)?.network(None);
    let lease = node.acquire(&request(&network("10.5.255.0"), "192.0.2.1")).await?;
    let mut events = node.watch();
    snapshot_of(&mut events, 1).await?;

    for (options, wanted) in [
        (options(api, std::slice::from_ref(&endpoint)), "--etcd-username"),
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
    let (restarted, seen) = tokio::join!(restart(etcd), interrupted(&mut events, Duration::from_secs(9)));
    let (_etcd, _) = (restarted?, seen?);
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

pub(crate) async fn mutual_tls_works_and_says_what_is_missing(api: EtcdApi) -> Result<()> {
    let authority = Authority::new("lab")?;
    let stranger = Authority::new("stranger")?;
    let client = authority.client("node")?;
    let foreign = stranger.client("node")?;
    let etcd = tls_server(&authority, Some(&authority), Some(client.clone()))?;
    let base = EtcdOptions { ca_file: Some(authority.ca()), ..options(api, &[etcd.endpoint()]) };
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

pub(crate) async fn an_authority_alone_verifies_the_server(api: EtcdApi) -> Result<()> {
    let authority = Authority::new("lab")?;
    let stranger = Authority::new("stranger")?;
    let etcd = tls_server(&authority, None, None)?;
    // Without a scheme, the authority says that TLS is meant.
    for endpoint in [etcd.endpoint(), etcd.address().to_string()] {
        let good = EtcdOptions { ca_file: Some(authority.ca()), ..options(api, &[endpoint]) };
        etcd::open(&good)?.network(None).acquire(&request(&network("10.5.255.0"), "192.0.2.1")).await?;
    }
    for ca in [Some(stranger.ca()), None] {
        let bad = EtcdOptions { ca_file: ca, ..options(api, &[etcd.endpoint()]) };
        let error = etcd::open(&bad)?.network(None).network_config().await.unwrap_err();
        ensure!(matches!(error, StoreError::Refused { .. }), "{error}");
        ensure!(error.to_string().contains("--etcd-cafile"), "{error}");
    }
    Ok(())
}

pub(crate) async fn a_running_watch_is_compared_with_a_list(api: EtcdApi) -> Result<()> {
    let etcd = start().await?;
    let options = EtcdOptions { resync: Duration::from_millis(500), ..options(api, &[etcd.endpoint()]) };
    let node = etcd::open(&options)?.network(None);
    let mut events = node.watch();
    // From before the watch, so that a stop of ours makes no interval shorter.
    let started = Instant::now();
    snapshot_of(&mut events, 0).await?;
    for _ in 0..3 {
        snapshot_of(&mut events, 0).await?;
    }
    let took = started.elapsed();
    ensure!((Duration::from_millis(1150)..Duration::from_secs(5)).contains(&took), "{took:?}");
    Ok(())
}

pub(crate) async fn keys_outside_the_folder_are_not_ours(api: EtcdApi) -> Result<()> {
    let etcd = start().await?;
    let keys = Keys::of(&etcd, api).await?;
    let node = store(api, &[etcd.endpoint()])?;
    let mut events = node.watch();
    snapshot_of(&mut events, 0).await?;
    for key in [
        "/coreos.com/network/subnets-old/10.5.1.0-24",
        "/coreos.com/network/subnets10.5.1.0-24",
        "/coreos.com/network2/subnets/10.5.1.0-24",
        "/coreos.com/network/blue/subnets/10.5.1.0-24",
    ] {
        keys.put(key, PEER, None).await?;
    }
    let lease = node.acquire(&request(&network("10.5.1.0"), "192.0.2.1")).await?;
    let LeaseEvent::Added(seen) = next(&mut events).await? else { panic!("our lease") };
    assert_eq!((seen.subnets, &seen.attrs, seen.revision), (lease.subnets, &lease.attrs, lease.revision));
    // A longer key that begins like ours comes and goes: ours is not concerned.
    let longer = "/coreos.com/network/subnets/10.5.1.0-24&fd00::-64";
    keys.put(longer, PEER, None).await?;
    ensure!(matches!(next(&mut events).await?, LeaseEvent::Added(seen) if seen.subnets != lease.subnets));
    keys.delete(longer).await?;
    assert_eq!(next(&mut events).await?, LeaseEvent::Removed(subnets("10.5.1.0-24&fd00::-64")));
    node.renew(&lease).await?;
    Ok(())
}

pub(crate) async fn the_prefix_is_cleaned(api: EtcdApi) -> Result<()> {
    let etcd = start().await?;
    let options =
        EtcdOptions { prefix: "//coreos.com/./network//".into(), ..options(api, &[etcd.endpoint()]) };
    let node = etcd::open(&options)?.network(None);
    let error = node.network_config().await.unwrap_err().to_string();
    ensure!(
        error.contains("no network configuration at /coreos.com/network/config in etcd at http://"),
        "{error}"
    );
    node.acquire(&request(&network("10.5.1.0"), "192.0.2.1")).await?;
    let there = Keys::of(&etcd, api).await?.list("/coreos.com/network/subnets/").await?;
    assert_eq!(there.len(), 1);
    assert_eq!(there[0].0, "/coreos.com/network/subnets/10.5.1.0-24");
    Ok(())
}

pub(crate) async fn nothing_that_cannot_work_is_accepted(api: EtcdApi) -> Result<()> {
    for (options, wanted) in [
        (options(api, &[]), "--etcd-endpoints names no endpoint"),
        (options(api, &["ftp://10.0.0.1:21".into()]), "\"ftp://10.0.0.1:21\" is neither"),
        (options(api, &["http://10.0.0.1".into()]), "has no port from 1 to 65535"),
    ] {
        let error = etcd::open(&options).err().context("an error")?.to_string();
        ensure!(error.contains(wanted), "{error}");
    }
    Ok(())
}
