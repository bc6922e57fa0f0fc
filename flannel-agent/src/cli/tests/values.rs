//! What each value may be, and what is refused by name.

use super::*;
use crate::domain::etcd::EtcdApi;

#[test]
fn the_renew_margin_is_checked_as_flanneld_checks_it() {
    for minutes in ["0", "-5", "1440", "0x7fffffffffffffff"] {
        let (text, stream, code) = printed(&format!("flanneld -subnet-lease-renew-margin={minutes}"));
        assert!(
            text.ends_with(
                "for -subnet-lease-renew-margin: must be from 1 to 1439 minutes: a lease lasts 1440"
            ),
            "{text}"
        );
        assert_eq!((stream, code), (Stream::Stderr, 1));
    }
    for minutes in [1, 60, 1439] {
        let found = settings(&format!("flanneld -subnet-lease-renew-margin {minutes}")).renew_margin;
        assert_eq!(found.as_secs(), minutes * 60);
    }
}

#[test]
fn what_is_not_built_is_refused_by_name() {
    for (flags, feature) in [
        ("-ip-masq", "masquerading"),
        ("-ip-masq-fully-random-disable", "masquerading"),
        ("-iptables-forward-rules", "forward rules"),
        ("-iptables-resync=10", "firewall rules"),
        ("-ip-blackhole-route", "the blackhole route"),
        ("-vmodule=a=1", "verbosity by source file"),
        ("-log_backtrace_at=a:1", "stack traces in the log"),
    ] {
        let flag = flags.split('=').next().unwrap();
        let wanted = format!("{flag}: this version does not have {feature} yet; leave it out");
        assert_eq!(printed(&format!("flanneld {flags}")), (wanted, Stream::Stderr, 2));
    }
    let Parsed::PrintAndExit { text, .. } = line("FLANNELD_IP_BLACKHOLE_ROUTE=1 flanneld -ip-masq") else {
        panic!()
    };
    assert!(
        text.starts_with("-ip-masq: this") && text.contains("\nFLANNELD_IP_BLACKHOLE_ROUTE: this"),
        "all at once: {text}"
    );
}

#[test]
fn what_asks_for_nothing_is_accepted() {
    let plain = settings("flanneld");
    for flags in [
        "-ip-masq=false",
        "-ip-masq -ip-masq=false",
        "-iptables-forward-rules=false",
        "-iptables-resync=5",
        "-ip-blackhole-route=0",
        "-kube-subnet-mgr=F",
        "-kube-api-url= -kubeconfig-file= -listen= -remote= -networks= -vmodule=",
        "-kube-annotation-prefix=flannel.alpha.coreos.com",
        "-net-config-path=/etc/kube-flannel/net-conf.json",
        "-set-node-network-unavailable -set-node-network-unavailable=true",
        "-subnet-dir=/run/flannel/networks",
        "-logtostderr -alsologtostderr -stderrthreshold=WARNING",
        "-stderrthreshold=2 -alsologtostderr=false -log_dir=",
        "-v=-1",
        "--",
    ] {
        assert_eq!(settings(&format!("flanneld {flags}")), plain, "{flags}");
    }
    assert_eq!(
        settings("flanneld -log_dir=/var/log").warnings,
        ["-log_dir has no effect: the log goes to standard error"]
    );
}

#[test]
fn a_value_that_can_not_be_meant_says_what_would_be_right() {
    refused(&[
        (
            "flanneld -public-ip=hello",
            "invalid value \"hello\" for -public-ip: must be an IPv4 address, such as 192.0.2.1",
        ),
        (
            "flanneld -public-ip=fe80::1",
            "invalid value \"fe80::1\" for -public-ip: must be an IPv4 address; an IPv6 address goes to -public-ipv6",
        ),
        (
            "flanneld -public-ip=0.0.0.0",
            "invalid value \"0.0.0.0\" for -public-ip: must be an address other nodes can send to",
        ),
        (
            "flanneld -public-ipv6=10.0.0.1",
            "invalid value \"10.0.0.1\" for -public-ipv6: must be an IPv6 address; an IPv4 address goes to -public-ip",
        ),
        (
            "flanneld -iface-can-reach=host",
            "invalid value \"host\" for -iface-can-reach: must be an IP address, such as 10.0.0.1",
        ),
        (
            "flanneld -iface-regex=(",
            "invalid value \"(\" for -iface-regex: not a regular expression: unclosed group",
        ),
        (
            "flanneld -healthz-port=70000",
            "invalid value \"70000\" for -healthz-port: must be from 1 to 65535, or 0 for off",
        ),
        (
            "flanneld -healthz-ip=localhost",
            "invalid value \"localhost\" for -healthz-ip: must be an IP address of this host, or 0.0.0.0 for all",
        ),
        ("flanneld -subnet-file=", "invalid value \"\" for -subnet-file: must name a file"),
        (
            "flanneld -subnet-file=/run/flannel/",
            "invalid value \"/run/flannel/\" for -subnet-file: must name a file",
        ),
        ("flanneld -bpffs-path=bpf", "invalid value \"bpf\" for -bpffs-path: must be a path from the root"),
        ("flanneld -status-socket=s", "invalid value \"s\" for -status-socket: must be a path from the root"),
        (
            "flanneld -udp-datapath=bpf",
            "invalid value \"bpf\" for -udp-datapath: must be one of auto, ebpf, xdp, tc, tun",
        ),
        (
            "flanneld -udp-source-check=on",
            "invalid value \"on\" for -udp-source-check: must be one of enforce, observe, off",
        ),
        (
            "flanneld -udp-source-port=0",
            "invalid value \"0\" for -udp-source-port: must be one of flow, fixed",
        ),
        (
            "flanneld -udp-mtu=67",
            "invalid value \"67\" for -udp-mtu: must be from 68 to 65507 bytes and 28 less than the interface's MTU at \
             most, or 0 to follow the interface",
        ),
        (
            "flanneld -logtostderr=false",
            "invalid value \"false\" for -logtostderr: this version logs to standard error only",
        ),
        (
            "flanneld -stderrthreshold=LOUD",
            "invalid value \"LOUD\" for -stderrthreshold: must be INFO, WARNING, ERROR or FATAL",
        ),
    ]);
    let long = format!("flanneld -status-socket=/{}", "x".repeat(107));
    assert!(printed(&long).0.ends_with("must be 107 bytes or less, the most the kernel takes"));
    assert_eq!(settings("flanneld -status-socket=").status_socket, None);
    assert_eq!(settings("flanneld -healthz-port=-1").healthz, None);
    assert_eq!(settings("flanneld -healthz-ip= -healthz-port=1").healthz, "0.0.0.0:1".parse().ok());
}

