//! The interface under the overlay changes while the agent runs: its MTU, its address, itself.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use flannel_tests::{
    agent::{AgentOptions, Status},
    probe::ping::Ping,
    scenario::{TIERS, over, scenario},
    topology::{Host, Lab},
};
use libtest_mimic::Trial;

use crate::{SOON, damage::reachable};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(over(&TIERS, "the_tunnel_follows_the_underlays_mtu_within_a_second", "mtu", mtu_changes));
    trials.extend(over(&TIERS, "a_renumbered_node_keeps_its_subnet", "renumber", renumbered));
    trials.extend(over(&TIERS, "an_address_that_is_gone_for_a_while_is_waited_for", "address", |lab, _| {
        address_away(lab)
    }));
    trials.extend(over(
        &TIERS,
        "an_underlay_that_was_long_gone_carries_within_a_second_of_its_return",
        "gone",
        long_gone,
    ));
    trials.push(scenario(
        "a_changed_mtu_is_followed_at_once_also_while_other_news_is_held_back".to_owned(),
        Lab::new("mtu-at-once"),
        |lab| {
            lab.bring_up(&["tc"; 2])?;
            mtu_at_once(lab.host(1))
        },
    ));
    trials.push(scenario(
        "xdp_for_large_frames_gives_way_to_the_plain_build_when_the_mtu_falls".to_owned(),
        Lab::new("mtu-frags").mtu(9000),
        |lab| {
            lab.bring_up(&["xdp"; 2])?;
            frags_to_plain(lab)
        },
    ));
    trials.push(scenario(
        "a_fixed_mtu_is_kept_cut_to_what_fits_and_refused_at_start_when_it_does_not".to_owned(),
        Lab::new("mtu-fixed"),
        fixed,
    ));
    trials
}

fn device_mtu(host: &Host, device: &str) -> Result<u32> {
    let text = host.netns().output(&format!("ip -o link show dev {device}"))?;
    let mtu = text.split_once(" mtu ").and_then(|(_, rest)| rest.split(' ').next()).context("no mtu")?;
    mtu.parse().with_context(|| text.clone())
}

/// Waits until the host looks as an underlay of `mtu` bytes wants it; how long that took.
fn follows(host: &Host, tier: &str, mtu: u32) -> Result<Duration> {
    let (started, wanted) = (Instant::now(), mtu - 28);
    // What goes through the door has an outer header, which is longer by 22 bytes than the tunnel's.
    let devices: &[(&str, u32)] =
        if tier == "tc" { &[("flannel0", 0), ("flannel0d", 50)] } else { &[("flannel0", 0)] };
    loop {
        // A device that is made anew is away for a moment.
        let mtu_of = |(device, more): &(&str, u32)| {
            device_mtu(host, device).map_or(0, |mtu| mtu.saturating_sub(*more))
        };
        let mtus: Vec<u32> = devices.iter().map(mtu_of).collect();
        let env = host.agent()?.subnet_env()?.mtu;
        let status = host.status()?;
        if mtus.iter().chain([&env, &status.mtu]).all(|mtu| *mtu == wanted) && status.ready {
            ensure!(status.tier() == tier, "{}", status.reasons());
            return Ok(started.elapsed());
        }
        ensure!(
            started.elapsed() < SOON,
            "not at {wanted} within {SOON:?}: {devices:?} {mtus:?}, subnet.env {env}, status {status:?}"
        );
    }
}

