use proptest::prelude::*;

use super::*;

/// Files as the originals wrote them, with the networks, subnet, MTU and masquerading that were set.
const RECORDED: [(&str, &str, &str, u32, bool); 6] = [
    (
        include_str!("../../../tests/fixtures/v0.7.0/udp/h1/run/subnet.env"),
        "10.244.0.0/16",
        "10.244.49.0/24",
        1472,
        true,
    ),
    (
        include_str!("../../../tests/fixtures/v0.7.0/host-gw/h1/run/subnet.env"),
        "10.244.0.0/16",
        "10.244.38.0/24",
        1500,
        true,
    ),
    (
        include_str!("../../../tests/fixtures/v0.7.0/alloc/h1/run/subnet.env"),
        "10.244.0.0/16",
        "10.244.96.0/24",
        1500,
        false,
    ),
    (
        include_str!("../../../tests/fixtures/v0.20.2/udp/h1/run/subnet.env"),
        "10.244.0.0/16",
        "10.244.38.0/24",
        1472,
        true,
    ),
    (
        include_str!("../../../tests/fixtures/v0.20.2/host-gw/h1/run/subnet.env"),
        "10.244.0.0/16",
        "10.244.15.0/24",
        1500,
        true,
    ),
    (
        include_str!("../../../tests/fixtures/v0.20.2/alloc/h1/run/subnet.env"),
        "10.244.0.0/16",
        "10.244.53.0/24",
        1500,
        false,
    ),
];

fn v4_only(net: &str) -> Subnets {
    Subnets { v4: Some(net.parse().unwrap()), v6: None }
}

fn example() -> SubnetEnv {
    SubnetEnv { networks: v4_only("10.5.0.0/16"), subnets: v4_only("10.5.68.0/24"), mtu: 1472, ip_masq: true }
}

/// The previous IPv4 subnet a text yields, or the reasons.
fn previous(text: &str) -> String {
    let found = PreviousSubnets::parse(text);
    match found.subnet {
        Some(subnet) => subnet.to_string(),
        None if found.ignored.is_empty() => "none".to_owned(),
        None => found.ignored.join("; "),
    }
}

#[test]
fn the_file_is_the_originals_byte_for_byte() {
    for (text, network, subnet, mtu, ip_masq) in RECORDED {
        let env = SubnetEnv { networks: v4_only(network), subnets: v4_only(subnet), mtu, ip_masq };
        assert_eq!(env.to_string(), text);
        let previous = PreviousSubnets::parse(text);
        assert_eq!(previous.network, network.parse().ok());
        assert_eq!(previous.subnets(), Some(v4_only(subnet)));
        assert_eq!(previous.ignored, Vec::<String>::new());
    }
}

#[test]
fn each_family_has_its_own_lines() {
    let v6 = (Some("fd00:6::/48".parse().unwrap()), Some("fd00:6:0:15::/64".parse().unwrap()));
    let dual = SubnetEnv {
        networks: Subnets { v6: v6.0, ..example().networks },
        subnets: Subnets { v6: v6.1, ..example().subnets },
        ip_masq: false,
        ..example()
    };
    assert_eq!(
        dual.to_string(),
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.68.1/24\n\
         FLANNEL_IPV6_NETWORK=fd00:6::/48\nFLANNEL_IPV6_SUBNET=fd00:6:0:15::1/64\n\
         FLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
    );
    assert_eq!(PreviousSubnets::parse(&dual.to_string()).subnets(), Some(dual.subnets));

    let only_v6 = SubnetEnv {
        networks: Subnets { v4: None, ..dual.networks },
        subnets: Subnets { v4: None, ..dual.subnets },
        ..dual
    };
    assert_eq!(
        only_v6.to_string(),
        "FLANNEL_IPV6_NETWORK=fd00:6::/48\nFLANNEL_IPV6_SUBNET=fd00:6:0:15::1/64\n\
         FLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
    );
}

