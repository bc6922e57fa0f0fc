//! `--etcd-api=auto`: which keyspace is taken, and when.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use flannel_agent::domain::lease::LeaseEvent;
use flannel_agent::stores::etcd::{self, EtcdApi, EtcdOptions};
use flannel_agent::stores::{NetworkEvent, NetworkStores, StoreError};
use flannel_tests::etcd::Version;
use futures_util::StreamExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::{options, snapshot_of, start, start_of};
use crate::ground::{Keys, network, next, request};
use crate::relay::Relay;

const CONFIG: &str = r#"{"Network":"10.5.0.0/16"}"#;

fn auto(endpoint: String, prefix: &str) -> Result<Arc<dyn NetworkStores>> {
    let options = EtcdOptions { prefix: prefix.into(), ..options(EtcdApi::Auto, &[endpoint]) };
    Ok(Arc::new(etcd::open(&options)?))
}

pub(crate) async fn the_keyspace_with_the_configuration_is_taken() -> Result<()> {
    let etcd = start().await?;
    let keys = |api| Keys::of(&etcd, api);
    let (v2, v3) = (keys(EtcdApi::V2).await?, keys(EtcdApi::V3).await?);
    for (number, (mine, other, key)) in [
        (&v2, &v3, "config"),
        (&v3, &v2, "config"),
        // Only networks with names.
        (&v2, &v3, "blue/config"),
        (&v3, &v2, "blue/config"),
    ]
    .into_iter()
    .enumerate()
    {
        let prefix = format!("/auto{number}");
        mine.put(&format!("{prefix}/{key}"), CONFIG, None).await?;
        // Leases alone are no network.
        other.put(&format!("{prefix}/subnets/10.5.9.0-24"), super::PEER, None).await?;
        let name = key.strip_suffix("/config").map(str::parse).transpose()?;
        let node = auto(etcd.endpoint(), &prefix)?.network(name.as_ref());
        assert_eq!(node.network_config().await?, CONFIG);
        let lease = node.acquire(&request(&network("10.5.1.0"), "192.0.2.1")).await?;
        node.renew(&lease).await?;
        snapshot_of(&mut node.watch(), 1).await?;
        assert_eq!(mine.list(&format!("{prefix}/")).await?.len(), 2);
        assert_eq!(other.list(&format!("{prefix}/")).await?.len(), 1);
    }
    Ok(())
}

