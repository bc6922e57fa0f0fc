use std::collections::BTreeSet;

use proptest::prelude::*;
use proptest::sample::select;

use super::*;

/// Items from lines as `Display` prints them.
fn state(lines: &str) -> HostState {
    lines.lines().map(str::trim).filter(|line| !line.is_empty()).map(item).collect()
}

fn item(line: &str) -> HostItem {
    let words: Vec<&str> = line.split(' ').collect();
    let after = |name: &str| {
        let position = words.iter().position(|word| *word == name)?;
        words.get(position + 1).copied()
    };
    let device = || after("dev").unwrap().to_owned();
    let item = match words[0] {
        "link" => HostItem::Link(Link {
            name: words[1].to_owned(),
            kind: LinkKind::Tun,
            mtu: after("mtu").unwrap().parse().unwrap(),
        }),
        "sysctl" => {
            let (key, value) = words[1].split_once('=').unwrap();
            HostItem::Sysctl(Sysctl { key: key.to_owned(), value: value.to_owned() })
        }
        "addr" => HostItem::Address(Address { device: device(), net: words[1].parse().unwrap() }),
        "tunnel" => {
            let (local, port) = after("local").unwrap().split_once(':').unwrap();
            HostItem::Tunnel(Tunnel {
                device: words[1].to_owned(),
                underlay: after("via").unwrap().to_owned(),
                local: local.parse().unwrap(),
                port: port.parse().unwrap(),
                network: after("network").unwrap().parse().unwrap(),
                own_subnet: after("subnet").unwrap().parse().unwrap(),
                mtu: after("mtu").unwrap().parse().unwrap(),
                options: TunnelOptions {
                    datapath: after("datapath").unwrap().parse().unwrap(),
                    source_check: after("source-check").unwrap().parse().unwrap(),
                    source_port: after("source-port").unwrap().parse().unwrap(),
                },
            })
        }
        "peer" => HostItem::TunnelPeer(TunnelPeer {
            device: device().into(),
            subnet: words[1].parse().unwrap(),
            node: after("at").unwrap().parse().unwrap(),
        }),
        "route" => HostItem::Route(Route {
            destination: words[1].parse().unwrap(),
            via: after("via").map(|via| via.parse().unwrap()),
            device: device().into(),
            onlink: words.contains(&"onlink"),
            source: after("src").map(|source| source.parse().unwrap()),
            mtu: after("mtu").map(|mtu| mtu.parse().unwrap()),
        }),
        _ => panic!("{line}"),
    };
    assert_eq!(item.to_string(), line, "a line must be written as it is printed");
    item
}

fn steps(from: &str, to: &str) -> Vec<String> {
    state(from).changes_to(&state(to)).iter().map(ToString::to_string).collect()
}

const UDP: &str = "
    link flannel0 type tun mtu 1472
    sysctl net/ipv6/conf/flannel0/disable_ipv6=1
    addr 10.5.68.0/32 dev flannel0
    tunnel flannel0 via eth0 local 10.0.0.1:8285 network 10.5.0.0/16 subnet 10.5.68.0/24 mtu 1472 datapath auto source-check observe source-port flow
    peer 10.5.54.0/24 at 10.0.0.2 dev flannel0
    route 10.5.0.0/16 dev flannel0
";

#[test]
fn a_bare_host_is_built_from_the_link_up() {
    assert_eq!(
        steps("", UDP),
        [
            "put link flannel0 type tun mtu 1472",
            "put sysctl net/ipv6/conf/flannel0/disable_ipv6=1",
            "put addr 10.5.68.0/32 dev flannel0",
            "put tunnel flannel0 via eth0 local 10.0.0.1:8285 network 10.5.0.0/16 subnet 10.5.68.0/24 mtu 1472 \
             datapath auto source-check observe source-port flow",
            "put peer 10.5.54.0/24 at 10.0.0.2 dev flannel0",
            "put route 10.5.0.0/16 dev flannel0",
        ]
    );
}

#[test]
fn tearing_down_is_building_backwards() {
    let built = steps("", UDP);
    let torn: Vec<_> = steps(UDP, "").iter().rev().map(|step| step.replacen("remove", "put", 1)).collect();
    assert_eq!(torn, built);
}

#[test]
fn nothing_is_done_when_nothing_differs() {
    assert_eq!(steps(UDP, UDP), Vec::<String>::new());
    assert_eq!(steps("", ""), Vec::<String>::new());
}