#[test]
fn a_former_file_is_read_as_leniently_as_flanneld_does() {
    for (text, wanted) in [
        ("FLANNEL_SUBNET=10.244.7.1/24\n", "10.244.7.0/24"),
        ("FLANNEL_SUBNET=10.244.7.1/25\n", "10.244.7.0/25"),
        ("FLANNEL_SUBNET=\"10.244.7.1/24\"\n", "10.244.7.0/24"),
        ("FLANNEL_SUBNET='10.244.7.1/24' # ours\n", "10.244.7.0/24"),
        ("export FLANNEL_SUBNET=10.244.7.1/24\n", "10.244.7.0/24"),
        ("FLANNEL_SUBNET: 10.244.7.1/24", "10.244.7.0/24"),
        ("  FLANNEL_SUBNET = 10.244.7.1/24   # ours\r\n", "10.244.7.0/24"),
        ("# FLANNEL_SUBNET=10.1.1.1/24\n\nFLANNEL_SUBNET=10.244.7.1/24", "10.244.7.0/24"),
        ("\u{feff}FLANNEL_SUBNET=10.244.7.1/24", "10.244.7.0/24"),
        ("FLANNEL_SUBNET=10.1.1.1/24\nFLANNEL_SUBNET=10.244.7.1/24\n", "10.244.7.0/24"),
        // Lists are a left-over of several cluster networks.
        ("FLANNEL_SUBNET=notacidr,10.244.7.1/24\n", "10.244.7.0/24"),
        ("FLANNEL_SUBNET=10.244.7.1/24,\n", "10.244.7.0/24"),
        (
            "FLANNEL_SUBNET=10.1.1.1/24, 10.244.7.1/24\n",
            "FLANNEL_SUBNET=\"10.1.1.1/24, 10.244.7.1/24\" names several networks",
        ),
        ("FLANNEL_SUBNET=notacidr\n", "FLANNEL_SUBNET=\"notacidr\" is no network such as 10.5.68.1/24"),
        ("FLANNEL_SUBNET=fd00::1/64\n", "FLANNEL_SUBNET=\"fd00::1/64\" is no network such as 10.5.68.1/24"),
        ("", "none"),
        ("FLANNEL_SUBNET=\n", "none"),
        ("FLANNEL_MTU=1472\n", "none"),
        (
            "FLANNEL_SUBNET 10.244.7.1/24\n",
            "line \"FLANNEL_SUBNET 10.244.7.1/24\" is no assignment such as FLANNEL_MTU=1472",
        ),
        (
            "FLANNEL_SUBNET=10.244.7.1/24\ngarbage{{{\n",
            "line \"garbage{{{\" is no assignment such as FLANNEL_MTU=1472",
        ),
        (
            "FLANNEL_SUBNET=\"10.244.7.1/24\n",
            "line \"FLANNEL_SUBNET=\\\"10.244.7.1/24\" is no assignment such as FLANNEL_MTU=1472",
        ),
    ] {
        assert_eq!(previous(text), wanted, "{text}");
    }
}

/// What flanneld v0.12.0 took from a file, as it logged it.
#[test]
fn recorded_files_give_the_subnet_the_original_found() {
    let recording = include_str!("../../../tests/fixtures/faults/v0.12.0/subnet_env.txt");
    let mut compared = 0;
    for block in recording.split("subnet.env = ").skip(1) {
        let Some((text, _)) = block.split_once(" ; lease in etcd") else { continue };
        let Some(theirs) = block.split("with Previous Subnet: ").nth(1).and_then(|rest| rest.lines().next())
        else {
            continue;
        };
        let ours = PreviousSubnets::parse(&text.replace('|', "\n")).subnet;
        assert_eq!(ours.map_or("None".to_owned(), |net| net.to_string()), theirs, "{text}");
        compared += 1;
    }
    assert_eq!(compared, 16);
}

fn scratch() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("cli-subnet-env-").tempdir().unwrap()
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn a_new_file_and_its_directories_get_their_modes() {
    let scratch = scratch();
    let path = scratch.path().join("run/flannel/subnet.env");
    example().write(&path).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), example().to_string());
    assert_eq!(mode(&path), 0o644);
    assert_eq!(mode(path.parent().unwrap()), 0o755);
    assert_eq!(PreviousSubnets::read(&path).subnets(), Some(example().subnets));
}

