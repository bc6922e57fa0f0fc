use std::net::IpAddr;

use proptest::prelude::*;

use super::*;

/// `10.0.0.1`, with `~` dynamic, `?` temporary, `!` deprecated.
fn address(text: &str) -> InterfaceAddress {
    InterfaceAddress {
        address: text.trim_end_matches(['~', '?', '!']).parse().unwrap(),
        prefix_len: 24,
        dynamic: text.contains('~'),
        temporary: text.contains('?'),
        deprecated: text.contains('!'),
    }
}

fn interface(index: u32, name: &str, addresses: &[&str]) -> Interface {
    Interface {
        name: name.to_owned(),
        index,
        mtu: 1500,
        up: true,
        addresses: addresses.iter().map(|text| address(text)).collect(),
    }
}

/// A host with an uplink, a second network, and what else is usually there.
fn host() -> HostFacts {
    HostFacts {
        interfaces: vec![
            interface(1, "lo", &["127.0.0.1", "::1"]),
            interface(2, "eth0", &["192.168.1.7~", "192.168.1.9", "fe80::2", "2001:db8::2"]),
            interface(3, "eth1", &["10.99.0.11", "fd00:99::11"]),
            interface(4, "docker0", &["172.17.0.1"]),
            interface(5, "down0", &[]),
        ],
        default_route_v4: Some(2),
        default_route_v6: Some(2),
        can_reach: vec![
            (
                "10.99.0.1".parse().unwrap(),
                RouteLookup { index: 3, source: Some("10.99.0.11".parse().unwrap()) },
            ),
            ("10.77.0.1".parse().unwrap(), RouteLookup { index: 4, source: None }),
            (
                "fd00:99::1".parse().unwrap(),
                RouteLookup { index: 3, source: Some("fd00:99::11".parse().unwrap()) },
            ),
        ],
    }
}

/// Selectors and public addresses as flags.
fn flags(line: &str) -> (Vec<Selector>, PublicAddresses) {
    let mut selectors = Vec::new();
    let mut public = PublicAddresses::default();
    for flag in line.split_whitespace() {
        let (name, value) = flag.split_once('=').unwrap();
        match name {
            "--iface" => selectors.push(Selector::from_iface(value)),
            "--iface-regex" => selectors.push(Selector::Pattern(value.parse().unwrap())),
            "--iface-can-reach" => selectors.push(Selector::CanReach(value.parse().unwrap())),
            "--public-ip" => public.v4 = Some(value.parse().unwrap()),
            "--public-ipv6" => public.v6 = Some(value.parse().unwrap()),
            _ => panic!("{flag}"),
        }
    }
    (selectors, public)
}

/// `name address public`, or what was tried.
fn chosen(facts: &HostFacts, line: &str, families: Families) -> String {
    let (selectors, public) = flags(line);
    match choose(&selectors, facts, public, families) {
        Ok(found) => {
            let mut text = found.name.clone();
            for (address, public) in found.addresses().zip(found.public_addresses()) {
                text.push_str(&format!(" {address} {public}"));
            }
            text
        }
        Err(error) => error.tried.join("; "),
    }
}