#[test]
fn a_changed_item_is_put_again_and_not_removed() {
    for (from, to, wanted) in [
        (
            "route 10.5.54.0/24 via 10.0.0.2 dev eth0 onlink",
            "route 10.5.54.0/24 via 10.0.0.3 dev eth0 onlink",
            "put route 10.5.54.0/24 via 10.0.0.3 dev eth0 onlink",
        ),
        (
            "route 10.5.54.0/24 via 10.0.0.2 dev eth0",
            "route 10.5.54.0/24 via 10.0.0.2 dev eth1 src 10.0.0.1 mtu 1400",
            "put route 10.5.54.0/24 via 10.0.0.2 dev eth1 src 10.0.0.1 mtu 1400",
        ),
        (
            "peer 10.5.54.0/24 at 10.0.0.2 dev flannel0",
            "peer 10.5.54.0/24 at 10.0.0.9 dev flannel0",
            "put peer 10.5.54.0/24 at 10.0.0.9 dev flannel0",
        ),
        (
            "link flannel0 type tun mtu 1472",
            "link flannel0 type tun mtu 8972",
            "put link flannel0 type tun mtu 8972",
        ),
        (
            "sysctl net/ipv4/conf/flannel0/rp_filter=1",
            "sysctl net/ipv4/conf/flannel0/rp_filter=2",
            "put sysctl net/ipv4/conf/flannel0/rp_filter=2",
        ),
    ] {
        assert_eq!(steps(from, to), [wanted]);
    }
}

#[test]
fn what_is_new_is_put_before_what_is_old_is_removed() {
    assert_eq!(
        steps(
            "addr 10.5.68.0/32 dev flannel0
             peer 10.5.54.0/24 at 10.0.0.2 dev flannel0
             route 10.5.54.0/24 via 10.0.0.2 dev eth0",
            "addr 10.5.69.0/32 dev flannel0
             peer 10.5.55.0/24 at 10.0.0.2 dev flannel0
             route 10.5.55.0/24 via 10.0.0.2 dev eth0",
        ),
        [
            "put addr 10.5.69.0/32 dev flannel0",
            "put peer 10.5.55.0/24 at 10.0.0.2 dev flannel0",
            "put route 10.5.55.0/24 via 10.0.0.2 dev eth0",
            "remove route 10.5.54.0/24 via 10.0.0.2 dev eth0",
            "remove peer 10.5.54.0/24 at 10.0.0.2 dev flannel0",
            "remove addr 10.5.68.0/32 dev flannel0",
        ]
    );
}

#[test]
fn a_state_prints_itself_in_creation_order() {
    let printed = state(UDP).to_string();
    let wanted: String = UDP
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .fold(String::new(), |text, line| text + line + "\n");
    assert_eq!(printed, wanted);
    let shuffled: HostState = state(UDP).iter().rev().cloned().collect();
    assert_eq!(shuffled.to_string(), wanted);
}

#[test]
fn tunnel_options_are_read_by_the_words_they_print() {
    for datapath in [Datapath::Auto, Datapath::Ebpf, Datapath::Xdp, Datapath::Tc, Datapath::Tun] {
        assert_eq!(datapath.to_string().parse(), Ok(datapath));
    }
    for check in [SourceCheck::Enforce, SourceCheck::Observe, SourceCheck::Off] {
        assert_eq!(check.to_string().parse(), Ok(check));
    }
    for port in [SourcePort::Flow, SourcePort::Fixed] {
        assert_eq!(port.to_string().parse(), Ok(port));
    }
    assert_eq!("bpf".parse::<Datapath>(), Err("must be one of auto, ebpf, xdp, tc, tun".to_owned()));
    assert_eq!("on".parse::<SourceCheck>(), Err("must be one of enforce, observe, off".to_owned()));
    assert_eq!("".parse::<SourcePort>(), Err("must be one of flow, fixed".to_owned()));
}

/// Few names and addresses, so that two states often have a key in common.
fn items() -> impl Strategy<Value = HostItem> {
    let device = || select(vec!["flannel0", "flannel1"]).prop_map(str::to_owned);
    let node = || (1..4_u8).prop_map(|n| Ipv4Addr::new(10, 0, 0, n));
    let subnet = || (0..4_u8).prop_map(|n| Ipv4Net::new_assert(Ipv4Addr::new(10, 5, n, 0), 24));
    let mtu = || select(vec![1400_u32, 1472]);
    let tunnel = (device(), node(), mtu(), select(vec![Datapath::Auto, Datapath::Tun])).prop_map(
        |(device, local, mtu, datapath)| {
            HostItem::Tunnel(Tunnel {
                device,
                underlay: "eth0".to_owned(),
                local,
                port: 8285,
                network: Ipv4Net::new_assert(Ipv4Addr::new(10, 5, 0, 0), 16),
                own_subnet: Ipv4Net::new_assert(Ipv4Addr::new(10, 5, 9, 0), 24),
                mtu,
                options: TunnelOptions { datapath, ..TunnelOptions::default() },
            })
        },
    );
    prop_oneof![
        (device(), mtu()).prop_map(|(name, mtu)| HostItem::Link(Link { name, kind: LinkKind::Tun, mtu })),
        (device(), select(vec!["0", "1"])).prop_map(|(device, value)| {
            let key = format!("net/ipv6/conf/{device}/disable_ipv6");
            HostItem::Sysctl(Sysctl { key, value: value.to_owned() })
        }),
        (device(), subnet()).prop_map(|(device, subnet)| {
            let net = IpNet::V4(Ipv4Net::from(subnet.network()));
            HostItem::Address(Address { device, net })
        }),
        tunnel,
        (device(), subnet(), node()).prop_map(|(device, subnet, node)| HostItem::TunnelPeer(TunnelPeer {
            device: device.into(),
            subnet,
            node
        })),
        (device(), subnet(), proptest::option::of(node()), any::<bool>()).prop_map(
            |(device, subnet, via, onlink)| {
                HostItem::Route(Route {
                    destination: IpNet::V4(subnet),
                    via: via.map(IpAddr::V4),
                    device: device.into(),
                    onlink,
                    source: None,
                    mtu: None,
                })
            }
        ),
    ]
}

