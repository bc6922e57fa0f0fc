//! The agent ends, another starts: nothing is lost and nothing forgotten.

use std::fs;
use std::net::Ipv4Addr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, MapData};
use flannel_agent::domain::host_state::{Datapath, HostItem, SourceCheck, SourcePort};
use flannel_agent::host::udp::programs::{ensure_bpffs, inspect};
use flannel_agent::host::udp::{PeerReport, TunnelReport};
use nix::mount::umount;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::rig::Rig;

pub(crate) fn nothing_lost() -> Result<()> {
    for (datapath, tier) in [(Datapath::Ebpf, "xdp"), (Datapath::Tc, "tc+gro")] {
        let rig = Rig::new()?;
        rig.up(datapath)?;
        rig.talks()?;
        let flood = rig.flood()?;
        // However fast one is.
        let (started, mut takeovers) = (Instant::now(), 0);
        while takeovers < 4 || started.elapsed() < Duration::from_secs(1) {
            // Both ends, each by a process that knows nothing.
            rig.up(datapath)?;
            for node in [&rig.a, &rig.b] {
                node.settles_on(datapath, tier)?;
            }
            takeovers += 1;
        }
        let sent = flood.end_complete(&rig)?;
        ensure!(sent > 1000, "only {sent} datagrams: the takeovers were not under load");
        let (xdp, tc) = (rig.b.count("decap_xdp")?, rig.b.count("decap_tc")?);
        ensure!(xdp + tc >= sent && if tier == "xdp" { xdp > 0 } else { xdp == 0 }, "{:?}", rig.b.report()?);
        ensure!(rig.b.count("source_refused")? == 0 && rig.a.count("no_peer")? == 0);
    }
    Ok(())
}

/// Where nothing carries yet, packets flow before any program hangs anywhere; and the programs know the peers when they are
/// hung up, or they would refuse what user space took.
pub(crate) fn from_nothing() -> Result<()> {
    for _ in 0..5 {
        let rig = Rig::new()?;
        for node in [&rig.a, &rig.b] {
            node.up(Datapath::Auto)?;
            ensure!(node.tier()? == "tun" && node.is_in_place()?, "{:?}", node.report()?);
            ensure!(!node.pins().exists(), "the kernel's part is there already");
        }
        rig.talks()?;
        let flood = rig.flood()?;
        sleep(Duration::from_millis(100));
        for node in [&rig.b, &rig.a] {
            node.disturbed_within(Duration::from_secs(1))?;
            ensure!(!node.is_in_place()?, "the agent would not put it again");
            node.put(node.tunnel(Datapath::Auto))?;
            ensure!(node.tier()? == "tc+gro" && node.is_in_place()?, "{:?}", node.report()?);
            ensure!(node.observe()?.contains(&HostItem::TunnelPeer(node.other())));
            sleep(Duration::from_millis(100));
        }
        let sent = flood.end_complete(&rig)?;
        ensure!(sent > 500, "only {sent} datagrams");
        ensure!(rig.a.count("encapsulated")? > 0 && rig.b.count("decap_tc")? > 0, "{:?}", rig.b.report()?);
        ensure!(rig.b.count("source_refused")? == 0 && rig.a.count("no_peer")? == 0);
    }
    Ok(())
}

/// That nothing is lost is claimed of the tunnel, not of a machine that gives it no time: the message tells them apart.
pub(crate) fn full_queue() -> Result<()> {
    let rig = Rig::new()?;
    rig.up(Datapath::Tun)?;
    rig.talks()?;
    // The flood sends ten at a time.
    rig.a.ip("link set flannel0 txqueuelen 1")?;
    let flood = rig.flood()?;
    sleep(Duration::from_millis(100));
    let said = flood
        .end_complete(&rig)
        .err()
        .context("one packet at a time has room, and none is lost")?
        .to_string();
    let (_, dropped) = said.split_once("\"node 1: flannel0 tx\": ").with_context(|| said.clone())?;
    let dropped = dropped.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    ensure!(said.starts_with(&format!("{dropped} of ")), "not all of them: {said}");
    Ok(())
}

pub(crate) fn no_agent() -> Result<()> {
    for datapath in [Datapath::Ebpf, Datapath::Tc] {
        let rig = Rig::new()?;
        rig.up(datapath)?;
        rig.talks()?;
        let flood = rig.flood()?;
        rig.a.end_agent();
        rig.b.end_agent();
        rig.talks()?;
        flood.end_complete(&rig)?;
    }
    Ok(())
}

pub(crate) fn counters_survive() -> Result<()> {
    let rig = Rig::new()?;
    rig.up(Datapath::Ebpf)?;
    rig.talks()?;
    let before = rig.b.report()?;
    rig.b.start_agent();
    ensure!(rig.b.observe()?.is_empty(), "before the tunnel is put, nothing is known of it");
    rig.b.put(rig.b.tunnel(Datapath::Ebpf))?;
    let after = rig.b.report()?;
    let peers = |report: &TunnelReport| {
        let ageless = |peer: &PeerReport| PeerReport { last_seen_ms_ago: None, ..peer.clone() };
        report.peers.iter().map(ageless).collect::<Vec<_>>()
    };
    ensure!(peers(&before) == peers(&after), "{:?}\n{:?}", before.peers, after.peers);
    ensure!(before.counters == after.counters, "{:?}\n{:?}", before.counters, after.counters);
    // A new agent hears of what it took over: some of it may not be wanted any more.
    rig.b.disturbed_within(Duration::from_secs(1))?;
    ensure!(rig.b.observe()?.contains(&HostItem::TunnelPeer(rig.b.other())));
    ensure!(after.reason == "native XDP attached, marks proven", "{}", after.reason);
    Ok(())
}

