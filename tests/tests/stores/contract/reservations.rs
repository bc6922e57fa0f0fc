//! An operator gives subnets to nodes for good, and takes leases away.

use anyhow::{Result, ensure};
use flannel_agent::domain::lease::{LeaseEvent, Reservation};
use flannel_agent::stores::{LEASE_TTL, StoreError};

use super::ALL;
use crate::ground::{Ground, first, network, next, only_ipv6, request, subnets};

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

pub(crate) async fn a_subnet_of_only_ipv6_is_reserved(ground: Ground) -> Result<()> {
    ground.configure(&only_ipv6().to_string()).await?;
    let operator = ground.node();
    let wanted = reservation("0.0.0.0-0&fd00:0:0:2::-64", "2001:db8::1");
    operator.reserve(&wanted).await?;
    assert_eq!(operator.reservations().await?, [wanted]);
    let lease = ground.node().acquire(&request(&only_ipv6(), "2001:db8::1")).await?;
    assert_eq!((lease.subnets, lease.expires), (wanted.subnets, None));
    let error = operator.reserve(&reservation("0.0.0.0-0&fd00:0:0:1::-64", "192.0.2.1")).await.unwrap_err();
    ensure!(error.to_string().contains("nodes of this network are known by their IPv6 address"), "{error}");
    Ok(())
}

pub(crate) async fn a_lease_becomes_a_reservation_and_a_lease_again(ground: Ground) -> Result<()> {
    ground.configure(CONFIG).await?;
    let node = ground.node();
    let mut request = request(&network(ALL), "192.0.2.1");
    request.attrs.backend_type = "host-gw".into();
    let lease = node.acquire(&request).await?;
    let wanted = Reservation { subnets: lease.subnets, public_ip: lease.attrs.public_ip.into() };
    node.reserve(&wanted).await?;
    assert_eq!(node.renew(&lease).await?.expires, None);
    let value = r#"{"PublicIP":"192.0.2.1","PublicIPv6":null,"BackendType":"host-gw"}"#;
    assert_eq!(ground.value(lease.subnets).await?, value);
    node.unreserve(lease.subnets).await?;
    assert_eq!(node.reservations().await?, []);
    assert!(ground.is_fresh(node.renew(&lease).await?.expires));
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
        ("10.5.0.0-24", "192.0.2.1", "10.5.0.0-24 where leases are from 10.5.1.0 to 10.5.255.0"),
        ("10.5.1.0-24", "0.0.0.0", "names no node"),
        ("10.5.1.0-24", "255.255.255.255", "must be an address other nodes can send to"),
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
