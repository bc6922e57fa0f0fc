mod stores;
mod values;

use proptest::prelude::*;

use super::*;
use crate::domain::etcd::EtcdApi;
use crate::domain::host_state::{Datapath, SourceCheck, SourcePort, TunnelOptions};
use crate::domain::interface::{PublicAddresses, Selector};

/// A command line with variables before it, as a shell takes it: `FLANNELD_IFACE=eth1 flanneld -v 1`.
fn line(line: &str) -> Parsed {
    let words: Vec<&str> = line.split_whitespace().collect();
    let is_variable = |word: &&&str| word.starts_with(|letter: char| letter.is_ascii_uppercase());
    let variables = words.iter().take_while(is_variable).count();
    let env = words[..variables].iter().map(|word| {
        let (name, value) = word.split_once('=').unwrap();
        (name.into(), value.into())
    });
    parse(words[variables..].iter().map(Into::into), env)
}

fn settings(text: &str) -> Settings {
    match line(text) {
        Parsed::Daemon(settings) => *settings,
        other => panic!("{text}: {other:?}"),
    }
}

fn etcd(text: &str) -> EtcdSettings {
    match settings(text).store {
        StoreSettings::Etcd(etcd) => etcd,
        other => panic!("{text}: {other:?}"),
    }
}

/// The first line of what is printed, with where and the exit code.
fn printed(text: &str) -> (String, Stream, u8) {
    match line(text) {
        Parsed::PrintAndExit { text, stream, code } => {
            assert!(text.ends_with('\n'), "{text}");
            (text.lines().next().unwrap_or_default().to_owned(), stream, code)
        }
        other => panic!("{text}: {other:?}"),
    }
}

fn refused(rows: &[(&str, &str)]) {
    for (text, wanted) in rows {
        assert_eq!(printed(text), ((*wanted).to_owned(), Stream::Stderr, 2), "{text}");
    }
}

#[test]
fn without_flags_everything_has_flanneld_defaults() {
    assert_eq!(
        settings("flanneld"),
        Settings {
            store: StoreSettings::Etcd(EtcdSettings {
                endpoints: vec!["http://127.0.0.1:4001".to_owned(), "http://127.0.0.1:2379".to_owned()],
                prefix: "/coreos.com/network".to_owned(),
                ca_file: None,
                identity: None,
                login: None,
                api: EtcdApi::Auto,
            }),
            serve: None,
            networks: None,
            selectors: vec![],
            public: PublicAddresses::default(),
            subnet_file: "/run/flannel/subnet.env".into(),
            renew_margin: Duration::from_secs(3600),
            healthz: None,
            status_socket: Some("/run/flannel/status.sock".into()),
            tunnel: TunnelOptions::default(),
            tunnel_mtu: None,
            bpffs: "/sys/fs/bpf".into(),
            verbosity: Verbosity(0),
            warnings: vec![],
        }
    );
    assert_eq!(line("flannel-agent"), line("flanneld"));
    assert_eq!(line("/usr/bin/flanneld"), line("./flannel-agent"));
    assert_eq!(parse([], []), line("flanneld"));
}

#[test]
fn every_flag_reaches_its_setting() {
    let all = settings(
        "flanneld -etcd-endpoints https://a:1,b:2 -etcd-prefix=/x/ --etcd-cafile ca --etcd-certfile=c -etcd-keyfile k \
         -etcd-username u -etcd-password p -etcd-api v2 -iface eth0 -iface=10.0.0.1 -iface-regex ^e -iface-can-reach 10.0.0.9 \
         -public-ip 192.0.2.1 -public-ipv6 2001:db8::1 -subnet-file /s.env -subnet-lease-renew-margin 0x10 \
         -healthz-ip ::1 -healthz-port 010470 -udp-datapath ebpf -udp-source-check enforce -udp-source-port fixed \
         -udp-mtu 1400 -bpffs-path /b -status-socket /s.sock -v 2",
    );
    assert_eq!(
        all,
        Settings {
            store: StoreSettings::Etcd(EtcdSettings {
                endpoints: vec!["https://a:1".to_owned(), "b:2".to_owned()],
                prefix: "/x/".to_owned(),
                ca_file: Some("ca".into()),
                identity: Some(ClientCertificate { cert_file: "c".into(), key_file: "k".into() }),
                login: Some(Login { username: "u".to_owned(), password: "p".to_owned().into() }),
                api: EtcdApi::V2,
            }),
            serve: None,
            networks: None,
            selectors: vec![
                Selector::Name("eth0".to_owned()),
                Selector::Address("10.0.0.1".parse().unwrap()),
                Selector::Pattern("^e".parse().unwrap()),
                Selector::CanReach("10.0.0.9".parse().unwrap()),
            ],
            public: PublicAddresses { v4: "192.0.2.1".parse().ok(), v6: "2001:db8::1".parse().ok() },
            subnet_file: "/s.env".into(),
            renew_margin: Duration::from_secs(16 * 60),
            healthz: Some("[::1]:4408".parse().unwrap()),
            status_socket: Some("/s.sock".into()),
            tunnel: TunnelOptions {
                datapath: Datapath::Ebpf,
                source_check: SourceCheck::Enforce,
                source_port: SourcePort::Fixed,
            },
            tunnel_mtu: Some(1400),
            bpffs: "/b".into(),
            verbosity: Verbosity(2),
            warnings: vec![],
        }
    );
    assert!(!format!("{all:?}").contains("\"p\""), "{all:?}");
}

