//! What holds for every text and every configuration.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use proptest::prelude::*;

use super::*;

/// Configurations that obey the rules, with and without defaults.
fn configs() -> impl Strategy<Value = String> {
    let v4 = (any::<u32>(), 1..=28_u8, 0..=40_u8).prop_map(|(bits, len, more)| {
        let network = Ipv4Net::new_assert(Ipv4Addr::from_bits(bits), len).trunc();
        let subnet_len = if more > 28 { 0 } else { (len + 2 + more).min(30) };
        format!(r#""Network":"{network}","SubnetLen":{subnet_len}"#)
    });
    let v6 = (any::<u128>(), 1..=124_u8, 0..=140_u8).prop_map(|(bits, len, more)| {
        let network = Ipv6Net::new_assert(Ipv6Addr::from_bits(bits), len).trunc();
        let subnet_len = if more > 124 { 0 } else { len.saturating_add(2 + more).min(126) };
        format!(r#","EnableIPv6":true,"IPv6Network":"{network}","IPv6SubnetLen":{subnet_len}"#)
    });
    let backend = prop_oneof![
        Just(String::new()),
        Just(r#","Backend":{"Type":"alloc"}"#.to_owned()),
        Just(r#","Backend":{"Type":"host-gw"}"#.to_owned()),
        (1..=65535_u16).prop_map(|port| format!(r#","Backend":{{"Type":"udp","Port":{port}}}"#)),
    ];
    (v4, proptest::option::of(v6), backend)
        .prop_map(|(v4, v6, backend)| format!("{{{v4}{}{backend}}}", v6.unwrap_or_default()))
}

proptest! {
    #[test]
    fn any_text_is_parsed_or_refused_and_never_panics(text in ".{0,200}") {
        let _ = NetworkConfig::parse(&text);
    }

    #[test]
    fn any_values_are_parsed_or_refused_and_never_panic(
        network in r#"("[0-9a-f.:/]{0,24}"|null|[0-9]{1,20})"#,
        number in r"-?[0-9]{1,24}(\.[0-9])?",
        address in r#"("[0-9a-f.:]{0,24}"|null)"#,
        backend in r#"(null|\{\}|\{"type":"(udp|alloc|x)","port":-?[0-9]{1,7}\})"#,
    ) {
        let text = format!(
            r#"{{"network":{network},"subnetlen":{number},"subnetmin":{address},"subnetmax":{address},
            "enableipv6":true,"ipv6network":{network},"ipv6subnetlen":{number},"ipv6subnetmin":{address},
            "backend":{backend}}}"#
        );
        let _ = NetworkConfig::parse(&text);
    }

    #[test]
    fn what_is_printed_parses_to_the_same_configuration(text in configs()) {
        let first = parsed(&text);
        let again = parsed(&first.to_string());
        prop_assert!(again.warnings.iter().all(|warning| warning.contains("Network is")), "{:?}", again.warnings);
        prop_assert_eq!(first.to_string(), again.to_string());
        prop_assert_eq!(NetworkConfig { warnings: Vec::new(), ..first }, NetworkConfig { warnings: Vec::new(), ..again });
    }

    #[test]
    fn every_range_holds_its_own_edges_on_subnet_boundaries(text in configs()) {
        let range = parsed(&text).v4.unwrap();
        for edge in [range.subnet_min, range.subnet_max] {
            let subnet = Ipv4Net::new(edge, range.subnet_len).unwrap();
            prop_assert_eq!(subnet.network(), edge);
            prop_assert!(range.network.contains(&subnet));
        }
        prop_assert!(range.subnet_min <= range.subnet_max);
    }
}