/// A look at the host is followed by no other for 400 ms, unless an MTU changes: packets that no longer fit are lost until the
/// tunnel has followed.
fn mtu_at_once(host: &Host) -> Result<()> {
    const AT_ONCE: Duration = Duration::from_millis(200);
    let mut times = Vec::new();
    for mtu in [1400, 1500, 1300, 1500, 1400, 1500, 1300] {
        sleep(Duration::from_millis(600));
        // Brings a look after 50 ms, and begins the pause.
        host.netns().ip("addr add 192.0.2.77/32 dev lo")?;
        sleep(Duration::from_millis(100));
        let started = Instant::now();
        host.netns().ip(&format!("link set eth0 mtu {mtu}"))?;
        while device_mtu(host, "flannel0")? != mtu - 28 {
            ensure!(started.elapsed() < SOON, "flannel0 does not follow {mtu} within {SOON:?}");
        }
        times.push(started.elapsed());
        host.netns().ip("addr del 192.0.2.77/32 dev lo")?;
    }
    times.sort();
    println!("flannel0 follows after {times:?}");
    ensure!(
        times[times.len() / 2] < AT_ONCE,
        "flannel0 follows after {times:?}, {AT_ONCE:?} or less is right"
    );
    Ok(())
}

/// Down and up again, without a ping lost.
fn mtu_changes(lab: &mut Lab, tier: &str) -> Result<()> {
    let (a, b) = (lab.host(0).pod()?, lab.host(1));
    let pings =
        Ping::new(&a.netns, b.pod()?.address).count(300).interval(Duration::from_millis(10)).start()?;
    for mtu in [1400, 1500, 1300, 1500] {
        b.netns().ip(&format!("link set eth0 mtu {mtu}"))?;
        follows(b, tier, mtu)?;
    }
    let report = pings.wait()?;
    ensure!(report.lost() == 0, "{report}");
    lab.ping_all_pairs(5)?;
    let log = lab.host(1).agent()?.log();
    ensure!(log.contains("FLANNEL_MTU was 1472 and is 1372; pods made before keep theirs"), "{log}");
    Ok(())
}

