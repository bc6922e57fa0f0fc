//! Which tier is taken, why, and that it carries packets.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use flannel_agent::domain::host_state::{Datapath, HostItem, SourceCheck};
use flannel_agent::host::udp::programs::inspect;
use flannel_agent::host::udp::userspace::{Role, UdpGro, UserTunnel, UserTunnelConfig};
use flannel_common::counter::Counter;

use crate::rig::{DEVICE, Inside, Node, Rig, UNDERLAY};
use crate::traffic;

pub(crate) fn auto_takes_xdp() -> Result<()> {
    let rig = Rig::new()?;
    rig.up(Datapath::Ebpf)?;
    ensure!(rig.b.tier()? == "xdp", "{:?}", rig.b.report()?);
    ensure!(rig.b.report()?.reason.contains("to be proven"), "{:?}", rig.b.report()?.reason);
    rig.talks()?;
    let items = rig.b.observe()?;
    let wanted = [HostItem::Tunnel(rig.b.tunnel(Datapath::Ebpf)), HostItem::TunnelPeer(rig.b.other())];
    ensure!(items == wanted, "{items:?}");
    let report = rig.b.report()?;
    ensure!(report.reason == "native XDP attached, marks proven", "{}", report.reason);
    ensure!(rig.b.count("decap_xdp")? >= 2 && rig.b.count("mark_seen")? >= 2, "{report:?}");
    ensure!(rig.b.count("decap_tc")? == 0 && rig.b.count("decap_user")? == 0, "{report:?}");
    ensure!(!rig.b.has_link("flannel0p") && !rig.b.has_link("flannel0d"), "no GRO pair beside XDP");
    let peer = &report.peers[0];
    ensure!(peer.node == rig.a.address() && peer.drops.is_empty(), "{peer:?}");
    ensure!(peer.rx_packets >= 2 && peer.tx_packets >= 2, "{peer:?}");
    ensure!(peer.last_seen_ms_ago.is_some_and(|age| age < 60_000), "{peer:?}");
    Ok(())
}

pub(crate) fn every_option() -> Result<()> {
    let tiers = [
        (Datapath::Ebpf, "xdp", "decap_xdp"),
        (Datapath::Xdp, "xdp", "decap_xdp"),
        (Datapath::Tc, "tc+gro", "decap_tc"),
        (Datapath::Tun, "tun", "decap_user"),
    ];
    for (datapath, tier, counter) in tiers {
        let rig = Rig::new()?;
        rig.up(datapath)?;
        rig.talks().with_context(|| format!("{datapath}"))?;
        ensure!(rig.b.tier()? == tier, "{datapath}: {:?}", rig.b.report()?);
        // In user space, packets are counted after they were delivered.
        let start = Instant::now();
        while rig.b.count(counter)? < 2 {
            ensure!(start.elapsed() < Duration::from_secs(5), "{datapath}: {:?}", rig.b.report()?);
            thread::sleep(Duration::from_millis(5));
        }
        ensure!(rig.b.is_in_place()?, "{datapath} is not in place");
        if matches!(datapath, Datapath::Tc | Datapath::Tun) {
            let reason = rig.b.report()?.reason;
            let more = if tier == "tc+gro" { "; super-packets stay whole" } else { "" };
            ensure!(reason == format!("chosen by --udp-datapath={datapath}{more}"), "{reason}");
        }
        ensure!(rig.b.has_link("flannel0d") == (tier == "tc+gro"), "{datapath}: door to the room");
        ensure!(!rig.b.has_link("flannel0p"), "{datapath}: GRO pair");
    }
    Ok(())
}

pub(crate) fn mixed() -> Result<()> {
    every_pair(|_| Ok(()))
}

/// As a wire between two cards: every frame finished and at most the MTU.
pub(crate) fn mixed_on_a_wire() -> Result<()> {
    every_pair(|node| node.command("ethtool", &format!("-K {UNDERLAY} tx off")).map(drop))
}

