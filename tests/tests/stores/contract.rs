//! The contract of a lease store (contract §3.4–3.9), one sentence per case.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flannel_agent::domain::config::{NetworkConfig, SubnetRange};
use flannel_agent::domain::lease::{LeaseAttrs, LeaseEvent, Reservation};
use flannel_agent::stores::{LEASE_TTL, LeaseRequest, StoreError};
use serde_json::Value;

use crate::ground::{Ground, first, network, next, next_unreadable, request, subnets};

const ALL: &str = "10.5.255.0";

/// A day from now, give or take what the test itself took.
fn a_day_ahead(end: Option<Instant>) -> bool {
    let wanted = Instant::now() + LEASE_TTL;
    end.is_some_and(|end| end <= wanted && end + Duration::from_secs(30) > wanted)
}

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
    assert!(a_day_ahead(lease.expires), "{:?}", lease.expires);
    assert_eq!(lease.revision != 0, ground.tells_revisions());
    let value = r#"{"PublicIP":"1.2.3.4","PublicIPv6":null}"#.to_owned();
    assert_eq!(ground.entries().await?, [("10.5.1.0-24".to_owned(), value)]);
    let seen = ground.snapshot().await?;
    assert_eq!(seen.len(), 1);
    assert_eq!((seen[0].subnets, seen[0].revision), (lease.subnets, lease.revision));
    assert!(a_day_ahead(seen[0].expires), "{:?}", seen[0].expires);
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
        assert!(a_day_ahead(again.expires));
    }
    assert_eq!(ground.entries().await?.len(), 1);
    Ok(())
}

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
    assert!(a_day_ahead(node.renew(&renewed).await?.expires));
    Ok(())
}

pub(crate) async fn a_renewal_moves_the_end(ground: Ground) -> Result<()> {
    let value = r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1}}"#;
    ground.put("10.5.7.0-24", value, Some(Duration::from_secs(3))).await?;
    let node = ground.node();
    let mut events = node.watch();
    let (leases, _) = first(&mut events).await?;
    let before = leases.first().context("the lease is there")?.clone();
    let after = node.renew(&before).await?;
    assert!(a_day_ahead(after.expires));
    assert_eq!(after.attrs, LeaseAttrs::from_json(value)?);
    assert_eq!(ground.value("10.5.7.0-24").await?, value);
    let LeaseEvent::Added(seen) = next(&mut events).await? else { panic!("the watch tells the renewal") };
    assert_eq!((seen.subnets, seen.revision), (after.subnets, after.revision));
    assert!(a_day_ahead(seen.expires));
    // The old end passes without effect.
    let quiet = tokio::time::timeout(Duration::from_secs(5), next(&mut events)).await;
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

pub(crate) async fn a_deleted_lease_is_lost(ground: Ground) -> Result<()> {
    let node = ground.node();
    let lease = node.acquire(&request(&network("10.5.1.0"), "192.0.2.1")).await?;
    ground.delete("10.5.1.0-24").await?;
    let error = node.renew(&lease).await.unwrap_err();
    assert_eq!(error.to_string(), "lease 10.5.1.0-24 is lost: it was deleted or has expired");
    assert!(ground.entries().await?.is_empty());
    Ok(())
}

pub(crate) async fn a_damaged_lease_is_put_right(ground: Ground) -> Result<()> {
    let node = ground.node();
    let lease = node.acquire(&request(&network("10.5.1.0"), "192.0.2.1")).await?;
    let mut events = node.watch();
    first(&mut events).await?;
    ground.put("10.5.1.0-24", "nonsense", Some(LEASE_TTL)).await?;
    next_unreadable(&mut events).await?;
    let lease = node.renew(&lease).await?;
    assert!(a_day_ahead(lease.expires));
    assert_eq!(ground.value("10.5.1.0-24").await?, r#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#);
    Ok(())
}

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
        assert!(seen.expires.is_some());
        let LeaseEvent::Added(seen) = next(events).await? else { panic!("a change") };
        assert_eq!((seen.subnets, seen.attrs), (peer.subnets, LeaseAttrs::from_json(moved)?));
        assert_eq!(next(events).await?, LeaseEvent::Removed(peer.subnets));
    }
    Ok(())
}