#[test]
fn an_interface_is_chosen_by_flag_or_default_route() {
    for (line, wanted) in [
        ("", "eth0 192.168.1.9 192.168.1.9"),
        ("--iface=eth1", "eth1 10.99.0.11 10.99.0.11"),
        ("--iface=10.99.0.11", "eth1 10.99.0.11 10.99.0.11"),
        // Asked for by itself, an address need not be the best one.
        ("--iface=192.168.1.7", "eth0 192.168.1.7 192.168.1.7"),
        // An IPv6 address selects the interface even when the overlay has no IPv6.
        ("--iface=fd00:99::11", "eth1 10.99.0.11 10.99.0.11"),
        ("--iface=nosuch0 --iface=eth1", "eth1 10.99.0.11 10.99.0.11"),
        ("--iface=eth1 --iface=eth0", "eth1 10.99.0.11 10.99.0.11"),
        // --public-ip selects when nothing else does, and only then.
        ("--public-ip=10.99.0.11", "eth1 10.99.0.11 10.99.0.11"),
        ("--iface=eth1 --public-ip=203.0.113.9", "eth1 10.99.0.11 203.0.113.9"),
        ("--public-ipv6=fd00:99::11", "eth1 10.99.0.11 10.99.0.11"),
        ("--iface-regex=^10\\.99\\.", "eth1 10.99.0.11 10.99.0.11"),
        ("--iface-regex=168", "eth0 192.168.1.9 192.168.1.9"),
        ("--iface-regex=\\.7$", "eth0 192.168.1.7 192.168.1.7"),
        ("--iface-regex=^docker", "docker0 172.17.0.1 172.17.0.1"),
        // An address that matches wins over a name that matches earlier.
        ("--iface-regex=eth|172", "docker0 172.17.0.1 172.17.0.1"),
        ("--iface-can-reach=10.99.0.1", "eth1 10.99.0.11 10.99.0.11"),
        ("--iface-can-reach=10.77.0.1", "docker0 172.17.0.1 172.17.0.1"),
        // Its IPv6 source says nothing about IPv4.
        ("--iface-can-reach=fd00:99::1", "eth1 10.99.0.11 10.99.0.11"),
    ] {
        assert_eq!(chosen(&host(), line, Families::V4), wanted, "{line}");
    }
}

#[test]
fn what_did_not_work_is_said_of_every_selector() {
    for (line, wanted) in [
        ("--iface=nosuch0", "--iface=nosuch0: there is no interface of that name"),
        ("--iface=9.9.9.9", "--iface=9.9.9.9: no interface has that address"),
        ("--iface=lo", "--iface=lo: lo has no usable IPv4 address"),
        ("--iface=down0", "--iface=down0: down0 has no usable IPv4 address"),
        ("--iface-regex=^wlan", "--iface-regex=^wlan: no interface's address or name matches"),
        ("--iface-can-reach=8.8.8.8", "--iface-can-reach=8.8.8.8: there is no route to it"),
        (
            "--iface=lo --iface=nosuch0",
            "--iface=lo: lo has no usable IPv4 address; --iface=nosuch0: there is no interface of that name",
        ),
        (
            "--public-ip=203.0.113.9",
            "--public-ip=203.0.113.9: no interface has that address; if it is one behind NAT, name with --iface the interface that leads there",
        ),
    ] {
        assert_eq!(chosen(&host(), line, Families::V4), wanted, "{line}");
    }
    let no_route = HostFacts { default_route_v4: None, ..host() };
    assert_eq!(
        chosen(&no_route, "", Families::V4),
        "there is no IPv4 default route to choose an interface by; name one with --iface"
    );
    let gone = HostFacts { default_route_v4: Some(77), ..host() };
    assert_eq!(chosen(&gone, "", Families::V4), "the route leaves by interface 77, which is gone");
}

#[test]
fn two_families_need_addresses_of_both_on_one_interface() {
    for (line, wanted) in [
        ("", "eth0 192.168.1.9 192.168.1.9 2001:db8::2 2001:db8::2"),
        ("--iface=eth1", "eth1 10.99.0.11 10.99.0.11 fd00:99::11 fd00:99::11"),
        ("--iface=fe80::2", "eth0 192.168.1.9 192.168.1.9 fe80::2 fe80::2"),
        ("--iface=10.99.0.11", "eth1 10.99.0.11 10.99.0.11 fd00:99::11 fd00:99::11"),
        ("--iface-can-reach=fd00:99::1", "eth1 10.99.0.11 10.99.0.11 fd00:99::11 fd00:99::11"),
        ("--iface=eth1 --public-ipv6=2001:db8::99", "eth1 10.99.0.11 10.99.0.11 fd00:99::11 2001:db8::99"),
        (
            "--public-ip=10.99.0.11 --public-ipv6=fd00:99::11",
            "eth1 10.99.0.11 10.99.0.11 fd00:99::11 fd00:99::11",
        ),
        (
            "--public-ip=10.99.0.11 --public-ipv6=2001:db8::2",
            "--public-ip=10.99.0.11: it is on eth1 but --public-ipv6=2001:db8::2 is on eth0; both must be on one interface",
        ),
        ("--iface-regex=^(10|fd00)", "eth1 10.99.0.11 10.99.0.11 fd00:99::11 fd00:99::11"),
        // Only IPv4 matches, and no name does.
        ("--iface-regex=^10", "--iface-regex=^10: no interface's address or name matches"),
        ("--iface=docker0", "--iface=docker0: docker0 has no usable IPv6 address"),
    ] {
        assert_eq!(chosen(&host(), line, Families::Dual), wanted, "{line}");
    }
    let split = HostFacts { default_route_v6: Some(3), ..host() };
    assert_eq!(
        chosen(&split, "", Families::Dual),
        "the default routes leave by different interfaces, IPv4 by eth0 and IPv6 by eth1; name one with --iface"
    );
    let half = HostFacts { default_route_v6: None, ..host() };
    assert!(chosen(&half, "", Families::Dual).starts_with("there is no IPv6 default route"));
}

