//! The shortcut past the pods' bridge, which `auto` takes where nodes are joined by veth and nothing on the bridge would be
//! passed by that somebody relies on.

use std::{
    net::{Ipv4Addr, SocketAddrV4},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use flannel_tests::{
    agent::{AgentOptions, Status},
    bpf::{self, TcHook},
    probe::{ping::Ping, tcp::TcpPath},
    scenario::scenario,
    topology::{Lab, Pod, PodLink},
};
use libtest_mimic::Trial;

/// A second, and some for a busy machine.
const SOON: Duration = Duration::from_secs(5);

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        scenario("super_packets_pass_the_bridge_by_and_pods_may_come_and_go", Lab::new("shortcut"), pods),
        scenario(
            "what_watches_the_bridge_ends_the_shortcut_until_it_goes",
            Lab::new("shortcut-legal"),
            legal,
        ),
        scenario(
            "the_shortcut_outlives_the_agent_and_another_tier_ends_it",
            Lab::new("shortcut-agent"),
            agent,
        ),
        scenario(
            "without_the_shortcut_super_packets_stay_whole_too_with_an_agent_or_without",
            Lab::new("room"),
            room,
        ),
        scenario(
            "a_pod_that_claims_anothers_mac_address_gets_what_the_bridge_gives_it_and_no_longer",
            Lab::new("shortcut-forged"),
            forged,
        ),
        scenario(
            "an_address_the_bridge_has_forgotten_and_what_is_beyond_4096_is_left_to_the_bridge",
            Lab::new("shortcut-many"),
            many,
        ),
        scenario(
            "a_bridge_that_takes_no_program_of_ours_is_left_alone",
            Lab::new("shortcut-refused"),
            refused,
        ),
        scenario("routed_pods_need_no_shortcut", Lab::new("shortcut-routed").pods(PodLink::Routed), routed),
    ]
}

fn bring_up(lab: &mut Lab) -> Result<()> {
    lab.bring_up(&["auto"; 2])?;
    for index in 0..2 {
        wait_path(lab, index, "tc+bridge")?;
    }
    Ok(())
}

/// Waits until the host's tunnel says this tier.
fn wait_path(lab: &Lab, index: usize, path: &str) -> Result<()> {
    lab.host(index).agent()?.wait_status(path, |status| status.path() == path).map(drop)
}

/// Bytes of an average packet that the second host's pod took in while 20 MB came.
fn average_received(lab: &Lab) -> Result<u64> {
    let (a, b) = (lab.host(0).pod()?, lab.host(1).pod()?);
    let count = |name: &str| -> Result<u64> {
        let text = b.netns.ip("-s -j link show dev eth0")?;
        let json: serde_json::Value = serde_json::from_str(&text)?;
        json[0]["stats64"]["rx"][name].as_u64().with_context(|| format!("no {name} in {text}"))
    };
    let before = (count("bytes")?, count("packets")?);
    let address = SocketAddrV4::new(b.address, 5001);
    TcpPath::new(&a.netns, &b.netns, address).transfer(20 << 20)?;
    let (bytes, packets) = (count("bytes")? - before.0, count("packets")? - before.1);
    ensure!(bytes > 20 << 20, "only {bytes} bytes arrived at the pod's device");
    Ok(bytes / packets.max(1))
}

fn room(lab: &mut Lab) -> Result<()> {
    let whole = |lab: &Lab, when: &str| -> Result<()> {
        let average = average_received(lab)?;
        ensure!(
            average > 5000,
            "{when}: packets of {average} bytes on average reach the pod: somebody splits them"
        );
        lab.ping_all_pairs(3).with_context(|| when.to_owned())
    };
    lab.bring_up(&["tc"; 2])?;
    whole(lab, "at first")?;
    ensure!(lab.host(1).status()?.path() == "tc+gro", "{}", lab.host(1).status()?.reasons());

    // The host's firewall sees no datagram of the tunnel, neither on the underlay nor on the way through the room.
    for line in [
        "nft add table inet wall",
        "nft add chain inet wall input { type filter hook input priority 0 ; }",
        "nft add rule inet wall input meta l4proto udp drop",
    ] {
        lab.host(1).netns().output(line)?;
    }
    whole(lab, "behind a firewall that lets no UDP in")?;
    lab.host(1).netns().output("nft delete table inet wall")?;

    lab.host_mut(1).agent_mut()?.crash()?;
    whole(lab, "without an agent")?;
    // As when the room's mount went with the agent's container: the door goes, and is done without.
    lab.host(1).netns().ip("link del dev flannel0d")?;
    average_received(lab).context("without agent and door")?;
    lab.host_mut(1).start_agent(&AgentOptions::new()?.datapath("tc"))?;
    lab.wait_connected()?;
    whole(lab, "with an agent again")
}