fn renumbered(lab: &mut Lab, tier: &str) -> Result<()> {
    let key = lab.host(1).agent()?.subnet_env()?.key();
    let host = lab.host(1);
    host.netns().ip(&format!("addr del {}/24 dev eth0", host.address()))?;
    sleep(Duration::from_millis(500));
    host.netns().ip("addr add 10.99.0.77/24 dev eth0")?;
    host.netns().ip("route replace default via 10.99.0.1 dev eth0")?;
    let took = reachable(lab, Duration::from_secs(5)).context("after the node was renumbered")?;
    ensure!(lab.host(1).agent()?.subnet_env()?.key() == key, "another subnet");
    let leases = lab.datastore().leases()?;
    let (_, value) = leases.iter().find(|(name, _)| *name == key).with_context(|| format!("{leases:?}"))?;
    ensure!(value.contains(r#""PublicIP":"10.99.0.77""#), "{value}");
    ensure!(leases.len() == 2, "{leases:?}");
    let peer = lab.host(0).status()?;
    let peer = peer.peers.first().context("no peer")?;
    ensure!(peer.public_ip == "10.99.0.77", "{peer:?}");
    lab.host(1).agent()?.wait_status("ready on its new address", |status| status.ready)?;
    ensure!(lab.host(1).status()?.tier() == tier);
    lab.ping_all_pairs(5).with_context(|| format!("reachable after {took:?}"))
}

fn address_away(lab: &mut Lab) -> Result<()> {
    let host = lab.host(1);
    host.netns().ip(&format!("addr del {}/24 dev eth0", host.address()))?;
    let away = |status: &Status| {
        !status.ready && status.not_ready.iter().any(|r| r.contains("has lost its address"))
    };
    host.agent()?.wait_status("that it says what is missing", away)?;
    let (code, body) = host.agent()?.readyz()?;
    ensure!(code == 503 && body.contains("eth0 has lost its address 10.99.0.12"), "{code} {body}");
    // Long enough for anything that is tried again to be tried seldom.
    sleep(Duration::from_secs(6));
    host.netns().ip(&format!("addr add {}/24 dev eth0", host.address()))?;
    host.netns().ip("route replace default via 10.99.0.1 dev eth0")?;
    reachable(lab, SOON)?;
    lab.ping_all_pairs(5)?;
    lab.host(1).agent()?.wait_status("ready again", |status| status.ready)?;
    Ok(())
}

fn long_gone(lab: &mut Lab, tier: &str) -> Result<()> {
    let host = lab.host(1);
    let (address, mac) = (host.address(), host.netns().mac("eth0")?);
    host.netns().ip("link del eth0")?;
    let gone = |status: &Status| status.not_ready.iter().any(|reason| reason.contains("eth0 is gone"));
    host.agent()?.wait_status("that it says what is missing", gone)?;
    sleep(Duration::from_secs(6));
    // The same card: its neighbours still know the address.
    let peer = format!("type veth peer name sw-h2 mtu 1500 netns {}", lab.switch().path());
    host.netns().ip(&format!("link add eth0 address {mac} mtu 1500 {peer}"))?;
    lab.switch().ip("link set sw-h2 master br0 up")?;
    // A port of a bridge starts forwarding when the kernel's link watcher finds the time.
    let port = "bridge -d link show dev sw-h2";
    while !lab.switch().output(port)?.contains("state forwarding") {
        host.netns().ip("link set eth0 up")?;
        sleep(Duration::from_millis(10));
    }
    host.netns().ip(&format!("addr add {address}/24 dev eth0"))?;
    host.netns().ip("route replace default via 10.99.0.1 dev eth0")?;
    reachable(lab, SOON).context("after eth0 was made anew")?;
    lab.host(1).agent()?.wait_status(&format!("tier {tier} again"), |s| s.tier() == tier && s.ready)?;
    lab.ping_all_pairs(5)
}

fn frags_to_plain(lab: &mut Lab) -> Result<()> {
    const LARGE: &str = "build for frames over one page";
    let host = lab.host(1);
    ensure!(host.status()?.reasons().contains(LARGE), "{}", host.status()?.reasons());
    lab.switch().ip("link set sw-h2 mtu 1500")?;
    host.netns().ip("link set eth0 mtu 1500")?;
    follows(host, "xdp", 1500)?;
    ensure!(!host.status()?.reasons().contains(LARGE), "{}", host.status()?.reasons());
    lab.ping_all_pairs(5)
}

fn fixed(lab: &mut Lab) -> Result<()> {
    let options = AgentOptions::new()?.datapath("ebpf");
    lab.datastore().put_config(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"udp","MTU":1400}}"#)?;
    let flag = options.clone().env("FLANNELD_UDP_MTU", "1300");
    lab.bring_up_with(&[options.clone(), flag])?;
    for (number, mtu, field) in [(0, 1400, "Backend.MTU"), (1, 1300, "--udp-mtu")] {
        let status = lab.host(number).status()?;
        ensure!(status.mtu == mtu && status.mtu_reason == format!("fixed by {field}"), "{status:?}");
        ensure!(device_mtu(lab.host(number), "flannel0")? == mtu);
        ensure!(lab.host(number).agent()?.subnet_env()?.mtu == mtu);
    }
    let host = lab.host(0);
    host.netns().ip("link set eth0 mtu 1420")?;
    follows(host, host.status()?.tier(), 1420)?;
    let reason = host.status()?.mtu_reason;
    ensure!(reason.contains("the 1400 of Backend.MTU do not fit"), "{reason}");
    host.netns().ip("link set eth0 mtu 1500")?;
    host.agent()?.wait_status("the fixed MTU again", |status| status.mtu == 1400)?;

    let mut ended =
        lab.host_mut(0).start_agent(&options.flag("--udp-mtu=1480"))?.wait_end(Duration::from_secs(20));
    let log = lab.host(0).agent()?.log();
    ensure!(ended.as_mut().is_ok_and(|status| status.code() == Some(1)), "{ended:?}: {log}");
    let said = "--udp-mtu is 1480: eth0 has MTU 1500, of which 28 bytes are the tunnel's own headers; it must be from 68 \
                to 1472, or left out to follow the interface";
    ensure!(log.contains(said), "{log}");
    Ok(())
}