#[test]
fn a_network_of_only_ipv6_asks_for_no_ipv4() {
    let mut facts = host();
    facts.interfaces.push(interface(6, "six0", &["fe80::6", "fd00:66::6"]));
    for (line, wanted) in [
        ("", "eth0 2001:db8::2 2001:db8::2"),
        ("--iface=six0", "six0 fd00:66::6 fd00:66::6"),
        ("--iface=fe80::6", "six0 fe80::6 fe80::6"),
        // An IPv4 address selects the interface even when the overlay has no IPv4.
        ("--iface=10.99.0.11", "eth1 fd00:99::11 fd00:99::11"),
        ("--public-ipv6=fd00:66::6", "six0 fd00:66::6 fd00:66::6"),
        ("--iface=six0 --public-ipv6=2001:db8::99", "six0 fd00:66::6 2001:db8::99"),
        ("--iface-regex=^fd00:99", "eth1 fd00:99::11 fd00:99::11"),
        ("--iface-can-reach=fd00:99::1", "eth1 fd00:99::11 fd00:99::11"),
        ("--iface=docker0", "--iface=docker0: docker0 has no usable IPv6 address"),
    ] {
        assert_eq!(chosen(&facts, line, Families::V6), wanted, "{line}");
    }
    let no_route = HostFacts { default_route_v6: None, ..host() };
    assert_eq!(
        chosen(&no_route, "", Families::V6),
        "there is no IPv6 default route to choose an interface by; name one with --iface"
    );
}