fn pods(lab: &mut Lab) -> Result<()> {
    bring_up(lab)?;
    lab.ping_all_pairs(3)?;
    let average = average_received(lab)?;
    ensure!(average > 5000, "packets of {average} bytes on average reach the pod: somebody splits them");
    let status = lab.host(1).status()?;
    ensure!(status.reasons().contains("packets pass cni0 by"), "{}", status.reasons());

    // A pod goes, and comes back on another port with the MAC address it had.
    let host = lab.host(1);
    let pod = host.pod()?;
    let mac = pod.netns.mac("eth0")?;
    let address = format!("{}/24", pod.address);
    host.netns().ip(&format!("link del dev {}", pod.port))?;
    host.netns().ip(&format!(
        "link add again0 mtu 1472 type veth peer name eth0 mtu 1472 netns {}",
        pod.netns.path()
    ))?;
    host.netns().ip("link set again0 master cni0 up")?;
    pod.netns.ip(&format!("link set eth0 address {mac}"))?;
    pod.netns.ip(&format!("addr add {address} dev eth0"))?;
    pod.netns.ip("link set eth0 up")?;
    pod.netns.ip(&format!("route add default via {}", pod.gateway))?;
    answers(lab)?;
    lab.ping_all_pairs(5)
}

/// Until the pod of the first host reaches that of the second again; a bridge opens a new port when its link watcher finds
/// the time.
fn answers(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host(0).pod()?, lab.host(1).pod()?);
    let started = Instant::now();
    while Ping::new(&a.netns, b.address).count(1).patience(Duration::from_millis(200)).run()?.lost() > 0 {
        ensure!(started.elapsed() < SOON, "the pod does not answer");
    }
    Ok(())
}

fn legal(lab: &mut Lab) -> Result<()> {
    bring_up(lab)?;
    let subnet = lab.host(1).agent()?.subnet_env()?;
    let second = Ipv4Addr::from(u32::from(subnet.gateway) + 99);
    let other = format!("ip addr add {second}/{} dev br9", subnet.prefix);
    lab.host(1).netns().ip("link add br9 type bridge")?;
    for (on, off, reason) in [
        (
            "nft add table bridge watch",
            "nft delete table bridge watch",
            "nftables tables of the bridge family",
        ),
        (other.as_str(), "ip link del dev br9", "more than one bridge has an address in"),
    ] {
        lab.host(1).netns().output(on)?;
        wait_path(lab, 1, "tc+gro").with_context(|| on.to_owned())?;
        let average = average_received(lab)?;
        ensure!(
            average > 5000,
            "{on}: packets of {average} bytes on average reach the pod: somebody splits them"
        );
        let reasons = lab.host(1).status()?.reasons();
        ensure!(reasons.contains(reason), "{reasons}");
        lab.ping_all_pairs(2)?;
        lab.host(1).netns().output(off)?;
        // Nothing tells of a table that goes; the next look at the host does.
        if on.starts_with("nft") {
            lab.host(1).netns().ip("link set cni0 txqueuelen 999")?;
        }
        wait_path(lab, 1, "tc+bridge").with_context(|| off.to_owned())?;
        lab.ping_all_pairs(2)?;
    }
    // A qdisc that somebody adds to the bridge changes nothing.
    let host = lab.host(1);
    host.netns().output("tc qdisc add dev cni0 clsact")?;
    lab.ping_all_pairs(2)
}