fn states() -> impl Strategy<Value = HostState> {
    proptest::collection::vec(items(), 0..24).prop_map(HostState::from_iter)
}

/// Does `item` need `base` to be there?
fn hangs_on(item: &HostItem, base: &HostItem) -> bool {
    match (item, base) {
        (HostItem::Sysctl(sysctl), HostItem::Link(link)) => {
            sysctl.key.split('/').any(|part| part == link.name)
        }
        (HostItem::Address(address), HostItem::Link(link)) => address.device == link.name,
        (HostItem::Tunnel(tunnel), HostItem::Link(link)) => tunnel.device == link.name,
        (HostItem::Tunnel(tunnel), HostItem::Address(address)) => tunnel.device == address.device,
        (HostItem::TunnelPeer(peer), HostItem::Tunnel(tunnel)) => *peer.device == *tunnel.device,
        (HostItem::Route(route), HostItem::Link(link)) => *route.device == *link.name,
        (HostItem::Route(route), HostItem::Address(address)) => *route.device == *address.device,
        // A packet must not be routed to a tunnel that does not know the peer yet.
        (HostItem::Route(route), HostItem::TunnelPeer(peer)) => route.device == peer.device,
        _ => false,
    }
}

proptest! {
    #[test]
    fn of_items_with_one_key_the_last_stays(items in proptest::collection::vec(items(), 0..24)) {
        let mut one_by_one = HostState::new();
        for item in items.clone() {
            one_by_one.insert(item);
        }
        prop_assert_eq!(HostState::from_iter(items), one_by_one);
    }

    #[test]
    fn applying_the_changes_gives_the_wanted_state(from in states(), wanted in states()) {
        let mut state = from.clone();
        for change in from.changes_to(&wanted) {
            state.record(&change);
        }
        prop_assert_eq!(state, wanted);
    }

    #[test]
    fn every_item_is_put_before_what_hangs_on_it(from in states(), wanted in states()) {
        let changes = from.changes_to(&wanted);
        for (position, change) in changes.iter().enumerate() {
            let Change::Put(item) = change else { continue };
            let late = changes[position..].iter().find(|later| {
                matches!(later, Change::Put(base) if hangs_on(item, base))
            });
            prop_assert!(late.is_none(), "{} comes before {}", change, late.unwrap());
        }
    }

    #[test]
    fn nothing_is_removed_while_something_old_hangs_on_it(from in states(), wanted in states()) {
        let changes = from.changes_to(&wanted);
        for (position, change) in changes.iter().enumerate() {
            let Change::Remove(base) = change else { continue };
            let late = changes[position..].iter().find(|later| {
                matches!(later, Change::Remove(item) if hangs_on(item, base))
            });
            prop_assert!(late.is_none(), "{} comes before {}", change, late.unwrap());
        }
    }

    #[test]
    fn removals_run_in_the_reverse_of_creation_order(from in states(), wanted in states()) {
        let removed: Vec<Key> = from
            .changes_to(&wanted)
            .iter()
            .filter_map(|change| match change {
                Change::Remove(item) => Some(item.key()),
                Change::Put(_) => None,
            })
            .collect();
        prop_assert!(removed.windows(2).all(|pair| pair[0] > pair[1]));
    }

    #[test]
    fn what_is_in_both_states_is_there_all_the_time(from in states(), wanted in states()) {
        let keys = |state: &HostState| state.iter().map(HostItem::key).collect::<BTreeSet<_>>();
        let kept: BTreeSet<Key> = keys(&from).intersection(&keys(&wanted)).cloned().collect();
        let mut state = from.clone();
        for change in from.changes_to(&wanted) {
            state.record(&change);
            prop_assert!(kept.is_subset(&keys(&state)), "{}", change);
        }
    }

    #[test]
    fn only_what_differs_is_touched(from in states(), wanted in states()) {
        for change in from.changes_to(&wanted) {
            prop_assert!(from.contains(change.item()) != wanted.contains(change.item()));
        }
    }

    #[test]
    fn a_change_that_failed_is_asked_for_again(from in states(), wanted in states(), failed in any::<prop::sample::Index>()) {
        let changes = from.changes_to(&wanted);
        prop_assume!(!changes.is_empty());
        let failed = failed.index(changes.len());
        let mut state = from.clone();
        for (position, change) in changes.iter().enumerate() {
            if position != failed {
                state.record(change);
            }
        }
        prop_assert_eq!(state.changes_to(&wanted), vec![changes[failed].clone()]);
    }

    #[test]
    fn every_item_is_printed_as_one_line_that_says_all(item_in in items()) {
        prop_assert_eq!(item(&item_in.to_string()), item_in);
    }
}
