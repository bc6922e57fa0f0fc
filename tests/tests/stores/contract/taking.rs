//! A node takes its lease, for the first time and again.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use flannel_agent::domain::config::{NetworkConfig, SubnetRange};
use flannel_agent::domain::lease::LeaseAttrs;
use flannel_agent::stores::{LEASE_TTL, LeaseRequest, StoreError};
use serde_json::Value;

use super::ALL;
use crate::ground::{Ground, network, only_ipv6, request, subnets};

pub(crate) async fn a_missing_configuration_is_named(ground: Ground) -> Result<()> {
    let error = ground.node().network_config().await.unwrap_err();
    ensure!(matches!(error, StoreError::NoConfig { .. }), "{error}");
    if let (Some(options), true) = (ground.etcd_options(), ground.tells_revisions()) {
        ensure!(
            error.to_string().contains(&format!("no network configuration at {}/config", options.prefix)),
            "{error}"
        );
    }
    let text = r#"{"Network":"10.5.0.0/16"}"#;
    ground.configure(text).await?;
    // A server says it with the defaults filled in.
    assert_eq!(NetworkConfig::parse(&ground.node().network_config().await?)?, NetworkConfig::parse(text)?);
    Ok(())
}

pub(crate) async fn a_first_lease_is_written_as_flanneld_writes_it(ground: Ground) -> Result<()> {
    let lease = ground.node().acquire(&request(&network("10.5.1.0"), "1.2.3.4")).await?;
    assert_eq!(lease.subnets.to_string(), "10.5.1.0-24");
    assert!(ground.is_fresh(lease.expires), "{:?}", lease.expires);
    assert_eq!(lease.revision != 0, ground.tells_revisions());
    let value = r#"{"PublicIP":"1.2.3.4","PublicIPv6":null}"#.to_owned();
    assert_eq!(ground.entries().await?, [("10.5.1.0-24".to_owned(), value)]);
    let seen = ground.snapshot().await?;
    assert_eq!(seen.len(), 1);
    assert_eq!((seen[0].subnets, seen[0].revision), (lease.subnets, lease.revision));
    assert!(ground.is_fresh(seen[0].expires), "{:?}", seen[0].expires);
    Ok(())
}

/// Leases of v0.20.2 come out as they went in; those of v0.7.0 gain `PublicIPv6`.
pub(crate) async fn recorded_leases_are_read_and_written_back_byte_for_byte(ground: Ground) -> Result<()> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures");
    let mut recorded = Vec::new();
    for backend in ["alloc", "host-gw", "ipip", "udp", "vxlan", "vxlan-directrouting"] {
        let text = std::fs::read_to_string(folder.join("v0.20.2").join(backend).join("etcd-v3.json"))?;
        let entries: Vec<Value> = serde_json::from_str(&text)?;
        recorded.extend(entries.iter().filter_map(|entry| {
            let key = entry["key"].as_str()?.strip_prefix("/coreos.com/network/subnets/")?;
            Some((key.to_owned(), entry["value"].as_str()?.to_owned()))
        }));
    }
    for backend in ["host-gw", "udp", "vxlan"] {
        let text = std::fs::read_to_string(folder.join("v0.7.0").join(backend).join("etcd-v2.json"))?;
        let dump: Value = serde_json::from_str(&text)?;
        find_v2(&dump["node"], &mut recorded);
    }
    ensure!(recorded.len() >= 21, "{} recordings", recorded.len());
    for (key, value) in recorded {
        ground.put(&key, &value, Some(LEASE_TTL)).await?;
        let [lease] = &ground.snapshot().await?[..] else {
            panic!("{key} {value} is one lease");
        };
        assert_eq!(lease.subnets.to_string(), key);
        let mut today = value.clone();
        if !value.contains("PublicIPv6") {
            let ip = r#"{"PublicIP":""#.len();
            let end = value[ip..].find('"').context("the address ends")? + ip + 1;
            today.insert_str(end, r#","PublicIPv6":null"#);
        }
        assert_eq!(lease.attrs.to_json(), today);

        // The node itself comes back.
        let mut config = network(ALL);
        config.v4 = Some(SubnetRange {
            network: "10.244.0.0/16".parse()?,
            subnet_len: 24,
            subnet_min: "10.244.1.0".parse()?,
            subnet_max: "10.244.255.0".parse()?,
        });
        let again = LeaseRequest { config, attrs: lease.attrs.clone(), previous: None, previous_only: false };
        assert_eq!(ground.node().acquire(&again).await?.subnets, lease.subnets);
        assert_eq!(ground.entries().await?, [(key.clone(), today)]);
        ground.delete(&key).await?;
    }
    Ok(())
}

