use super::*;
use crate::domain::config::BackendConfig;
use crate::domain::lease::LeaseAttrs;
use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

const US: &str = "192.0.2.1";

/// `10.5.0.0/16 24 10.5.1.0 10.5.255.0`
fn v4(text: &str) -> Option<SubnetRange<Ipv4Net, Ipv4Addr>> {
    let words: Vec<_> = text.split(' ').collect();
    Some(SubnetRange {
        network: words[0].parse().unwrap(),
        subnet_len: words[1].parse().unwrap(),
        subnet_min: words[2].parse().unwrap(),
        subnet_max: words[3].parse().unwrap(),
    })
}

fn network(text: &str) -> NetworkConfig {
    NetworkConfig {
        v4: v4(text),
        v6: None,
        enable_nftables: false,
        backend: BackendConfig::Alloc,
        warnings: vec![],
    }
}

fn dual(text: &str) -> NetworkConfig {
    let mut config = network(text);
    config.v6 = Some(SubnetRange {
        network: "fd00::/48".parse().unwrap(),
        subnet_len: 64,
        subnet_min: "fd00:0:0:1::".parse().unwrap(),
        subnet_max: "fd00:0:0:ffff::".parse().unwrap(),
    });
    config
}

/// `10.5.1.0-24 192.0.2.1`
fn leases(lines: &[&str]) -> Vec<Lease> {
    let lease = |line: &&str| {
        let (key, ip) = line.split_once(' ').unwrap();
        Lease {
            subnets: key.parse().unwrap(),
            attrs: LeaseAttrs::new(ip.parse().unwrap()),
            expires: None,
            revision: 0,
        }
    };
    lines.iter().map(lease).collect()
}

fn ask(config: &NetworkConfig, previous: Previous, lines: &[&str]) -> String {
    let wish = Wish { config, node: US.parse().ok(), previous };
    let leases = leases(lines);
    let taken = Taken { leases: &leases, unreadable: &[] };
    match choose(&wish, &taken, &mut StdRng::seed_from_u64(1)) {
        Ok(Choice::Reuse(lease)) => format!("reuse {}", lease.subnets),
        Ok(Choice::Delete(lease)) => format!("delete {}", lease.subnets),
        Ok(Choice::Take(subnets)) => format!("take {subnets}"),
        Err(error) => error.to_string(),
    }
}

fn preferred(key: &str) -> Previous {
    Previous::Preferred(key.parse().unwrap())
}

#[test]
fn a_lease_that_names_us_is_ours_when_it_fits_and_deleted_when_not() {
    let config = network("10.5.0.0/16 24 10.5.10.0 10.5.20.0");
    for (lease, wanted) in [
        ("10.5.10.0-24 192.0.2.1", "reuse 10.5.10.0-24"),
        ("10.5.20.0-24 192.0.2.1", "reuse 10.5.20.0-24"),
        ("10.5.9.0-24 192.0.2.1", "delete 10.5.9.0-24"),
        ("10.5.21.0-24 192.0.2.1", "delete 10.5.21.0-24"),
        ("10.5.12.0-25 192.0.2.1", "delete 10.5.12.0-25"),
        ("10.6.12.0-24 192.0.2.1", "delete 10.6.12.0-24"),
        ("10.5.12.0-24&fd00:0:0:1::-64 192.0.2.1", "delete 10.5.12.0-24&fd00:0:0:1::-64"),
    ] {
        assert_eq!(ask(&config, Previous::None, &["10.5.11.0-24 192.0.2.9", lease]), wanted);
        assert_eq!(ask(&config, preferred("10.5.15.0-24"), &[lease]), wanted, "previous comes second");
    }
    let dual = dual("10.5.0.0/16 24 10.5.1.0 10.5.255.0");
    assert_eq!(ask(&dual, Previous::None, &["10.5.3.0-24 192.0.2.1"]), "delete 10.5.3.0-24");
    assert_eq!(
        ask(&dual, Previous::None, &["10.5.3.0-24&fd00:0:0:3::-64 192.0.2.1"]),
        "reuse 10.5.3.0-24&fd00:0:0:3::-64"
    );
}