pub(crate) async fn of_two_configurations_that_of_v3_is_taken_with_a_warning() -> Result<()> {
    let etcd = start().await?;
    for (api, network) in [(EtcdApi::V2, "10.4.0.0/16"), (EtcdApi::V3, "10.5.0.0/16")] {
        let text = format!(r#"{{"Network":"{network}"}}"#);
        Keys::of(&etcd, api).await?.put("/two-keyspaces/config", &text, None).await?;
    }
    let node = auto(etcd.endpoint(), "/two-keyspaces")?.network(None);
    assert_eq!(node.network_config().await?, CONFIG);
    let warned = || {
        let log = crate::LOG.lock().unwrap();
        let text = String::from_utf8_lossy(&log).into_owned();
        let mut lines = text.lines();
        lines.any(|line| {
            line.contains("WARN") && line.contains("below /two-keyspaces") && line.contains("--etcd-api=v2")
        })
    };
    let started = Instant::now();
    while !warned() {
        ensure!(started.elapsed() < Duration::from_secs(5), "no warning");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

pub(crate) async fn while_there_is_no_configuration_both_are_looked_at() -> Result<()> {
    let etcd = start().await?;
    let networks = auto(etcd.endpoint(), "/later")?;
    let node = networks.network(None);
    let error = node.network_config().await.unwrap_err();
    ensure!(matches!(error, StoreError::NoConfig { .. }), "{error}");
    ensure!(error.to_string().contains("/later/config"), "{error}");
    let error = node.acquire(&request(&network("10.5.1.0"), "192.0.2.1")).await.unwrap_err();
    ensure!(error.to_string().contains("neither of its APIs holds"), "{error}");
    let (mut events, mut changes) = (node.watch(), networks.watch_networks());
    snapshot_of(&mut events, 0).await?;
    assert_eq!(changes.next().await, Some(NetworkEvent::Snapshot(Vec::new())));

    let v2 = Keys::of(&etcd, EtcdApi::V2).await?;
    v2.put("/later/subnets/10.5.9.0-24", super::PEER, None).await?;
    v2.put("/later/blue/config", CONFIG, None).await?;
    snapshot_of(&mut events, 1).await?;
    assert_eq!(changes.next().await, Some(NetworkEvent::Snapshot(vec!["blue".parse()?])));
    // From now on it stays.
    let v3 = Keys::of(&etcd, EtcdApi::V3).await?;
    v3.put("/later/config", r#"{"Network":"10.6.0.0/16"}"#, None).await?;
    v2.put("/later/config", CONFIG, None).await?;
    assert_eq!(node.network_config().await?, CONFIG);
    let lease = node.acquire(&request(&network("10.5.1.0"), "192.0.2.1")).await?;
    let LeaseEvent::Added(seen) = next(&mut events).await? else { panic!("our lease") };
    assert_eq!(seen.subnets, lease.subnets);
    Ok(())
}

pub(crate) async fn an_etcd_with_one_api_only_is_no_trouble(version: Version) -> Result<()> {
    let etcd = start_of(version).await?;
    let node = auto(etcd.endpoint(), "/one")?.network(None);
    ensure!(matches!(node.network_config().await, Err(StoreError::NoConfig { .. })));
    Keys::of(&etcd, EtcdApi::V3).await?.put("/one/config", CONFIG, None).await?;
    assert_eq!(node.network_config().await?, CONFIG);
    node.acquire(&request(&network("10.5.1.0"), "192.0.2.1")).await?;
    Ok(())
}

pub(crate) async fn a_v2_that_does_not_answer_keeps_nobody_waiting() -> Result<()> {
    let etcd = start().await?;
    let relay = Relay::start(etcd.address()).await?;
    relay.swallow_http1();
    Keys::of(&etcd, EtcdApi::V3).await?.put("/slow/config", CONFIG, None).await?;
    let node = auto(relay.endpoint(), "/slow")?.network(None);
    let started = Instant::now();
    assert_eq!(node.network_config().await?, CONFIG);
    ensure!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    Ok(())
}

/// Debian has none so old: what it would say is played. An etcd that has v3 and does not let us see it is another thing.
pub(crate) async fn an_etcd_older_than_v3_is_taken_as_v2() -> Result<()> {
    for (version, taken) in [("2.3.8", true), ("3.4.30", false)] {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let endpoint = format!("http://{}", listener.local_addr()?);
        let server = tokio::spawn(async move {
            while let Ok((mut connection, _)) = listener.accept().await {
                let mut buffer = [0; 4096];
                let length = connection.read(&mut buffer).await.unwrap_or_default();
                let asked = String::from_utf8_lossy(&buffer[..length]).into_owned();
                let body = match asked.split(' ').nth(1) {
                    Some("/version") => format!(r#"{{"etcdserver":"{version}","etcdcluster":"{version}"}}"#),
                    Some(path) if path.starts_with("/v2/keys/old/config?") => {
                        let value = CONFIG.replace('"', "\\\"");
                        format!(
                            r#"{{"action":"get","node":{{"key":"/old/config","value":"{value}","modifiedIndex":7}}}}"#
                        )
                    }
                    // HTTP/2 is unknown to it.
                    _ => continue,
                };
                let answer = format!(
                    "HTTP/1.1 200 OK\r\nX-Etcd-Index: 7\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
                    body.len()
                );
                let _ = connection.write_all(answer.as_bytes()).await;
            }
        });
        let config = auto(endpoint, "/old")?.network(None).network_config().await;
        match taken {
            true => assert_eq!(config?, CONFIG),
            false => ensure!(matches!(config, Err(StoreError::Unreachable { .. })), "{config:?}"),
        }
        server.abort();
    }
    Ok(())
}