/// All traffic in both directions between all tiers; `prepare` is done to both nodes.
fn every_pair(prepare: fn(&Node) -> Result<()>) -> Result<()> {
    let all = [Datapath::Xdp, Datapath::Tc, Datapath::Tun];
    let rig = Rig::new()?;
    for node in [&rig.a, &rig.b] {
        prepare(node)?;
    }
    for a in all {
        rig.a.up(a)?;
        for b in all {
            rig.b.up(b)?;
            rig.talks().with_context(|| format!("{a} and {b}"))?;
            for (from, to, way) in
                [(&rig.a, &rig.b, format!("{a} to {b}")), (&rig.b, &rig.a, format!("{b} to {a}"))]
            {
                traffic::tcp(from, to, 2 << 20).with_context(|| format!("TCP, {way}"))?;
                traffic::udp_segments(from, to, 1200).with_context(|| format!("UDP, {way}"))?;
            }
            for node in [&rig.a, &rig.b] {
                ensure!(node.count("oversize")? == 0, "{a} and {b}: {:?}", node.report()?);
                ensure!(node.count("malformed")? == 0, "{a} and {b}: {:?}", node.report()?);
            }
        }
    }
    Ok(())
}

/// The agent switches UDP segmentation of a veth off; other senders don't. How the kernel hands such packets to the socket
/// depends on whether it may merge datagrams there.
pub(crate) fn super_packets() -> Result<()> {
    const TCP: usize = 8 << 20;
    let rig = Rig::new()?;
    let config = UserTunnelConfig {
        device: DEVICE.to_owned(),
        local: rig.b.address(),
        port: rig.b.tunnel(Datapath::Tun).port,
        mtu: rig.b.tunnel(Datapath::Tun).mtu,
        network: rig.b.tunnel(Datapath::Tun).network,
        own_subnet: rig.b.tunnel(Datapath::Tun).own_subnet,
        source_check: SourceCheck::Enforce,
        role: Role::WholePath,
    };
    let receiver = rig.b.run(move |_| UserTunnel::start(config))?;
    receiver.set_peers(vec![(rig.b.other().subnet, rig.b.other().node)]);
    let count = |counter: Counter| receiver.counters().counts[counter as usize].packets;
    for sender in [Datapath::Xdp, Datapath::Tc] {
        rig.a.up(sender)?;
        rig.talks()?;
        rig.a.command("ethtool", &format!("-K {UNDERLAY} tx-udp-segmentation on"))?;
        for role in [
            Role::WholePath,
            Role::Exceptions { udp_gro: UdpGro::Allowed },
            Role::Exceptions { udp_gro: UdpGro::Forbidden },
        ] {
            receiver.set_role(role);
            let before = count(Counter::DecapUser);
            for size in [60, 1200, 1444] {
                traffic::udp_segments(&rig.a, &rig.b, size)
                    .with_context(|| format!("{size} bytes each, {sender} to {role:?}"))?;
            }
            traffic::tcp(&rig.a, &rig.b, TCP).with_context(|| format!("TCP, {sender} to {role:?}"))?;
            // Packets are counted after they were delivered.
            let (expected, start) = (3 * 400 + TCP as u64 / 1420, Instant::now());
            while count(Counter::DecapUser) - before < expected {
                let packets = count(Counter::DecapUser) - before;
                ensure!(
                    start.elapsed() < Duration::from_secs(5),
                    "{packets} of {expected}: a super-packet counts as what it holds ({sender} to {role:?})"
                );
                thread::sleep(Duration::from_millis(5));
            }
        }
        for counter in [Counter::Oversize, Counter::Malformed, Counter::SendFailed] {
            ensure!(count(counter) == 0, "{}: {}", counter.name(), count(counter));
        }
    }
    Ok(())
}

