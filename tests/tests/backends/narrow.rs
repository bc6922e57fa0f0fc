//! A link on the way that carries less than the tunnel: it is found out, per peer, and whoever sends is told.

use std::{
    net::SocketAddrV4,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use flannel_tests::{
    agent::{AgentOptions, PeerCount, Status},
    probe::{
        capture::{Capture, ipv4},
        ping::Ping,
        tcp::TcpPath,
    },
    proxy::Proxies,
    scenario::scenario,
    topology::{Lab, Underlay},
};
use libtest_mimic::Trial;

use crate::traffic::PORT;

const LINK: u32 = 1400;
const PATH: u32 = LINK - 28;
const STREAM: u64 = 16 << 20;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for tier in ["xdp", "tc", "tun"] {
        trials.push(scenario(
            format!("a_narrow_link_is_learned_from_icmp_over_{tier}"),
            Lab::new(&format!("narrow-{tier}")).underlay(Underlay::Narrow(LINK)),
            move |lab| {
                lab.bring_up(&[tier; 2])?;
                learned(lab, "said by ICMP that its next link carries 1400")
            },
        ));
        trials.push(scenario(
            format!("a_narrow_link_whose_icmp_is_filtered_is_found_by_probes_over_{tier}"),
            Lab::new(&format!("silent-{tier}")).underlay(Underlay::Narrow(LINK)),
            move |lab| {
                for router in lab.routers() {
                    router.iptables("-A OUTPUT -p icmp --icmp-type fragmentation-needed -j DROP")?;
                }
                lab.bring_up(&[tier; 2])?;
                learned(lab, "answered, larger probes were not")
            },
        ));
    }
    for tier in ["xdp", "tc", "tun"] {
        trials.push(scenario(
            format!("a_narrow_link_to_a_node_of_the_original_is_found_over_{tier}"),
            Lab::new(&format!("original-{tier}")).underlay(Underlay::Narrow(LINK)),
            move |lab| {
                let options = AgentOptions::new()?.datapath(tier);
                let _original = Proxies::beside_an_agent(lab, &options)?;
                // It sends what its own kernel has cut where it must: only this direction is ours to say.
                transfer(lab).context("before the path is known")?;
                let fits = |status: &Status| peer(status).is_some_and(|peer| peer.path_mtu == Some(PATH));
                let status = lab.host(0).agent()?.wait_status("the path's MTU", fits)?;
                let said = peer(&status).and_then(|peer| peer.path_mtu_reason.clone()).unwrap_or_default();
                ensure!(said.contains("said by ICMP"), "{said}");
                no_fragments(lab)
            },
        ));
    }
    trials.push(scenario(
        "a_path_that_became_wide_is_used_whole_again".to_owned(),
        Lab::new("wide-again").underlay(Underlay::Narrow(LINK)),
        |lab| {
            for host in lab.hosts() {
                host.netns().sysctl("net.ipv4.route.mtu_expires", "5")?;
            }
            lab.bring_up(&["xdp"; 2])?;
            wide_again(lab)
        },
    ));
    trials.push(scenario(
        "a_former_runs_paths_stay_narrow_over_a_restart".to_owned(),
        Lab::new("narrow-restart").underlay(Underlay::Narrow(LINK)),
        |lab| {
            lab.bring_up(&["xdp"; 2])?;
            restart(lab)
        },
    ));
    trials.push(scenario(
        "answers_are_heard_behind_a_firewall_that_drops_what_conntrack_has_not_seen".to_owned(),
        Lab::new("narrow-firewall").underlay(Underlay::Narrow(LINK)),
        |lab| {
            for host in lab.hosts() {
                host.netns().iptables("-A INPUT -m conntrack --ctstate INVALID -j DROP")?;
            }
            lab.bring_up(&["xdp"; 2])?;
            transfer(lab)?;
            let path = |status: &Status| peer(status).is_some_and(|peer| peer.path_mtu == Some(PATH));
            lab.host(0).agent()?.wait_status("the path's MTU", path).map(drop)
        },
    ));
    trials.push(scenario(
        "a_fixed_mtu_sends_no_probes".to_owned(),
        Lab::new("narrow-fixed").underlay(Underlay::Narrow(LINK)),
        |lab| {
            let options = AgentOptions::new()?.flag(format!("--udp-mtu={PATH}"));
            lab.bring_up_with(&[options.clone(), options])?;
            let capture = Capture::start(lab.switch(), "sw-h1")?;
            transfer(lab)?;
            sleep(Duration::from_secs(2));
            let probes = capture.finish()?.iter().filter_map(|frame| ipv4(frame)).filter(is_probe).count();
            ensure!(probes == 0, "{probes} probes");
            no_fragments(lab)
        },
    ));
    trials
}

fn peer(status: &Status) -> Option<&PeerCount> {
    status.tunnels.first()?.peers.first()
}

fn transfer(lab: &Lab) -> Result<()> {
    let (a, b) = (lab.host(0).pod()?, lab.host(1).pod()?);
    let path = TcpPath::new(&a.netns, &b.netns, SocketAddrV4::new(b.address, PORT));
    path.transfer(STREAM).map(drop)
}

/// Datagrams to the tunnel's port that must not be fragmented.
fn is_probe(packet: &&[u8]) -> bool {
    packet.get(6).is_some_and(|flags| flags & 0x40 != 0)
        && packet.get(9) == Some(&17)
        && packet.get(22..24) == Some(8285_u16.to_be_bytes().as_slice())
}

