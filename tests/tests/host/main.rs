//! `LinuxHost` against a real kernel: each test in a network namespace of its own that ends with its thread.
//!
//! `ip` from iproute2 plays everybody else: it does the damage, and it is the second opinion on what we did.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod changes;
mod events;
mod netlink;
mod ownership;

use std::cell::RefCell;
use std::future::Future;
use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use flannel_agent::domain::host_state::{
    Address, Change, Datapath, HostItem, HostState, Key, Link, LinkKind, Route, Sysctl, Tunnel,
    TunnelOptions, TunnelPeer,
};
use flannel_agent::domain::interface::InterfaceAddress;
use flannel_agent::host::interfaces::{facts, interfaces, reach};
use flannel_agent::host::linux::{LinuxHost, LinuxHostOptions, Scope};
use flannel_agent::host::netlink::{Netlink, NextHop, ROUTE_PROTOCOL};
use flannel_agent::host::{Host, HostError};
use flannel_tests::agent::at_rest;
use flannel_tests::privilege;
use libtest_mimic::{Failed, Trial};
use nix::sched::{CloneFlags, unshare};

thread_local! {
    /// What the agent's parts logged in a test, which has one thread.
    static SAID: RefCell<String> = const { RefCell::new(String::new()) };
}

struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        SAID.with_borrow_mut(|said| said.push_str(&String::from_utf8_lossy(bytes)));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter("flannel_agent=info")
        .with_writer(|| Log)
        .with_ansi(false)
        .init();
    privilege::run_when(
        privilege::require_root,
        vec![
            trial("what_is_put_is_observed_and_what_is_removed_is_gone", changes::put_observe_remove),
            trial("a_moved_route_is_replaced_and_never_missing", changes::moved_route),
            trial("a_former_flannelds_route_is_taken_over_in_place", ownership::takeover),
            trial("what_belongs_to_others_is_neither_seen_nor_touched", ownership::foreign),
            trial("stale_routes_are_swept_only_inside_the_network", ownership::sweep),
            trial("a_deleted_device_route_or_address_is_missed_within_a_second", events::damage),
            trial("a_device_that_is_down_or_has_another_mtu_is_put_right", changes::device_repair),
            trial("our_own_routes_do_not_wake_us", events::own_echo),
            trial("a_lost_event_is_an_event", events::overrun),
            trial("a_burst_wakes_once_and_a_cancelled_wait_forgets_nothing", events::burst),
            trial("five_thousand_routes_go_in_batches", changes::five_thousand),
            trial("ipv6_takes_the_same_way", changes::ipv6),
            trial("every_field_of_a_route_is_read_back", changes::route_fields),
            trial("a_failure_names_the_route_and_stops_no_other", changes::failures),
            trial("each_result_of_several_batches_belongs_to_its_route", changes::mapping),
            trial("clones_of_a_connection_take_turns", netlink::turns),
            trial("the_kernels_own_routes_are_not_replaced", ownership::connected),
            trial("a_device_of_another_kind_is_not_removed", ownership::foreign_device),
            trial("a_missing_capability_is_named", changes::unprivileged),
            trial("interfaces_are_listed_with_the_facts_that_rank_their_addresses", netlink::list_interfaces),
            trial("next_hops_of_many_peers_come_in_one_go", netlink::next_hops),
            trial("a_tunnel_and_its_peers_are_put_missed_and_repaired_like_the_rest", changes::tunnel),
            trial("a_veth_pair_is_made_set_and_deleted", netlink::veth),
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
            runtime.block_on(async { tokio::time::timeout(Duration::from_secs(60), body()).await })??;
            Ok(at_rest(&SAID.take())?)
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

/// Returns once the kernel has made all there is to be of the underlay by itself: carrier, link-local addresses that nobody
/// else has (RFC 4862 §5.4), their routes.
async fn settled() {
    let started = Instant::now();
    loop {
        let (links, addresses, routes) = (ip("-o link"), ip("-o addr"), ip("-6 route show table local"));
        let up = links.lines().filter(|line| line.contains("under") && line.contains("state UP")).count();
        let own = routes.lines().filter(|line| line.starts_with("local fe80:")).count();
        if up == 2 && own == 2 && !addresses.contains("tentative") {
            return;
        }
        assert!(started.elapsed() < Duration::from_secs(20), "it never settles:\n{links}{addresses}{routes}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
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
        if tokio::time::timeout(Duration::from_millis(1500), host.news()).await.is_err() {
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