/// Puts a bridge over the wire's end at B: a device that is stacked on another.
fn stack(rig: &Rig) -> Result<()> {
    rig.b.ip(&format!("link set {UNDERLAY} name wire0"))?;
    rig.b.ip(&format!("link add {UNDERLAY} type bridge"))?;
    rig.b.ip("address flush dev wire0")?;
    rig.b.ip(&format!("link set wire0 master {UNDERLAY} up"))?;
    rig.b.ip(&format!("address add {}/24 dev {UNDERLAY}", rig.b.address()))?;
    rig.b.ip(&format!("link set {UNDERLAY} up"))?;
    // A port opens when the kernel's link watcher finds the time.
    let started = Instant::now();
    while !rig.b.ip("-d link show dev wire0")?.contains("state forwarding") {
        ensure!(started.elapsed() < Duration::from_secs(5), "the bridge's port does not open");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

pub(crate) fn stacked() -> Result<()> {
    let rig = Rig::new()?;
    rig.b.ip(&format!("link set {UNDERLAY} down"))?;
    stack(&rig)?;
    rig.up(Datapath::Ebpf)?;
    let report = rig.b.report()?;
    ensure!(report.tier.name() == "tc+gro", "{report:?}");
    ensure!(
        report.reason == "eth0 is a bridge, native XDP needs a network card or a veth",
        "{}",
        report.reason
    );
    rig.talks()
}

pub(crate) fn pinned_refused() -> Result<()> {
    let rig = Rig::new()?;
    rig.b.ip(&format!("link set {UNDERLAY} down"))?;
    stack(&rig)?;
    rig.b.start_agent();
    let error = rig.b.try_put(rig.b.tunnel(Datapath::Xdp)).err().context("it came up")?;
    ensure!(
        error
            == "bring up udp datapath xdp on eth0: eth0 is a bridge, native XDP needs a network card or a veth",
        "{error}"
    );
    ensure!(!rig.b.pins().exists(), "pins were left behind");
    ensure!(rig.b.observe()?.is_empty(), "something is observed");
    let mut elsewhere = rig.b.tunnel(Datapath::Ebpf);
    elsewhere.underlay = "nothere0".to_owned();
    let error = rig.b.try_put(elsewhere).err().context("it came up")?;
    ensure!(error == "bring up the tunnel on flannel0: there is no network device nothere0", "{error}");
    Ok(())
}

pub(crate) fn jumbo() -> Result<()> {
    let rig = Rig::with_mtu(9000)?;
    for node in [&rig.a, &rig.b] {
        node.ip(&format!("link set {DEVICE} mtu 8972"))?;
        node.start_agent();
        let mut tunnel = node.tunnel(Datapath::Ebpf);
        tunnel.mtu = 8972;
        node.put(tunnel)?;
        node.put_peers(vec![node.other()])?;
    }
    rig.talks()?;
    ensure!(rig.b.is_in_place()?);
    let report = rig.b.report()?;
    ensure!(report.reason.starts_with("native XDP attached (build for frames over one page)"), "{report:?}");
    let (sender, receiver) = (rig.a.pod_socket(0)?, rig.b.pod_socket(0)?);
    receiver.set_read_timeout(Some(Duration::from_secs(2)))?;
    sender.send_to(&[1; 8944], receiver.local_addr()?)?;
    let length = receiver.recv(&mut [0; 9000]).context("a full jumbo packet")?;
    ensure!(length == 8944);
    Ok(())
}

/// Drops from the calling thread what loading needs, keeps CAP_NET_ADMIN and CAP_NET_RAW (capset(2), version 3).
fn drop_bpf(_: &mut Inside) {
    const KEPT: u32 = 1 << 12 | 1 << 13;
    let header = [0x2008_0522_u32, 0];
    let sets = [KEPT, KEPT, 0, 0, 0, 0];
    // SAFETY: both have the layout of capset's arguments and live during the call.
    let dropped = unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) };
    assert_eq!(dropped, 0);
}

