//! The lab itself, without an agent: a probe that can't fail would prove nothing.

use std::{
    fs::{self, File, Permissions},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use flannel_tests::{
    agent::AgentOptions,
    namespace::{Namespace, outside},
    port::Port,
    privilege,
    probe::{
        capture::{Capture, ipv4, udp_payload},
        ping::Ping,
        tcp::TcpPath,
        udp::Datagrams,
    },
    proxy::Proxies,
    reference,
    scenario::{run_when, scenario},
    topology::{Lab, Underlay},
};
use libtest_mimic::{Failed, Trial};
use nix::mount::{MsFlags, mount};

fn main() -> ExitCode {
    let trials = vec![
        scenario("hosts_on_a_bridge_reach_each_other_and_etcd", Lab::new("lab-bridge").hosts(3), bridge),
        scenario(
            "hosts_on_a_direct_link_reach_each_other_and_etcd",
            Lab::new("lab-direct").underlay(Underlay::Direct),
            direct,
        ),
        scenario(
            "a_wire_carries_frames_no_longer_than_its_mtu",
            Lab::new("lab-wire").underlay(Underlay::Wire),
            wire,
        ),
        scenario("routes_and_vxlan_made_by_hand_carry_pods", Lab::new("lab-host-gw").without_etcd(), |lab| {
            reference::host_gw(lab)?;
            lab.ping_all_pairs(2)?;
            let mut lab = Lab::new("lab-vxlan").underlay(Underlay::Wire).without_etcd().build()?;
            reference::vxlan(&mut lab)?;
            lab.ping_all_pairs(2)?;
            pods_exchange_bytes(&lab)
        }),
        scenario(
            "a_proxy_with_one_read_and_one_send_carries_pods",
            Lab::new("lab-proxy").underlay(Underlay::Wire).without_etcd(),
            |lab| {
                let _proxies = Proxies::start(lab)?;
                lab.ping_all_pairs(2)?;
                pods_exchange_bytes(lab)
            },
        ),
        scenario("probes_see_what_passes_and_what_does_not", Lab::new("lab-probes"), probes),
        scenario("etcd_keeps_its_data_over_a_restart", Lab::new("lab-etcd").hosts(1), datastore),
        Trial::test("a_name_goes_with_its_namespace_and_the_room_of_its_agent_too", || {
            names().map_err(|e| Failed::from(format!("{e:#}")))
        }),
        scenario(
            "an_agent_that_never_comes_to_rest_fails_its_test_and_hides_no_other_failure",
            Lab::new("lab-unrest").without_etcd(),
            unrest,
        ),
        scenario("a_held_port_is_given_to_nobody_who_asks_for_any", Lab::new("lab-port").hosts(1), held_port),
    ];
    run_when(privilege::require_root, trials)
}

fn bridge(lab: &mut Lab) -> Result<()> {
    for from in lab.hosts() {
        for to in lab.hosts() {
            ensure!(Ping::new(from.netns(), to.address()).run()?.lost() == 0);
        }
        let store = SocketAddrV4::new([10, 99, 0, 1].into(), 2379);
        from.netns().run(|| Ok(TcpStream::connect(store)?))?;
    }
    Ok(())
}

fn direct(lab: &mut Lab) -> Result<()> {
    ensure!(Ping::new(lab.host(0).netns(), lab.host(1).address()).run()?.lost() == 0);
    let store = SocketAddrV4::new([10, 98, 0, 1].into(), 2379);
    lab.host(1).netns().run(|| Ok(TcpStream::connect(store)?))?;
    Ok(())
}

fn wire(lab: &mut Lab) -> Result<()> {
    direct(lab)?;
    let (a, b) = (lab.host(0), lab.host(1));
    let before = a.netns().sent("eth0")?;
    TcpPath::new(a.netns(), b.netns(), SocketAddrV4::new(b.address(), 5001)).transfer(20_000_000)?;
    let after = a.netns().sent("eth0")?;
    let (packets, bytes) = (after.packets - before.packets, after.bytes - before.bytes);
    ensure!(bytes > 20_000_000 && bytes <= packets * 1514, "{packets} packets, {bytes} bytes");
    Ok(())
}

/// Says what an agent with a loop in it would, on the second host. Its log is emptied at last: this test passes.
fn unrest(lab: &mut Lab) -> Result<()> {
    lab.verdict(Ok(()))?;
    let program = lab.folder().join("restless");
    let repair = "INFO tunnel on flannel0 needs repair: super-packets stay whole on eth0 by now";
    let says = format!(
        "for second in 0 1 2 3 4 5 6 7 8; do echo \"2026-11-26T21:26:0$second.500000Z  {repair}\"; done"
    );
    fs::write(&program, format!("#!/bin/sh\n{says}\n"))?;
    fs::set_permissions(&program, Permissions::from_mode(0o755))?;
    let agent = lab.host_mut(1).start_agent(&AgentOptions::with_binary(program))?;
    ensure!(agent.wait_end(Duration::from_secs(10))?.success(), "{}", agent.log());

    let said = format!("the agent on h2 does not come to rest: 9 times in 8.0 s: {repair}\n");
    let alone = lab.verdict(Ok(())).err().context("it is not noticed")?.to_string();
    ensure!(alone.starts_with(&said) && !alone.contains("agent on h1"), "{alone}");
    let both = lab.verdict(Err(anyhow!("8 pings lost"))).err().context("a failure became none")?.to_string();
    ensure!(both.starts_with(&format!("8 pings lost\n{said}")), "{both}");
    fs::write(lab.host(1).files().log(), "")?;
    Ok(())
}

fn pods_exchange_bytes(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host(0).pod()?, lab.host(1).pod()?);
    TcpPath::new(&a.netns, &b.netns, SocketAddrV4::new(b.address, 5001)).transfer(2_000_000)?;
    Ok(())
}

