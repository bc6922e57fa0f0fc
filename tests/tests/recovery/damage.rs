//! Somebody deletes or changes what is ours; it is back within a second.

use std::{
    fs,
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{Map, MapData};
use flannel_agent::host::udp::programs::inspect;
use flannel_common::{
    LAYOUT_VERSION,
    peer::{MAX_SUBNETS, Peer, PeerKey},
};
use flannel_tests::{
    probe::ping::Ping,
    scenario::{IN_KERNEL, TIERS, over},
    topology::{Host, Lab},
};
use libtest_mimic::Trial;

use crate::SOON;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(over(
        &TIERS,
        "a_damaged_device_address_or_route_is_back_within_a_second",
        "damage",
        devices,
    ));
    trials.extend(over(
        &TIERS,
        "an_underlay_that_went_away_and_came_back_carries_again",
        "underlay",
        underlay,
    ));
    trials.extend(over(
        &IN_KERNEL,
        "a_detached_program_is_attached_again_within_a_second",
        "detached",
        |lab, tier| links(lab, tier, Damage::Detached),
    ));
    trials.extend(over(
        &IN_KERNEL,
        "every_damage_to_what_carries_the_tunnel_is_undone_within_a_second",
        "parts",
        parts,
    ));
    trials.extend(over(&IN_KERNEL, "a_removed_pin_is_back_within_a_second", "unpinned", |lab, tier| {
        links(lab, tier, Damage::Unpinned)
    }));
    trials
}

/// Waits until pods reach each other again; how long it took.
pub(crate) fn reachable(lab: &Lab, limit: Duration) -> Result<Duration> {
    let (from, to) = (&lab.host(0).pod()?.netns, lab.host(1).pod()?.address);
    let started = Instant::now();
    loop {
        let report = Ping::new(from, to).count(1).patience(Duration::from_millis(200)).run()?;
        if report.received == 1 {
            return Ok(started.elapsed());
        }
        ensure!(started.elapsed() < limit, "no ping passes within {limit:?}: {report}");
    }
}

fn devices(lab: &mut Lab, tier: &str) -> Result<()> {
    let base = lab.host(1).agent()?.subnet_env()?.base();
    let address = format!("{base}/32");
    let damages = [
        ("route del 10.244.0.0/16 dev flannel0", "ip route show dev flannel0", "10.244.0.0/16"),
        ("route replace 10.244.0.0/16 via 10.99.0.1", "ip route show dev flannel0", "10.244.0.0/16"),
        ("addr flush dev flannel0", "ip addr show dev flannel0", address.as_str()),
        ("link set flannel0 mtu 1300", "ip link show dev flannel0", "mtu 1472"),
        ("link set flannel0 down", "ip route show dev flannel0", "10.244.0.0/16"),
        ("link del flannel0", "ip route show dev flannel0", "10.244.0.0/16"),
    ];
    for (damage, command, pattern) in damages {
        let host = lab.host(1);
        host.netns().ip(damage)?;
        host.wait_output(command, pattern, SOON).with_context(|| format!("after `ip {damage}`"))?;
        reachable(lab, SOON).with_context(|| format!("after `ip {damage}`"))?;
        let status = lab.host(1).status()?;
        ensure!(status.tier() == tier, "after `ip {damage}`: {}", status.reasons());
        lab.ping_all_pairs(5).with_context(|| format!("after `ip {damage}`"))?;
    }
    Ok(())
}

/// The cable is pulled; then the device itself is made anew, as by a driver's restart.
fn underlay(lab: &mut Lab, tier: &str) -> Result<()> {
    let limit = Duration::from_secs(3);
    let host = lab.host(1);
    host.netns().ip("link set eth0 down")?;
    sleep(Duration::from_millis(300));
    host.netns().ip("link set eth0 up")?;
    reachable(lab, limit).context("after eth0 was down")?;

    let host = lab.host(1);
    let (address, mac) = (host.address(), host.netns().mac("eth0")?);
    host.netns().ip("link del eth0")?;
    sleep(Duration::from_millis(300));
    host.netns().ip(&format!(
        // The same card: its neighbours still know the address.
        "link add eth0 address {mac} mtu 1500 type veth peer name sw-h2 mtu 1500 netns {}",
        lab.switch().path()
    ))?;
    lab.switch().ip("link set sw-h2 master br0 up")?;
    host.netns().ip(&format!("addr add {address}/24 dev eth0"))?;
    host.netns().ip("link set eth0 up")?;
    host.netns().ip("route replace default via 10.99.0.1 dev eth0")?;
    reachable(lab, limit).context("after eth0 was made anew")?;
    let status = lab.host(1).agent()?.wait_status(&format!("tier {tier} again"), |s| s.tier() == tier)?;
    let (word, before) = match tier {
        "xdp" => ("decap_xdp", status.counted("decap_xdp")),
        "tc" => ("decap_tc", status.counted("decap_tc")),
        _ => ("decap_user", status.counted("decap_user")),
    };
    lab.ping_all_pairs(5)?;
    // In user space, packets are counted after they were delivered.
    let wanted = format!("{word} to grow from {before} by 10: else another way carries");
    lab.host(1).agent()?.wait_status(&wanted, |status| status.counted(word) >= before + 10).map(drop)
}