#[test]
fn the_first_of_two_leases_that_name_us_counts() {
    let config = network("10.5.0.0/16 24 10.5.1.0 10.5.255.0");
    let lines = ["10.5.30.0-24 192.0.2.1", "10.5.4.0-24 192.0.2.1"];
    assert_eq!(ask(&config, Previous::None, &lines), "reuse 10.5.30.0-24");
}

#[test]
fn the_previous_subnet_is_taken_when_it_is_free_and_fits() {
    let config = network("10.5.0.0/16 24 10.5.1.0 10.5.1.0");
    let previous = preferred("10.5.1.0-24");
    assert_eq!(ask(&config, previous, &[]), "take 10.5.1.0-24");
    let host_bits = Previous::Preferred(Subnets::v4(Ipv4Net::new("10.5.1.1".parse().unwrap(), 24).unwrap()));
    assert_eq!(ask(&config, host_bits, &[]), "take 10.5.1.0-24");

    let config = network("10.5.0.0/16 24 10.5.7.0 10.5.8.0");
    for (previous, lease) in [
        // Leased, or overlapped by a wider or narrower lease.
        ("10.5.7.0-24", "10.5.7.0-24 192.0.2.9"),
        ("10.5.7.0-24", "10.5.6.0-23 192.0.2.9"),
        ("10.5.7.0-24", "10.5.7.128-25 192.0.2.9"),
        // Not what this configuration gives out.
        ("10.5.9.0-24", "10.5.7.0-24 192.0.2.9"),
        ("10.5.8.0-25", "10.5.7.0-24 192.0.2.9"),
    ] {
        assert_eq!(ask(&config, preferred(previous), &[lease]), "take 10.5.8.0-24", "{previous} {lease}");
    }
}

#[test]
fn a_running_node_gets_its_subnet_or_the_reason_why_not() {
    let config = network("10.5.0.0/16 24 10.5.1.0 10.5.255.0");
    let only = Previous::Only("10.5.7.0-24".parse().unwrap());
    for (lines, wanted) in [
        (&[][..], "take 10.5.7.0-24"),
        (&["10.5.7.0-24 192.0.2.1"], "reuse 10.5.7.0-24"),
        // A node with our public address (NAT) took another one meanwhile: that one stays.
        (&["10.5.3.0-24 192.0.2.1"], "take 10.5.7.0-24"),
        (&["10.5.6.0-23 192.0.2.1"], "delete 10.5.6.0-23"),
        (&["10.5.7.0-24 192.0.2.9"], "subnet 10.5.7.0-24 is leased by 192.0.2.9 now"),
        (&["10.5.0.0-20 192.0.2.9"], "subnet 10.5.7.0-24 is leased by 192.0.2.9 now"),
        // A wide claim by another does not take away what we hold.
        (&["10.5.0.0-20 192.0.2.9", "10.5.7.0-24 192.0.2.1"], "reuse 10.5.7.0-24"),
    ] {
        assert_eq!(ask(&config, only, lines), wanted);
    }
    let unfit = Previous::Only("10.6.7.0-24".parse().unwrap());
    assert_eq!(
        ask(&config, unfit, &[]),
        "subnet 10.6.7.0-24 does not fit the network configuration any more"
    );
}

#[test]
fn when_nothing_is_free_the_range_is_named() {
    let config = network("10.5.0.0/16 24 10.5.1.0 10.5.3.0");
    let lines = ["10.5.1.0-24 192.0.2.2", "10.5.2.0-24 192.0.2.3", "10.5.3.0-26 192.0.2.4"];
    assert_eq!(
        ask(&config, Previous::None, &lines),
        "out of subnets: every /24 from 10.5.1.0 to 10.5.3.0 is leased"
    );
}

