//! The loop against a store in memory and a host that only remembers.

mod healing;

use std::time::Duration;

use crate::status::Status;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::*;
use crate::backends::{self, BackendContext};
use crate::domain::host_state::{Key, TunnelOptions};
use crate::domain::interface::{Families, HostFacts, Interface, InterfaceAddress, PublicAddresses};
use crate::host::fake::FakeHost;
use crate::stores::LeaseRequest;
use crate::stores::memory::MemoryStore;

const DAY: Option<Duration> = Some(Duration::from_secs(86400));

/// A host whose only interface is the default route's.
fn uplink(mtu: u32, addresses: &[&str]) -> HostFacts {
    let addresses = addresses.iter().map(|address| InterfaceAddress {
        address: address.parse().unwrap(),
        prefix_len: 24,
        dynamic: false,
        temporary: false,
        deprecated: false,
    });
    let eth0 = Interface { name: "eth0".to_owned(), index: 2, mtu, up: true, addresses: addresses.collect() };
    HostFacts { interfaces: vec![eth0], default_route_v4: Some(2), ..HostFacts::default() }
}

fn by_default_route() -> Selection {
    Selection { selectors: Vec::new(), public: PublicAddresses::default(), families: Families::V4 }
}

struct Running {
    store: MemoryStore,
    host: FakeHost,
    health: Health,
    ask: mpsc::Sender<Question>,
    orders: Orders,
    task: JoinHandle<End>,
    files: tempfile::TempDir,
}