#[test]
fn addresses_are_ranked_as_a_peer_would_want_them() {
    for (addresses, wanted) in [
        (&["10.0.0.1", "10.0.0.2"][..], "10.0.0.1"),
        (&["169.254.1.1", "10.0.0.2"], "10.0.0.2"),
        (&["169.254.1.1", "10.0.0.2~?"], "10.0.0.2"),
        (&["10.0.0.1~", "10.0.0.2?"], "10.0.0.2"),
        (&["10.0.0.1?", "10.0.0.2"], "10.0.0.2"),
        (&["10.0.0.1!", "169.254.1.1~"], "169.254.1.1"),
        (&["127.0.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "192.0.2.1"], "192.0.2.1"),
    ] {
        let facts = HostFacts { interfaces: vec![interface(2, "eth0", addresses)], ..HostFacts::default() };
        let wanted = format!("eth0 {wanted} {wanted}");
        assert_eq!(chosen(&facts, "--iface=eth0", Families::V4), wanted, "{addresses:?}");
    }
}

#[test]
fn an_interface_with_an_mtu_of_zero_is_passed_over() {
    let mut facts = host();
    facts.interfaces[1].mtu = 0;
    assert_eq!(chosen(&facts, "--iface=eth0 --iface=eth1", Families::V4), "eth1 10.99.0.11 10.99.0.11");
    assert_eq!(chosen(&facts, "", Families::V4), "eth0 has an MTU of 0");
}

#[test]
fn the_error_lists_the_interfaces_of_the_host_and_stays_short() {
    let (selectors, public) = flags("--iface=nosuch0");
    let error = choose(&selectors, &host(), public, Families::V4).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no interface to use: --iface=nosuch0: there is no interface of that name; this host has \
         lo:[127.0.0.1 ::1], eth0:[192.168.1.7 192.168.1.9 fe80::2 2001:db8::2], eth1:[10.99.0.11 fd00:99::11], \
         docker0:[172.17.0.1], down0:[]"
    );
    let many = HostFacts {
        interfaces: (1..5000).map(|n| interface(n, &format!("veth{n}"), &[])).collect(),
        ..host()
    };
    let error = choose(&selectors, &many, public, Families::V4).unwrap_err();
    assert!(error.present.ends_with("veth24:[], and 4975 more"), "{}", error.present);
    let none = choose(&selectors, &HostFacts::default(), public, Families::V4).unwrap_err();
    assert_eq!(none.present, "no interfaces");
}

#[test]
fn a_pattern_that_is_no_expression_says_why() {
    assert_eq!("(".parse::<Pattern>().unwrap_err(), "not a regular expression: unclosed group");
    assert_eq!(
        "(?=x)".parse::<Pattern>().unwrap_err(),
        "not a regular expression: look-around, including look-ahead and look-behind, is not supported"
    );
    assert!(r"(\w{500}){500}".parse::<Pattern>().unwrap_err().starts_with("takes more than"));
}

fn link(name: &str, is_tun: bool, addresses: &[&str]) -> ExistingLink {
    let addresses = addresses.iter().map(|text| text.parse().unwrap()).collect();
    ExistingLink { name: name.to_owned(), is_tun, addresses }
}

#[test]
fn the_tunnel_device_is_ours_again_or_the_first_free_one() {
    let own = "10.5.68.0/32";
    for (links, wanted) in [
        (vec![], "flannel0"),
        (vec![link("eth0", false, &["10.0.0.1/24"])], "flannel0"),
        (vec![link("flannel0", true, &[own])], "flannel0"),
        (vec![link("flannel0", true, &["10.6.1.0/32"])], "flannel1"),
        (vec![link("flannel0", true, &["10.6.1.0/32"]), link("flannel1", true, &[own])], "flannel1"),
        (vec![link("flannel7", true, &[own])], "flannel7"),
        (vec![link("flannel7", true, &["10.6.1.0/32", own])], "flannel7"),
        (vec![link("flannel1", true, &["10.6.1.0/32"])], "flannel0"),
        // Ours by address alone is not ours: not a TUN, not of our name, not a /32.
        (vec![link("flannel0", false, &[own])], "flannel1"),
        (vec![link("tun0", true, &[own])], "flannel0"),
        (vec![link("flannel0", true, &["10.5.68.0/24"])], "flannel1"),
        // Other names that look alike.
        (
            vec![
                link("flannel.1", false, &[]),
                link("flannel00", true, &[own]),
                link("flannel+1", true, &[own]),
            ],
            "flannel0",
        ),
        (vec![link("flannel99999999", true, &[])], "flannel0"),
    ] {
        assert_eq!(tunnel_device_name(&links, "10.5.68.0".parse().unwrap()), wanted, "{links:?}");
    }
}

proptest! {
    #[test]
    fn a_chosen_interface_is_one_of_the_hosts_and_has_its_address(
        addresses in proptest::collection::vec(any::<[u8; 4]>(), 0..6),
        public in proptest::option::of(any::<[u8; 4]>()),
    ) {
        let mut facts = host();
        facts.interfaces[1].addresses =
            addresses.iter().map(|bytes| address(&IpAddr::from(*bytes).to_string())).collect();
        let public = PublicAddresses { v4: public.map(Ipv4Addr::from), v6: None };
        for selectors in [vec![], vec![Selector::Name("eth0".to_owned())]] {
            if let Ok(found) = choose(&selectors, &facts, public, Families::V4) {
                let held = facts.interfaces.iter().find(|one| one.index == found.index).unwrap();
                prop_assert!(held.addresses.iter().any(|one| Some(one.address) == found.address.map(IpAddr::V4)));
                prop_assert_eq!(found.public_ip, public.v4.or(found.address));
            }
        }
    }
}

/// The interface as flags chose it on [`host`], and the flags.
fn started_with(line: &str) -> (ExternalInterface, Selection) {
    let (selectors, public) = flags(line);
    let current = choose(&selectors, &host(), public, Families::V4).unwrap();
    (current, Selection { selectors, public, families: Families::V4 })
}

#[test]
fn a_chosen_interface_is_followed_and_never_left() {
    let eth0 = |addresses: &[&str]| {
        let mut facts = host();
        facts.interfaces[1] = interface(2, "eth0", addresses);
        facts
    };
    let remade = {
        let mut facts = eth0(&["192.168.1.9"]);
        facts.interfaces[1].index = 77;
        facts.interfaces[1].mtu = 1400;
        facts
    };
    let gone = {
        let mut facts = host();
        facts.interfaces.remove(1);
        facts.default_route_v4 = Some(3);
        facts
    };
    let without_route = |addresses: &[&str]| HostFacts { default_route_v4: Some(3), ..eth0(addresses) };
    let rows = [
        ("as it was", "", host(), "eth0 2 1500 192.168.1.9"),
        ("made anew", "", remade, "eth0 77 1400 192.168.1.9"),
        ("gone", "", gone.clone(), "interface eth0 is gone"),
        ("gone, and another would do", "--iface=eth0 --iface=eth1", gone, "interface eth0 is gone"),
        ("a better address came", "", eth0(&["192.168.1.8", "192.168.1.9"]), "eth0 2 1500 192.168.1.9"),
        ("renumbered", "", eth0(&["192.168.1.8"]), "eth0 2 1500 192.168.1.8"),
        ("renumbered, the route comes later", "", without_route(&["192.168.1.8"]), "eth0 2 1500 192.168.1.8"),
        ("by name", "--iface=eth0", eth0(&["192.168.1.8"]), "eth0 2 1500 192.168.1.8"),
        (
            "no address left",
            "",
            eth0(&["fe80::2"]),
            "eth0 has lost its address 192.168.1.9 and has no other to take",
        ),
        (
            "flags name the address",
            "--iface=192.168.1.9",
            eth0(&["192.168.1.8"]),
            "eth0 has lost its address 192.168.1.9 and has no other to take",
        ),
        (
            "the public address is the choice",
            "--public-ip=192.168.1.9",
            eth0(&["192.168.1.8"]),
            "eth0 has lost its address 192.168.1.9 and has no other to take",
        ),
        (
            "a pattern that fits no longer",
            "--iface-regex=^192\\.168\\.1\\.9$",
            eth0(&["192.168.1.8"]),
            "eth0 has lost its address 192.168.1.9 and has no other to take",
        ),
        (
            "no MTU",
            "",
            {
                let mut facts = host();
                facts.interfaces[1].mtu = 0;
                facts
            },
            "interface eth0 has an MTU of 0",
        ),
    ];
    for (name, line, facts, expected) in rows {
        let (current, selection) = started_with(line);
        let said = match follow(&current, &selection, &facts) {
            Followed::There(now) => {
                let address = now.address.map_or_else(|| "none".to_owned(), |address| address.to_string());
                format!("{} {} {} {address}", now.name, now.index, now.mtu)
            }
            Followed::Away(reason) => reason,
        };
        assert_eq!(said, expected, "{name}");
    }
}

#[test]
fn what_a_restart_would_choose_is_told_when_it_is_another() {
    let (current, selection) = started_with("");
    assert_eq!(preferred(&current, &selection, &host()), None);
    let moved = HostFacts { default_route_v4: Some(3), ..host() };
    assert_eq!(preferred(&current, &selection, &moved).as_deref(), Some("eth1"));
    // A moment without a default route is no other choice.
    assert_eq!(preferred(&current, &selection, &HostFacts { default_route_v4: None, ..host() }), None);
    let (current, selection) = started_with("--iface=eth0");
    assert_eq!(preferred(&current, &selection, &moved), None);
}