#[test]
fn the_end_of_the_address_space_does_not_wrap() {
    let last = network("255.255.0.0/16 24 255.255.255.0 255.255.255.0");
    assert_eq!(ask(&last, Previous::None, &[]), "take 255.255.255.0-24");
    assert_eq!(
        ask(&last, Previous::None, &["255.255.255.0-24 192.0.2.9"]),
        "out of subnets: every /24 from 255.255.255.0 to 255.255.255.0 is leased"
    );
    let mut v6 = dual("10.5.0.0/16 24 10.5.1.0 10.5.255.0");
    v6.v6 = Some(SubnetRange {
        network: "ffff::/16".parse().unwrap(),
        subnet_len: 64,
        subnet_min: "ffff:ffff:ffff:ffff::".parse().unwrap(),
        subnet_max: "ffff:ffff:ffff:ffff::".parse().unwrap(),
    });
    assert!(ask(&v6, Previous::None, &[]).ends_with("&ffff:ffff:ffff:ffff::-64"));
    let full = "10.5.1.0-24&ffff:ffff:ffff:ffff::-64 192.0.2.9";
    assert!(ask(&v6, Previous::None, &[full]).starts_with("out of subnets: every /64 from ffff:"));
}

#[test]
fn ipv4_only_leases_do_not_disturb_a_dual_stack_network() {
    let config = dual("10.5.0.0/16 24 10.5.1.0 10.5.2.0");
    let text = ask(&config, Previous::None, &["10.5.1.0-24 192.0.2.9"]);
    assert!(text.starts_with("take 10.5.2.0-24&fd00:0:0:"), "{text}");
}

#[test]
fn a_node_without_the_address_that_leases_are_told_apart_by_is_refused() {
    let config = network("10.5.0.0/16 24 10.5.1.0 10.5.2.0");
    let wish = Wish { config: &config, node: None, previous: Previous::None };
    let taken = Taken { leases: &[], unreadable: &[] };
    assert_eq!(
        choose(&wish, &taken, &mut StdRng::seed_from_u64(1)),
        Err(NoSubnet::NoPublicIp { family: "IPv4" })
    );
}

#[test]
fn a_network_of_only_ipv6_is_leased_by_ipv6_addresses() {
    let mut config = dual("10.5.0.0/16 24 10.5.1.0 10.5.2.0");
    config.v4 = None;
    config.v6 = config.v6.map(|range| SubnetRange { subnet_max: "fd00:0:0:2::".parse().unwrap(), ..range });
    let key = "0.0.0.0-0&fd00:0:0:1::-64";
    let lease = |key: &str, node: &str| Lease {
        subnets: key.parse().unwrap(),
        attrs: LeaseAttrs::of_node(node.parse().unwrap()),
        expires: None,
        revision: 0,
    };
    let ask = |node: &str, previous, leases: &[Lease]| {
        let wish = Wish { config: &config, node: node.parse().ok(), previous };
        choose(&wish, &Taken { leases, unreadable: &[] }, &mut StdRng::seed_from_u64(1))
    };
    let others = [lease(key, "2001:db8::2"), lease("10.5.1.0-24", "192.0.2.1")];
    let second = "0.0.0.0-0&fd00:0:0:2::-64".parse().unwrap();
    assert_eq!(ask("2001:db8::1", Previous::None, &others), Ok(Choice::Take(second)));
    assert_eq!(ask("2001:db8::2", Previous::None, &others), Ok(Choice::Reuse(others[0].clone())));
    assert_eq!(ask("2001:db8::1", preferred(key), &[]), Ok(Choice::Take(key.parse().unwrap())));
    assert_eq!(ask("", Previous::None, &others), Err(NoSubnet::NoPublicIp { family: "IPv6" }));
    let only = Previous::Only(key.parse().unwrap());
    assert_eq!(
        ask("2001:db8::1", only, &others).unwrap_err().to_string(),
        format!("subnet {key} is leased by 2001:db8::2 now")
    );
}