#[test]
fn endpoints_are_checked_one_by_one() {
    for endpoints in
        ["http://a:80", "https://10.0.0.1:2379/", "a:2379", "http://[fd00::1]:2379,http://[fd00::2]:4001"]
    {
        let found = etcd(&format!("flanneld -etcd-endpoints={endpoints}")).endpoints;
        assert_eq!(found.join(","), endpoints);
    }
    for (endpoints, wanted) in [
        ("", "\"\" is empty"),
        ("http://a:1,", "\"\" is empty"),
        ("http://a:1, http://b", "\" http://b\" contains a space"),
        ("ftp://a", "\"ftp://a\" is neither http nor https"),
        ("http://", "\"http://\" names no host"),
        (":2379", "\":2379\" names no host"),
        ("http://a:x", "\"http://a:x\" has no port from 1 to 65535"),
        ("http://a:70000", "\"http://a:70000\" has no port from 1 to 65535"),
        ("http://a:0", "\"http://a:0\" has no port from 1 to 65535"),
        ("http://a", "\"http://a\" has no port from 1 to 65535"),
        ("http://a:1/x", "\"http://a:1/x\" has a path, which etcd's API does not take"),
    ] {
        let args = ["flanneld".into(), format!("-etcd-endpoints={endpoints}").into()];
        let Parsed::PrintAndExit { text, code: 2, .. } = parse(args, []) else { panic!("{endpoints}") };
        assert!(text.contains(&format!("for -etcd-endpoints: {wanted}; endpoints are such as")), "{text}");
    }
}

#[test]
fn a_password_in_an_endpoint_is_not_repeated() {
    refused(&[(
        "flanneld -etcd-endpoints=http://u:p@a:1,http://b",
        "-etcd-endpoints names a user, who goes to -etcd-username and -etcd-password",
    )]);
}

#[test]
fn credentials_go_together() {
    let half = |flags: &str| printed(&format!("flanneld {flags}"));
    assert_eq!(
        half("-etcd-certfile=c"),
        (
            "-etcd-certfile is given without -etcd-keyfile: a certificate needs its key".to_owned(),
            Stream::Stderr,
            1
        )
    );
    assert_eq!(
        half("-etcd-keyfile=k -etcd-certfile="),
        (
            "-etcd-keyfile is given without -etcd-certfile: a certificate needs its key".to_owned(),
            Stream::Stderr,
            1
        )
    );
    for (text, api) in [("v3", EtcdApi::V3), ("v2", EtcdApi::V2), ("auto", EtcdApi::Auto)] {
        assert_eq!(etcd(&format!("flanneld -etcd-api={text}")).api, api);
    }
    refused(&[
        ("flanneld -etcd-api=3", "invalid value \"3\" for -etcd-api: must be auto, v2 or v3"),
        (
            "FLANNELD_ETCD_API=V2 flanneld",
            "invalid value \"V2\" for FLANNELD_ETCD_API: must be auto, v2 or v3",
        ),
    ]);
    let ca_only = etcd("flanneld -etcd-cafile=ca");
    assert_eq!((ca_only.ca_file, ca_only.identity), (Some("ca".into()), None));
    assert_eq!(etcd("flanneld -etcd-username=u").login.unwrap().password, Secret::default());
    let lonely = settings("flanneld -etcd-password=p");
    assert_eq!(etcd("flanneld -etcd-password=p").login, None);
    assert_eq!(lonely.warnings, ["-etcd-password has no effect without -etcd-username"]);
}

#[test]
fn the_levels_of_verbosity_are_those_of_the_log() {
    use tracing::Level;
    for (v, wanted) in [
        (-3, Level::INFO),
        (0, Level::INFO),
        (1, Level::DEBUG),
        (4, Level::DEBUG),
        (5, Level::TRACE),
        (10, Level::TRACE),
    ] {
        assert_eq!(settings(&format!("flanneld -v={v}")).verbosity.level(), wanted, "{v}");
    }
}