fn agent(lab: &mut Lab) -> Result<()> {
    bring_up(lab)?;
    lab.host_mut(1).agent_mut()?.crash()?;
    lab.ping_all_pairs(5)?;
    let average = average_received(lab)?;
    ensure!(average > 5000, "without the agent packets of {average} bytes on average reach the pod");
    let options = AgentOptions::new()?.datapath("auto");
    lab.host_mut(1).start_agent(&options)?;
    wait_path(lab, 1, "tc+bridge")?;
    lab.ping_all_pairs(2)?;
    // A tier that was chosen by hand takes no shortcut.
    let options = AgentOptions::new()?.datapath("tc");
    lab.host_mut(1).start_agent(&options)?;
    wait_path(lab, 1, "tc+gro")?;
    lab.ping_all_pairs(2)?;
    let pins = lab.host(1).bpffs().context("no bpffs was mounted")?;
    if walk(pins)?.iter().any(|name| name == "link_bridge") {
        bail!("the program on the bridge is still pinned");
    }
    Ok(())
}

/// A second pod on the second host's bridge claims the first one's MAC address by sending a frame from it. That is the
/// bridge's weakness, not more than that: what the bridge would hand to the claimant, it gets, until the owner speaks again.
fn forged(lab: &mut Lab) -> Result<()> {
    bring_up(lab)?;
    lab.ping_all_pairs(3)?;
    lab.host_mut(1).attach_pod()?;
    let (a, b) = (lab.host(0).pod()?, lab.host(1));
    let [owner, claimant] = b.pods() else { bail!("{} pods, not two", b.pods().len()) };
    let mac = owner.netns.mac("eth0")?;
    let claimants = claimant.netns.mac("eth0")?;
    let ping = || Ping::new(&a.netns, owner.address).count(5).patience(Duration::from_millis(300)).run();
    let received = || -> Result<u64> {
        let text = claimant.netns.ip("-s -j link show dev eth0")?;
        let json: serde_json::Value = serde_json::from_str(&text)?;
        json[0]["stats64"]["rx"]["packets"].as_u64().with_context(|| format!("no packets in {text}"))
    };
    ensure!(ping()?.lost() == 0, "the owner is not reached before anybody claims its address");

    let speak =
        |pod: &Pod| Ping::new(&pod.netns, pod.gateway).count(1).patience(Duration::from_secs(1)).run();
    // The owner is silent: what it would answer is dropped, so that nothing takes the claim back.
    owner.netns.output("tc qdisc add dev eth0 root tbf rate 8bit burst 1 limit 1")?;
    claimant.netns.ip(&format!("link set eth0 address {mac}"))?;
    speak(claimant)?;
    let entry = |port: &str| -> Result<bool> {
        let entries = b.netns().output("bridge fdb show br cni0")?;
        Ok(entries
            .lines()
            .any(|line| line.starts_with(&format!("{mac} dev {port} ")) && !line.contains("permanent")))
    };
    let started = Instant::now();
    while !entry(&claimant.port)? {
        ensure!(started.elapsed() < SOON, "the bridge does not believe the claimant");
    }
    // As the bridge, so the shortcut, within the time it takes to hear of it.
    let before = received()?;
    let started = Instant::now();
    while received()? == before {
        ping()?;
        ensure!(started.elapsed() < SOON, "the shortcut goes on to a port the bridge has left");
    }

    claimant.netns.ip(&format!("link set eth0 address {claimants}"))?;
    owner.netns.output("tc qdisc del dev eth0 root")?;
    speak(owner)?;
    let started = Instant::now();
    while ping()?.lost() > 0 {
        ensure!(started.elapsed() < SOON, "the owner spoke and is not reached");
    }
    let before = received()?;
    ensure!(ping()?.lost() == 0 && received()? == before, "packets still go to the claimant, too");
    ensure!(b.status()?.path() == "tc+bridge", "{}", b.status()?.reasons());
    Ok(())
}

