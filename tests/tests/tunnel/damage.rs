//! What breaks is missed, and put again it works again.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{HashMap, Map, MapData, PerCpuArray, PerCpuValues};
use flannel_agent::domain::host_state::Datapath;
use flannel_common::counter::{Count, Counter};
use flannel_common::peer::{Peer, PeerKey};

use crate::rig::{DEVICE, Rig, UNDERLAY, peer};

const SOON: Duration = Duration::from_secs(1);

pub(crate) fn recreated_underlay() -> Result<()> {
    for datapath in [Datapath::Ebpf, Datapath::Tc] {
        let rig = Rig::new()?;
        rig.up(datapath)?;
        rig.talks()?;
        rig.b.ip(&format!("link delete {UNDERLAY}"))?;
        rig.b.disturbed_within(SOON)?;
        ensure!(!rig.b.is_in_place()?);
        let error = rig.b.try_put(rig.b.tunnel(datapath)).err().context("it came up without underlay")?;
        ensure!(error == "bring up the tunnel on flannel0: there is no network device eth0", "{error}");
        rig.join(1500)?;
        for node in [&rig.a, &rig.b] {
            ensure!(!node.is_in_place()?);
            node.put(node.tunnel(datapath))?;
            node.put_peers(vec![node.other()])?;
            ensure!(node.is_in_place()?);
            ensure!(node.observe()?.len() == 2, "{:?}", node.observe()?);
        }
        rig.talks()?;
        ensure!(rig.b.tier()? == if datapath == Datapath::Ebpf { "xdp" } else { "tc+gro" });
    }
    Ok(())
}

pub(crate) fn deleted_pins() -> Result<()> {
    for (datapath, pins) in [
        (Datapath::Ebpf, ["link_xdp", "link_encap", "link_ingress", "peers", "counters"].as_slice()),
        (Datapath::Tc, ["link_gro", "peer_counters"].as_slice()),
    ] {
        let rig = Rig::new()?;
        rig.up(datapath)?;
        rig.talks()?;
        for pin in pins {
            fs::remove_file(rig.b.pins().join(pin)).context(*pin)?;
            rig.b.disturbed_within(SOON).context(*pin)?;
            ensure!(!rig.b.is_in_place()?, "{pin} is not missed");
            rig.b.put(rig.b.tunnel(datapath))?;
            ensure!(rig.b.is_in_place()?, "{pin} is not back");
            ensure!(rig.b.observe()?.len() == 2, "{pin}: the peer is lost");
            rig.talks().context(*pin)?;
        }
        ensure!(rig.b.disturbed_within(SOON).is_err(), "a healthy tunnel complains");
    }
    Ok(())
}

pub(crate) fn map_entries() -> Result<()> {
    let rig = Rig::new()?;
    rig.up(Datapath::Ebpf)?;
    rig.talks()?;
    // The takeover of the other node's entry is news once.
    let _ = rig.b.disturbed_within(SOON);
    let map = MapData::from_pin(rig.b.pins().join("peers"))?;
    let mut peers: HashMap<_, PeerKey, Peer> = Map::from_map_data(map)?.try_into()?;
    let key = peers.keys().next().context("no entry")??;
    let right = peers.get(&key, 0)?;
    let seen = |count: usize| -> Result<()> {
        rig.b.disturbed_within(SOON)?;
        let items = rig.b.observe()?;
        ensure!(items.len() == count && rig.b.is_in_place()?, "{items:?}");
        ensure!(rig.b.disturbed_within(SOON).is_err(), "said twice");
        Ok(())
    };
    let repair = |peers: &HashMap<MapData, PeerKey, Peer>| -> Result<()> {
        rig.b.put_peers(vec![rig.b.other()])?;
        ensure!(peers.get(&key, 0)? == right && rig.b.observe()?.len() == 2);
        ensure!(rig.b.disturbed_within(SOON).is_err(), "our own entry is news");
        rig.talks()
    };
    peers.remove(&key)?;
    seen(1).context("deleted")?;
    repair(&peers)?;
    peers.insert(key, Peer { ifindex: right.ifindex + 7, ..right }, 0)?;
    seen(1).context("changed")?;
    repair(&peers)?;
    let foreign = u32::from_ne_bytes([10, 244, 9, 0]);
    peers.insert(foreign, Peer { index: 5, ..right }, 0)?;
    seen(3).context("added")?;
    rig.b.remove_peers(vec![peer("10.244.9.0/24", rig.a.address())])?;
    ensure!(peers.get(&foreign, 0).is_err());
    repair(&peers)
}