fn probes(lab: &mut Lab) -> Result<()> {
    let (a, b) = (lab.host(0), lab.host(1));
    let capture = Capture::start(lab.switch(), "sw-h2")?;
    let address = SocketAddrV4::new(b.address(), 5001);
    let path = TcpPath::new(a.netns(), b.netns(), address);
    let transfer = path.transfer(20_000_000)?;
    ensure!(transfer.bytes == 20_000_000, "{transfer:?}");

    let flow = path.flow()?;
    flow.wait_arrived(1_000_001)?;
    ensure!(flow.is_alive());
    ensure!(flow.finish()?.bytes > 1_000_000);

    for batch in [1, 20] {
        let load = Datagrams { count: 200, size: 1200, batch };
        let delivered = load.send(a.netns(), b.netns(), address)?;
        ensure!((delivered.whole, delivered.damaged) == (200, 0), "{delivered:?} in batches of {batch}");
    }
    let frames = capture.finish()?;
    let datagrams = frames.iter().filter_map(|frame| udp_payload(ipv4(frame)?, 5001)).count();
    ensure!(datagrams >= 200, "{datagrams} datagrams captured");

    // What is lost must show.
    b.netns().iptables("-A INPUT -p icmp -j DROP")?;
    b.netns().iptables("-A INPUT -p udp -m statistic --mode nth --every 2 --packet 0 -j DROP")?;
    let report = Ping::new(a.netns(), b.address()).count(2).run()?;
    ensure!(report.lost() == 2, "{report}");
    ensure!(b.netns().iptables_packets("INPUT -p icmp -j DROP")? == 2);
    let delivered = Datagrams { count: 100, size: 100, batch: 1 }.send(a.netns(), b.netns(), address)?;
    ensure!(delivered.whole == 50, "{delivered:?}");
    Ok(())
}

fn datastore(lab: &mut Lab) -> Result<()> {
    let store = lab.datastore_mut();
    store.put("subnets/10.244.7.0-24", r#"{"PublicIP":"10.99.0.7"}"#)?;
    store.stop()?;
    store.restart()?;
    let leases = store.leases()?;
    ensure!(leases == [("10.244.7.0-24".to_owned(), r#"{"PublicIP":"10.99.0.7"}"#.to_owned())], "{leases:?}");
    ensure!(store.delete("subnets/10.244.7.0-24")? && store.leases()?.is_empty());
    store.freeze()?;
    ensure!(store.get("config").is_err(), "a frozen etcd answered");
    store.thaw()?;
    ensure!(store.get("config")?.is_some());
    Ok(())
}

/// As an agent leaves a room that is killed: mounted, below a folder that everybody has.
fn names() -> Result<()> {
    let names = ["a", "b"].map(|name| format!("lab-names-{}-{name}", std::process::id()));
    for killed in [false, true] {
        let hosts =
            names.each_ref().map(|name| Namespace::listed(name)).into_iter().collect::<Result<Vec<_>>>()?;
        let mut rooms = Vec::new();
        for host in &hosts {
            let number = fs::metadata(host.path())?.ino();
            let room = format!("/run/flannel/lab{}.{number}.room", std::process::id());
            File::create_new(&room)?;
            mount(Some(host.path().as_str()), room.as_str(), None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            ensure!(!outside(&room).try_exists()?, "{room} is seen outside");
            rooms.push(room);
        }
        let is_left = |index: usize| {
            let name = Path::new("/run/netns").join(&names[index]);
            let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
            [name.exists(), Path::new(&rooms[index]).exists(), mounts.contains(&rooms[index])]
        };
        let mut hosts = hosts.into_iter();
        if killed {
            // Nobody drops what a killed process had: the next run finds the names.
            hosts.by_ref().for_each(std::mem::forget);
            Namespace::forget_listed(&names[0]);
        } else {
            drop(hosts.next());
        }
        ensure!(is_left(0) == [false; 3] && is_left(1) == [true; 3], "{:?} {:?}", is_left(0), is_left(1));
        drop(hosts);
        Namespace::forget_listed(&names[1]);
        ensure!(is_left(1) == [false; 3], "{:?}", is_left(1));
    }
    // One without a name, too: its number is given to another.
    let host = Namespace::new("lab-unnamed")?;
    let number = fs::metadata(host.path())?.ino();
    let room = format!("/run/flannel/lab{}.{number}.room", std::process::id());
    File::create_new(&room)?;
    drop(host);
    ensure!(!Path::new(&room).exists(), "{room} outlived its host");
    Ok(())
}

fn held_port(lab: &mut Lab) -> Result<()> {
    let netns = lab.host(0).netns();
    netns.sysctl("net.ipv4.ip_local_port_range", "40000 40007")?;
    netns.run(|| {
        let held = Port::hold(Ipv4Addr::LOCALHOST.into())?;
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        for _ in 0..200 {
            ensure!(TcpListener::bind(any)?.local_addr()? != held.address(), "a listener got it");
        }
        ensure!(TcpStream::connect(held.address()).is_err(), "something answers in its place");
        // Its owner has it as often as it likes.
        for _ in 0..2 {
            let server = TcpListener::bind(held.address())?;
            TcpStream::connect(held.address())?;
            server.accept()?;
        }
        let other = TcpListener::bind(any)?;
        for _ in 0..20 {
            let mut near = TcpStream::connect(other.local_addr()?)?;
            ensure!(near.local_addr()? != held.address(), "a connection got it");
            // The far end closes first: what lingers keeps no port of the near one.
            drop(other.accept()?);
            std::io::Read::read(&mut near, &mut [0])?;
        }
        Ok(())
    })
}