#[test]
fn scalars_take_the_last_value_and_interfaces_all() {
    assert_eq!(settings("flanneld -v 1 -v=3 --v 2").verbosity, Verbosity(2));
    assert_eq!(settings("flanneld -subnet-file=/a -subnet-file /b").subnet_file, PathBuf::from("/b"));
    let names =
        |text: &str| -> Vec<String> { settings(text).selectors.iter().map(ToString::to_string).collect() };
    assert_eq!(
        names("flanneld -iface-regex b -iface=eth1 -iface-regex=a -iface eth0,eth2"),
        ["--iface=eth1", "--iface=eth0,eth2", "--iface-regex=b", "--iface-regex=a"]
    );
    // A manifest may leave the variable it takes the name from empty.
    assert_eq!(names("flanneld -iface= -iface-regex= -iface-can-reach= -public-ip="), Vec::<String>::new());
}

#[test]
fn variables_stand_behind_flags_and_before_defaults() {
    for (text, wanted) in [
        ("FLANNELD_SUBNET_FILE=/e flanneld", "/e"),
        ("FLANNELD_SUBNET_FILE=/e flanneld -subnet-file /c", "/c"),
        ("FLANNELD_SUBNET_FILE= flanneld", "/run/flannel/subnet.env"),
        ("FLANNELD_SUBNET_FILE= flanneld -subnet-file=/c", "/c"),
        ("FLANNELD_NOSUCH=1 flanneld", "/run/flannel/subnet.env"),
    ] {
        assert_eq!(settings(text).subnet_file, PathBuf::from(wanted), "{text}");
    }
    // One element, commas and all; and none when the flag is given.
    let names =
        |text: &str| -> Vec<String> { settings(text).selectors.iter().map(ToString::to_string).collect() };
    assert_eq!(names("FLANNELD_IFACE=a,b flanneld"), ["--iface=a,b"]);
    assert_eq!(names("FLANNELD_IFACE=a flanneld -iface b"), ["--iface=b"]);
    assert_eq!(settings("FLANNELD_V=3 flanneld").verbosity, Verbosity(3));
    assert_eq!(
        etcd("FLANNELD_ETCD_PASSWORD=x FLANNELD_ETCD_USERNAME=y flanneld").login.unwrap().username,
        "y"
    );
    assert_eq!(settings("FLANNELD_HEALTHZ_PORT=0x10 flanneld").healthz, "0.0.0.0:16".parse().ok());
    assert_eq!(settings("FLANNELD_IP_MASQ=false flanneld"), settings("flanneld"));
    // A variable that the command line overrides is not even read.
    assert_eq!(settings("FLANNELD_V=x flanneld -v 1").verbosity, Verbosity(1));
    // Too late, both.
    assert_eq!(settings("FLANNELD_VERSION=true FLANNELD_HELP=true flanneld"), settings("flanneld"));
    assert_eq!(settings("FLANNELD_VERSION=maybe flanneld"), settings("flanneld"));
}

#[test]
fn every_flag_can_be_set_by_its_variable() {
    let command = flags::command();
    let names: Vec<&str> = command.get_arguments().filter_map(|arg| arg.get_long()).collect();
    assert_eq!(names.len(), 51);
    for name in names.into_iter().filter(|name| *name != "version") {
        // A value that is wrong for whatever is not plain text, and text that is refused or kept.
        let variable = variable(name);
        let outcome = line(&format!("{variable}=\u{1}nonsense flanneld"));
        match outcome {
            Parsed::Daemon(settings) => assert_ne!(*settings, self::settings("flanneld"), "{variable}"),
            Parsed::PrintAndExit { text, .. } => assert!(text.contains(&variable), "{variable}: {text}"),
            Parsed::Command(_) => panic!("{variable}"),
        }
    }
    assert_eq!(variable("log_backtrace_at"), "FLANNELD_LOG_BACKTRACE_AT");
}

