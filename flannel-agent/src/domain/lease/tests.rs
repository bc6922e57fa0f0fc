use super::*;
use proptest::prelude::*;

fn subnets(v4: &str, v6: Option<&str>) -> Subnets {
    Subnets { v4: Some(v4.parse().unwrap()), v6: v6.map(|net| net.parse().unwrap()) }
}

#[test]
fn keys_are_spelled_as_flanneld_spells_them() {
    for (key, wanted) in [
        ("10.5.34.0-24", subnets("10.5.34.0/24", None)),
        ("10.12.13.0-24&fd00:12:13::-56", subnets("10.12.13.0/24", Some("fd00:12:13::/56"))),
        ("0.0.0.0-1", subnets("0.0.0.0/1", None)),
        ("10.5.34.2-31", subnets("10.5.34.2/31", None)),
        ("0.0.0.0-0&fd00::-64", Subnets { v4: None, v6: Some("fd00::/64".parse().unwrap()) }),
    ] {
        assert_eq!(key.parse::<Subnets>().unwrap(), wanted, "{key}");
        assert_eq!(wanted.to_string(), key);
    }
}

#[test]
fn keys_that_flanneld_refuses_are_refused() {
    for key in [
        "",
        "foo",
        "10.12.13.0",
        "10.12.13.300-24",
        "10.12.13.0-24hi",
        "&2001::-56",
        "10.12.13.0-24&2001-56",
        "10.12.13.0-24&2001::",
        "10.12.13.0-24&",
        "10.12.13.0-24&2001::-",
        "10.12.13.0-24&2001::-56hi",
        "10.12.13.0-24&2001::-128",
        "10.12.13.0-32",
        "10.12.13.0-33",
        "10x12x13x0-24",
        "hi10.12.13.0-24",
        "0.0.0.0-0",
    ] {
        let error = key.parse::<Subnets>().unwrap_err().to_string();
        assert!(error.contains(&format!("{key:?}")), "{error}");
    }
}

#[test]
fn a_key_that_is_not_canonical_is_no_second_name_of_a_subnet() {
    for key in ["10.12.13.7-24", "10.12.13.0-024", "10.12.13.0-+24", "10.12.13.0-24&FD00::-56"] {
        assert!(key.parse::<Subnets>().is_err(), "{key}");
    }
}

#[test]
fn recorded_values_are_written_back_byte_for_byte() {
    for json in [
        r#"{"PublicIP":"10.99.0.11","PublicIPv6":null}"#,
        r#"{"PublicIP":"10.9.0.1","PublicIPv6":null,"BackendType":"host-gw"}"#,
        r#"{"PublicIP":"10.9.0.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:f2:c6:92:5c:8b"}}"#,
        r#"{"PublicIP":"10.9.0.1","PublicIPv6":"2001:db8::1","BackendType":"wireguard","BackendData":{"PublicKey":"ab+/=","Port":51820},"BackendV6Data":{"PublicKey":"ab+/=","Port":51821}}"#,
        r#"{"PublicIP":"10.9.0.1","PublicIPv6":null,"BackendType":"extension","BackendData":"a \u003cb\u003e \u0026 c\n"}"#,
        r#"{"PublicIP":"0.0.0.0","PublicIPv6":"fd00::1"}"#,
        r#"{"PublicIP":"10.9.0.1","PublicIPv6":null,"BackendType":"x","Zone":"b","Also":[1,{"z":1,"a":2}]}"#,
    ] {
        assert_eq!(LeaseAttrs::from_json(json).unwrap().to_json(), json);
    }
}

