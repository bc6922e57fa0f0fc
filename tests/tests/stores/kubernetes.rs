//! The contract on Kubernetes: what of it can't apply there by nature, why, and what Kubernetes does instead.
//!
//! A subnet is a Node's pod CIDR, which the controller manager chooses; it has no end, and belongs to the Node for as
//! long as there is one. Every case of the contract either runs here as it is or has a row in [`INSTEAD`].

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use flannel_agent::domain::lease::{LeaseAttrs, LeaseEvent, Reservation};
use flannel_agent::stores::{LEASE_TTL, LeaseRequest, LeaseStore, StoreError};
use libtest_mimic::{Failed, Trial};
use serde_json::{Value, json};

use crate::ground::kube::{Cluster, known_to};
use crate::ground::{Ground, first, network, next, request, subnets};
use crate::{TROUBLE_LIMIT, run_within, trouble};

/// A watch that is silent for 90 s is opened anew: an answer that was lost on the way is noticed by nothing else.
const SILENCE_NOTICED: Duration = Duration::from_secs(110);

const ALL: &str = "10.5.255.0";

/// A case of the contract that can't apply, why, and the case that shows what Kubernetes does instead.
const INSTEAD: [(&str, &str, &str); 19] = [
    (
        "fields_of_others_survive_a_reuse_and_a_renewal",
        "a lease is annotations of a Node, each by itself",
        "annotations_of_others_survive_a_reuse_and_a_renewal",
    ),
    (
        "the_previous_subnet_is_taken_when_it_is_free",
        "the subnet is not ours to choose",
        "the_previous_subnet_gives_way_to_the_pod_cidr",
    ),
    (
        "a_running_node_gets_no_other_subnet",
        "the subnet is not ours to choose",
        "a_running_node_whose_pod_cidr_changed_has_lost_its_lease",
    ),
    (
        "a_lease_that_no_longer_fits_is_replaced",
        "the subnet is not ours to choose",
        "a_pod_cidr_outside_the_network_is_refused_with_both_named",
    ),
    (
        "both_families_are_leased_under_one_key",
        "the subnet is not ours to choose",
        "both_families_are_two_pod_cidrs_of_one_node",
    ),
    (
        "a_full_network_says_so",
        "the controller manager runs out of subnets, not the agent",
        "a_node_without_a_pod_cidr_waits_for_the_controller_manager",
    ),
    (
        "two_nodes_with_one_public_address_share_a_lease",
        "a node is known by its name, not by its address",
        "two_nodes_behind_one_address_keep_their_own_pod_cidrs",
    ),
    (
        "a_reservation_keeps_having_no_end",
        "no lease has an end",
        "a_renewal_writes_nothing_where_nothing_is_missing",
    ),
    ("a_renewal_moves_the_end", "no lease has an end", "a_renewal_writes_nothing_where_nothing_is_missing"),
    (
        "a_moved_nodes_lease_that_was_taken_over_is_lost",
        "a pod CIDR belongs to a Node, which nobody else is",
        "another_node_with_our_pod_cidr_takes_nothing_from_us",
    ),
    (
        "a_lease_that_was_taken_over_is_not_overwritten",
        "a pod CIDR belongs to a Node, which nobody else is",
        "another_node_with_our_pod_cidr_takes_nothing_from_us",
    ),
    (
        "a_lease_of_only_ipv6_that_was_taken_over_is_lost",
        "a pod CIDR belongs to a Node, which nobody else is",
        "another_node_with_our_pod_cidr_takes_nothing_from_us",
    ),
    (
        "a_subnet_of_only_ipv6_is_reserved",
        "every pod CIDR is its Node's for good",
        "reservations_are_refused_with_the_reason",
    ),
    ("a_lease_that_ends_is_told", "no lease has an end", "a_node_that_is_deleted_or_left_by_flannel_is_told"),
    (
        "an_entry_that_cannot_be_read_hides_nothing",
        "a lease's key is no text that somebody writes",
        "a_node_that_cannot_be_read_hides_nothing",
    ),
    (
        "a_reserved_subnet_waits_for_its_node",
        "every pod CIDR is its Node's for good",
        "reservations_are_refused_with_the_reason",
    ),
    (
        "a_lease_becomes_a_reservation_and_a_lease_again",
        "every pod CIDR is its Node's for good",
        "reservations_are_refused_with_the_reason",
    ),
    (
        "a_reservation_that_cannot_be_is_refused_with_the_reason",
        "every pod CIDR is its Node's for good",
        "reservations_are_refused_with_the_reason",
    ),
    (
        "a_revoked_lease_is_told_and_free",
        "every pod CIDR is its Node's for good",
        "a_lease_is_not_revoked_but_its_node_deleted",
    ),
];