#[test]
fn a_bad_variable_is_refused_by_name_and_never_becomes_zero() {
    refused(&[
        (
            "FLANNELD_SUBNET_LEASE_RENEW_MARGIN=x flanneld",
            "invalid value \"x\" for FLANNELD_SUBNET_LEASE_RENEW_MARGIN: not a whole number",
        ),
        (
            "FLANNELD_HEALTHZ_PORT=8o flanneld",
            "invalid value \"8o\" for FLANNELD_HEALTHZ_PORT: not a whole number",
        ),
        (
            "FLANNELD_IP_MASQ=maybe flanneld",
            "invalid value \"maybe\" for FLANNELD_IP_MASQ: not true or false (nor 1, t, T, TRUE, True, 0, f, F, FALSE, False)",
        ),
        (
            "FLANNELD_UDP_DATAPATH=bpf flanneld",
            "invalid value \"bpf\" for FLANNELD_UDP_DATAPATH: must be one of auto, ebpf, xdp, tc, tun",
        ),
        (
            "FLANNELD_PUBLIC_IP=hello flanneld",
            "invalid value \"hello\" for FLANNELD_PUBLIC_IP: must be an IPv4 address, such as 192.0.2.1",
        ),
        (
            "FLANNELD_IP_MASQ=true flanneld",
            "FLANNELD_IP_MASQ: this version does not have masquerading yet; leave it out",
        ),
    ]);
    let invalid: OsString = std::os::unix::ffi::OsStringExt::from_vec(vec![0xff]);
    let parsed = parse(["flanneld".into()], [("FLANNELD_IFACE".into(), invalid.clone())]);
    assert!(
        matches!(&parsed, Parsed::PrintAndExit { text, code: 2, .. } if text.starts_with("FLANNELD_IFACE is not text"))
    );
    let parsed = parse(["flanneld".into(), invalid.clone()], []);
    assert!(matches!(&parsed, Parsed::PrintAndExit { text, code: 2, .. } if text.starts_with("argument ")));
    // What is not ours is not looked at.
    let other = parse(["flanneld".into()], [("LANG".into(), invalid.clone()), (invalid, "x".into())]);
    assert_eq!(other, line("flanneld"));
}

#[test]
fn a_misspelt_variable_is_reported_and_an_unrelated_one_is_not() {
    assert_eq!(
        settings(
            "FLANNELD_SUBNETFILE=/x FLANNELD_SERVICE_HOST=10.0.0.1 FLANNELD_PORT=tcp://10.0.0.1:80 flanneld"
        )
        .warnings,
        ["variable FLANNELD_SUBNETFILE is not known (did you mean FLANNELD_SUBNET_FILE?)"]
    );
}

#[test]
fn outcomes_of_the_contract_table() {
    let version = (VERSION.to_owned(), Stream::Stderr, 0);
    for text in [
        "flanneld -version",
        "flanneld --version",
        "flanneld -version=true",
        "flanneld -v 2 --version -ip-masq",
    ] {
        assert_eq!(printed(text), version, "{text}");
    }
    // Before the environment is applied.
    assert_eq!(printed("FLANNELD_V=nonsense flanneld -version"), version);
    assert_eq!(settings("flanneld -version=false"), settings("flanneld"));
    assert_eq!(settings("flanneld -version -version=false"), settings("flanneld"));

    for text in ["flanneld -help", "flanneld --help", "flanneld -h", "flanneld -v 1 -help -nosuch"] {
        assert_eq!(printed(text), ("Usage: flanneld [OPTION]...".to_owned(), Stream::Stderr, 0), "{text}");
    }
    refused(&[
        ("flanneld --nosuchflag", "flag provided but not defined: -nosuchflag"),
        ("flanneld -ifaces=eth0", "flag provided but not defined: -ifaces (did you mean -iface?)"),
        ("flanneld -version -nosuch", "flag provided but not defined: -nosuch"),
        ("flanneld --iface", "flag needs an argument: -iface"),
        ("flanneld ---iface=x", "bad flag syntax: ---iface=x"),
        (
            "flanneld --ip-masq=maybe",
            "invalid value \"maybe\" for -ip-masq: not true or false (nor 1, t, T, TRUE, True, 0, f, F, FALSE, False)",
        ),
        (
            "flanneld --subnet-lease-renew-margin=abc",
            "invalid value \"abc\" for -subnet-lease-renew-margin: not a whole number",
        ),
        (
            "flanneld -subnet-lease-renew-margin=",
            "invalid value \"\" for -subnet-lease-renew-margin: not a whole number",
        ),
        ("flanneld -v=x", "invalid value \"x\" for -v: not a level: a whole number such as 2"),
        (
            "flanneld positional",
            "unexpected argument \"positional\": there are only flags, each with its value behind it",
        ),
        (
            "flanneld --etcd-endpoints=http://10.95.0.1:2379 positional",
            "unexpected argument \"positional\": there are only flags, each with its value behind it",
        ),
        (
            "flanneld -ip-masq true -iface eth0",
            "unexpected argument true after -ip-masq: a boolean takes its value behind an equals sign, -ip-masq=true",
        ),
    ]);
}