impl Running {
    /// A node at 192.0.2.1 with backend `backend`, whose host already looks like `host`.
    async fn start(backend: &str, host: FakeHost) -> Self {
        let text = format!(r#"{{"Network":"10.1.0.0/16","Backend":{{"Type":"{backend}"}}}}"#);
        let store = MemoryStore::new(&text);
        let config = NetworkConfig::parse(&text).unwrap();
        host.rewire(|facts| *facts = uplink(1500, &["192.0.2.1"]));
        let interface = ExternalInterface {
            name: "eth0".to_owned(),
            index: 2,
            mtu: 1500,
            address: "192.0.2.1".parse().ok(),
            public_ip: "192.0.2.1".parse().ok(),
            address_v6: None,
            public_ipv6: None,
        };
        let context = BackendContext {
            interface,
            tunnel_device: "flannel0".to_owned(),
            tunnel: TunnelOptions::default(),
            tunnel_mtu: None,
        };
        let backend = backends::choose(&config, context.clone()).unwrap();
        let request = LeaseRequest {
            config: config.clone(),
            attrs: backend.lease_attrs(),
            previous: Some("10.1.7.0-24".parse().unwrap()),
            previous_only: false,
        };
        let lease = store.open().acquire(&request).await.unwrap();
        let node =
            Node { config, selection: by_default_route(), context, backend, store: store.open(), lease };
        let files = tempfile::tempdir().unwrap();
        let options = AgentOptions {
            subnet_file: files.path().join("subnet.env"),
            renew_margin: Duration::from_secs(3600),
            path_mtu_lifetime: Duration::from_secs(600),
            company: Company::Alone,
        };
        let health = Health::default();
        let orders = Orders::default();
        let (ask, mut questions) = mpsc::channel(1);
        let agent = Agent::new(node, host.clone(), options, health.clone());
        let given = orders.clone();
        let task = tokio::spawn(async move { agent.run(given, &mut questions).await });
        Self { store, host, health, ask, orders, task, files }
    }

    fn peer(&self, subnet: &str, node: &str, backend_type: &str) {
        let value = match backend_type {
            "" => format!(r#"{{"PublicIP":"{node}","PublicIPv6":null}}"#),
            _ => format!(r#"{{"PublicIP":"{node}","PublicIPv6":null,"BackendType":"{backend_type}"}}"#),
        };
        self.store.put(subnet, &value, DAY);
    }

    async fn until(&self, what: &str, fits: impl Fn(&Self) -> bool) {
        for _ in 0..3000 {
            if fits(self) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{what} did not happen; not ready: {:?}; host:\n{}", self.health.reasons(), self.host);
    }

    async fn ready(&self) {
        self.until("readiness", |running| running.health.reasons().is_empty()).await;
    }

    fn subnet_env(&self) -> String {
        std::fs::read_to_string(self.files.path().join("subnet.env")).unwrap()
    }

    async fn status(&self) -> Status {
        let (question, answer) = tokio::sync::oneshot::channel();
        self.ask.send(question).await.unwrap();
        match answer.await.unwrap() {
            Answer::Running(status) => *status,
            Answer::Starting(starting) => panic!("{starting:?}"),
        }
    }

    fn shown(&self) -> String {
        self.host.to_string()
    }

    async fn end(self) -> End {
        self.orders.stop.cancel();
        self.task.await.unwrap()
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_without_peers_gets_its_own_part_and_subnet_env() {
    let running = Running::start("udp", FakeHost::new()).await;
    running.ready().await;
    let shown = running.shown();
    for line in [
        "link flannel0 type tun mtu 1472",
        "addr 10.1.7.0/32 dev flannel0",
        "tunnel flannel0 via eth0 local 192.0.2.1:8285 network 10.1.0.0/16 subnet 10.1.7.0/24",
        "route 10.1.0.0/16 dev flannel0",
    ] {
        assert!(shown.contains(line), "{line} is missing in:\n{shown}");
    }
    let env = std::fs::read_to_string(running.files.path().join("subnet.env")).unwrap();
    assert_eq!(
        env,
        "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.7.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"
    );
    assert_eq!(running.end().await, End::Stopped);
}

#[tokio::test(start_paused = true)]
async fn peers_come_move_and_go() {
    let running = Running::start("host-gw", FakeHost::new()).await;
    running.ready().await;
    running.peer("10.1.9.0-24", "192.0.2.9", "host-gw");
    running.peer("10.1.10.0-24", "192.0.2.10", "vxlan");
    running.until("the route", |r| r.shown().contains("route 10.1.9.0/24 via 192.0.2.9 dev eth0")).await;
    running.peer("10.1.9.0-24", "192.0.2.99", "host-gw");
    running.until("the move", |r| r.shown().contains("route 10.1.9.0/24 via 192.0.2.99 dev eth0")).await;
    assert!(!running.shown().contains("10.1.10.0"), "a peer of another backend is not for us");
    running.store.delete("10.1.9.0-24");
    running.until("the removal", |r| r.host.state().is_empty()).await;
    assert_eq!(running.end().await, End::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_deleted_lease_is_taken_again_under_the_same_subnet() {
    let running = Running::start("udp", FakeHost::new()).await;
    running.ready().await;
    running.store.delete("10.1.7.0-24");
    running
        .until("the lease", |r| r.store.entries().iter().any(|(key, _)| key.contains("10.1.7.0-24")))
        .await;
    running.ready().await;
    assert_eq!(running.end().await, End::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_subnet_that_another_node_took_ends_the_daemon() {
    let running = Running::start("udp", FakeHost::new()).await;
    running.ready().await;
    let before = running.host.state();
    running.peer("10.1.7.0-24", "192.0.2.66", "");
    let end = tokio::time::timeout(Duration::from_secs(60), running.task).await.unwrap().unwrap();
    assert!(matches!(end, End::LeaseLost(_)), "{end:?}");
    assert_eq!(running.host.state(), before, "the host is left as it is");
}

#[tokio::test(start_paused = true)]
async fn the_lease_is_renewed_before_it_ends() {
    let running = Running::start("udp", FakeHost::new()).await;
    running.ready().await;
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_secs(86400)).await;
        assert!(running.store.entries().iter().any(|(key, _)| key.contains("10.1.7.0-24")));
    }
    assert_eq!(running.end().await, End::Stopped);
}

#[tokio::test(start_paused = true)]
async fn status_tells_what_is_refused() {
    let running = Running::start("udp", FakeHost::new()).await;
    running.ready().await;
    running.peer("192.168.0.0-24", "192.0.2.9", "");
    running.peer("10.1.9.0-24", "192.0.2.1", "");
    running.store.put("10.1.10.0-24", "not json", DAY);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let status = running.status().await;
    assert_eq!(status.refused.len(), 3, "{:?}", status.refused);
    assert!(status.ready, "others' mistakes don't make us unready: {:?}", status.not_ready);
    assert_eq!(status.subnet, "10.1.7.0/24");
    assert_eq!(running.end().await, End::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_network_that_is_left_takes_everything_along() {
    let running = Running::start("host-gw", FakeHost::new()).await;
    running.ready().await;
    running.orders.leave.cancel();
    let host = running.host.clone();
    assert_eq!(running.task.await.unwrap(), End::Left);
    assert_eq!(host.to_string(), "");
}

#[tokio::test(start_paused = true)]
async fn a_node_that_was_ready_leaves_everything_in_place_when_it_stops() {
    let host = FakeHost::new();
    let running = Running::start("udp", host.clone()).await;
    running.ready().await;
    let whole = host.state();
    assert_eq!(running.end().await, End::Stopped);
    assert_eq!(host.state(), whole);
}

#[tokio::test(start_paused = true)]
async fn the_tunnel_follows_the_interfaces_mtu_and_shrinks_before_anything_else() {
    let running = Running::start("udp", FakeHost::new()).await;
    running.ready().await;
    for mtu in [1400_u32, 9000] {
        let before = running.host.log().len();
        running.host.rewire(|facts| facts.interfaces[0].mtu = mtu);
        let wanted = mtu - 28;
        running.until("subnet.env", |r| r.subnet_env().contains(&format!("FLANNEL_MTU={wanted}\n"))).await;
        let log = running.host.log().split_off(before);
        assert_eq!(log[0], format!("put link flannel0 type tun mtu {wanted}"));
        assert!(
            log[1].starts_with("put tunnel flannel0") && log[1].contains(&format!("mtu {wanted}")),
            "{log:?}"
        );
        let status = running.status().await;
        assert_eq!((status.mtu, status.interface.mtu), (wanted, mtu));
        assert_eq!(status.mtu_reason, format!("MTU {mtu} of eth0 less 28"));
    }
    assert_eq!(running.end().await, End::Stopped);
}

#[tokio::test(start_paused = true)]
async fn host_gw_follows_the_interfaces_mtu_and_address_and_probes_nothing() {
    let running = Running::start("host-gw", FakeHost::new()).await;
    running.ready().await;
    running.host.narrow("192.0.2.9".parse().unwrap(), 1400);
    running.peer("10.1.9.0-24", "192.0.2.9", "host-gw");
    running.host.rewire(|facts| *facts = uplink(9000, &["192.0.2.77"]));
    running.until("subnet.env", |r| r.subnet_env().contains("FLANNEL_MTU=9000\n")).await;
    tokio::time::sleep(Duration::from_secs(120)).await;
    running.ready().await;
    assert_eq!(running.shown(), "route 10.1.9.0/24 via 192.0.2.9 dev eth0\n");
    let (_, value) = running.store.entries().remove(0);
    assert!(value.contains("192.0.2.77") && value.contains("host-gw"), "{value}");
    assert_eq!(running.end().await, End::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_renumbered_node_publishes_its_new_address_in_the_lease_it_holds() {
    let running = Running::start("udp", FakeHost::new()).await;
    running.ready().await;
    running.host.rewire(|facts| *facts = uplink(1500, &[]));
    running.until("waiting", |r| !r.health.reasons().is_empty()).await;
    assert_eq!(running.health.reasons(), ["eth0 has lost its address 192.0.2.1 and has no other to take"]);
    assert!(running.status().await.interface.away.is_some());
    running.store.cut();
    running.host.rewire(|facts| *facts = uplink(1500, &["192.0.2.77"]));
    running.until("the move", |r| r.shown().contains("local 192.0.2.77:8285")).await;
    assert!(running.health.reasons().iter().any(|reason| reason.contains("lease")), "the store is away");
    running.store.mend();
    running.ready().await;
    let entries = running.store.entries();
    let value = r#"{"PublicIP":"192.0.2.77","PublicIPv6":null}"#;
    assert_eq!(entries, [("10.1.7.0-24".to_owned(), value.to_owned())]);
    // The address another node has now is no longer ours.
    running.peer("10.1.9.0-24", "192.0.2.1", "");
    running.until("the peer", |r| r.shown().contains("peer 10.1.9.0/24 at 192.0.2.1")).await;
    assert_eq!(running.end().await, End::Stopped);
}

#[tokio::test(start_paused = true)]
async fn an_interface_that_would_be_chosen_now_is_told_and_not_taken() {
    let running = Running::start("udp", FakeHost::new()).await;
    running.ready().await;
    running.host.rewire(|facts| {
        let mut vpn = uplink(1400, &["198.51.100.7"]).interfaces.remove(0);
        vpn.name = "vpn0".to_owned();
        vpn.index = 9;
        facts.interfaces.push(vpn);
        facts.default_route_v4 = Some(9);
    });
    running.until("a look", |r| r.host.calls().observe > 3).await;
    let status = running.status().await;
    assert_eq!(status.interface.name, "eth0");
    assert_eq!(status.interface.preferred.as_deref(), Some("vpn0"));
    assert!(running.health.reasons().is_empty());
    assert_eq!(running.end().await, End::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_narrow_path_gets_a_route_of_its_own_and_loses_it_when_it_is_wide_again() {
    let running = Running::start("udp", FakeHost::new()).await;
    running.ready().await;
    running.host.narrow("192.0.2.9".parse().unwrap(), 1400);
    running.peer("10.1.9.0-24", "192.0.2.9", "");
    running.peer("10.1.10.0-24", "192.0.2.10", "");
    let route = "route 10.1.9.0/24 dev flannel0 mtu 1372";
    running.until("the route", |r| r.shown().contains(route)).await;
    assert!(!running.shown().contains("route 10.1.10.0"), "{}", running.shown());
    running.host.narrow("192.0.2.9".parse().unwrap(), 1500);
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_secs(10)).await;
        if !running.shown().contains(route) {
            break;
        }
    }
    assert!(!running.shown().contains("mtu 1372"), "{}", running.shown());
    assert_eq!(running.end().await, End::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_narrow_path_is_inherited_from_a_former_run() {
    let route = HostItem::Route(crate::domain::host_state::Route {
        destination: "10.1.9.0/24".parse().unwrap(),
        via: None,
        device: "flannel0".into(),
        onlink: false,
        source: None,
        mtu: Some(1372),
    });
    let host = FakeHost::with([route.clone()].into_iter().collect());
    host.narrow("192.0.2.9".parse().unwrap(), 1400);
    let running = Running::start("udp", host).await;
    running.peer("10.1.9.0-24", "192.0.2.9", "");
    running.ready().await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    assert!(running.host.state().contains(&route));
    assert!(!running.host.log().iter().any(|line| line.contains("remove route")), "{:?}", running.host.log());
    assert_eq!(running.end().await, End::Stopped);
}