/// Why a case of the contract does not run here.
pub(crate) fn exemption(case: &str) -> Option<&'static str> {
    INSTEAD.iter().find(|(name, ..)| *name == case).map(|(_, reason, _)| *reason)
}

/// Runs a case on Nodes of its own. The API server, which takes seconds, is not the case's to wait for.
pub(crate) fn run_on<Case, Done>(cluster: &Arc<Cluster>, case: Case) -> Result<(), Failed>
where
    Case: FnOnce(Ground) -> Done,
    Done: Future<Output = Result<()>>,
{
    cluster.ready().map_err(|error| format!("{error:#}"))?;
    // Each word with the operator is a process of curl's.
    run_within(TROUBLE_LIMIT, async { case(Ground::kubernetes(cluster).await?).await })
}

macro_rules! instead {
    ($trials:ident, $cluster:ident: $($case:ident)*) => {
        $(
            let cluster = $cluster.clone();
            $trials.push(Trial::test(concat!("kubernetes::", stringify!($case)), move || run_on(&cluster, $case)));
        )*
        const CASES: &[&str] = &[$(stringify!($case)),*];
    };
}

/// What runs here beside the contract; `contract` are the names of its cases.
pub(crate) fn trials(cluster: &Arc<Cluster>, contract: &'static [&'static str]) -> Vec<Trial> {
    let mut trials = Vec::new();
    instead!(trials, cluster:
        annotations_of_others_survive_a_reuse_and_a_renewal
        the_previous_subnet_gives_way_to_the_pod_cidr
        a_running_node_whose_pod_cidr_changed_has_lost_its_lease
        a_pod_cidr_outside_the_network_is_refused_with_both_named
        both_families_are_two_pod_cidrs_of_one_node
        a_node_without_a_pod_cidr_waits_for_the_controller_manager
        two_nodes_behind_one_address_keep_their_own_pod_cidrs
        a_renewal_writes_nothing_where_nothing_is_missing
        another_node_with_our_pod_cidr_takes_nothing_from_us
        a_node_that_is_deleted_or_left_by_flannel_is_told
        a_node_that_cannot_be_read_hides_nothing
        reservations_are_refused_with_the_reason
        a_lease_is_not_revoked_but_its_node_deleted
    );
    trials.push(Trial::test(
        "kubernetes::every_case_of_the_contract_runs_or_has_another_instead",
        move || {
            for (case, _, instead) in INSTEAD {
                if !contract.contains(&case) {
                    return Err(format!("{case} is no case of the contract").into());
                }
                if !CASES.contains(&instead) {
                    return Err(format!("{instead}, which stands for {case}, is not run").into());
                }
            }
            Ok(())
        },
    ));
    let cluster = cluster.clone();
    trials.push(Trial::test("kubernetes::each_trouble_on_the_way_is_survived", move || {
        cluster.ready().map_err(|error| format!("{error:#}"))?;
        run_within(2 * TROUBLE_LIMIT, async {
            trouble::each_is_survived(Ground::kubernetes(&cluster).await?, SILENCE_NOTICED).await
        })
    }));
    trials
}