#[test]
fn an_entry_that_cannot_be_read_still_occupies_its_subnet() {
    let config = network("10.5.0.0/16 24 10.5.1.0 10.5.2.0");
    let unreadable = ["10.5.1.0-24".parse().unwrap()];
    let taken = Taken { leases: &[], unreadable: &unreadable };
    for previous in [Previous::None, preferred("10.5.1.0-24")] {
        let wish = Wish { config: &config, node: US.parse().ok(), previous };
        let choice = choose(&wish, &taken, &mut StdRng::seed_from_u64(1));
        assert_eq!(choice, Ok(Choice::Take("10.5.2.0-24".parse().unwrap())));
    }
}

#[test]
fn the_choice_is_spread_over_the_first_hundred_free_subnets() {
    let config = network("10.0.0.0/8 24 10.0.1.0 10.255.255.0");
    let taken = leases(&["10.0.1.0-24 192.0.2.9", "10.0.64.0-18 192.0.2.8"]);
    let mut rng = StdRng::seed_from_u64(7);
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..5000 {
        let wish = Wish { config: &config, node: US.parse().ok(), previous: Previous::None };
        let Ok(Choice::Take(subnets)) = choose(&wish, &Taken { leases: &taken, unreadable: &[] }, &mut rng)
        else {
            panic!("there is room");
        };
        seen.insert(subnets);
    }
    assert_eq!(seen.len(), 100);
    assert_eq!(seen.first().unwrap().to_string(), "10.0.2.0-24");
    // 62 before the wide lease, which is skipped in one step, 38 behind it.
    assert_eq!(seen.last().unwrap().to_string(), "10.0.165.0-24");
}

#[test]
fn a_full_network_of_four_million_subnets_is_answered_at_once() {
    let config = network("10.0.0.0/8 30 10.0.0.4 10.255.255.252");
    // The shortest of some: how long others keep the processor is no matter of ours.
    let took = (0..20).map(|_| {
        let started = std::time::Instant::now();
        assert!(ask(&config, Previous::None, &["10.0.0.0-8 192.0.2.9"]).starts_with("out of subnets"));
        started.elapsed().as_millis()
    });
    assert!(took.min().is_some_and(|took| took < 100));
}

proptest! {
    #[test]
    fn what_is_taken_fits_overlaps_nothing_and_is_found_whenever_there_is_room(
        seed in any::<u64>(),
        max in 1u8..=15,
        others in proptest::collection::vec((0u8..16, 20u8..=27), 0..20),
    ) {
        let config = network(&format!("10.5.0.0/20 24 10.5.1.0 10.5.{max}.0"));
        let lines: Vec<String> = others
            .iter()
            .map(|(third, len)| {
                let net = Ipv4Net::new([10, 5, *third, 64].into(), *len).unwrap().trunc();
                format!("{} 192.0.2.9", Subnets::v4(net))
            })
            .collect();
        let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
        let leases = leases(&lines);
        let room = (1..=max).any(|third| {
            let net = Subnets::v4(Ipv4Net::new([10, 5, third, 0].into(), 24).unwrap());
            !leases.iter().any(|lease| lease.subnets.overlaps(&net))
        });
        let wish = Wish { config: &config, node: US.parse().ok(), previous: Previous::None };
        let taken = Taken { leases: &leases, unreadable: &[] };
        match choose(&wish, &taken, &mut StdRng::seed_from_u64(seed)) {
            Ok(Choice::Take(subnets)) => {
                prop_assert!(room && fits(&subnets, &config));
                prop_assert!(!leases.iter().any(|lease| lease.subnets.overlaps(&subnets)));
            }
            other => {
                prop_assert!(!room, "{:?}", other);
            }
        }
    }
}