/// More than the map of pods holds.
const MANY: u32 = 4200;

fn many(lab: &mut Lab) -> Result<()> {
    bring_up(lab)?;
    lab.ping_all_pairs(3)?;
    let b = lab.host(1);
    let (mac, port) = (b.pod()?.netns.mac("eth0")?, &b.pod()?.port);
    // Unknown to the bridge: it asks all ports.
    b.netns().output(&format!("bridge fdb del {mac} dev {port} master"))?;
    lab.ping_all_pairs(3)?;
    ensure!(average_received(lab)? > 5000, "the pod has spoken and is not passed on directly");

    // Lower addresses than the pod's, which the map takes first.
    let batch = b.files().folder.join("fdb");
    let entries = |verb: &str| {
        let one = |number: u32| {
            let [_, x, y, z] = number.to_be_bytes();
            format!("fdb {verb} 00:00:01:{x:02x}:{y:02x}:{z:02x} dev {port} master static\n")
        };
        (0..MANY).map(one).collect::<String>()
    };
    std::fs::write(&batch, entries("add"))?;
    b.netns().output(&format!("bridge -batch {}", batch.display()))?;
    let said = "addresses, 4096 are passed on directly and the rest by the bridge";
    let started = Instant::now();
    while !b.agent()?.log().contains(said) {
        ensure!(started.elapsed() < SOON, "nobody says that there are too many");
        std::thread::sleep(Duration::from_millis(50));
    }
    lab.ping_all_pairs(5)?;
    ensure!(b.status()?.path() == "tc+bridge", "{}", b.status()?.reasons());
    let average = average_received(lab)?;
    ensure!(average < 5000, "packets of {average} bytes: the map holds more than it should");

    std::fs::write(&batch, entries("del"))?;
    b.netns().output(&format!("bridge -batch {}", batch.display()))?;
    let started = Instant::now();
    while average_received(lab)? < 5000 {
        ensure!(started.elapsed() < SOON, "there is room again and the pod is not passed on directly");
    }
    lab.ping_all_pairs(2)
}

fn walk(folder: &std::path::Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            names.extend(walk(&path)?);
        }
        names.push(path.file_name().unwrap_or_default().to_string_lossy().into_owned());
    }
    Ok(names)
}

/// Legal, and refused all the same: every place at the bridge's hook is taken.
fn refused(lab: &mut Lab) -> Result<()> {
    lab.host(1).netns().ip("link add cni0 type bridge")?;
    let others = bpf::fill(lab.host(1).netns(), "cni0", TcHook::Egress)?;
    for index in 0..2 {
        lab.host_mut(index).start_agent(&AgentOptions::new()?.datapath("auto"))?;
    }
    lab.wait_connected()?;
    let env = lab.host(1).agent()?.subnet_env()?;
    lab.host(1).netns().ip(&format!("addr add {}/{} dev cni0", env.gateway, env.prefix))?;
    lab.host(1).netns().ip("link set cni0 up")?;
    for index in 0..2 {
        lab.host_mut(index).attach_pod()?;
    }
    let fits = |status: &Status| {
        status.ready && status.path() == "tc+gro" && status.reasons().contains("no shortcut past the bridge")
    };
    let agent = lab.host(1).agent()?;
    agent.wait_status("the reason", fits)?;
    let repairs = || agent.log().matches("needs repair").count();
    let before = repairs();
    std::thread::sleep(Duration::from_secs(2));
    ensure!(repairs() == before, "{} repairs in two seconds:\n{}", repairs() - before, agent.log());
    ensure!(fits(&agent.status()?), "{:?}", agent.status()?);
    drop(others);
    lab.ping_all_pairs(3)
}

fn routed(lab: &mut Lab) -> Result<()> {
    lab.bring_up(&["auto"; 2])?;
    lab.ping_all_pairs(3)?;
    let status = lab.host(0).status()?;
    ensure!(status.path() == "tc+gro", "{}", status.reasons());
    ensure!(status.reasons().contains("no bridge has an address in"), "{}", status.reasons());
    Ok(())
}