#[test]
fn a_replaced_file_keeps_its_mode_and_leaves_nothing_next_to_it() {
    let scratch = scratch();
    let path = scratch.path().join("subnet.env");
    fs::write(&path, "FLANNEL_MTU=9\n").unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    example().write(&path).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), example().to_string());
    assert_eq!(mode(&path), 0o600);
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1);
}

#[test]
fn a_file_that_says_the_same_is_left_as_it_is() {
    let scratch = scratch();
    let path = scratch.path().join("subnet.env");
    let file = || std::os::unix::fs::MetadataExt::ino(&fs::metadata(&path).unwrap());
    example().write(&path).unwrap();
    let first = file();
    example().write(&path).unwrap();
    assert_eq!(file(), first);
    let other = SubnetEnv { mtu: example().mtu + 1, ..example() };
    other.write(&path).unwrap();
    assert_ne!(file(), first);
    assert_eq!(fs::read_to_string(&path).unwrap(), other.to_string());
}

#[test]
fn a_reader_never_sees_half_a_file() {
    let scratch = scratch();
    let path = scratch.path().join("subnet.env");
    let other = SubnetEnv { mtu: 1400, subnets: v4_only("10.5.9.0/24"), ..example() };
    example().write(&path).unwrap();
    std::thread::scope(|threads| {
        let writer = threads.spawn(|| {
            for _ in 0..100 {
                other.write(&path).unwrap();
                example().write(&path).unwrap();
            }
        });
        while !writer.is_finished() {
            let text = fs::read_to_string(&path).unwrap();
            assert!(text == example().to_string() || text == other.to_string(), "{text}");
        }
    });
}

#[test]
fn a_place_that_can_not_be_written_is_named() {
    let scratch = scratch();
    let directory = scratch.path().join("subnet.env");
    fs::create_dir(&directory).unwrap();
    let error = example().write(&directory).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("replace {}: it is there and not a regular file", directory.display())
    );
    assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1, "no temporary file is left");

    let file = scratch.path().join("file");
    fs::write(&file, "").unwrap();
    let below = file.join("subnet.env");
    let error = example().write(&below).unwrap_err().to_string();
    assert!(error.starts_with(&format!("create the directory of {}: ", below.display())), "{error}");
    assert!(example().write(Path::new("/")).is_err());
}

#[test]
fn reading_what_is_no_file_says_why_and_never_waits() {
    let scratch = scratch();
    let missing = PreviousSubnets::read(&scratch.path().join("missing"));
    assert_eq!(missing, PreviousSubnets::default());

    let directory = PreviousSubnets::read(scratch.path());
    assert_eq!(directory.ignored, [format!("{}: not a regular file", scratch.path().display())]);

    let pipe = scratch.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(PreviousSubnets::read(&pipe).ignored, [format!("{}: not a regular file", pipe.display())]);

    let long = scratch.path().join("long");
    fs::write(&long, "#".repeat(100_000)).unwrap();
    assert_eq!(
        PreviousSubnets::read(&long).ignored,
        [format!("{}: longer than 65536 bytes", long.display())]
    );

    let bytes = scratch.path().join("bytes");
    fs::write(&bytes, [0xff, 0xfe]).unwrap();
    assert_eq!(PreviousSubnets::read(&bytes).ignored, [format!("{}: not text in UTF-8", bytes.display())]);
}

proptest! {
    #[test]
    fn any_text_is_read_without_a_panic(text in "(FLANNEL_SUBNET|export|[=: \"'#\n,/.0-9a-z]){0,40}|.{0,80}") {
        let _ = PreviousSubnets::parse(&text);
    }

    #[test]
    fn what_is_written_is_read_back(base in any::<u32>(), len in 3..=30_u8, mtu in any::<u32>(), ip_masq: bool) {
        let subnet = Ipv4Net::new_assert(Ipv4Addr::from_bits(base), len).trunc();
        let network = Ipv4Net::new_assert(subnet.network(), len - 2).trunc();
        let env = SubnetEnv {
            networks: Subnets { v4: Some(network), v6: None },
            subnets: Subnets { v4: Some(subnet), v6: None },
            mtu,
            ip_masq,
        };
        let previous = PreviousSubnets::parse(&env.to_string());
        prop_assert_eq!(previous, PreviousSubnets { network: Some(network), subnet: Some(subnet), ..PreviousSubnets::default() });
    }
}