/// What is done to a host, and when it is undone.
struct Part {
    what: &'static str,
    damage: fn(&Host) -> Result<()>,
    undone: fn(&Host) -> Result<bool>,
}

fn does(host: &Host, command: &str) -> Result<()> {
    host.netns().output(command).map(drop)
}

fn shows(host: &Host, command: &str, pattern: &str) -> Result<bool> {
    Ok(host.netns().output(command).is_ok_and(|text| text.contains(pattern)))
}

fn pins(host: &Host) -> Result<PathBuf> {
    let bpffs = host.bpffs().context("no bpffs was mounted")?;
    Ok(bpffs.join(format!("flannel/flannel0/v{LAYOUT_VERSION}")))
}

type PeerMap = aya::maps::HashMap<MapData, PeerKey, Peer>;

fn peer_map(host: &Host) -> Result<PeerMap> {
    Ok(Map::from_map_data(MapData::from_pin(pins(host)?.join("peers"))?)?.try_into()?)
}

fn entries(host: &Host) -> Result<Vec<(PeerKey, Peer)>> {
    Ok(peer_map(host)?.iter().collect::<Result<_, _>>()?)
}

type Subnets = aya::maps::Array<MapData, Peer>;

fn subnets(host: &Host) -> Result<Subnets> {
    Ok(Map::from_map_data(MapData::from_pin(pins(host)?.join("subnets"))?)?.try_into()?)
}

/// Places of peers.
fn places(host: &Host) -> Result<Vec<(u32, Peer)>> {
    let subnets = subnets(host)?;
    let all = (0..MAX_SUBNETS).map(|place| Ok((place, subnets.get(&place, 0)?)));
    all.filter(|entry| entry.as_ref().map_or(true, |(_, peer): &(u32, Peer)| peer.node != 0)).collect()
}

fn is_only_place_right(host: &Host) -> Result<bool> {
    let node = u32::from_ne_bytes([10, 99, 0, 11]);
    Ok(matches!(places(host)?.as_slice(), [(_, peer)] if peer.node == node))
}

/// Of both tiers.
const PARTS: [Part; 8] = [
    Part {
        what: "a peer's place emptied",
        damage: |host| {
            let (place, peer) = *places(host)?.first().context("no place")?;
            Ok(subnets(host)?.set(place, Peer { node: 0, ..peer }, 0)?)
        },
        undone: is_only_place_right,
    },
    Part {
        what: "a peer's place pointed elsewhere",
        damage: |host| {
            let (place, peer) = *places(host)?.first().context("no place")?;
            Ok(subnets(host)?.set(place, Peer { node: u32::from_ne_bytes([10, 99, 0, 99]), ..peer }, 0)?)
        },
        undone: is_only_place_right,
    },
    Part {
        what: "an empty place filled",
        damage: |host| {
            let (place, peer) = *places(host)?.first().context("no place")?;
            Ok(subnets(host)?.set((place + 1) % 256, peer, 0)?)
        },
        undone: is_only_place_right,
    },
    Part {
        what: "a peer's entry deleted from the map",
        damage: |host| {
            let (key, _) = *entries(host)?.first().context("no entry")?;
            Ok(peer_map(host)?.remove(&key)?)
        },
        undone: |host| Ok(entries(host)?.len() == 1),
    },
    Part {
        what: "a peer's entry pointed elsewhere",
        damage: |host| {
            let (key, peer) = *entries(host)?.first().context("no entry")?;
            Ok(peer_map(host)?.insert(key, Peer { node: u32::from_ne_bytes([10, 99, 0, 99]), ..peer }, 0)?)
        },
        undone: |host| {
            Ok(entries(host)?.iter().any(|(_, peer)| peer.node == u32::from_ne_bytes([10, 99, 0, 11])))
        },
    },
    Part {
        what: "an entry added to the map",
        damage: |host| {
            let (_, peer) = *entries(host)?.first().context("no entry")?;
            Ok(peer_map(host)?.insert(
                u32::from_ne_bytes([10, 244, 254, 0]),
                Peer { index: 99, ..peer },
                0,
            )?)
        },
        undone: |host| Ok(entries(host)?.len() == 1),
    },
    Part {
        what: "clsact made and deleted",
        damage: |host| {
            does(host, "tc qdisc add dev eth0 clsact")?;
            does(host, "tc qdisc del dev eth0 clsact")
        },
        undone: |_| Ok(true),
    },
    Part {
        what: "every pin removed at once",
        damage: |host| {
            let folder = pins(host)?;
            let files = fs::read_dir(&folder)?.collect::<Result<Vec<_>, _>>()?;
            files
                .iter()
                .filter(|file| file.path().is_file())
                .try_for_each(|file| Ok(fs::remove_file(file.path())?))
        },
        undone: |host| {
            let folder = pins(host)?;
            let names = ["peers", "subnets", "counters", "peer_counters", "link_encap", "link_ingress"];
            Ok(names.iter().all(|name| folder.join(name).exists()))
        },
    },
];