pub(crate) fn gro_pair() -> Result<()> {
    let rig = Rig::new()?;
    // On a veth that splits what it sends; else the way goes through the room.
    rig.b.command("ethtool", &format!("-K {UNDERLAY} tso off"))?;
    rig.up(Datapath::Tc)?;
    let damages: [(&str, &str); 5] = [
        ("ethtool", "-K flannel0p tso on"),
        ("ethtool", "-K flannel0g gro off"),
        ("ip", "link set flannel0p mtu 1400"),
        ("ip", "link set flannel0g down"),
        ("ip", "link delete flannel0p"),
    ];
    for (program, arguments) in damages {
        rig.b.command(program, arguments)?;
        ensure!(!rig.b.is_in_place()?, "{program} {arguments} is not missed");
        rig.b.put(rig.b.tunnel(Datapath::Tc))?;
        ensure!(rig.b.is_in_place()?, "{program} {arguments} is not repaired");
        ensure!(rig.b.tier()? == "tc+gro");
        rig.talks()?;
    }
    // A device of that name which is not ours is left alone, and costs the pair only.
    rig.b.remove(Datapath::Tc)?;
    rig.b.ip("link add flannel0p type bridge")?;
    rig.b.up(Datapath::Tc)?;
    let report = rig.b.report()?;
    ensure!(report.tier.name() == "tc", "{report:?}");
    ensure!(report.reason.contains("flannel0p exists and is a bridge"), "{}", report.reason);
    rig.talks()
}

pub(crate) fn room() -> Result<()> {
    let rig = Rig::new()?;
    rig.up(Datapath::Tc)?;
    let path = rig.b.run(|_| fs::metadata("/proc/thread-self/ns/net"))?.ino();
    let path = format!("/run/flannel/flannel0.{path}.room");
    let unmount = format!("-l {path}");
    let damages: [(&str, &str); 6] = [
        ("ip", "link set flannel0d mtu 1400"),
        ("ip", "link set flannel0d down"),
        ("ip", "link set flannel0v down"),
        ("ip", "link delete flannel0v"),
        ("ip", "link delete flannel0d"),
        ("umount", &unmount),
    ];
    for (program, arguments) in damages {
        ensure!(!rig.b.has_link("flannel0p"), "a veth pair beside the room");
        rig.b.command(program, arguments)?;
        ensure!(!rig.b.is_in_place()?, "{program} {arguments} is not missed");
        rig.b.put(rig.b.tunnel(Datapath::Tc))?;
        ensure!(rig.b.is_in_place()?, "{program} {arguments} is not repaired");
        ensure!(rig.b.report()?.reason == "chosen by --udp-datapath=tc; super-packets stay whole");
        rig.talks()?;
    }
    // Where the underlay splits what it sends, peers will too: then the pair is faster.
    rig.b.command("ethtool", &format!("-K {UNDERLAY} tso off"))?;
    ensure!(!rig.b.is_in_place()?, "tso off is not missed");
    rig.b.put(rig.b.tunnel(Datapath::Tc))?;
    ensure!(rig.b.has_link("flannel0p") && !rig.b.has_link("flannel0d") && !rig.b.has_link("flannel0v"));
    ensure!(!Path::new(&path).exists(), "{path} is left");
    rig.talks()?;
    rig.b.command("ethtool", &format!("-K {UNDERLAY} tso on"))?;
    ensure!(!rig.b.is_in_place()?, "tso on is not missed");
    rig.b.put(rig.b.tunnel(Datapath::Tc))?;
    ensure!(!rig.b.has_link("flannel0p") && rig.b.has_link("flannel0d"));
    rig.talks()?;
    // A device of that name which is not ours is left alone, and costs the room only.
    rig.b.remove(Datapath::Tc)?;
    ensure!(!Path::new(&path).exists(), "{path} is left");
    rig.b.ip("link add flannel0v type bridge")?;
    rig.b.up(Datapath::Tc)?;
    ensure!(rig.b.tier()? == "tc+gro" && rig.b.has_link("flannel0p") && !rig.b.has_link("flannel0d"));
    rig.talks()
}