pub(crate) fn unprivileged() -> Result<()> {
    let rig = Rig::new()?;
    rig.a.up(Datapath::Tun)?;
    // The folder itself would need CAP_DAC_OVERRIDE only where root's files are another's.
    fs::create_dir_all(rig.b.pins())?;
    rig.b.run(drop_bpf);
    rig.b.up(Datapath::Auto)?;
    // User space has begun; the kernel's part is tried next.
    rig.b.disturbed_within(Duration::from_secs(1))?;
    rig.b.put(rig.b.tunnel(Datapath::Auto))?;
    let report = rig.b.report()?;
    ensure!(report.tier.name() == "tun", "{report:?}");
    ensure!(report.reason.ends_with("needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"), "{}", report.reason);
    rig.talks()
}

pub(crate) fn change_under_traffic() -> Result<()> {
    let rig = Rig::new()?;
    rig.up(Datapath::Xdp)?;
    rig.talks()?;
    let flood = rig.flood()?;
    for (datapath, tier) in [(Datapath::Tc, "tc+gro"), (Datapath::Xdp, "xdp"), (Datapath::Tc, "tc+gro")] {
        thread::sleep(Duration::from_millis(150));
        rig.b.put(rig.b.tunnel(datapath))?;
        rig.b.settles_on(datapath, tier)?;
    }
    let sent = flood.end_complete(&rig)?;
    let (xdp, tc) = (rig.b.count("decap_xdp")?, rig.b.count("decap_tc")?);
    ensure!(xdp > 0 && tc > 0 && xdp + tc >= sent, "{xdp} by XDP, {tc} by tc, of {sent}");
    Ok(())
}

pub(crate) fn merging() -> Result<()> {
    const LENGTH: usize = 8 << 20;
    let rig = Rig::new()?;
    // As a wire: every frame at most the MTU.
    for node in [&rig.a, &rig.b] {
        node.command("ethtool", &format!("-K {UNDERLAY} tso off gso off tx off"))?;
    }
    rig.up(Datapath::Tc)?;
    rig.talks()?;
    let address = (rig.b.pod(), 0);
    let listener = rig.b.run(move |_| TcpListener::bind(address))?;
    let to = listener.local_addr()?;
    let receiving = thread::spawn(move || -> std::io::Result<usize> {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let mut data = Vec::new();
        stream.read_to_end(&mut data)
    });
    let mut stream: TcpStream =
        rig.a.run(move |_| TcpStream::connect_timeout(&to, Duration::from_secs(5)))?;
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(&vec![5; LENGTH])?;
    drop(stream);
    let received = receiving.join().map_err(|_| anyhow!("the receiver panicked"))??;
    ensure!(received == LENGTH, "{received} bytes");
    // What flannel_gro hands on reaches the stack in fewer packets than were decapsulated.
    let decapsulated = rig.b.count("decap_tc")?;
    let text = rig.b.run(|_| fs::read_to_string("/proc/thread-self/net/snmp"))?;
    let delivered: u64 = text
        .lines()
        .filter(|line| line.starts_with("Ip: "))
        .nth(1)
        .and_then(|line| line.split_whitespace().nth(3))
        .context("InReceives")?
        .parse()?;
    ensure!(delivered * 2 < decapsulated, "{decapsulated} decapsulated, {delivered} received");
    Ok(())
}

