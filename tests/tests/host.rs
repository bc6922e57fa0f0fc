//! `LinuxHost` against a real kernel: each test in a network namespace of its own that ends with its thread.
//!
//! `ip` from iproute2 plays everybody else: it does the damage, and it is the second opinion on what we did.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::future::Future;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use flannel_agent::domain::host_state::{
    Address, Change, HostItem, HostState, Key, Link, LinkKind, Route, Sysctl,
};
use flannel_agent::domain::interface::InterfaceAddress;
use flannel_agent::host::interfaces::{Family, default_route, interfaces, reach};
use flannel_agent::host::linux::{LinuxHost, LinuxHostOptions, Scope};
use flannel_agent::host::netlink::{Netlink, NextHop, ROUTE_PROTOCOL};
use flannel_agent::host::{Host, HostError};
use flannel_tests::privilege;
use libtest_mimic::{Failed, Trial};
use nix::sched::{CloneFlags, unshare};

fn main() -> ExitCode {
    privilege::run_when(
        privilege::require_root,
        vec![
            trial("what_is_put_is_observed_and_what_is_removed_is_gone", put_observe_remove),
            trial("a_moved_route_is_replaced_and_never_missing", moved_route),
            trial("a_former_flannelds_route_is_taken_over_in_place", takeover),
            trial("what_belongs_to_others_is_neither_seen_nor_touched", foreign),
            trial("stale_routes_are_swept_only_inside_the_network", sweep),
            trial("a_deleted_device_route_or_address_is_missed_within_a_second", damage),
            trial("a_device_that_is_down_or_has_another_mtu_is_put_right", device_repair),
            trial("our_own_routes_do_not_wake_us", own_echo),
            trial("a_lost_event_is_an_event", overrun),
            trial("a_burst_wakes_once_and_a_cancelled_wait_forgets_nothing", burst),
            trial("five_thousand_routes_go_in_batches", five_thousand),
            trial("ipv6_takes_the_same_way", ipv6),
            trial("every_field_of_a_route_is_read_back", route_fields),
            trial("a_failure_names_the_route_and_stops_no_other", failures),
            trial("each_result_of_several_batches_belongs_to_its_route", mapping),
            trial("clones_of_a_connection_take_turns", turns),
            trial("the_kernels_own_routes_are_not_replaced", connected),
            trial("a_device_of_another_kind_is_not_removed", foreign_device),
            trial("a_missing_capability_is_named", unprivileged),
            trial("interfaces_are_listed_with_the_facts_that_rank_their_addresses", list_interfaces),
            trial("next_hops_of_many_peers_come_in_one_go", next_hops),
            trial("a_veth_pair_is_made_set_and_deleted", veth),
        ],
    )
}

type Outcome = Result<(), HostError>;

/// Runs `body` on a thread, and a runtime, that live in a network namespace of their own.
fn trial<F: Future<Output = Outcome> + 'static>(name: &str, body: fn() -> F) -> Trial {
    Trial::test(name, move || {
        let thread = std::thread::spawn(move || -> Result<(), Failed> {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|e| format!("unshare the network namespace: {e}"))?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            ip("link set lo up");
            Ok(runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), body()).await })??)
        });
        thread.join().map_err(|panic| {
            let text = panic.downcast_ref::<String>().cloned();
            text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default()
        })?
    })
}