pub(crate) fn disproved() -> Result<()> {
    let rig = Rig::new()?;
    rig.up(Datapath::Ebpf)?;
    ensure!(rig.b.tier()? == "xdp");
    // As a driver without metadata would have it: decapsulated by XDP, no mark seen.
    let map = MapData::from_pin(rig.b.pins().join("counters"))?;
    let mut counters: PerCpuArray<_, Count> = Map::from_map_data(map)?.try_into()?;
    let index = Counter::DecapXdp as u32;
    let cpus = counters.get(&index, 0)?.len();
    counters.set(index, PerCpuValues::try_from(vec![Count { packets: 9, bytes: 9 }; cpus])?, 0)?;
    let after = rig.b.disturbed_within(Duration::from_secs(10)).or_else(|_| {
        // The first news may have been the peers'.
        rig.b.disturbed_within(Duration::from_secs(10))
    })?;
    ensure!(after > Duration::from_secs(4), "given up after {after:?}");
    ensure!(!rig.b.is_in_place()?);
    rig.b.put(rig.b.tunnel(Datapath::Ebpf))?;
    let told = "packets that XDP decapsulated on eth0 arrived without its mark; the driver drops metadata";
    ensure!(rig.b.tier()? == "tc+gro" && rig.b.report()?.reason == told, "{:?}", rig.b.report()?);
    rig.talks()?;
    // The next agent does not try again, and says why when it must.
    rig.b.up(Datapath::Ebpf)?;
    ensure!(rig.b.tier()? == "tc+gro" && rig.b.report()?.reason == told, "{:?}", rig.b.report()?);
    let error = rig.b.try_put(rig.b.tunnel(Datapath::Xdp)).err().context("it came up")?;
    ensure!(error.ends_with(told), "{error}");
    ensure!(rig.b.tier()? == "tc+gro" && rig.b.is_in_place()?, "what ran before still runs");
    rig.talks()
}

pub(crate) fn deleted_device() -> Result<()> {
    for datapath in [Datapath::Ebpf, Datapath::Tun] {
        let rig = Rig::new()?;
        rig.up(datapath)?;
        rig.talks()?;
        rig.b.ip(&format!("link delete {DEVICE}"))?;
        rig.b.disturbed_within(SOON)?;
        ensure!(!rig.b.is_in_place()?);
        rig.b.make_device()?;
        rig.b.put(rig.b.tunnel(datapath))?;
        ensure!(rig.b.observe()?.len() == 2, "{:?}", rig.b.observe()?);
        rig.talks()?;
    }
    Ok(())
}

pub(crate) fn at_once() -> Result<()> {
    let rig = Rig::new()?;
    rig.up(Datapath::Ebpf)?;
    rig.talks()?;
    for pin in ["link_xdp", "link_ingress", "link_encap"] {
        for _ in 0..5 {
            fs::remove_file(rig.b.pins().join(pin))?;
            rig.b.put(rig.b.tunnel(Datapath::Ebpf))?;
            ensure!(rig.b.tier()? == "xdp" && rig.b.is_in_place()?, "{pin}: {:?}", rig.b.report()?);
        }
    }
    rig.talks()
}