pub(crate) async fn a_lease_that_ends_is_told(ground: Ground) -> Result<()> {
    ground.put("10.5.7.0-24", r#"{"PublicIP":"192.0.2.7"}"#, Some(Duration::from_secs(2))).await?;
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

pub(crate) async fn an_address_of_the_wrong_family_is_refused(ground: Ground) -> Result<()> {
    let config = NetworkConfig::parse(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48"}"#)?;
    let error = ground.node().acquire(&request(&config, "192.0.2.1")).await.unwrap_err();
    ensure!(matches!(error, StoreError::Refused { .. }), "{error}");
    let error = ground.node().acquire(&request(&network(ALL), "0.0.0.0")).await.unwrap_err();
    ensure!(matches!(error, StoreError::Refused { .. }), "{error}");
    Ok(())
}

fn reservation(key: &str, ip: &str) -> Reservation {
    Reservation { subnets: subnets(key), public_ip: ip.parse().unwrap() }
}

const CONFIG: &str = r#"{"Network":"10.5.0.0/16"}"#;

pub(crate) async fn a_reserved_subnet_waits_for_its_node(ground: Ground) -> Result<()> {
    ground.configure(CONFIG).await?;
    let operator = ground.node();
    let wanted = reservation("10.5.1.0-24", "192.0.2.1");
    operator.reserve(&wanted).await?;
    operator.reserve(&wanted).await?;
    assert_eq!(operator.reservations().await?, [wanted]);
    // Nobody else gets it, and its node does, without an end.
    let other = ground.node().acquire(&request(&network("10.5.2.0"), "192.0.2.2")).await?;
    assert_eq!(other.subnets, subnets("10.5.2.0-24"));
    let node = ground.node();
    let lease = node.acquire(&request(&network("10.5.2.0"), "192.0.2.1")).await?;
    assert_eq!((lease.subnets, lease.expires), (wanted.subnets, None));
    assert_eq!(node.renew(&lease).await?.expires, None);
    assert_eq!(operator.reservations().await?, [wanted]);
    Ok(())
}

pub(crate) async fn a_lease_becomes_a_reservation_and_a_lease_again(ground: Ground) -> Result<()> {
    ground.configure(CONFIG).await?;
    let node = ground.node();
    let mut request = request(&network(ALL), "192.0.2.1");
    request.attrs.backend_type = "host-gw".into();
    let lease = node.acquire(&request).await?;
    let wanted = Reservation { subnets: lease.subnets, public_ip: lease.attrs.public_ip };
    node.reserve(&wanted).await?;
    assert_eq!(node.renew(&lease).await?.expires, None);
    let value = r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"host-gw"}"#;
    assert_eq!(ground.value(lease.subnets).await?, value);
    node.unreserve(lease.subnets).await?;
    assert_eq!(node.reservations().await?, []);
    assert!(a_day_ahead(node.renew(&lease).await?.expires));
    assert_eq!(ground.value(lease.subnets).await?, value);
    let error = node.unreserve(lease.subnets).await.unwrap_err();
    ensure!(matches!(error, StoreError::Conflict(_)), "{error}");
    ensure!(error.to_string().contains("is not reserved"), "{error}");
    Ok(())
}

pub(crate) async fn a_reservation_that_cannot_be_is_refused_with_the_reason(ground: Ground) -> Result<()> {
    ground.configure(CONFIG).await?;
    ground.put("10.5.7.0-24", r#"{"PublicIP":"192.0.2.7"}"#, Some(LEASE_TTL)).await?;
    ground.put("10.5.128.0-20", r#"{"PublicIP":"192.0.2.8"}"#, Some(LEASE_TTL)).await?;
    for (key, ip, reason) in [
        ("10.5.7.0-24", "192.0.2.1", "is leased by 192.0.2.7 already"),
        ("10.5.130.0-24", "192.0.2.1", "overlaps lease 10.5.128.0-20"),
        ("10.6.1.0-24", "192.0.2.1", "is outside of flannel network"),
        ("10.5.1.0-25", "192.0.2.1", "has mask incompatible with network config"),
        ("10.5.1.0-24", "0.0.0.0", "names no node"),
    ] {
        let error = ground.node().reserve(&reservation(key, ip)).await.unwrap_err();
        ensure!(matches!(error, StoreError::Conflict(_)), "{key}: {error:?}");
        ensure!(error.to_string().contains(reason), "{key}: {error}");
    }
    assert_eq!(ground.node().reservations().await?, []);
    assert_eq!(ground.entries().await?.len(), 2);
    Ok(())
}

pub(crate) async fn a_revoked_lease_is_told_and_free(ground: Ground) -> Result<()> {
    let node = ground.node();
    let lease = node.acquire(&request(&network("10.5.1.0"), "192.0.2.1")).await?;
    let mut events = ground.node().watch();
    first(&mut events).await?;
    ground.node().revoke(lease.subnets).await?;
    assert_eq!(next(&mut events).await?, LeaseEvent::Removed(lease.subnets));
    let error = node.renew(&lease).await.unwrap_err();
    ensure!(matches!(error, StoreError::LeaseLost { .. }), "{error}");
    let other = ground.node().acquire(&request(&network("10.5.1.0"), "192.0.2.2")).await?;
    assert_eq!(other.subnets, lease.subnets);
    let error = ground.node().revoke(subnets("10.5.9.0-24")).await.unwrap_err();
    ensure!(error.to_string().contains("10.5.9.0-24 is not leased"), "{error}");
    Ok(())
}