fn is_fragment(packet: &&[u8]) -> bool {
    packet.get(6..8).is_some_and(|field| u16::from_be_bytes([field[0], field[1]]) & 0x3fff != 0)
}

/// Nothing is cut on the narrow link while a large transfer passes.
fn no_fragments(lab: &Lab) -> Result<()> {
    let capture = Capture::start(lab.switch(), "narrow")?;
    transfer(lab)?;
    let frames = capture.finish()?;
    let packets: Vec<&[u8]> = frames.iter().filter_map(|frame| ipv4(frame)).collect();
    let fragments = packets.iter().filter(|packet| is_fragment(packet)).count();
    ensure!(packets.len() > 100, "only {} packets were seen", packets.len());
    ensure!(fragments == 0, "{fragments} fragments among {} packets", packets.len());
    Ok(())
}

fn learned(lab: &mut Lab, reason: &str) -> Result<()> {
    let whole = lab.host(0).status()?;
    let before = peer(&whole).context("no peer")?;
    ensure!(before.path_mtu == Some(1472), "{before:?}");
    transfer(lab).context("before the path is known")?;
    let started = Instant::now();
    for host in lab.hosts() {
        let fits = |status: &Status| peer(status).is_some_and(|peer| peer.path_mtu == Some(PATH));
        let status = host.agent()?.wait_status("the path's MTU", fits)?;
        let said = peer(&status).and_then(|peer| peer.path_mtu_reason.as_deref()).unwrap_or_default();
        ensure!(said.contains(reason), "{said}");
        ensure!(status.mtu == 1472, "the tunnel's own MTU is {}", status.mtu);
    }
    let subnet = lab.host(1).agent()?.subnet_env()?.base();
    lab.host(0).wait_output(
        &format!("ip route show {subnet}/24"),
        "dev flannel0 proto 85 mtu 1372",
        SECOND,
    )?;
    no_fragments(lab).with_context(|| format!("known after {:?}", started.elapsed()))?;

    // Whoever sends more is told by its own kernel.
    let (host, to) = (lab.host(0).netns(), lab.host(1).pod()?.address);
    let told = Ping::new(host, to).packet(1472).dont_fragment().count(1).run()?;
    ensure!(told.received == 0 && told.said().contains("mtu=1372"), "{told}");
    // A pod that has sent nothing yet, and so was told nothing.
    let fresh = lab.host_mut(0).attach_pod()?.netns.clone();
    let told = Ping::new(&fresh, to).packet(1472).dont_fragment().count(1).run()?;
    ensure!(told.received == 0 && told.said().contains("(mtu = 1372)"), "{told}");
    let (pod, host) = (&lab.host(0).pod()?.netns, lab.host(0).netns());
    let full = Ping::new(pod, to).packet(1372).dont_fragment().run()?;
    ensure!(full.lost() == 0, "{full}");
    let cut = Ping::new(host, to).packet(3000).run()?;
    ensure!(cut.lost() == 0, "{cut}");
    let log = lab.host(0).agent()?.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("MTU was 1472 and is 1372")).collect();
    ensure!(lines.len() == 1 && lines[0].contains(reason), "{lines:?}");
    Ok(())
}

const SECOND: Duration = Duration::from_secs(1);

fn wide_again(lab: &mut Lab) -> Result<()> {
    transfer(lab)?;
    let narrow = |status: &Status| peer(status).is_some_and(|peer| peer.path_mtu == Some(PATH));
    lab.host(0).agent()?.wait_status("the path's MTU", narrow)?;
    for router in lab.routers() {
        router.ip("link set narrow mtu 1500")?;
    }
    let (pod, to) = (&lab.host(0).pod()?.netns, lab.host(1).pod()?.address);
    let traffic = Ping::new(pod, to).count(2000).interval(Duration::from_millis(10)).start()?;
    let wide = |status: &Status| peer(status).is_some_and(|peer| peer.path_mtu == Some(1472));
    lab.host(0).agent()?.wait_status("the whole MTU again", wide)?;
    traffic.stop()?;
    let subnet = lab.host(1).agent()?.subnet_env()?.base();
    let routes = lab.host(0).netns().ip(&format!("route show {subnet}/24"))?;
    ensure!(!routes.contains("mtu"), "{routes}");
    // The first pod's kernel may still remember the former path, a new one's can't.
    let fresh = lab.host_mut(0).attach_pod()?.netns.clone();
    let full = Ping::new(&fresh, to).packet(1472).dont_fragment().run()?;
    ensure!(full.lost() == 0, "{full}");
    Ok(())
}

fn restart(lab: &mut Lab) -> Result<()> {
    transfer(lab)?;
    let narrow = |status: &Status| peer(status).is_some_and(|peer| peer.path_mtu == Some(PATH));
    lab.host(0).agent()?.wait_status("the path's MTU", narrow)?;
    lab.host_mut(0).agent_mut()?.crash()?;
    let options = AgentOptions::new()?.datapath("xdp");
    lab.host_mut(0).start_agent(&options)?.wait_peers(1)?;
    let status = lab.host(0).status()?;
    ensure!(peer(&status).is_some_and(|peer| peer.path_mtu == Some(PATH)), "{status:?}");
    no_fragments(lab)?;
    let log = lab.host(0).agent()?.log();
    ensure!(log.matches("MTU was").count() == 1, "{log}");
    Ok(())
}
