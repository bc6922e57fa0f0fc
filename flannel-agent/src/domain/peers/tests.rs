//! Events in, text out: who is believed, who is not, and what our own lease does.

use super::*;
use crate::domain::config::SubnetRange;
use crate::domain::lease::LeaseAttrs;
use proptest::prelude::*;
use std::time::{Duration, Instant};

const OWN: &str = "10.5.1.0-24";

fn config(backend: BackendConfig) -> NetworkConfig {
    NetworkConfig {
        v4: Some(SubnetRange {
            network: "10.5.0.0/16".parse().unwrap(),
            subnet_len: 24,
            subnet_min: "10.5.1.0".parse().unwrap(),
            subnet_max: "10.5.255.0".parse().unwrap(),
        }),
        v6: None,
        enable_nftables: false,
        backend,
        warnings: Vec::new(),
    }
}

fn lease(key: &str, ip: &str) -> Lease {
    Lease {
        subnets: key.parse().unwrap(),
        attrs: LeaseAttrs::new(ip.parse().unwrap()),
        expires: None,
        revision: 1,
    }
}

fn peers() -> Peers {
    Peers::new(
        &lease(OWN, "192.0.2.1"),
        &config(BackendConfig::HostGw),
        &["192.0.2.1".parse().unwrap(), "10.0.0.1".parse().unwrap()],
    )
}

fn added(key: &str, ip: &str) -> LeaseEvent {
    LeaseEvent::Added(lease(key, ip))
}

fn removed(key: &str) -> LeaseEvent {
    LeaseEvent::Removed(key.parse().unwrap())
}

fn snapshot(leases: &[(&str, &str)]) -> LeaseEvent {
    let own = [lease(OWN, "192.0.2.1")];
    LeaseEvent::Snapshot(
        own.into_iter().chain(leases.iter().map(|(key, ip)| lease(key, ip))).collect(),
        vec![],
    )
}

fn unreadable(key: &str) -> Unreadable {
    Unreadable { key: format!("/coreos.com/network/subnets/{key}"), reason: "not JSON".into() }
}

/// `yes` or `no`, our own lease's news, then what is believed and what is refused.
fn say(peers: &mut Peers, event: LeaseEvent) -> String {
    let folded = peers.fold(event);
    let mut lines = vec![match folded.peers {
        Changed::Yes => "changed".to_owned(),
        Changed::No => "same".to_owned(),
    }];
    lines.extend(folded.own.map(|own| match own {
        OwnLease::Gone => "own gone".to_owned(),
        OwnLease::Changed(lease) => format!("own revision {}", lease.revision),
    }));
    lines.extend(peers.iter().map(|lease| format!("{} {}", lease.subnets, node_of(lease))));
    lines.extend(peers.refused().map(|refused| refused.to_string()));
    lines.join("\n")
}

#[test]
fn nobody_is_known_before_the_first_snapshot() {
    let mut peers = peers();
    assert!(!peers.is_known());
    assert_eq!(say(&mut peers, LeaseEvent::Interrupted("away".into())), "same");
    assert!(!peers.is_known());
    assert_eq!(say(&mut peers, snapshot(&[])), "changed");
    assert!(peers.is_known());
    assert_eq!(say(&mut peers, snapshot(&[])), "same");
}

#[test]
fn peers_come_move_and_go() {
    let mut peers = peers();
    let text = say(&mut peers, snapshot(&[("10.5.3.0-24", "192.0.2.3"), ("10.5.2.0-24", "192.0.2.2")]));
    assert_eq!(text, "changed\n10.5.2.0-24 192.0.2.2\n10.5.3.0-24 192.0.2.3");
    let text = say(&mut peers, added("10.5.2.0-24", "192.0.2.22"));
    assert_eq!(text, "changed\n10.5.2.0-24 192.0.2.22\n10.5.3.0-24 192.0.2.3");
    assert_eq!(say(&mut peers, removed("10.5.3.0-24")), "changed\n10.5.2.0-24 192.0.2.22");
    assert_eq!(say(&mut peers, removed("10.5.3.0-24")), "same\n10.5.2.0-24 192.0.2.22");
    assert_eq!(say(&mut peers, LeaseEvent::Interrupted("away".into())), "same\n10.5.2.0-24 192.0.2.22");
}