/// Runs `ip` in the calling thread's namespace.
fn ip(arguments: &str) -> String {
    let output =
        Command::new("ip").args(arguments.split_whitespace()).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The underlay: `under0` with 10.9.0.1/24 and fd00:9::1/64, its other end up as well.
fn underlay() {
    ip("link add under0 type veth peer name under1");
    ip("addr add 10.9.0.1/24 dev under0");
    ip("addr add fd00:9::1/64 dev under0 nodad");
    ip("link set under0 up");
    ip("link set under1 up");
}

fn host() -> Result<LinuxHost, HostError> {
    LinuxHost::new(
        Scope {
            devices: vec!["flannel0".into()],
            networks: vec!["10.5.0.0/16".parse().unwrap(), "fd00:5::/32".parse().unwrap()],
        },
        LinuxHostOptions { bpffs: PathBuf::from("/sys/fs/bpf") },
    )
}

fn tun() -> HostItem {
    HostItem::Link(Link { name: "flannel0".into(), kind: LinkKind::Tun, mtu: 1472 })
}

fn address(net: &str) -> HostItem {
    HostItem::Address(Address { device: "flannel0".into(), net: net.parse().unwrap() })
}

fn route(destination: &str, via: &str) -> HostItem {
    HostItem::Route(plain(destination, Some(via), "under0"))
}

fn plain(destination: &str, via: Option<&str>, device: &str) -> Route {
    Route {
        destination: destination.parse().unwrap(),
        via: via.map(|via| via.parse().unwrap()),
        device: device.into(),
        onlink: false,
        source: None,
        mtu: None,
    }
}

fn state(items: impl IntoIterator<Item = HostItem>) -> HostState {
    items.into_iter().collect()
}

/// Applies what leads from one state to the other and expects every step to work.
async fn go(host: &mut LinuxHost, from: &HostState, to: &HostState) {
    let changes = from.changes_to(to);
    for (change, result) in changes.iter().zip(host.apply(&changes).await) {
        assert_eq!(result, Ok(()), "{change}");
    }
}

/// Returns once nothing has happened for a while: a new device makes news for some time (carrier, IPv6).
async fn quiet(host: &mut LinuxHost) {
    for _ in 0..20 {
        if tokio::time::timeout(Duration::from_millis(1500), host.disturbed()).await.is_err() {
            return;
        }
    }
    panic!("the host never becomes quiet");
}

/// What `ip monitor route` prints from now on, until it is asked.
struct Monitor(Child);

impl Monitor {
    fn start() -> Self {
        let child = Command::new("ip").args(["-o", "monitor", "route"]).stdout(Stdio::piped()).spawn();
        let monitor = Self(child.expect("iproute2 is installed"));
        // It says nothing when it listens: its socket's membership in a group does.
        let pid = monitor.0.id().to_string();
        for _ in 0..200 {
            let sockets = std::fs::read_to_string("/proc/thread-self/net/netlink").unwrap();
            let listens = |line: &str| {
                let fields: Vec<&str> = line.split_whitespace().collect();
                fields.get(2) == Some(&pid.as_str())
                    && fields.get(3).is_some_and(|groups| *groups != "00000000")
            };
            if sockets.lines().any(listens) {
                return monitor;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("ip monitor does not start");
    }

    /// The lines up to the news of a last route, which is put here.
    fn lines(mut self) -> Vec<String> {
        ip("route add 198.51.100.0/24 dev lo");
        let lines = BufReader::new(self.0.stdout.take().unwrap()).lines();
        let lines = lines.map(Result::unwrap).take_while(|line| !line.contains("198.51.100.0/24")).collect();
        ip("route del 198.51.100.0/24 dev lo");
        lines
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn put_observe_remove() -> Outcome {
    underlay();
    let mut host = host()?;
    let wanted = state([
        tun(),
        HostItem::Sysctl(Sysctl { key: "net/ipv4/conf/flannel0/rp_filter".into(), value: "2".into() }),
        address("10.5.3.0/32"),
        HostItem::Route(plain("10.5.0.0/16", None, "flannel0")),
        route("10.5.9.0/24", "10.9.0.2"),
    ]);
    assert_eq!(host.observe().await?, HostState::new());
    go(&mut host, &HostState::new(), &wanted).await;
    assert_eq!(host.observe().await?, wanted);

    // A second opinion, and what is in no item: protocol, scope, label, broadcast address.
    let routes = ip("-N -details route show table main");
    assert!(routes.contains("1 10.5.0.0/16 dev flannel0 proto 85 scope 0"), "{routes}");
    assert!(routes.contains("1 10.5.9.0/24 via 10.9.0.2 dev under0 proto 85 scope 0"), "{routes}");
    let addresses = ip("-o -4 addr show dev flannel0");
    assert!(addresses.contains("inet 10.5.3.0/32 scope global flannel0"), "{addresses}");
    assert!(!addresses.contains("brd"), "{addresses}");

    // Putting again changes nothing and is no error.
    go(&mut host, &HostState::new(), &wanted).await;
    assert_eq!(host.observe().await?, wanted);

    let removals = wanted.changes_to(&HostState::new());
    assert!(host.apply(&removals).await.iter().all(Result::is_ok));
    assert_eq!(host.observe().await?, HostState::new());
    assert!(!ip("-o link").contains("flannel0"));
    // What is gone already is removed, all the same.
    for (change, result) in removals.iter().zip(host.apply(&removals).await) {
        assert_eq!(result, Ok(()), "{change}");
    }
    Ok(())
}

async fn moved_route() -> Outcome {
    underlay();
    let mut host = host()?;
    let before = state([route("10.5.9.0/24", "10.9.0.2"), route("fd00:5:9::/64", "fd00:9::2")]);
    let after = state([route("10.5.9.0/24", "10.9.0.3"), route("fd00:5:9::/64", "fd00:9::3")]);
    go(&mut host, &HostState::new(), &before).await;
    let monitor = Monitor::start();
    go(&mut host, &before, &after).await;
    let news = monitor.lines();
    assert!(news.iter().any(|line| line.contains("10.5.9.0/24 via 10.9.0.3")), "{news:?}");
    assert!(news.iter().any(|line| line.contains("fd00:5:9::/64 via fd00:9::3")), "{news:?}");
    assert!(!news.iter().any(|line| line.contains("Deleted")), "{news:?}");
    assert_eq!(host.observe().await?, after);
    Ok(())
}

async fn takeover() -> Outcome {
    underlay();
    ip("route add 10.5.9.0/24 via 10.9.0.2 dev under0");
    ip("route add 10.5.8.0/24 via 10.9.0.7 dev under0");
    ip("route add fd00:5:9::/64 via fd00:9::2 dev under0");
    let mut host = host()?;
    assert_eq!(host.observe().await?, HostState::new(), "they are not ours yet");
    let monitor = Monitor::start();
    let wanted = state([
        route("10.5.9.0/24", "10.9.0.2"),
        route("10.5.8.0/24", "10.9.0.8"),
        route("fd00:5:9::/64", "fd00:9::2"),
    ]);
    go(&mut host, &HostState::new(), &wanted).await;
    let news = monitor.lines();
    assert!(!news.iter().any(|line| line.contains("Deleted")), "{news:?}");
    assert_eq!(host.observe().await?, wanted);
    for destination in ["10.5.9.0/24", "10.5.8.0/24", "fd00:5:9::/64"] {
        let family = if destination.contains(':') { "-6" } else { "-4" };
        let routes = ip(&format!("{family} route show {destination} table main"));
        assert_eq!(routes.lines().count(), 1, "{routes}");
        assert!(routes.contains("proto 85"), "{routes}");
    }
    Ok(())
}

async fn foreign() -> Outcome {
    underlay();
    ip("tuntap add mode tun name foreign0");
    ip("addr add 10.5.77.1/24 dev foreign0");
    ip("link set foreign0 up");
    // Like ours in all but the protocol, the shape, the table, the metric or the place.
    let foreign = [
        "10.5.9.0/24 via 10.9.0.2 dev under0",
        "10.5.10.0/24 via 10.9.0.2 dev under0 proto static",
        "blackhole 10.5.11.0/24 proto 85",
        "10.5.12.0/24 via 10.9.0.2 dev under0 proto 85 table 100",
        "10.5.13.0/24 via 10.9.0.2 dev under0 proto 85 metric 5",
        "192.0.2.0/24 via 10.9.0.2 dev under0 proto 85",
        "fd00:5:9::/64 via fd00:9::2 dev under0",
    ];
    for route in foreign {
        ip(&format!("route add {route}"));
    }
    let before = [ip("route show table all"), ip("-6 route show table all"), ip("-o addr"), ip("-o link")];
    let mut host = host()?;
    assert_eq!(host.observe().await?, HostState::new());
    // Even when told to remove their destinations, only ours would go.
    let removals = ["10.5.9.0/24", "10.5.10.0/24", "10.5.11.0/24", "10.5.12.0/24"]
        .map(|destination| Change::Remove(route(destination, "10.9.0.2")));
    // (10.5.11.0/24 has our protocol and is asked for by destination: it is the one that may go.)
    let [a, b, _, d] = removals;
    for result in host.apply(&[a, b, d, Change::Remove(route("fd00:5:9::/64", "fd00:9::2"))]).await {
        assert_eq!(result, Ok(()));
    }
    let after = [ip("route show table all"), ip("-6 route show table all"), ip("-o addr"), ip("-o link")];
    assert_eq!(before, after);
    Ok(())
}

async fn sweep() -> Outcome {
    underlay();
    for route in [
        "10.5.7.0/24 via 10.9.0.2 dev under0 proto 85",
        "10.5.9.0/24 via 10.9.0.9 dev under0 proto 85",
        "192.0.2.0/24 via 10.9.0.2 dev under0 proto 85",
        "10.0.0.0/8 via 10.9.0.2 dev under0 proto 85",
        "10.5.6.0/24 via 10.9.0.2 dev under0 proto static",
    ] {
        ip(&format!("route add {route}"));
    }
    let mut host = host()?;
    let found = host.observe().await?;
    assert_eq!(found, state([route("10.5.7.0/24", "10.9.0.2"), route("10.5.9.0/24", "10.9.0.9")]));
    let wanted = state([route("10.5.9.0/24", "10.9.0.2")]);
    go(&mut host, &found, &wanted).await;
    assert_eq!(host.observe().await?, wanted);
    let left = ip("route show table main");
    for stays in ["192.0.2.0/24", "10.0.0.0/8", "10.5.6.0/24", "10.5.9.0/24 via 10.9.0.2"] {
        assert!(left.contains(stays), "{stays} is not in:\n{left}");
    }
    assert!(!left.contains("10.5.7.0/24"), "{left}");
    Ok(())
}

async fn damage() -> Outcome {
    underlay();
    let mut host = host()?;
    let wanted = state([
        tun(),
        address("10.5.3.0/32"),
        HostItem::Route(plain("10.5.0.0/16", None, "flannel0")),
        route("10.5.9.0/24", "10.9.0.2"),
    ]);
    go(&mut host, &HostState::new(), &wanted).await;
    let missing = [
        ("route del 10.5.9.0/24", vec![Key::Route("10.5.9.0/24".parse().unwrap())]),
        // With its last address a device stops speaking IPv4, and loses its routes.
        (
            "addr del 10.5.3.0/32 dev flannel0",
            vec![
                Key::Address("flannel0".into(), "10.5.3.0/32".parse().unwrap()),
                Key::Route("10.5.0.0/16".parse().unwrap()),
            ],
        ),
        // No word from the kernel about the routes that go with a device; the device's own news must do.
        ("link set under0 down", vec![Key::Route("10.5.9.0/24".parse().unwrap())]),
        (
            "link del flannel0",
            vec![
                Key::Link("flannel0".into()),
                Key::Address("flannel0".into(), "10.5.3.0/32".parse().unwrap()),
                Key::Route("10.5.0.0/16".parse().unwrap()),
            ],
        ),
        (
            "route replace 10.5.9.0/24 via 10.9.0.66 dev under0",
            vec![Key::Route("10.5.9.0/24".parse().unwrap())],
        ),
    ];
    for (command, gone) in missing {
        quiet(&mut host).await;
        let start = Instant::now();
        ip(command);
        let woken = tokio::time::timeout(Duration::from_secs(1), host.disturbed()).await;
        assert!(woken.is_ok(), "nobody noticed `ip {command}`");
        let found = host.observe().await?;
        println!("ip {command}: noticed after {} ms", start.elapsed().as_millis());
        for item in wanted.iter() {
            assert_eq!(found.contains(item), !gone.contains(&item.key()), "{item} after `ip {command}`");
        }
        if command == "link set under0 down" {
            ip("link set under0 up");
        }
        go(&mut host, &found, &wanted).await;
        assert_eq!(host.observe().await?, wanted, "after the repair of `ip {command}`");
    }
    Ok(())
}

async fn device_repair() -> Outcome {
    let mut host = host()?;
    let wanted =
        state([tun(), address("10.5.3.0/32"), HostItem::Route(plain("10.5.0.0/16", None, "flannel0"))]);
    go(&mut host, &HostState::new(), &wanted).await;
    for damage in ["link set flannel0 mtu 1400", "link set flannel0 down"] {
        ip(damage);
        let found = host.observe().await?;
        assert!(!found.contains(&tun()), "after `ip {damage}`");
        go(&mut host, &found, &wanted).await;
        assert_eq!(host.observe().await?, wanted, "after the repair of `ip {damage}`");
    }
    Ok(())
}

async fn own_echo() -> Outcome {
    underlay();
    let mut host = host()?;
    quiet(&mut host).await;
    let wanted = state((0..100).map(|n| route(&format!("10.5.{n}.0/24"), "10.9.0.2")));
    go(&mut host, &HostState::new(), &wanted).await;
    let woken = tokio::time::timeout(Duration::from_millis(500), host.disturbed()).await;
    assert!(woken.is_err(), "woken by our own routes");
    ip("route del 10.5.50.0/24");
    let woken = tokio::time::timeout(Duration::from_secs(1), host.disturbed()).await;
    assert!(woken.is_ok(), "not woken by another's deletion");
    Ok(())
}

async fn overrun() -> Outcome {
    underlay();
    let mut host = host()?;
    quiet(&mut host).await;
    // Another program changes more than the socket can hold while nobody reads.
    let other = Netlink::new()?;
    let routes: Vec<Route> = (0..12_000_u32)
        .map(|n| plain(&format!("10.5.{}.{}/32", n / 256, n % 256), Some("10.9.0.2"), "under0"))
        .collect();
    let routes: Vec<&Route> = routes.iter().collect();
    assert!(other.put_routes(&routes).await.iter().all(Result::is_ok));
    let drops: u64 = std::fs::read_to_string("/proc/thread-self/net/netlink")
        .unwrap()
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|fields| fields[3] != "00000000")
        .map(|fields| fields[8].parse::<u64>().unwrap())
        .sum();
    assert!(drops > 0, "the kernel lost nothing: the test must change more");
    println!("{drops} events lost");
    let woken = tokio::time::timeout(Duration::from_secs(1), host.disturbed()).await;
    assert!(woken.is_ok(), "lost events went unnoticed");
    assert_eq!(host.observe().await?.len(), 12_000);
    let again = tokio::time::timeout(Duration::from_millis(1000), host.disturbed()).await;
    assert!(again.is_err(), "woken again by what was reported");
    // And the subscription is still alive.
    ip("route del 10.5.0.7/32");
    assert!(tokio::time::timeout(Duration::from_secs(1), host.disturbed()).await.is_ok());
    Ok(())
}

async fn burst() -> Outcome {
    underlay();
    let mut host = host()?;
    quiet(&mut host).await;
    for n in 0..20 {
        ip(&format!("route add 10.5.{n}.0/24 via 10.9.0.2 dev under0"));
    }
    // Waits that are given up, as those of a select that another arm wins.
    for _ in 0..10 {
        let _ = tokio::time::timeout(Duration::from_millis(2), host.disturbed()).await;
    }
    assert!(tokio::time::timeout(Duration::from_millis(500), host.disturbed()).await.is_ok(), "forgotten");
    assert!(tokio::time::timeout(Duration::from_millis(700), host.disturbed()).await.is_err(), "woken twice");
    Ok(())
}

async fn five_thousand() -> Outcome {
    underlay();
    let mut host = host()?;
    let via = |last: u32| {
        state(
            (0..5000_u32)
                .map(|n| route(&format!("10.5.{}.{}/32", n / 256, n % 256), &format!("10.9.0.{last}"))),
        )
    };
    let (first, second, none) = (via(2), via(3), HostState::new());
    for (what, from, to) in [("put", &none, &first), ("moved", &first, &second), ("removed", &second, &none)]
    {
        let start = Instant::now();
        go(&mut host, from, to).await;
        let changed = start.elapsed();
        let start = Instant::now();
        assert_eq!(&host.observe().await?, to);
        println!(
            "5,000 routes {what} in {} ms, observed in {} ms",
            changed.as_millis(),
            start.elapsed().as_millis()
        );
    }
    Ok(())
}

async fn ipv6() -> Outcome {
    underlay();
    let mut host = host()?;
    let wanted = state([
        tun(),
        address("fd00:5:3::/128"),
        HostItem::Route(plain("fd00:5::/32", None, "flannel0")),
        route("fd00:5:9::/64", "fd00:9::2"),
    ]);
    go(&mut host, &HostState::new(), &wanted).await;
    assert_eq!(host.observe().await?, wanted, "the kernel's own link-local address is left out");
    let routes = ip("-6 -N route show table main");
    assert!(routes.contains("fd00:5:9::/64 via fd00:9::2 dev under0 proto 85"), "{routes}");
    quiet(&mut host).await;
    ip("-6 route del fd00:5:9::/64");
    assert!(tokio::time::timeout(Duration::from_secs(1), host.disturbed()).await.is_ok());
    let found = host.observe().await?;
    assert_eq!(found.len(), 3);
    go(&mut host, &found, &wanted).await;
    go(&mut host, &wanted, &HostState::new()).await;
    assert_eq!(host.observe().await?, HostState::new());
    Ok(())
}

async fn route_fields() -> Outcome {
    underlay();
    let mut host = host()?;
    let full = |destination: &str, via: &str, source: &str| {
        HostItem::Route(Route {
            onlink: true,
            source: Some(source.parse().unwrap()),
            mtu: Some(1400),
            ..plain(destination, Some(via), "under0")
        })
    };
    let wanted = state([
        full("10.5.9.0/24", "203.0.113.9", "10.9.0.1"),
        full("fd00:5:9::/64", "fd00:99::9", "fd00:9::1"),
        HostItem::Route(plain("10.5.10.0/24", Some("fd00:9::2"), "under0")),
    ]);
    go(&mut host, &HostState::new(), &wanted).await;
    assert_eq!(host.observe().await?, wanted);
    Ok(())
}

async fn failures() -> Outcome {
    underlay();
    let mut host = host()?;
    let good = route("10.5.9.0/24", "10.9.0.2");
    let gone = HostItem::Address(Address { device: "gone0".into(), net: "10.5.3.0/32".parse().unwrap() });
    let changes = [
        route("10.5.7.0/24", "203.0.113.7"),
        good.clone(),
        HostItem::Route(plain("10.5.8.0/24", None, "gone0")),
        gone,
        HostItem::Sysctl(Sysctl { key: "net/ipv4/conf/gone0/rp_filter".into(), value: "1".into() }),
        HostItem::Sysctl(Sysctl { key: "net/ipv4/conf/lo/rp_filter".into(), value: "many".into() }),
        HostItem::Link(Link { name: "sixteen-bytes-xx".into(), kind: LinkKind::Tun, mtu: 1472 }),
    ]
    .map(Change::Put);
    let results = host.apply(&changes).await;
    let texts: Vec<String> =
        results.into_iter().map(|r| r.err().map(|e| e.to_string()).unwrap_or_default()).collect();
    let expected = [
        "put route 10.5.7.0/24 via 203.0.113.7 dev under0: network is unreachable (the kernel says: Nexthop has invalid \
         gateway): gateway 203.0.113.7 must be on a network of under0 itself",
        "",
        "put route 10.5.8.0/24 dev gone0: there is no network device gone0",
        "put addr 10.5.3.0/32 dev gone0: there is no network device gone0",
        "put sysctl net/ipv4/conf/gone0/rp_filter=1: no such file or directory: the device is gone, or this kernel \
         lacks the feature (is IPv6 off, a module missing?)",
        "put sysctl net/ipv4/conf/lo/rp_filter=many: invalid argument: the kernel does not take this value",
    ];
    assert_eq!(texts[..6], expected);
    assert!(!texts[6].is_empty(), "a name that is too long");

    std::fs::write("/proc/sys/net/ipv6/conf/under0/disable_ipv6", "1").unwrap();
    let on_under0 =
        HostItem::Address(Address { device: "under0".into(), net: "fd00:9::7/64".parse().unwrap() });
    let results = host.apply(&[Change::Put(on_under0)]).await;
    let text = results[0].as_ref().unwrap_err().to_string();
    assert!(text.ends_with("IPv6 is switched off on under0"), "{text}");
    assert_eq!(host.observe().await?, state([good]));
    Ok(())
}

async fn mapping() -> Outcome {
    underlay();
    let mut host = host()?;
    let bad = |n: u32| n % 3 == 1;
    let changes: Vec<Change> = (0..450_u32)
        .map(|n| {
            let via = if bad(n) { "203.0.113.7" } else { "10.9.0.2" };
            Change::Put(route(&format!("10.5.{}.{}/32", n / 256, n % 256), via))
        })
        .collect();
    for ((n, change), result) in (0..).zip(&changes).zip(host.apply(&changes).await) {
        assert_eq!(result.is_err(), bad(n), "{change}: {result:?}");
        if let Err(error) = result {
            assert!(error.to_string().starts_with(&change.to_string()), "{error} is not about {change}");
        }
    }
    assert_eq!(host.observe().await?.len(), 300);
    Ok(())
}

async fn turns() -> Outcome {
    underlay();
    let netlink = Netlink::new()?;
    let routes: Vec<Route> = (0..3000_u32)
        .map(|n| plain(&format!("10.5.{}.{}/32", n / 256, n % 256), Some("10.9.0.2"), "under0"))
        .collect();
    assert!(netlink.put_routes(&routes.iter().collect::<Vec<_>>()).await.iter().all(Result::is_ok));
    let (some, rest) = routes.split_at(500);
    let some: Vec<&Route> = some.iter().collect();
    let (links, first, removed, second, put) = tokio::join!(
        netlink.links(),
        netlink.routes(Some(ROUTE_PROTOCOL)),
        netlink.remove_routes(&some),
        netlink.routes(Some(ROUTE_PROTOCOL)),
        netlink.put_routes(&some),
    );
    assert_eq!(links?.len(), 3);
    assert!(first?.len() >= rest.len() && second?.len() >= rest.len());
    assert!(removed.iter().chain(&put).all(Result::is_ok));
    // The kernel refuses a dump while an abandoned one is still under way on the socket.
    for patience in 0..20 {
        let abandoned = netlink.routes(Some(ROUTE_PROTOCOL));
        let _ = tokio::time::timeout(Duration::from_micros(patience * 200), abandoned).await;
        assert_eq!(netlink.routes(Some(ROUTE_PROTOCOL)).await?.len(), 3000);
    }
    Ok(())
}

async fn connected() -> Outcome {
    underlay();
    ip("addr add 10.5.20.1/24 dev under0");
    let mut host = host()?;
    go(&mut host, &HostState::new(), &state([tun()])).await;
    let before = ip("route show 10.5.20.0/24");
    let changes = [
        Change::Put(HostItem::Route(plain("10.5.20.0/24", None, "flannel0"))),
        Change::Put(HostItem::Route(plain("10.5.21.0/24", None, "flannel0"))),
    ];
    let results = host.apply(&changes).await;
    assert_eq!(
        results[0].as_ref().unwrap_err().to_string(),
        "put route 10.5.20.0/24 dev flannel0: 10.5.20.0/24 is the network of an address on under0, whose route stays"
    );
    assert_eq!(results[1], Ok(()));
    assert_eq!(ip("route show 10.5.20.0/24"), before);
    // On a device of ours it may be replaced: what is on it is ours.
    ip("addr add 10.5.30.1/24 dev flannel0");
    let ours = HostItem::Route(plain("10.5.30.0/24", None, "flannel0"));
    assert_eq!(host.apply(&[Change::Put(ours)]).await, [Ok(())]);
    Ok(())
}

async fn foreign_device() -> Outcome {
    ip("link add flannel0 type bridge");
    let mut host = host()?;
    assert_eq!(host.observe().await?, HostState::new());
    let results = host.apply(&[Change::Remove(tun())]).await;
    assert_eq!(
        results[0].as_ref().unwrap_err().to_string(),
        "remove link flannel0 type tun mtu 1472: flannel0 is of kind bridge now, so it is not ours"
    );
    assert!(ip("-o link").contains("flannel0"));
    Ok(())
}

async fn unprivileged() -> Outcome {
    underlay();
    // All capabilities, of this thread only, which ends with the test (capset(2), version 3).
    let header = [0x2008_0522_u32, 0];
    let none = [0_u32; 6];
    // SAFETY: both have the layout of capset's arguments and live during the call.
    let dropped = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), none.as_ptr()) };
    assert_eq!(dropped, 0);
    let mut host = host()?;
    assert_eq!(host.observe().await?, HostState::new(), "looking needs no privilege");
    let results = host.apply(&[Change::Put(route("10.5.9.0/24", "10.9.0.2"))]).await;
    assert_eq!(
        results[0].as_ref().unwrap_err().to_string(),
        "put route 10.5.9.0/24 via 10.9.0.2 dev under0: operation not permitted: needs CAP_NET_ADMIN"
    );
    Ok(())
}

async fn list_interfaces() -> Outcome {
    underlay();
    ip("addr add 10.9.0.50/24 dev under0 valid_lft 1000 preferred_lft 0");
    ip("addr add fd00:9::50/64 dev under0 nodad valid_lft 1000 preferred_lft 500");
    let netlink = Netlink::new()?;
    let all = interfaces(&netlink).await?;
    assert!(all.is_sorted_by_key(|interface| interface.index), "in the kernel's order");
    let under0 = all.iter().find(|interface| interface.name == "under0").unwrap();
    assert_eq!((under0.mtu, under0.up), (1500, true));
    let address = |ip: &str, prefix_len, dynamic, deprecated| InterfaceAddress {
        address: ip.parse().unwrap(),
        prefix_len,
        dynamic,
        temporary: false,
        deprecated,
    };
    let global: Vec<_> = under0
        .addresses
        .iter()
        .filter(|a| !matches!(a.address, IpAddr::V6(v6) if v6.is_unicast_link_local()))
        .cloned()
        .collect();
    for expected in [
        address("10.9.0.1", 24, false, false),
        address("10.9.0.50", 24, true, true),
        address("fd00:9::1", 64, false, false),
        address("fd00:9::50", 64, true, false),
    ] {
        assert!(global.contains(&expected), "{expected:?} is not in {global:?}");
    }
    assert_eq!(global.len(), 4);
    assert_eq!(global[0].address, "10.9.0.1".parse::<IpAddr>().unwrap());

    assert_eq!(default_route(&netlink, Family::V4).await?, None);
    ip("route add default via 10.9.0.254 metric 300");
    ip("route add default dev under1 metric 100");
    ip("-6 route add default via fd00:9::fe");
    let under1 = all.iter().find(|interface| interface.name == "under1").unwrap();
    assert_eq!(default_route(&netlink, Family::V4).await?, Some(under1.index));
    assert_eq!(default_route(&netlink, Family::V6).await?, Some(under0.index));

    let way = reach(&netlink, "10.9.0.77".parse().unwrap()).await?;
    assert_eq!((way.via, way.ifindex), (None, under0.index));
    assert_eq!(way.source, Some("10.9.0.1".parse().unwrap()));
    let way = reach(&netlink, "2001:db8::1".parse().unwrap()).await?;
    assert_eq!((way.via, way.ifindex), (Some("fd00:9::fe".parse().unwrap()), under0.index));
    Ok(())
}

async fn next_hops() -> Outcome {
    underlay();
    ip("route add 192.0.2.0/24 via 10.9.0.254");
    ip("route add blackhole 203.0.113.0/24");
    let netlink = Netlink::new()?;
    let under0 = netlink.link("under0").await?.unwrap().index;
    let peers: Vec<Ipv4Addr> =
        (0..1000_u32).map(|n| Ipv4Addr::from_bits(0xc000_0200 + n % 250 + 1)).collect();
    let start = Instant::now();
    let hops = netlink.next_hops(&peers).await;
    println!("1,000 next hops in {} ms", start.elapsed().as_millis());
    let (gateway, source) = (Ipv4Addr::new(10, 9, 0, 254), Ipv4Addr::new(10, 9, 0, 1));
    let routed = NextHop { via: Some(gateway), ifindex: under0, source: Some(source) };
    assert_eq!(hops.len(), 1000);
    assert!(hops.iter().all(|hop| hop.as_ref() == Ok(&routed)), "{:?}", hops[0]);

    let odd = ["10.9.0.2", "10.9.0.1", "198.51.100.1", "203.0.113.1"].map(|ip| ip.parse().unwrap());
    let found = netlink.next_hops(&odd).await;
    assert_eq!(found[0], Ok(NextHop { via: None, ifindex: under0, source: Some(source) }));
    assert_eq!(netlink.next_hop(odd[0]).await, found[0]);
    let text = |n: usize| found[n].as_ref().unwrap_err().to_string();
    assert_eq!(text(1), "look up the route to 10.9.0.1: 10.9.0.1 is an address of this host");
    assert_eq!(
        text(2),
        "look up the route to 198.51.100.1: network is unreachable: no route of this host leads there"
    );
    assert!(text(3).starts_with("look up the route to 203.0.113.1: "), "{}", text(3));
    Ok(())
}

async fn veth() -> Outcome {
    let netlink = Netlink::new()?;
    netlink.create_veth("flannel0p", "flannel0g", 1472).await?;
    for name in ["flannel0p", "flannel0g"] {
        let link = netlink.link(name).await?.unwrap();
        assert_eq!((link.mtu, link.up, link.kind.as_deref()), (1472, false, Some("veth")));
        assert_eq!(link.tun, None);
        netlink.set_no_arp(name).await?;
        netlink.set_mtu(name, 1450).await?;
        netlink.set_up(name).await?;
        let link = netlink.link(name).await?.unwrap();
        assert_eq!((link.mtu, link.up), (1450, true));
        assert!(ip(&format!("-o link show {name}")).contains("NOARP"));
    }
    let again = netlink.create_veth("flannel0p", "flannel0g", 1472).await.unwrap_err().to_string();
    assert!(
        again.starts_with("create veth pair flannel0p and flannel0g with mtu 1472: file exists"),
        "{again}"
    );
    netlink.delete_link("flannel0g").await?;
    assert_eq!(netlink.link("flannel0p").await?, None);
    netlink.delete_link("flannel0g").await?;
    let gone = netlink.set_up("flannel0g").await.unwrap_err().to_string();
    assert!(gone.ends_with("there is no network device flannel0g"), "{gone}");
    assert_eq!(netlink.routes(Some(ROUTE_PROTOCOL)).await?, vec![]);
    Ok(())
}