#[test]
fn values_of_v0_7_0_are_read_and_written_as_todays() {
    for (old, new) in [
        (r#"{"PublicIP":"10.9.0.1"}"#, r#"{"PublicIP":"10.9.0.1","PublicIPv6":null}"#),
        (
            r#"{"PublicIP":"10.9.0.1","BackendType":"vxlan","BackendData":{"VtepMAC":"ca:5f:8f:8e:df:61"}}"#,
            r#"{"PublicIP":"10.9.0.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VtepMAC":"ca:5f:8f:8e:df:61"}}"#,
        ),
        // What its server mode makes of raw data.
        (
            r#"{"PublicIP":"10.9.0.1","BackendType":"vxlan","BackendData":"eyJWdGVwTUFDIjoiY2E6NWY6OGY6OGU6ZGY6NjEifQ=="}"#,
            r#"{"PublicIP":"10.9.0.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VtepMAC":"ca:5f:8f:8e:df:61"}}"#,
        ),
        (
            r#" { "publicip" : "10.9.0.1" , "PUBLICIPV6": null } "#,
            r#"{"PublicIP":"10.9.0.1","PublicIPv6":null}"#,
        ),
        ("{}", r#"{"PublicIP":"0.0.0.0","PublicIPv6":null}"#),
    ] {
        assert_eq!(LeaseAttrs::from_json(old).unwrap().to_json(), new);
    }
}

#[test]
fn a_value_that_is_no_lease_says_what_is_wrong() {
    for (json, wanted) in [
        ("nonsense", "not JSON"),
        ("", "not JSON"),
        ("[]", "a list where an object was expected"),
        (r#"{"PublicIP":"hello"}"#, r#"field PublicIP is "hello", it must be an IPv4 address"#),
        (r#"{"PublicIP":null}"#, "field PublicIP is null"),
        (r#"{"PublicIP":"10.0.0.1","PublicIPv6":""}"#, "field PublicIPv6 is \"\""),
        (r#"{"PublicIP":"10.0.0.1","BackendType":7}"#, "field BackendType is 7, it must be a string"),
    ] {
        let error = LeaseAttrs::from_json(json).unwrap_err().to_string();
        assert!(error.contains(wanted), "{json}: {error}");
    }
    let long = format!(r#"{{"PublicIP":"10.0.0.1","Filler":"{}"}}"#, "x".repeat(MAX_VALUE_BYTES));
    assert!(matches!(LeaseAttrs::from_json(&long), Err(LeaseError::TooLong(_))));
    assert!(matches!(LeaseAttrs::from_json(&"[".repeat(9000)), Err(LeaseError::Json(_))));
}

#[test]
fn renewal_is_due_a_margin_before_the_end_and_at_once_when_late() {
    let now = Instant::now();
    let (hour, minute) = (Duration::from_secs(3600), Duration::from_secs(60));
    let lease = |expires| Lease {
        subnets: subnets("10.5.34.0/24", None),
        attrs: LeaseAttrs::new(Ipv4Addr::LOCALHOST),
        expires,
        revision: 0,
    };
    assert_eq!(lease(Some(now + 24 * hour)).renew_at(now, hour, Duration::ZERO), Some(now + 23 * hour));
    assert_eq!(lease(Some(now + 24 * hour)).renew_at(now, hour, minute), Some(now + 23 * hour - minute));
    assert_eq!(lease(Some(now + minute)).renew_at(now, hour, minute), Some(now));
    assert_eq!(lease(Some(now)).renew_at(now + hour, hour, minute), Some(now + hour));
    assert_eq!(lease(None).renew_at(now, hour, minute), None, "a reservation is never renewed");
    // 1439 minutes is the largest margin allowed: a minute is left, and jitter may not eat it up.
    assert_eq!(lease(Some(now + 24 * hour)).renew_at(now, 1439 * minute, hour), Some(now + minute / 2));
}

proptest! {
    #[test]
    fn any_text_is_either_a_canonical_key_or_refused(key in "[0-9a-f.:&-]{0,40}|\\PC*") {
        if let Ok(subnets) = key.parse::<Subnets>() {
            prop_assert_eq!(subnets.to_string(), key);
        }
    }

    #[test]
    fn any_readable_value_is_stable_once_written(
        ip in any::<[u8; 4]>(),
        kind in "\\PC{0,8}",
        data in proptest::option::of("\\PC{0,20}"),
        name in "[X-Z]\\PC{0,8}",
    ) {
        let mut attrs = LeaseAttrs::new(ip.into());
        attrs.backend_type = kind;
        attrs.backend_data = data.map(|data| Box::new(Value::from(data)));
        attrs.unknown.push((name, Value::from("<&>")));
        let json = attrs.to_json();
        prop_assert_eq!(LeaseAttrs::from_json(&json).unwrap().to_json(), json);
    }

    #[test]
    fn no_value_makes_the_reader_panic(json in "\\PC{0,200}") {
        let _ = LeaseAttrs::from_json(&json);
    }
}