#[test]
fn a_snapshot_brings_changed_attributes_and_drops_the_missing() {
    let mut peers = peers();
    peers.fold(snapshot(&[("10.5.2.0-24", "192.0.2.2"), ("10.5.3.0-24", "192.0.2.3")]));
    let text = say(&mut peers, snapshot(&[("10.5.2.0-24", "192.0.2.22")]));
    assert_eq!(text, "changed\n10.5.2.0-24 192.0.2.22");
}

#[test]
fn a_renewal_of_a_peer_changes_nothing() {
    let mut peers = peers();
    peers.fold(snapshot(&[("10.5.2.0-24", "192.0.2.2")]));
    let mut renewed = lease("10.5.2.0-24", "192.0.2.2");
    renewed.revision = 9;
    renewed.expires = Some(Instant::now() + Duration::from_secs(86400));
    let folded = peers.fold(LeaseEvent::Added(renewed));
    assert_eq!(folded, Folded { peers: Changed::No, own: None });
    assert_eq!(peers.iter().next().unwrap().revision, 9);
}

#[test]
fn our_own_lease_is_never_a_peer_but_its_news_are_told() {
    let mut peers = peers();
    assert_eq!(say(&mut peers, snapshot(&[])), "changed");
    let mut renewed = lease(OWN, "192.0.2.1");
    renewed.revision = 7;
    assert_eq!(say(&mut peers, LeaseEvent::Added(renewed.clone())), "same\nown revision 7");
    assert_eq!(say(&mut peers, LeaseEvent::Added(renewed.clone())), "same");
    assert_eq!(say(&mut peers, removed(OWN)), "same\nown gone");
    assert_eq!(say(&mut peers, removed(OWN)), "same");
    assert_eq!(say(&mut peers, LeaseEvent::Snapshot(vec![], vec![])), "same", "said once");
    assert_eq!(say(&mut peers, LeaseEvent::Added(renewed)), "same\nown revision 7");
    assert_eq!(say(&mut peers, LeaseEvent::Snapshot(vec![], vec![])), "same\nown gone");
}

#[test]
fn our_subnet_in_another_nodes_hands_is_lost() {
    let mut peers = peers();
    peers.fold(snapshot(&[]));
    assert_eq!(say(&mut peers, added(OWN, "192.0.2.66")), "same\nown gone");
    assert_eq!(peers.own().attrs.public_ip, "192.0.2.1".parse::<std::net::Ipv4Addr>().unwrap());
}

#[test]
fn claims_that_cannot_be_true_are_refused_with_the_reason() {
    for (key, ip, reason) in [
        ("10.5.0.0-23", "192.0.2.2", "overlaps our own subnet 10.5.1.0-24"),
        ("10.5.1.0-24&fd00::-64", "192.0.2.2", "belongs to a family the network does not use"),
        ("10.6.2.0-24", "192.0.2.2", "10.6.2.0/24 is not inside the network 10.5.0.0/16"),
        ("10.0.0.0-8", "192.0.2.2", "10.0.0.0/8 is not inside"),
        ("10.5.2.0-24", "192.0.2.1", "names our own address 192.0.2.1"),
        ("10.5.2.0-24", "10.0.0.1", "names our own address 10.0.0.1"),
        ("10.5.2.0-24", "0.0.0.0", "0.0.0.0 can't be the address of a node"),
        ("10.5.2.0-24", "127.0.0.1", "127.0.0.1 can't be the address of a node"),
        ("10.5.2.0-24", "224.0.0.1", "224.0.0.1 can't be the address of a node"),
        ("10.5.2.0-24", "255.255.255.255", "can't be the address of a node"),
        ("10.5.9.0-25", "192.0.2.2", "overlaps 10.5.9.0-24, leased by 192.0.2.9"),
        ("10.5.9.128-25", "192.0.2.2", "overlaps 10.5.9.0-24, leased by 192.0.2.9"),
        ("10.5.8.0-23", "192.0.2.2", "overlaps 10.5.9.0-24, leased by 192.0.2.9"),
    ] {
        let mut peers = peers();
        peers.fold(snapshot(&[("10.5.9.0-24", "192.0.2.9")]));
        let text = say(&mut peers, added(key, ip));
        assert!(text.starts_with("same\n10.5.9.0-24 192.0.2.9\nlease "), "{key}: {text}");
        assert!(text.contains(reason), "{key}: {text}");
        assert_eq!(say(&mut peers, removed(key)), "same\n10.5.9.0-24 192.0.2.9", "{key}");
    }
}