pub(crate) fn stale_map() -> Result<()> {
    let rig = Rig::new()?;
    rig.up(Datapath::Ebpf)?;
    rig.talks()?;
    rig.b.end_agent();
    let pin = rig.b.pins().join("peers");
    fs::remove_file(&pin)?;
    HashMap::<_, u32, u64>::create(10, 0)?.pin(&pin)?;
    rig.b.up(Datapath::Ebpf)?;
    ensure!(rig.b.is_in_place()?);
    ensure!(rig.b.report()?.peers.len() == 1);
    rig.talks()
}

/// Up and down: another version of the agent, whose map of peers has other values. Peers are known before the programs are
/// replaced, long before the leases are.
pub(crate) fn other_layout() -> Result<()> {
    for datapath in [Datapath::Ebpf, Datapath::Tc] {
        let rig = Rig::new()?;
        rig.up(datapath)?;
        rig.talks()?;
        let flood = rig.flood()?;
        for version in ["v1", "v99"] {
            for node in [&rig.a, &rig.b] {
                node.end_agent();
                let old = node.pins().with_file_name(version);
                fs::rename(node.pins(), &old)?;
                let pin = old.join("peers");
                fs::remove_file(&pin)?;
                let mut peers = HashMap::<_, u32, [u32; 6]>::create(64, 0)?;
                let [subnet, peer] = [node.other().subnet.network(), node.other().node].map(on_the_wire);
                peers.insert(subnet, [peer, 7, 7, 7, 7, 7], 0)?;
                peers.pin(&pin)?;
                node.start_agent();
                node.put(node.tunnel(datapath))?;
                let peers = node.report()?.peers;
                ensure!(peers.len() == 1 && peers[0].node == node.other().node, "{version}: {peers:?}");
                ensure!(!old.exists(), "{version}: what is of no use any more is still there");
            }
        }
        let sent = flood.end_complete(&rig)?;
        ensure!(sent > 100, "only {sent} datagrams");
        // As it was before, and healed by the first look.
        rig.up(datapath)?;
        rig.talks()?;
    }
    Ok(())
}

fn on_the_wire(address: Ipv4Addr) -> u32 {
    u32::from_ne_bytes(address.octets())
}

pub(crate) fn other_version() -> Result<()> {
    let rig = Rig::new()?;
    rig.up(Datapath::Ebpf)?;
    rig.talks()?;
    rig.b.end_agent();
    let link = |rig: &Rig| inspect::pinned_link(&rig.b.pins().join("link_xdp")).ok().flatten();
    let before = link(&rig);
    fs::rename(rig.b.pins(), rig.b.pins().with_file_name("v0"))?;
    rig.b.up(Datapath::Ebpf)?;
    ensure!(rig.b.tier()? == "xdp", "the old link would be a foreign program: {:?}", rig.b.report()?);
    ensure!(!rig.b.pins().with_file_name("v0").exists());
    let after = link(&rig);
    ensure!(before.map(|link| link.ifindex) == after.map(|link| link.ifindex), "{before:?} {after:?}");
    rig.talks()
}

pub(crate) fn settings() -> Result<()> {
    let rig = Rig::new()?;
    rig.up(Datapath::Ebpf)?;
    rig.talks()?;
    let flood = rig.flood()?;
    for (check, port) in [(SourceCheck::Off, SourcePort::Fixed), (SourceCheck::Enforce, SourcePort::Flow)] {
        for node in [&rig.a, &rig.b] {
            let mut tunnel = node.tunnel(Datapath::Ebpf);
            tunnel.options.source_check = check;
            tunnel.options.source_port = port;
            node.put(tunnel.clone())?;
            ensure!(node.observe()?.contains(&HostItem::Tunnel(tunnel)));
        }
    }
    flood.end_complete(&rig)?;
    ensure!(rig.b.tier()? == "xdp");
    Ok(())
}

/// The places of peers mean other subnets then: programs that still run must not find them in theirs.
pub(crate) fn other_network() -> Result<()> {
    for datapath in [Datapath::Ebpf, Datapath::Tc] {
        let rig = Rig::new()?;
        rig.up(datapath)?;
        rig.talks()?;
        let map =
            |rig: &Rig| Ok::<_, anyhow::Error>(MapData::from_pin(rig.b.pins().join("subnets"))?.info()?.id());
        let before = map(&rig)?;
        let flood = rig.flood()?;
        for node in [&rig.a, &rig.b] {
            let mut tunnel = node.tunnel(datapath);
            tunnel.network = "10.240.0.0/12".parse()?;
            node.put(tunnel)?;
        }
        flood.end_complete(&rig)?;
        ensure!(map(&rig)? != before, "the map is still the one of the former network");
        ensure!(rig.b.count("source_refused")? == 0 && rig.a.count("no_peer")? == 0, "{:?}", rig.b.report()?);
    }
    Ok(())
}

pub(crate) fn mounts_bpffs() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let at = folder.path().join("made/for/it");
    ensure_bpffs(&at)?;
    ensure_bpffs(&at)?;
    ensure!(statfs(&at)?.filesystem_type() == BPF_FS_MAGIC);
    umount(&at)?;
    ensure!(umount(&at).is_err(), "mounted once only");
    let file = folder.path().join("file");
    fs::write(&file, "")?;
    let error = ensure_bpffs(&file).err().context("a file was taken")?;
    ensure!(error.to_string().contains("file exists (EEXIST)"), "{error}");
    Ok(())
}