pub(crate) fn offloads() -> Result<()> {
    let rig = Rig::new()?;
    let before = (rig.b.offload(UNDERLAY, "generic-receive-offload")?, segmentation(&rig.b)?);
    ensure!(before == ("off".to_owned(), "on".to_owned()), "{before:?}");
    rig.b.up(Datapath::Xdp)?;
    let during = (rig.b.offload(UNDERLAY, "generic-receive-offload")?, segmentation(&rig.b)?);
    ensure!(during == ("on".to_owned(), "off".to_owned()), "{during:?}");
    for change in ["gro off", "tx-udp-segmentation on"] {
        rig.b.command("ethtool", &format!("-K {UNDERLAY} {change}"))?;
        ensure!(!rig.b.is_in_place()?, "{change} is not missed");
        rig.b.put(rig.b.tunnel(Datapath::Xdp))?;
        ensure!(rig.b.is_in_place()?);
    }
    ensure!((rig.b.offload(UNDERLAY, "generic-receive-offload")?, segmentation(&rig.b)?) == during);
    // The notes outlive the agent.
    rig.b.up(Datapath::Tc)?;
    let with_tc = (rig.b.offload(UNDERLAY, "generic-receive-offload")?, segmentation(&rig.b)?);
    ensure!(with_tc == ("off".to_owned(), "off".to_owned()), "{with_tc:?}");
    rig.b.start_agent();
    rig.b.remove(Datapath::Tc)?;
    let after = (rig.b.offload(UNDERLAY, "generic-receive-offload")?, segmentation(&rig.b)?);
    ensure!(after == before, "{after:?}");
    Ok(())
}

fn segmentation(node: &Node) -> Result<String> {
    node.offload(UNDERLAY, "tx-udp-segmentation")
}

/// Ids of the programs at a tcx hook.
pub(crate) fn tcx(node: &Node, device: &'static str, side: u32) -> Result<Vec<u32>> {
    node.run(move |_| -> Result<Vec<u32>> {
        Ok(inspect::tcx_programs(nix::net::if_::if_nametoindex(device)?, side)?)
    })
}

pub(crate) const INGRESS: u32 = 46;
const EGRESS: u32 = 47;

pub(crate) fn has_xdp(node: &Node) -> Result<bool> {
    Ok(node.ip(&format!("-details link show dev {UNDERLAY}"))?.contains("xdp"))
}

pub(crate) fn removing() -> Result<()> {
    let rig = Rig::new()?;
    for datapath in [Datapath::Xdp, Datapath::Tc, Datapath::Tun] {
        rig.up(datapath)?;
        rig.talks()?;
        rig.b.remove(datapath)?;
        ensure!(tcx(&rig.b, UNDERLAY, INGRESS)?.is_empty(), "{datapath}: ingress");
        ensure!(tcx(&rig.b, DEVICE, EGRESS)?.is_empty(), "{datapath}: egress");
        ensure!(!has_xdp(&rig.b)?, "{datapath}: XDP");
        for device in ["flannel0p", "flannel0g", "flannel0d", "flannel0v"] {
            ensure!(!rig.b.has_link(device), "{datapath}: {device}");
        }
        ensure!(!rig.b.bpffs.join("flannel").exists(), "{datapath}: pins");
        ensure!(rig.b.has_link(DEVICE), "the device is another item");
        ensure!(rig.b.observe()?.is_empty());
        rig.b.remove(datapath).context("a second time")?;
    }
    Ok(())
}

pub(crate) fn another_underlay() -> Result<()> {
    for datapath in [Datapath::Ebpf, Datapath::Tc, Datapath::Tun] {
        let rig = Rig::new()?;
        rig.up(datapath)?;
        rig.talks()?;
        // The address moves to a device over the old one.
        stack(&rig)?;
        rig.b.ip(&format!("link set {UNDERLAY} down"))?;
        rig.b.ip(&format!("link set {UNDERLAY} name over0"))?;
        rig.b.ip("link set over0 up")?;
        rig.b.ip(&format!("link set wire0 name {UNDERLAY}"))?;
        let mut tunnel = rig.b.tunnel(datapath);
        tunnel.underlay = "over0".to_owned();
        rig.b.put(tunnel.clone())?;
        rig.b.put_peers(vec![rig.b.other()])?;
        ensure!(rig.b.observe()?.contains(&HostItem::Tunnel(tunnel)), "{datapath}");
        ensure!(tcx(&rig.b, UNDERLAY, INGRESS)?.is_empty() && !has_xdp(&rig.b)?, "{datapath}: left behind");
        rig.talks().with_context(|| format!("{datapath}"))?;
    }
    Ok(())
}