#[test]
fn only_the_udp_backend_insists_on_one_prefix_length() {
    for (backend, believed) in [(BackendConfig::Udp { port: 8285, mtu: None }, 0), (BackendConfig::HostGw, 1)]
    {
        let mut peers = Peers::new(&lease(OWN, "192.0.2.1"), &config(backend), &[]);
        peers.fold(snapshot(&[("10.5.2.0-25", "192.0.2.2")]));
        assert_eq!(peers.len(), believed);
        assert_eq!(peers.refused().len(), 1 - believed);
    }
}

#[test]
fn who_was_known_first_wins_and_the_other_follows_when_he_leaves() {
    let mut peers = peers();
    peers.fold(snapshot(&[]));
    peers.fold(added("10.5.8.0-22", "192.0.2.2"));
    peers.fold(added("10.5.9.0-24", "192.0.2.3"));
    peers.fold(added("10.5.10.0-24", "192.0.2.4"));
    let list = [("10.5.8.0-22", "192.0.2.2"), ("10.5.9.0-24", "192.0.2.3"), ("10.5.10.0-24", "192.0.2.4")];
    assert!(say(&mut peers, snapshot(&list)).starts_with("same\n10.5.8.0-22 192.0.2.2\nlease"), "stable");
    assert_eq!(
        say(&mut peers, removed("10.5.8.0-22")),
        "changed\n10.5.9.0-24 192.0.2.3\n10.5.10.0-24 192.0.2.4"
    );
    // Also when the first one makes itself impossible.
    peers.fold(added("10.5.9.0-25", "192.0.2.5"));
    let text = say(&mut peers, added("10.5.9.0-24", "192.0.2.1"));
    assert!(text.starts_with("changed\n10.5.9.0-25 192.0.2.5\n10.5.10.0-24 192.0.2.4\nlease"), "{text}");
}

#[test]
fn at_start_one_wide_claim_does_not_push_out_the_leases_it_covers() {
    let mut peers = peers();
    let text = say(&mut peers, snapshot(&[("10.5.8.0-22", "192.0.2.66"), ("10.5.9.0-24", "192.0.2.3")]));
    assert!(text.starts_with("changed\n10.5.9.0-24 192.0.2.3\nlease 10.5.8.0-22 of 192.0.2.66"), "{text}");
}

#[test]
fn an_entry_that_becomes_unreadable_leaves_the_lease_as_it_was() {
    let mut peers = peers();
    peers.fold(snapshot(&[("10.5.2.0-24", "192.0.2.2")]));
    let text = say(&mut peers, LeaseEvent::Unreadable(unreadable("10.5.2.0-24")));
    assert_eq!(text, "same\n10.5.2.0-24 192.0.2.2");
    peers.fold(LeaseEvent::Unreadable(unreadable("foo")));
    assert_eq!(peers.unreadable().len(), 2);
    let bad = vec![unreadable("10.5.2.0-24"), unreadable(OWN)];
    assert_eq!(say(&mut peers, LeaseEvent::Snapshot(vec![], bad)), "same\n10.5.2.0-24 192.0.2.2");
    assert_eq!(peers.unreadable().len(), 2);
    assert_eq!(say(&mut peers, removed("10.5.2.0-24")), "changed");
    assert_eq!(peers.unreadable().len(), 1);
}

#[test]
fn both_families_of_a_lease_are_checked() {
    let mut config = config(BackendConfig::HostGw);
    config.v6 = Some(SubnetRange {
        network: "fd00::/48".parse().unwrap(),
        subnet_len: 64,
        subnet_min: "fd00:0:0:1::".parse().unwrap(),
        subnet_max: "fd00:0:0:ffff::".parse().unwrap(),
    });
    let mut peers = Peers::new(&lease("10.5.1.0-24&fd00:0:0:1::-64", "192.0.2.1"), &config, &[]);
    peers.fold(LeaseEvent::Snapshot(vec![], vec![]));
    let text = say(&mut peers, added("10.5.2.0-24&fd00:0:0:1::-64", "192.0.2.2"));
    assert!(text.contains("overlaps our own subnet"), "{text}");
    peers.fold(removed("10.5.2.0-24&fd00:0:0:1::-64"));
    peers.fold(added("10.5.2.0-24&fd00:0:0:2::-64", "192.0.2.2"));
    let text = say(&mut peers, added("10.5.3.0-24&fd00:0:0:2::-64", "192.0.2.3"));
    assert!(text.contains("overlaps 10.5.2.0-24&fd00:0:0:2::-64"), "{text}");
    let text = say(&mut peers, added("10.5.4.0-24&fd01:0:0:2::-64", "192.0.2.4"));
    assert!(text.contains("fd01:0:0:2::/64 is not inside the network fd00::/48"), "{text}");
}

