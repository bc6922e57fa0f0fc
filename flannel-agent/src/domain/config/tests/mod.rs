mod any;
mod recorded;

use super::*;

fn parsed(text: &str) -> NetworkConfig {
    NetworkConfig::parse(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

/// `network min max len` of the IPv4 range, or the error.
fn v4(text: &str) -> String {
    match NetworkConfig::parse(text) {
        Ok(NetworkConfig { v4: Some(range), .. }) => {
            format!("{} {} {} {}", range.network, range.subnet_min, range.subnet_max, range.subnet_len)
        }
        Ok(_) => "no IPv4".to_owned(),
        Err(error) => error.to_string(),
    }
}

fn v6(text: &str) -> String {
    match NetworkConfig::parse(text) {
        Ok(NetworkConfig { v6: Some(range), .. }) => {
            format!("{} {} {} {}", range.network, range.subnet_min, range.subnet_max, range.subnet_len)
        }
        Ok(_) => "no IPv6".to_owned(),
        Err(error) => error.to_string(),
    }
}

fn table(rows: &[(&str, &str)], run: impl Fn(&str) -> String) {
    for (text, wanted) in rows {
        assert_eq!(run(text), *wanted, "{text}");
    }
}

#[test]
fn an_ipv4_network_gets_the_defaults_of_the_contract() {
    table(
        &[
            (r#"{"Network":"10.3.0.0/16"}"#, "10.3.0.0/16 10.3.1.0 10.3.255.0 24"),
            (r#"{"Network":"10.0.0.0/8"}"#, "10.0.0.0/8 10.0.1.0 10.255.255.0 24"),
            (r#"{"Network":"10.3.0.0/22"}"#, "10.3.0.0/22 10.3.1.0 10.3.3.0 24"),
            (r#"{"Network":"10.3.0.0/23"}"#, "10.3.0.0/23 10.3.0.128 10.3.1.128 25"),
            (r#"{"Network":"10.3.0.0/24"}"#, "10.3.0.0/24 10.3.0.64 10.3.0.192 26"),
            (r#"{"Network":"10.3.0.0/28"}"#, "10.3.0.0/28 10.3.0.4 10.3.0.12 30"),
            (r#"{"Network":"10.3.0.0/16","SubnetLen":0}"#, "10.3.0.0/16 10.3.1.0 10.3.255.0 24"),
            (r#"{"Network":"10.3.0.0/16","SubnetLen":18}"#, "10.3.0.0/16 10.3.64.0 10.3.192.0 18"),
            (r#"{"Network":"10.3.0.0/16","SubnetLen":30}"#, "10.3.0.0/16 10.3.0.4 10.3.255.252 30"),
            (r#"{"Network":"10.5.7.9/16"}"#, "10.5.0.0/16 10.5.1.0 10.5.255.0 24"),
            (r#"{"Network":"255.255.0.0/16"}"#, "255.255.0.0/16 255.255.1.0 255.255.255.0 24"),
            (r#"{"Network":"128.0.0.0/1","SubnetLen":3}"#, "128.0.0.0/1 160.0.0.0 224.0.0.0 3"),
            (
                r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.10.0","SubnetMax":"10.3.20.0"}"#,
                "10.3.0.0/16 10.3.10.0 10.3.20.0 24",
            ),
            (r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.0.0"}"#, "10.3.0.0/16 10.3.0.0 10.3.255.0 24"),
            (
                r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.9.0","SubnetMax":"10.3.9.0"}"#,
                "10.3.0.0/16 10.3.9.0 10.3.9.0 24",
            ),
            // Unspecified is unset, as it is for the original.
            (
                r#"{"Network":"10.3.0.0/16","SubnetMin":"0.0.0.0","SubnetMax":"0.0.0.0"}"#,
                "10.3.0.0/16 10.3.1.0 10.3.255.0 24",
            ),
        ],
        v4,
    );
}

#[test]
fn an_ipv4_range_that_breaks_a_rule_says_which_and_what_would_be_right() {
    const FORMAT: &str = r#"must be an IPv4 network with prefix length, such as "10.244.0.0/16""#;
    for (value, shown) in [
        (r#""10.244.0.0""#, r#""10.244.0.0""#),
        (r#""10.244.0.0/33""#, r#""10.244.0.0/33""#),
        (r#""10.244.0.0/-1""#, r#""10.244.0.0/-1""#),
        (r#""300.0.0.0/16""#, r#""300.0.0.0/16""#),
        (r#""hello""#, r#""hello""#),
        (r#""""#, r#""""#),
        (r#""fd00::/64""#, r#""fd00::/64""#),
        ("null", "null"),
        ("5", "5"),
        ("[1]", "[1]"),
    ] {
        let text = format!(r#"{{"Network":{value}}}"#);
        assert_eq!(v4(&text), format!("Network is {shown}: {FORMAT}"));
    }
    table(
        &[
            ("{}", r#"Network is missing: give the IPv4 network pods live in, such as "10.244.0.0/16""#),
            ("null", r#"Network is missing: give the IPv4 network pods live in, such as "10.244.0.0/16""#),
            (
                r#"{"Network":"0.0.0.0/0"}"#,
                r#"Network is "0.0.0.0/0": every address there is can't be leased: give the IPv4 network pods live in, such as "10.244.0.0/16""#,
            ),
            (
                r#"{"Network":"10.3.0.0/29"}"#,
                r#"Network is "10.3.0.0/29": too small: the longest useful prefix is /28"#,
            ),
            (
                r#"{"Network":"10.3.0.0/32"}"#,
                r#"Network is "10.3.0.0/32": too small: the longest useful prefix is /28"#,
            ),
            (r#"{"Network":"10.3.0.0/16","SubnetLen":31}"#, "SubnetLen is 31: must be 30 or less"),
            (r#"{"Network":"10.3.0.0/29","SubnetLen":31}"#, "SubnetLen is 31: must be 30 or less"),
            (
                r#"{"Network":"10.3.0.0/16","SubnetLen":18446744073709551615}"#,
                "SubnetLen is 18446744073709551615: must be 30 or less",
            ),
            (
                r#"{"Network":"10.3.0.0/16","SubnetLen":17}"#,
                "SubnetLen is 17: Network 10.3.0.0/16 must hold at least four subnets, so it must be 18 or more",
            ),
            (
                r#"{"Network":"10.3.0.0/16","SubnetMin":"10.2.0.0"}"#,
                "SubnetMin is 10.2.0.0: must be the first address of a subnet of Network 10.3.0.0/16",
            ),
            (
                r#"{"Network":"10.3.0.0/16","SubnetMax":"10.4.0.0"}"#,
                "SubnetMax is 10.4.0.0: must be the first address of a subnet of Network 10.3.0.0/16",
            ),
            (
                r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.9.77"}"#,
                "SubnetMin is 10.3.9.77: must begin a /24: the one it lies in begins at 10.3.9.0",
            ),
            (
                r#"{"Network":"10.3.0.0/16","SubnetMax":"10.3.9.77"}"#,
                "SubnetMax is 10.3.9.77: must begin a /24: the one it lies in begins at 10.3.9.0",
            ),
            (
                r#"{"Network":"10.3.0.0/16","SubnetMin":"10.3.9.0","SubnetMax":"10.3.3.0"}"#,
                "SubnetMin is 10.3.9.0: must not be above SubnetMax 10.3.3.0, or no subnet is left to lease",
            ),
            (
                r#"{"Network":"10.3.0.0/16","SubnetMin":"hello"}"#,
                r#"SubnetMin is "hello": must be an IPv4 address, such as "10.244.1.0""#,
            ),
            (
                r#"{"Network":"10.3.0.0/16","SubnetMin":null}"#,
                r#"SubnetMin is null: must be an IPv4 address, such as "10.244.1.0""#,
            ),
        ],
        v4,
    );
}

#[test]
fn an_ipv6_network_follows_the_same_rules_in_its_own_numbers() {
    table(
        &[
            (r#"{"Network":"10.3.0.0/16"}"#, "no IPv6"),
            (
                r#"{"Network":"10.3.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48"}"#,
                "fc00::/48 fc00:0:0:1:: fc00:0:0:ffff:: 64",
            ),
            (
                r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/62"}"#,
                "fc00::/62 fc00:0:0:1:: fc00:0:0:3:: 64",
            ),
            (
                r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/63"}"#,
                "fc00::/63 fc00::8000:0:0:0 fc00:0:0:1:8000:: 65",
            ),
            (
                r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/124"}"#,
                "fc00::/124 fc00::4 fc00::c 126",
            ),
            (
                r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"ffff::/16","IPv6SubnetLen":20}"#,
                "ffff::/16 ffff:1000:: ffff:f000:: 20",
            ),
            (
                r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","IPv6SubnetMin":null,"IPv6SubnetMax":null}"#,
                "fc00::/48 fc00:0:0:1:: fc00:0:0:ffff:: 64",
            ),
            (
                r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","IPv6SubnetMin":"fc00:0:0:10::","IPv6SubnetMax":"fc00:0:0:20::"}"#,
                "fc00::/48 fc00:0:0:10:: fc00:0:0:20:: 64",
            ),
            (
                r#"{"EnableIPv4":false,"EnableIPv6":true}"#,
                r#"IPv6Network is missing: give the IPv6 network pods live in, such as "fd00:244::/48""#,
            ),
            (
                r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/125"}"#,
                r#"IPv6Network is "fc00::/125": too small: the longest useful prefix is /124"#,
            ),
            (
                r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","IPv6SubnetLen":127}"#,
                "IPv6SubnetLen is 127: must be 126 or less",
            ),
            (
                r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","IPv6SubnetLen":49}"#,
                "IPv6SubnetLen is 49: IPv6Network fc00::/48 must hold at least four subnets, so it must be 50 or more",
            ),
            (
                r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","IPv6SubnetMin":"fc00::1"}"#,
                "IPv6SubnetMin is fc00::1: must begin a /64: the one it lies in begins at fc00::",
            ),
            (
                r#"{"Network":"10.3.0.0/16","IPv6Network":null}"#,
                r#"IPv6Network is null: must be an IPv6 network with prefix length, such as "fd00:244::/48""#,
            ),
        ],
        v6,
    );
}

#[test]
fn a_network_without_ipv4_is_refused_where_the_backend_carries_nothing_else() {
    let config = parsed(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48"}"#);
    assert_eq!(config.v4, None);
    assert_eq!(config.require_family_of_backend(), Err(ConfigError::NeedsIpv4 { backend: "udp" }));
    for backend in ["host-gw", "alloc"] {
        let text = format!(
            r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","Backend":{{"Type":"{backend}"}}}}"#
        );
        assert_eq!(parsed(&text).require_family_of_backend(), Ok(()));
    }
    let both = parsed(r#"{"Network":"10.3.0.0/16","EnableIPv6":true,"IPv6Network":"fc00::/48"}"#);
    assert_eq!((both.require_family_of_backend(), both.v4.map(|range| range.subnet_len)), (Ok(()), Some(24)));
    assert_eq!(
        NetworkConfig::parse(r#"{"EnableIPv4":false,"Network":"10.3.0.0/16"}"#),
        Err(ConfigError::NoFamily)
    );
}

#[test]
fn the_backend_is_chosen_in_any_case_and_udp_without_one() {
    table(
        &[
            (r#"{"Network":"10.3.0.0/16"}"#, r#"{"Type":"udp","Port":8285}"#),
            (r#"{"Network":"10.3.0.0/16","Backend":{"Type":"udp"}}"#, r#"{"Type":"udp","Port":8285}"#),
            (r#"{"network":"10.3.0.0/16","backend":{"type":"UDP","port":7}}"#, r#"{"Type":"udp","Port":7}"#),
            (
                r#"{"Network":"10.3.0.0/16","Backend":{"Type":"udp","Port":null}}"#,
                r#"{"Type":"udp","Port":8285}"#,
            ),
            (
                r#"{"Network":"10.3.0.0/16","Backend":{"Type":"udp","Port":65535}}"#,
                r#"{"Type":"udp","Port":65535}"#,
            ),
            (r#"{"Network":"10.3.0.0/16","Backend":{"Type":"Host-GW"}}"#, r#"{"Type":"host-gw"}"#),
            (r#"{"Network":"10.3.0.0/16","Backend":{"Type":"alloc"}}"#, r#"{"Type":"alloc"}"#),
        ],
        |text| parsed(text).backend.to_string(),
    );
}

#[test]
fn a_backend_that_can_not_be_used_is_named() {
    const NO_TYPE: &str =
        r#"Backend.Type is missing: name a backend, such as "udp", or leave Backend out, which is udp"#;
    const PORT: &str = "must be a port number from 1 to 65535, without quotes";
    const TUNNEL_MTU: &str = "must be the tunnel's MTU, from 68 to 65507 bytes and without quotes; a node takes it when \
                              its interface's MTU is at least 28 larger";
    for (backend, wanted) in [
        ("null", NO_TYPE.to_owned()),
        ("{}", NO_TYPE.to_owned()),
        (r#"{"Type":""}"#, NO_TYPE.to_owned()),
        (r#"{"Type":null}"#, NO_TYPE.to_owned()),
        (r#""vxlan""#, r#"Backend is "vxlan": must be an object such as {"Type":"udp"}"#.to_owned()),
        ("[]", r#"Backend is []: must be an object such as {"Type":"udp"}"#.to_owned()),
        (r#"{"Type":5}"#, "Backend.Type is 5: must be a string".to_owned()),
        (
            r#"{"Type":"nosuch"}"#,
            r#"Backend.Type is "nosuch", which is no backend; this version has udp, host-gw, alloc"#.to_owned(),
        ),
        (
            r#"{"Type":"hostgw"}"#,
            r#"Backend.Type is "hostgw", which is no backend (did you mean host-gw?); this version has udp, host-gw, alloc"#
                .to_owned(),
        ),
        (r#"{"Type":"udp","Port":0}"#, format!("Backend.Port is 0: {PORT}")),
        (r#"{"Type":"udp","Port":-1}"#, format!("Backend.Port is -1: {PORT}")),
        (r#"{"Type":"udp","Port":70000}"#, format!("Backend.Port is 70000: {PORT}")),
        (r#"{"Type":"udp","Port":1.5}"#, format!("Backend.Port is 1.5: {PORT}")),
        (r#"{"Type":"udp","Port":"x"}"#, format!(r#"Backend.Port is "x": {PORT}"#)),
        (r#"{"Type":"udp","MTU":67}"#, format!("Backend.MTU is 67: {TUNNEL_MTU}")),
        (r#"{"Type":"udp","MTU":65508}"#, format!("Backend.MTU is 65508: {TUNNEL_MTU}")),
        (r#"{"Type":"udp","MTU":"1400"}"#, format!(r#"Backend.MTU is "1400": {TUNNEL_MTU}"#)),
    ] {
        let text = format!(r#"{{"Network":"10.3.0.0/16","Backend":{backend}}}"#);
        assert_eq!(NetworkConfig::parse(&text).map_err(|error| error.to_string()), Err(wanted), "{text}");
    }
    for name in NOT_BUILT {
        let text = format!(r#"{{"Network":"10.3.0.0/16","Backend":{{"Type":"{}"}}}}"#, name.to_uppercase());
        let error = NetworkConfig::parse(&text);
        assert_eq!(error, Err(ConfigError::BackendNotBuilt { name }));
    }
    assert_eq!(
        ConfigError::BackendNotBuilt { name: "vxlan" }.to_string(),
        "Backend.Type vxlan is a backend this version does not have yet; it has udp, host-gw, alloc"
    );
}

#[test]
fn keys_match_in_any_case_and_the_last_one_counts() {
    table(
        &[
            (r#"{"NETWORK":"10.3.0.0/16","subnetmin":"10.3.7.0"}"#, "10.3.0.0/16 10.3.7.0 10.3.255.0 24"),
            (
                r#"{"Network":"10.3.0.0/16","Network":"10.55.0.0/16"}"#,
                "10.55.0.0/16 10.55.1.0 10.55.255.0 24",
            ),
            (
                r#"{"network":"10.3.0.0/16","Network":"10.55.0.0/16"}"#,
                "10.55.0.0/16 10.55.1.0 10.55.255.0 24",
            ),
            (r#"{"Network":"10.55.0.0/16","network":"10.3.0.0/16"}"#, "10.3.0.0/16 10.3.1.0 10.3.255.0 24"),
            // Go's null leaves a number as it was.
            (
                r#"{"Network":"10.3.0.0/16","SubnetLen":20,"SubnetLen":null}"#,
                "10.3.0.0/16 10.3.16.0 10.3.240.0 20",
            ),
            // Unicode's simple folding, as Go's decoder does it.
            ("{\"Networ\u{212a}\":\"10.3.0.0/16\"}", "10.3.0.0/16 10.3.1.0 10.3.255.0 24"),
            ("{\"Network\":\"10.3.0.0/16\",\"\u{17f}ubnetLen\":20}", "10.3.0.0/16 10.3.16.0 10.3.240.0 20"),
        ],
        v4,
    );
}

#[test]
fn a_value_of_the_wrong_type_is_an_error() {
    const LEN: &str = "must be a prefix length: a whole number such as 24, without quotes";
    for (field, value) in [
        ("SubnetLen", r#""24""#),
        ("SubnetLen", "24.0"),
        ("SubnetLen", "24.5"),
        ("SubnetLen", "-1"),
        ("SubnetLen", "2e1"),
        ("SubnetLen", "true"),
        ("IPv6SubnetLen", "{}"),
    ] {
        let text = format!(r#"{{"Network":"10.3.0.0/16","{field}":{value}}}"#);
        assert_eq!(v4(&text), format!("{field} is {value}: {LEN}"));
    }
    for field in ["EnableIPv4", "EnableIPv6", "EnableNFTables"] {
        for value in [r#""true""#, "1", "[]"] {
            let text = format!(r#"{{"Network":"10.3.0.0/16","{field}":{value}}}"#);
            assert_eq!(v4(&text), format!("{field} is {value}: must be true or false, without quotes"));
        }
    }
}

#[test]
fn text_that_is_not_an_object_is_refused_with_an_example() {
    for (text, wanted) in [
        ("nonsense", "is not JSON: "),
        ("", "is not JSON: "),
        (r#"{"Network":"10.3.0.0/16""#, "is not JSON: "),
        (r#"{"Network":"10.3.0.0/16"} trailing"#, "is not JSON: trailing characters"),
        (r#"{"Network":"10.3.0.0/16",}"#, "is not JSON: "),
        ("[]", "is an array, not an object"),
        (r#""10.3.0.0/16""#, "is a string, not an object"),
        ("5", "is a number, not an object"),
        ("true", "is a boolean, not an object"),
    ] {
        let error = NetworkConfig::parse(text).unwrap_err().to_string();
        assert!(error.starts_with(&format!("the network configuration {wanted}")), "{text}: {error}");
        assert!(error.ends_with(EXAMPLE), "{text}: {error}");
    }
    assert!(NetworkConfig::parse(EXAMPLE).is_ok());
}

#[test]
fn unknown_keys_are_reported_with_the_nearest_known_one() {
    for (text, wanted) in [
        (r#"{"Network":"10.3.0.0/16"}"#, vec![]),
        (
            r#"{"Network":"10.3.0.0/16","SubnetLenght":25,"Backend":{"Type":"udp","Prot":9}}"#,
            vec![
                "unknown key SubnetLenght is ignored (did you mean SubnetLen?)",
                "unknown key Backend.Prot is ignored (did you mean Port?)",
            ],
        ),
        (
            r#"{"Network":"10.3.0.0/16","Backend":{"Type":"host-gw","DirectRouting":true}}"#,
            vec!["unknown key Backend.DirectRouting is ignored; known are Type"],
        ),
        (
            r#"{"Network":"10.3.0.0/16","network":"10.4.0.0/16"}"#,
            vec!["key Network is there more than once: the last one counts"],
        ),
        (
            r#"{"Network":"10.3.0.0/16","IPv6Network":"fc00::/48"}"#,
            vec!["IPv6Network has no effect: EnableIPv6 is not true"],
        ),
        (
            r#"{"Network":"127.0.0.0/8"}"#,
            vec!["Network is 127.0.0.0/8: packets to loopback addresses never leave a host"],
        ),
    ] {
        assert_eq!(parsed(text).warnings, wanted, "{text}");
    }
}

#[test]
fn hostile_text_is_bounded() {
    let padded = |filling: &str| format!(r#"{{"Network":"10.3.0.0/16"{filling}}}"#);
    let too_long = padded(&" ".repeat(MAX_TEXT));
    assert_eq!(NetworkConfig::parse(&too_long), Err(ConfigError::TooLong { size: too_long.len() }));

    let many_keys: String = (0..5000).map(|n| format!(r#","k{n}":0"#)).collect();
    assert_eq!(parsed(&padded(&many_keys)).warnings.len(), 9);

    let long_key = format!(r#","{}\u001b":0"#, "x".repeat(60_000));
    assert!(parsed(&padded(&long_key)).warnings.iter().all(|warning| warning.len() < 400));

    let long_value = format!(r#"{{"Network":"{}"}}"#, "x".repeat(60_000));
    assert!(v4(&long_value).len() < 400);
    let long_type = format!(r#"{{"Network":"10.3.0.0/16","Backend":{{"Type":"{}"}}}}"#, "x".repeat(60_000));
    assert!(v4(&long_type).len() < 400);

    let deep = padded(&format!(r#","k":{}{}"#, "[".repeat(30_000), "]".repeat(30_000)));
    assert!(
        NetworkConfig::parse(&deep).is_ok()
            || matches!(NetworkConfig::parse(&deep), Err(ConfigError::NotJson { .. }))
    );
}