const PARTS_OF_XDP: [Part; 2] = [
    Part {
        what: "gro off on eth0",
        damage: |host| host.netns().offload("eth0", "gro off"),
        undone: |host| shows(host, "ethtool -k eth0", "generic-receive-offload: on"),
    },
    Part {
        what: "tx-udp-segmentation on on eth0",
        damage: |host| host.netns().offload("eth0", "tx-udp-segmentation on"),
        undone: |host| shows(host, "ethtool -k eth0", "tx-udp-segmentation: off"),
    },
];

const PARTS_OF_ROOM: [Part; 4] = [
    Part {
        what: "flannel0v down",
        damage: |host| does(host, "ip link set flannel0v down"),
        undone: |host| shows(host, "ip link show dev flannel0v", ",UP"),
    },
    Part {
        what: "flannel0v deleted",
        damage: |host| does(host, "ip link del flannel0v"),
        undone: |host| shows(host, "ip link show dev flannel0v", ",UP"),
    },
    Part {
        what: "flannel0d deleted",
        damage: |host| does(host, "ip link del flannel0d"),
        undone: |host| shows(host, "ip link show dev flannel0d", "state UP"),
    },
    Part {
        what: "eth0 splits what it sends",
        damage: |host| host.netns().offload("eth0", "tso off"),
        undone: |host| shows(host, "ip link show dev flannel0p", "state UP"),
    },
];

const PARTS_OF_TC: [Part; 5] = [
    Part {
        what: "tso on on flannel0p",
        damage: |host| host.netns().offload("flannel0p", "tso on"),
        undone: |host| shows(host, "ethtool -k flannel0p", "tcp-segmentation-offload: off"),
    },
    Part {
        what: "gro off on flannel0g",
        damage: |host| host.netns().offload("flannel0g", "gro off"),
        undone: |host| shows(host, "ethtool -k flannel0g", "generic-receive-offload: on"),
    },
    Part {
        what: "flannel0g down",
        damage: |host| does(host, "ip link set flannel0g down"),
        undone: |host| shows(host, "ip link show dev flannel0g", "state UP"),
    },
    Part {
        what: "another MTU on flannel0p",
        damage: |host| does(host, "ip link set flannel0p mtu 1300"),
        undone: |host| shows(host, "ip link show dev flannel0p", "mtu 1472"),
    },
    Part {
        what: "flannel0p deleted",
        damage: |host| does(host, "ip link del flannel0p"),
        undone: |host| shows(host, "ip link show dev flannel0p", "state UP"),
    },
];

fn parts(lab: &mut Lab, tier: &str) -> Result<()> {
    let [own, more] = match tier {
        "xdp" => [PARTS_OF_XDP.as_slice(), &[]],
        _ => [PARTS_OF_ROOM.as_slice(), PARTS_OF_TC.as_slice()],
    };
    // The maps taken over at the start are news of their own.
    sleep(SOON);
    for Part { what, damage, undone } in PARTS.iter().chain(own).chain(more) {
        let host = lab.host(1);
        damage(host).context(*what)?;
        let started = Instant::now();
        while !undone(host).is_ok_and(|undone| undone) {
            ensure!(started.elapsed() < SOON, "{what}: not undone within {SOON:?}");
            sleep(Duration::from_millis(10));
        }
        reachable(lab, SOON).context(*what)?;
        lab.ping_all_pairs(5).context(*what)?;
        let status = lab.host(1).agent()?.wait_status("all in place", |status| status.ready)?;
        ensure!(status.tier() == tier, "{what}: {}", status.reasons());
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Damage {
    Detached,
    Unpinned,
}

fn links(lab: &mut Lab, tier: &str, damage: Damage) -> Result<()> {
    let host = lab.host(1);
    let pins = pinned_links(host.bpffs().context("no bpffs was mounted")?)?;
    ensure!(pins.len() >= 2, "only {pins:?} pinned");
    for pin in pins {
        let name = pin.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match damage {
            Damage::Detached => {
                inspect::detach(&pin).with_context(|| format!("detach {}", pin.display()))?;
            }
            Damage::Unpinned => fs::remove_file(&pin).with_context(|| format!("remove {}", pin.display()))?,
        }
        let started = Instant::now();
        loop {
            // A link that was detached hangs on no interface.
            match inspect::pinned_link(&pin) {
                Ok(Some(link)) if link.ifindex != 0 => break,
                state if started.elapsed() > SOON => {
                    bail!("{name} is not back within {SOON:?}: {state:?}")
                }
                _ => sleep(Duration::from_millis(10)),
            }
        }
        reachable(lab, SOON).with_context(|| name.clone())?;
        lab.ping_all_pairs(5).with_context(|| name.clone())?;
        let status = host.status()?;
        ensure!(status.tier() == tier, "after {name}: {}", status.reasons());
    }
    Ok(())
}

fn pinned_links(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(pinned_links(&path)?);
        } else if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("link_")) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}