fn any_lease() -> impl Strategy<Value = Lease> {
    (0u8..12, prop_oneof![Just(24u8), Just(23), Just(25), Just(20)], 1u8..9).prop_map(|(third, len, node)| {
        let net = Ipv4Net::new([10, 5, third, 0].into(), len).unwrap().trunc();
        lease(&Subnets::v4(net).to_string(), &format!("192.0.2.{node}"))
    })
}

fn any_event() -> impl Strategy<Value = LeaseEvent> {
    prop_oneof![
        4 => any_lease().prop_map(LeaseEvent::Added),
        3 => any_lease().prop_map(|lease| LeaseEvent::Removed(lease.subnets)),
        1 => proptest::collection::vec(any_lease(), 0..8).prop_map(|all| LeaseEvent::Snapshot(all, vec![])),
        1 => Just(LeaseEvent::Interrupted("away".into())),
    ]
}

proptest! {
    #[test]
    fn whatever_the_store_says_peers_are_disjoint_and_not_us(events in proptest::collection::vec(any_event(), 0..40)) {
        let mut peers = peers();
        let mut store: BTreeMap<Subnets, Lease> = BTreeMap::new();
        for event in events {
            match &event {
                LeaseEvent::Added(lease) => {
                    store.insert(lease.subnets, lease.clone());
                }
                LeaseEvent::Removed(subnets) => {
                    store.remove(subnets);
                }
                LeaseEvent::Snapshot(all, _) => {
                    store = all.iter().map(|lease| (lease.subnets, lease.clone())).collect();
                }
                _ => {}
            }
            let before: Vec<Lease> = peers.iter().cloned().collect();
            let known = peers.is_known();
            let folded = peers.fold(event);
            let after: Vec<Lease> = peers.iter().cloned().collect();
            prop_assert_eq!(folded.peers == Changed::Yes, before != after || known != peers.is_known());

            for (index, peer) in after.iter().enumerate() {
                prop_assert!(!peer.subnets.overlaps(&peers.own.subnets));
                for other in after.get(index + 1..).unwrap() {
                    prop_assert!(!peer.subnets.overlaps(&other.subnets));
                }
            }
            // Nothing is lost: every lease of the store is believed or refused.
            store.remove(&peers.own.subnets);
            let mut held: Vec<Subnets> = after.iter().map(|lease| lease.subnets).collect();
            held.extend(peers.refused().map(|refused| refused.lease.subnets));
            held.sort();
            prop_assert_eq!(held, store.keys().copied().collect::<Vec<_>>());
            // Nothing is refused for a reason that is gone.
            for refused in peers.refused() {
                prop_assert!(peers.examine(refused.lease).is_err());
            }
        }
    }
}

#[test]
fn a_renumbered_node_is_known_by_both_addresses_until_the_store_shows_the_new_one() {
    let mut peers = peers();
    peers.fold(snapshot(&[("10.5.2.0-24", "192.0.2.2"), ("10.5.3.0-24", "192.0.2.77")]));
    // Whoever had the address before us is not to get our own packets.
    assert_eq!(peers.renumber(&["192.0.2.77".parse().unwrap()]), Changed::Yes);
    assert_eq!(
        say(&mut peers, added(OWN, "192.0.2.1")),
        "same\n10.5.2.0-24 192.0.2.2\n\
         lease 10.5.3.0-24 of 192.0.2.77 is refused: it names our own address 192.0.2.77"
    );
    let said = say(&mut peers, added(OWN, "192.0.2.77"));
    assert!(said.contains("own revision"), "{said}");
    peers.renumber(&["192.0.2.77".parse().unwrap()]);
    let said = say(&mut peers, added("10.5.4.0-24", "192.0.2.1"));
    assert!(said.contains("changed") && said.contains("10.5.4.0-24 192.0.2.1"), "{said}");
    assert!(say(&mut peers, added(OWN, "192.0.2.1")).contains("own gone"), "another node's now");
}