#[test]
fn an_error_is_followed_by_where_to_look() {
    let Parsed::PrintAndExit { text, .. } = line("flanneld -nosuch") else { panic!() };
    assert_eq!(
        text,
        "flag provided but not defined: -nosuch\nUsage: flanneld [OPTION]...\nRun 'flanneld -help' for the options.\n"
    );
}

#[test]
fn subcommands_are_for_the_agents_own_name() {
    let at = |socket: &str| LookAt { socket: socket.into(), network: None, bpffs_path: "/sys/fs/bpf".into() };
    let status =
        |json, socket: &str| Parsed::Command(Command::Status(StatusCommand { json, at: at(socket) }));
    for (text, wanted) in [
        ("flannel-agent status", status(false, "/run/flannel/status.sock")),
        ("flannel-agent status --json", status(true, "/run/flannel/status.sock")),
        ("/usr/bin/flannel-agent status --socket /x --json", status(true, "/x")),
        ("FLANNELD_V=nonsense flannel-agent status --socket=/x", status(false, "/x")),
    ] {
        assert_eq!(line(text), wanted, "{text}");
    }
    let top = |millis, count| {
        let interval = Duration::from_millis(millis);
        Parsed::Command(Command::Top(TopCommand { interval, count, at: at("/run/flannel/status.sock") }))
    };
    for (text, wanted) in [
        ("flannel-agent top", top(1000, None)),
        ("flannel-agent top --interval=0.25 --count 2", top(250, Some(2))),
    ] {
        assert_eq!(line(text), wanted, "{text}");
    }
    for text in [
        "flannel-agent top --interval=0",
        "flannel-agent top --interval=nan",
        "flannel-agent top --interval=1h",
        "flannel-agent top --count=0",
    ] {
        assert_eq!(printed(text).2, 2, "{text}");
    }
    let cleanup = |dry_run, socket: &str, bpffs_path: &str| {
        let (socket, bpffs_path) = (socket.into(), bpffs_path.into());
        Parsed::Command(Command::Cleanup(CleanupCommand { dry_run, socket, bpffs_path }))
    };
    for (text, wanted) in [
        ("flannel-agent cleanup", cleanup(false, "/run/flannel/status.sock", "/sys/fs/bpf")),
        ("flannel-agent cleanup --dry-run --bpffs-path=/b --socket /x", cleanup(true, "/x", "/b")),
    ] {
        assert_eq!(line(text), wanted, "{text}");
    }
    assert_eq!(printed("flannel-agent version"), (format!("flannel-agent {VERSION}"), Stream::Stdout, 0));
    assert_eq!(
        printed("flannel-agent help"),
        ("Usage: flannel-agent [OPTION]...".to_owned(), Stream::Stdout, 0)
    );
    assert_eq!(printed("flannel-agent status --help").2, 0);
    assert_eq!(printed("flannel-agent help status").1, Stream::Stdout);
    assert_eq!(printed("flannel-agent help status").0, "What the running agent is doing");
    for text in [
        "flannel-agent status x",
        "flannel-agent status --jsn",
        "flannel-agent cleanup now",
        "flannel-agent version x",
        "flannel-agent help nosuch",
    ] {
        let (_, stream, code) = printed(text);
        assert_eq!((stream, code), (Stream::Stderr, 2), "{text}");
    }
    refused(&[
        (
            "flannel-agent statsu",
            "unexpected argument \"statsu\": did you mean the subcommand status, as the first word?",
        ),
        (
            "flannel-agent -v 1 status",
            "unexpected argument \"status\": did you mean the subcommand status, as the first word?",
        ),
        (
            "flannel-agent nonsense",
            "unexpected argument \"nonsense\": there are only flags, and the subcommands status, top, cleanup, reservations, migrate, migrate-etcd, version and help as the first word",
        ),
        (
            "flanneld status",
            "unexpected argument \"status\": there are only flags, each with its value behind it",
        ),
        (
            "flanneld version",
            "unexpected argument \"version\": there are only flags, each with its value behind it",
        ),
    ]);
}