fn find_v2(node: &Value, found: &mut Vec<(String, String)>) {
    if let (Some(key), Some(value)) = (node["key"].as_str(), node["value"].as_str())
        && let Some(key) = key.strip_prefix("/coreos.com/network/subnets/")
    {
        found.push((key.to_owned(), value.to_owned()));
    }
    for child in node["nodes"].as_array().into_iter().flatten() {
        find_v2(child, found);
    }
}

pub(crate) async fn a_node_that_comes_back_gets_its_lease_again(ground: Ground) -> Result<()> {
    let request = request(&network(ALL), "192.0.2.1");
    let lease = ground.node().acquire(&request).await?;
    for _ in 0..3 {
        let again = ground.node().acquire(&request).await?;
        assert_eq!(again.subnets, lease.subnets);
        assert_eq!(again.revision > lease.revision, ground.tells_revisions());
        assert!(ground.is_fresh(again.expires));
    }
    assert_eq!(ground.entries().await?.len(), 1);
    Ok(())
}

pub(crate) async fn the_previous_subnet_is_taken_when_it_is_free(ground: Ground) -> Result<()> {
    let config = network(ALL);
    let with = |ip: &str, key: &str| LeaseRequest { previous: Some(subnets(key)), ..request(&config, ip) };
    let first = ground.node().acquire(&with("192.0.2.1", "10.5.77.0-24")).await?;
    assert_eq!(first.subnets, subnets("10.5.77.0-24"));
    for key in ["10.5.77.0-24", "10.6.77.0-24", "10.5.77.0-25"] {
        let other = ground.node().acquire(&with("192.0.2.2", key)).await?;
        assert_ne!(other.subnets, subnets(key), "leased, outside or of another length");
        ground.delete(&other.subnets.to_string()).await?;
    }
    ground.put("10.5.64.0-20", r#"{"PublicIP":"192.0.2.9"}"#, None).await?;
    let other = ground.node().acquire(&with("192.0.2.3", "10.5.78.0-24")).await?;
    assert!(!other.subnets.overlaps(&subnets("10.5.64.0-20")), "{} is in another's lease", other.subnets);
    Ok(())
}

pub(crate) async fn a_running_node_gets_no_other_subnet(ground: Ground) -> Result<()> {
    let only = LeaseRequest {
        previous: Some(subnets("10.5.9.0-24")),
        previous_only: true,
        ..request(&network(ALL), "192.0.2.1")
    };
    let node = ground.node();
    assert_eq!(node.acquire(&only).await?.subnets, subnets("10.5.9.0-24"));
    assert_eq!(node.acquire(&only).await?.subnets, subnets("10.5.9.0-24"));
    ground.put("10.5.9.0-24", r#"{"PublicIP":"192.0.2.66"}"#, Some(LEASE_TTL)).await?;
    let error = node.acquire(&only).await.unwrap_err();
    ensure!(matches!(error, StoreError::LeaseLost { .. }), "{error}");
    ensure!(error.to_string().contains("192.0.2.66"), "{error}");
    assert_eq!(ground.entries().await?.len(), 1);
    Ok(())
}

pub(crate) async fn a_lease_that_no_longer_fits_is_replaced(ground: Ground) -> Result<()> {
    let lease = ground.node().acquire(&request(&network(ALL), "192.0.2.1")).await?;
    let mut config = network(ALL);
    config.v4 = Some(SubnetRange {
        network: "10.6.0.0/16".parse()?,
        subnet_len: 25,
        subnet_min: "10.6.0.128".parse()?,
        subnet_max: "10.6.255.128".parse()?,
    });
    let previous = LeaseRequest { previous: Some(lease.subnets), ..request(&config, "192.0.2.1") };
    let new = ground.node().acquire(&previous).await?;
    assert!(new.subnets.to_string().starts_with("10.6.") && new.subnets.to_string().ends_with("-25"));
    let keys: Vec<_> = ground.entries().await?.into_iter().map(|(key, _)| key).collect();
    assert_eq!(keys, [new.subnets.to_string()]);
    Ok(())
}

pub(crate) async fn both_families_are_leased_under_one_key(ground: Ground) -> Result<()> {
    let mut config = network(ALL);
    config.v6 = Some(SubnetRange {
        network: "fd00::/48".parse()?,
        subnet_len: 64,
        subnet_min: "fd00:0:0:1::".parse()?,
        subnet_max: "fd00:0:0:1::".parse()?,
    });
    // Somebody who has IPv4 only does not disturb.
    ground.put("10.5.3.0-24", r#"{"PublicIP":"192.0.2.9"}"#, None).await?;
    let mut request = request(&config, "192.0.2.1");
    request.attrs.public_ipv6 = Some("2001:db8::1".parse()?);
    let lease = ground.node().acquire(&request).await?;
    let key = lease.subnets.to_string();
    ensure!(key.ends_with("&fd00:0:0:1::-64"), "{key}");
    assert_eq!(ground.value(&key).await?, r#"{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1"}"#);
    assert_eq!(ground.node().acquire(&request).await?.subnets, lease.subnets);
    // The next one finds the only IPv6 subnet leased.
    request.attrs.public_ip = "192.0.2.2".parse()?;
    let error = ground.node().acquire(&request).await.unwrap_err();
    ensure!(matches!(error, StoreError::OutOfSubnets(_)), "{error}");
    Ok(())
}

/// flanneld's key for it; flanneld itself leases such networks from Kubernetes only (contract T17).
pub(crate) async fn a_network_of_only_ipv6_is_leased(ground: Ground) -> Result<()> {
    let config = only_ipv6();
    let node = ground.node();
    let first = node.acquire(&request(&config, "2001:db8::1")).await?;
    let second = ground.node().acquire(&request(&config, "2001:db8::2")).await?;
    let (one, two) = (subnets("0.0.0.0-0&fd00:0:0:1::-64"), subnets("0.0.0.0-0&fd00:0:0:2::-64"));
    assert_eq!(BTreeSet::from([first.subnets, second.subnets]), BTreeSet::from([one, two]));
    let value = |ip: &str| format!(r#"{{"PublicIP":"0.0.0.0","PublicIPv6":"{ip}"}}"#);
    assert_eq!(ground.value(first.subnets).await?, value("2001:db8::1"));
    assert_eq!(ground.snapshot().await?.len(), 2);
    // It comes back, and moves.
    assert_eq!(ground.node().acquire(&request(&config, "2001:db8::1")).await?.subnets, first.subnets);
    let moved = node.rewrite(&first, &LeaseAttrs::of_node("2001:db8::9".parse()?)).await?;
    assert_eq!(ground.value(moved.subnets).await?, value("2001:db8::9"));
    node.renew(&moved).await?;
    assert_eq!(ground.value(second.subnets).await?, value("2001:db8::2"));
    ground.delete(&moved.subnets.to_string()).await?;
    let error = node.renew(&moved).await.unwrap_err();
    assert_eq!(error.to_string(), format!("lease {} is lost: {}", moved.subnets, ground.words_for_deleted()));
    Ok(())
}

pub(crate) async fn a_full_network_says_so(ground: Ground) -> Result<()> {
    let config = network("10.5.3.0");
    for node in 1..=3 {
        ground.node().acquire(&request(&config, &format!("192.0.2.{node}"))).await?;
    }
    let error = ground.node().acquire(&request(&config, "192.0.2.4")).await.unwrap_err();
    assert_eq!(error.to_string(), "out of subnets: every /24 from 10.5.1.0 to 10.5.3.0 is leased");
    Ok(())
}

/// Every one of them loses races and asks again.
pub(crate) async fn eight_nodes_at_once_share_eight_subnets(ground: Ground) -> Result<()> {
    let config = network("10.5.8.0");
    let nodes = (1..=8).map(|node| {
        let (store, request) = (ground.node(), request(&config, &format!("192.0.2.{node}")));
        tokio::spawn(async move { store.acquire(&request).await })
    });
    let mut taken = BTreeSet::new();
    for node in futures_util::future::join_all(nodes).await {
        taken.insert(node??.subnets);
    }
    assert_eq!(taken.len(), 8);
    assert_eq!(ground.entries().await?.len(), 8);
    Ok(())
}

/// Behind NAT, as with Vagrant.
pub(crate) async fn two_nodes_with_one_public_address_share_a_lease(ground: Ground) -> Result<()> {
    let request = request(&network(ALL), "192.0.2.1");
    let (one, other) = (ground.node(), ground.node());
    let first = one.acquire(&request).await?;
    let second = other.acquire(&request).await?;
    assert_eq!(first.subnets, second.subnets);
    let first = one.renew(&first).await?;
    let second = other.renew(&second).await?;
    assert_eq!(second.revision > first.revision, ground.tells_revisions());
    assert_eq!(ground.entries().await?.len(), 1);
    Ok(())
}

pub(crate) async fn an_address_of_the_wrong_family_is_refused(ground: Ground) -> Result<()> {
    let config = NetworkConfig::parse(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48"}"#)?;
    let error = ground.node().acquire(&request(&config, "192.0.2.1")).await.unwrap_err();
    ensure!(matches!(error, StoreError::Refused { .. }), "{error}");
    let error = ground.node().acquire(&request(&network(ALL), "0.0.0.0")).await.unwrap_err();
    ensure!(matches!(error, StoreError::Refused { .. }), "{error}");
    Ok(())
}