async fn annotations_of_others_survive_a_reuse_and_a_renewal(ground: Ground) -> Result<()> {
    let nodes = ground.nodes();
    let mut annotations = nodes.annotations(r#"{"PublicIP":"192.0.2.1","BackendType":"old"}"#);
    annotations["example.com/zone"] = "z".into();
    nodes.api().create_node(&nodes.node_name("h1"), &["10.5.7.0/24"], Some(annotations))?;
    let node = ground.node();
    let lease = node.acquire(&request(&network(ALL), "192.0.2.1")).await?;
    let written = || -> Result<Value> {
        Ok(nodes.api().node(&nodes.node_name("h1"))?["metadata"]["annotations"].clone())
    };
    let mut wanted = nodes.annotations(r#"{"PublicIP":"192.0.2.1"}"#);
    wanted["example.com/zone"] = "z".into();
    assert_eq!(written()?, wanted);
    node.renew(&lease).await?;
    assert_eq!(written()?, wanted);
    Ok(())
}

async fn the_previous_subnet_gives_way_to_the_pod_cidr(ground: Ground) -> Result<()> {
    let wanted =
        LeaseRequest { previous: Some(subnets("10.5.77.0-24")), ..request(&network(ALL), "192.0.2.1") };
    assert_eq!(ground.node().acquire(&wanted).await?.subnets, subnets("10.5.1.0-24"));
    Ok(())
}

/// Its Node was deleted and registered anew, as when a machine is installed again.
async fn a_running_node_whose_pod_cidr_changed_has_lost_its_lease(ground: Ground) -> Result<()> {
    let node = ground.node();
    let mut request = request(&network(ALL), "192.0.2.1");
    let lease = node.acquire(&request).await?;
    let mut events = ground.node().watch();
    first(&mut events).await?;
    ground.delete("10.5.1.0-24").await?;
    assert_eq!(next(&mut events).await?, LeaseEvent::Removed(lease.subnets));
    let name = ground.nodes().node_name("192-0-2-1");
    ground.nodes().api().create_node(&name, &["10.5.9.0/24"], None)?;
    let lost = "lease 10.5.1.0-24 is lost: the Node's pod CIDR is 10.5.9.0-24 now";
    assert_eq!(node.renew(&lease).await.unwrap_err().to_string(), lost);
    (request.previous, request.previous_only) = (Some(lease.subnets), true);
    let error = node.acquire(&request).await.unwrap_err();
    ensure!(matches!(error, StoreError::LeaseLost { .. }), "{error:?}");
    assert_eq!(error.to_string(), lost);
    // Nothing was written on the Node that is another now.
    assert_eq!(ground.entries().await?, []);
    Ok(())
}

async fn a_pod_cidr_outside_the_network_is_refused_with_both_named(ground: Ground) -> Result<()> {
    let nodes = ground.nodes();
    nodes.api().create_node(&nodes.node_name("192-0-2-1"), &["10.6.1.0/24"], None)?;
    let error = ground.node().acquire(&request(&network(ALL), "192.0.2.1")).await.unwrap_err();
    ensure!(matches!(error, StoreError::Refused { .. }), "{error:?}");
    ensure!(error.to_string().contains("10.6.1.0/24 is not inside Network 10.5.0.0/16"), "{error}");
    assert_eq!(ground.entries().await?, []);
    Ok(())
}

async fn both_families_are_two_pod_cidrs_of_one_node(ground: Ground) -> Result<()> {
    let nodes = ground.nodes();
    nodes.api().create_node(&nodes.node_name("192-0-2-1"), &["10.5.1.0/24", "fd00:0:0:1::/64"], None)?;
    let config = flannel_agent::domain::config::NetworkConfig::parse(
        r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}"#,
    )?;
    let mut request = request(&config, "192.0.2.1");
    request.attrs.public_ipv6 = Some("2001:db8::1".parse()?);
    // One of the backends that flanneld publishes an IPv6 address for.
    request.attrs.backend_type = "host-gw".into();
    let lease = ground.node().acquire(&request).await?;
    assert_eq!(lease.subnets, subnets("10.5.1.0-24&fd00:0:0:1::-64"));
    let value = r#"{"PublicIP":"192.0.2.1","PublicIPv6":"2001:db8::1","BackendType":"host-gw"}"#;
    assert_eq!(ground.value(lease.subnets).await?, value);
    assert_eq!(ground.snapshot().await?, [lease]);
    Ok(())
}

async fn a_node_without_a_pod_cidr_waits_for_the_controller_manager(ground: Ground) -> Result<()> {
    let nodes = ground.nodes();
    let name = nodes.node_name("192-0-2-1");
    nodes.api().create_node(&name, &[], None)?;
    let node = ground.node();
    let error = node.acquire(&request(&network(ALL), "192.0.2.1")).await.unwrap_err();
    ensure!(matches!(error, StoreError::NotYet { .. }), "{error:?}");
    let text = error.to_string();
    ensure!(text.contains(&name) && text.contains("--allocate-node-cidrs"), "{text}");
    let assigned = json!({"spec": {"podCIDR": "10.5.3.0/24", "podCIDRs": ["10.5.3.0/24"]}});
    nodes.api().patch_node(&name, &assigned)?;
    let lease = node.acquire(&request(&network(ALL), "192.0.2.1")).await?;
    assert_eq!(lease.subnets, subnets("10.5.3.0-24"));
    Ok(())
}

/// Behind NAT, as with Vagrant.
async fn two_nodes_behind_one_address_keep_their_own_pod_cidrs(ground: Ground) -> Result<()> {
    let nodes = ground.nodes();
    let request = request(&network(ALL), "192.0.2.1");
    nodes.configure(&request.config.to_string())?;
    let (one, other) = (nodes.open("one").await?, nodes.open("other").await?);
    nodes.api().create_node(&nodes.node_name("one"), &["10.5.1.0/24"], None)?;
    nodes.api().create_node(&nodes.node_name("other"), &["10.5.2.0/24"], None)?;
    let first = one.acquire(&request).await?;
    let second = other.acquire(&request).await?;
    assert_eq!((first.subnets, second.subnets), (subnets("10.5.1.0-24"), subnets("10.5.2.0-24")));
    one.renew(&first).await?;
    assert_eq!(known_to(&other).await?, ["10.5.1.0-24", "10.5.2.0-24"]);
    Ok(())
}

async fn a_renewal_writes_nothing_where_nothing_is_missing(ground: Ground) -> Result<()> {
    let nodes = ground.nodes();
    let node = ground.node();
    let lease = node.acquire(&request(&network(ALL), "192.0.2.1")).await?;
    assert_eq!(lease.expires, None);
    let name = nodes.node_name("192-0-2-1");
    let version = || -> Result<Value> { Ok(nodes.api().node(&name)?["metadata"]["resourceVersion"].clone()) };
    let before = version()?;
    assert_eq!(node.renew(&lease).await?, lease);
    assert_eq!(version()?, before);
    Ok(())
}

async fn another_node_with_our_pod_cidr_takes_nothing_from_us(ground: Ground) -> Result<()> {
    let nodes = ground.nodes();
    nodes.configure(&network(ALL).to_string())?;
    nodes.api().create_node(&nodes.node_name("h1"), &["10.5.1.0/24"], None)?;
    let own = nodes.open("h1").await?;
    let lease = own.acquire(&request(&network(ALL), "192.0.2.1")).await?;
    let mut events = own.watch();
    assert_eq!(first(&mut events).await?.0, std::slice::from_ref(&lease));

    let others = nodes.annotations(r#"{"PublicIP":"192.0.2.66"}"#);
    nodes.api().create_node(&nodes.node_name("h2"), &["10.5.1.0/24"], Some(others.clone()))?;
    let LeaseEvent::Unreadable(entry) = next(&mut events).await? else { panic!("h2 is put aside") };
    ensure!(entry.key.contains("h2") && entry.reason.contains("10.5.1.0-24"), "{entry}");
    own.renew(&lease).await?;
    let moved = own.rewrite(&lease, &LeaseAttrs::new("192.0.2.9".parse()?)).await?;
    assert_eq!(moved.subnets, lease.subnets);
    let there = nodes.api().node(&nodes.node_name("h2"))?;
    assert_eq!(there["metadata"]["annotations"], others);
    Ok(())
}

async fn a_node_that_is_deleted_or_left_by_flannel_is_told(ground: Ground) -> Result<()> {
    let nodes = ground.nodes();
    ground.put("10.5.7.0-24", r#"{"PublicIP":"192.0.2.7"}"#, Some(LEASE_TTL)).await?;
    ground.put("10.5.8.0-24", r#"{"PublicIP":"192.0.2.8"}"#, None).await?;
    let mut events = ground.node().watch();
    assert_eq!(first(&mut events).await?.0.len(), 2);
    ground.delete("10.5.7.0-24").await?;
    assert_eq!(next(&mut events).await?, LeaseEvent::Removed(subnets("10.5.7.0-24")));
    let unmarked = json!({"metadata": {"annotations": {nodes.annotation("kube-subnet-manager"): null}}});
    nodes.api().patch_node(&nodes.node_name("10.5.8.0-24"), &unmarked)?;
    assert_eq!(next(&mut events).await?, LeaseEvent::Removed(subnets("10.5.8.0-24")));
    assert_eq!(ground.snapshot().await?, []);
    Ok(())
}

async fn a_node_that_cannot_be_read_hides_nothing(ground: Ground) -> Result<()> {
    let nodes = ground.nodes();
    let good = r#"{"PublicIP":"192.0.2.8"}"#;
    ground.put("10.5.8.0-24", good, None).await?;
    let mut wrong_data = nodes.annotations(good);
    wrong_data[nodes.annotation("backend-data")] = "{".into();
    for (name, cidrs, annotations) in [
        ("address", vec!["10.5.9.0/24"], nodes.annotations("nonsense")),
        ("data", vec!["10.5.10.0/24"], wrong_data),
        ("cidr", vec![], nodes.annotations(good)),
        ("family", vec!["fd00::/64"], nodes.annotations(good)),
    ] {
        let mut events = ground.node().watch();
        assert_eq!(first(&mut events).await?.0.len(), 1);
        nodes.api().create_node(&nodes.node_name(name), &cidrs, Some(annotations))?;
        let LeaseEvent::Unreadable(entry) = next(&mut events).await? else { panic!("{name} is told") };
        ensure!(entry.key.ends_with(&nodes.node_name(name)) && !entry.reason.is_empty(), "{entry}");
        let (leases, unreadable) = first(&mut ground.node().watch()).await?;
        assert_eq!(leases.len(), 1, "{name}");
        assert_eq!(unreadable, [entry]);
        // The next good one still comes through.
        ground.put("10.5.20.0-24", good, None).await?;
        let LeaseEvent::Added(lease) = next(&mut events).await? else { panic!("an addition") };
        assert_eq!(lease.subnets, subnets("10.5.20.0-24"));
        ground.delete("10.5.20.0-24").await?;
        nodes.api().delete_node(&nodes.node_name(name))?;
    }
    Ok(())
}

async fn reservations_are_refused_with_the_reason(ground: Ground) -> Result<()> {
    let node = ground.node();
    let lease = node.acquire(&request(&network(ALL), "192.0.2.1")).await?;
    let wanted = Reservation { subnets: lease.subnets, public_ip: lease.attrs.public_ip.into() };
    for error in [
        node.reservations().await.map(drop).unwrap_err(),
        node.reserve(&wanted).await.unwrap_err(),
        node.unreserve(lease.subnets).await.unwrap_err(),
    ] {
        ensure!(matches!(error, StoreError::NoReservations), "{error:?}");
        ensure!(error.to_string().contains("a node's pod CIDR is its own for good"), "{error}");
    }
    Ok(())
}

async fn a_lease_is_not_revoked_but_its_node_deleted(ground: Ground) -> Result<()> {
    let node = ground.node();
    let lease = node.acquire(&request(&network(ALL), "192.0.2.1")).await?;
    let mut events = ground.node().watch();
    first(&mut events).await?;
    let error = node.revoke(lease.subnets).await.unwrap_err();
    ensure!(matches!(error, StoreError::Conflict(_)), "{error:?}");
    ensure!(error.to_string().contains("delete the Node"), "{error}");
    let quiet = tokio::time::timeout(Duration::from_secs(1), next(&mut events)).await;
    ensure!(quiet.is_err(), "{quiet:?}");
    ground.delete("10.5.1.0-24").await?;
    assert_eq!(next(&mut events).await?, LeaseEvent::Removed(lease.subnets));
    let error = node.renew(&lease).await.unwrap_err();
    ensure!(matches!(error, StoreError::LeaseLost { .. }), "{error:?}");
    Ok(())
}