#[test]
fn help_is_grouped_and_fits_a_terminal() {
    let Parsed::PrintAndExit { text, .. } = line("flanneld -help") else { panic!() };
    for heading in ["Leases in etcd:", "This node:", "The udp backend:", "Log and version:"] {
        assert!(text.lines().any(|line| line == heading), "{heading}\n{text}");
    }
    let widest = text.lines().map(|line| line.chars().count()).max().unwrap();
    assert!(widest <= 100, "{widest}\n{text}");
    assert!(!text.contains('\u{1b}'));
    assert!(!text.contains("subcommand") && !text.contains("Commands"));
    let Parsed::PrintAndExit { text, .. } = line("flannel-agent help") else { panic!() };
    assert!(text.contains("flannel-agent status [--json] [--socket PATH]"), "{text}");
}

/// The flags of the originals' own help: name, whether it is a boolean, default.
fn recorded_flags(recording: &'static str) -> Vec<(&'static str, bool, Option<&'static str>)> {
    let help = recording.split("\n$ ").find(|block| block.contains("--help")).unwrap();
    let mut flags = Vec::new();
    let mut lines = help.lines().skip(2).peekable();
    while let Some(line) = lines.next() {
        let Some(flag) = line.strip_prefix("  -") else { continue };
        let (name, kind) = flag.split_once(' ').unwrap_or((flag, ""));
        let text = lines.peek().copied().unwrap_or_default();
        let default = text.split("(default ").nth(1).and_then(|rest| rest.strip_suffix(')'));
        flags.push((name, kind.is_empty(), default.map(|default| default.trim_matches('"'))));
    }
    flags
}

#[test]
fn every_flag_of_the_originals_is_known_with_its_kind_and_default() {
    let command = flags::command();
    let recordings = [
        (include_str!("../../../../tests/fixtures/faults/v0.7.0/flags.txt"), 30),
        (include_str!("../../../../tests/fixtures/faults/v0.12.0/flags.txt"), 26),
    ];
    for (recording, count) in recordings {
        let recorded = recorded_flags(recording);
        assert_eq!(recorded.len(), count, "{recorded:?}");
        for (name, boolean, default) in recorded {
            if name == "help" {
                continue;
            }
            let kind = if boolean { go::Kind::Boolean } else { go::Kind::Valued };
            assert_eq!(flags::kind_of(&command, name), Some(kind), "-{name}");
            let arg = command.get_arguments().find(|arg| arg.get_long() == Some(name)).unwrap();
            let ours = arg.get_default_values().first().and_then(|value| value.to_str());
            match default {
                // Today's default, which asks for rules: unset is not asked for.
                Some("true") if name == "iptables-forward-rules" => assert_eq!(ours, None),
                Some(default) => assert_eq!(ours, Some(default), "-{name}"),
                None => {}
            }
        }
    }
    // Of today's flanneld, and in neither recording.
    for name in [
        "public-ipv6",
        "iface-can-reach",
        "set-node-network-unavailable",
        "ip-blackhole-route",
        "ip-masq-fully-random-disable",
    ] {
        assert!(flags::kind_of(&command, name).is_some(), "-{name}");
    }
}

proptest! {
    #[test]
    fn no_command_line_makes_it_panic(
        words in proptest::collection::vec(
            prop_oneof![
                Just("-iface".to_owned()),
                Just("--ip-masq".to_owned()),
                Just("status".to_owned()),
                "-{0,3}(v|help|version|healthz-port|etcd-endpoints|public-ip|iface-regex)(=.{0,12})?",
                ".{0,10}",
            ],
            0..6,
        ),
        program in "(flanneld|flannel-agent|/?.{0,8})",
        value in ".{0,12}",
    ) {
        let args = std::iter::once(program).chain(words).map(OsString::from);
        let _ = parse(args, [("FLANNELD_IFACE_REGEX".into(), value.clone().into()), ("FLANNELD_V".into(), value.into())]);
    }
}
