//! The agent is killed, stopped and started again with traffic flowing.

use std::{
    env, fs,
    sync::Arc,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use flannel_common::LAYOUT_VERSION;
use flannel_tests::{
    agent::AgentOptions,
    probe::ping::Ping,
    scenario::{IN_KERNEL, scenario},
    topology::{Lab, NETWORK},
};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;

use crate::{SOON, Traffic};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for tier in IN_KERNEL {
        trials.push(scenario(
            format!("traffic_flows_on_while_the_agent_is_dead_and_through_its_return_over_{tier}"),
            Lab::new(&format!("killed-{tier}")),
            move |lab| killed(lab, tier),
        ));
        trials.push(scenario(
            format!("an_upgrade_to_another_map_layout_and_back_loses_nothing_over_{tier}"),
            Lab::new(&format!("upgraded-{tier}")),
            move |lab| upgraded(lab, tier),
        ));
    }
    trials.extend([
        scenario("in_user_space_traffic_returns_with_the_agent", Lab::new("killed-tun"), killed_tun),
        scenario("a_stopped_agent_leaves_the_host_as_it_is", Lab::new("stopped"), stopped),
        scenario("a_tier_can_change_under_traffic_in_both_directions", Lab::new("retiered"), change_tiers),
        scenario(
            "the_same_subnet_is_leased_again_by_address_and_by_subnet_env",
            Lab::new("again").hosts(1),
            same_subnet,
        ),
        scenario(
            "a_peer_that_left_while_the_agent_was_down_is_swept",
            Lab::new("swept").config(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#),
            swept,
        ),
        scenario("a_second_signal_kills_at_once", Lab::new("twice").hosts(1).without_config(), twice),
    ]);
    trials
}

/// How often the agent is killed and started again.
const RESTARTS: usize = 20;

fn killed(lab: &mut Lab, tier: &str) -> Result<()> {
    lab.bring_up(&[tier; 2])?;
    let options = AgentOptions::new()?.datapath(tier);
    let traffic = Traffic::start_every(lab, Duration::from_millis(1))?;
    let before = lab.host(1).status()?;
    for restart in 0..RESTARTS {
        // Now and then nobody is there for a while.
        let away = if restart % 5 == 0 { SOON } else { Duration::from_millis(50) };
        restart_agent(lab, &options, away)?;
    }
    traffic.stop_without_loss()?;
    let after = lab.host(1).status()?;
    ensure!(after.subnet == before.subnet && after.tier() == tier, "{before:?} became {after:?}");
    ensure!(
        after.counted("encapsulated") > before.counted("encapsulated"),
        "counters did not outlive the agent: {before:?} {after:?}"
    );
    Ok(())
}

/// Names the binary of an agent with another map layout, to be used in turn with this one's.
const OTHER_AGENT: &str = "FLANNEL_TESTS_OTHER_AGENT";

/// What another layout is to a new agent: the programs of its predecessor run with maps it must not use, pinned in a folder
/// that is not its own. Where no other agent is at hand, the folder is given another version's name.
fn upgraded(lab: &mut Lab, tier: &str) -> Result<()> {
    lab.bring_up(&[tier; 2])?;
    let this = AgentOptions::new()?.datapath(tier);
    let other = env::var_os(OTHER_AGENT).map(|path| AgentOptions::with_binary(path.into()).datapath(tier));
    let traffic = Traffic::start_every(lab, Duration::from_millis(1))?;
    for turn in 0..RESTARTS {
        match &other {
            Some(other) => {
                let options = if turn % 2 == 0 { other } else { &this };
                restart_agent(lab, options, Duration::from_millis(50))?;
            }
            None => {
                lab.host_mut(1).agent_mut()?.crash()?;
                let bpffs = lab.host(1).bpffs().context("no bpffs was mounted")?;
                let pins = bpffs.join("flannel/flannel0");
                let now = pins.join(format!("v{LAYOUT_VERSION}"));
                fs::rename(&now, pins.join(format!("v{}", if turn % 2 == 0 { 1 } else { 9999 })))
                    .with_context(|| format!("rename {}", now.display()))?;
                restart_agent(lab, &this, Duration::ZERO)?;
                let found: Vec<_> = fs::read_dir(&pins)?.collect::<Result<_, _>>()?;
                ensure!(found.len() == 1 && now.is_dir(), "{found:?}");
            }
        }
        let status = lab.host(1).status()?;
        ensure!(status.tier() == tier, "{}", status.reasons());
    }
    traffic.stop_without_loss()
}

/// Kills the second host's agent and starts another after `away`; how long it took until that one was ready and knew the
/// peers.
fn restart_agent(lab: &mut Lab, options: &AgentOptions, away: Duration) -> Result<Duration> {
    let killed = Instant::now();
    lab.host_mut(1).agent_mut()?.crash()?;
    sleep(away);
    lab.host_mut(1).start_agent(options)?;
    lab.wait_connected()?;
    let back = killed.elapsed();
    sleep(Duration::from_millis(100));
    Ok(back)
}

/// Nobody carries packets while no agent runs; as soon as one is ready, everything arrives.
fn killed_tun(lab: &mut Lab) -> Result<()> {
    lab.bring_up(&["tun"; 2])?;
    let options = AgentOptions::new()?.datapath("tun");
    let traffic = Traffic::start(lab)?;
    let (from, to) = (Arc::clone(&lab.host(0).pod()?.netns), lab.host(1).pod()?.address);
    for _ in 0..5 {
        let pings = Ping::new(&from, to).count(1_000_000).interval(Duration::from_millis(1)).start()?;
        sleep(Duration::from_millis(200));
        let back = restart_agent(lab, &options, Duration::ZERO)?;
        let report = pings.stop()?;
        println!("{} of {} pings lost, ready again {back:?} after the kill", report.lost(), report.sent);
        ensure!(u128::from(report.lost()) <= back.as_millis(), "lost on while an agent ran: {report}");
        lab.ping_all_pairs(5)?;
    }
    // TCP waits longer after each attempt, up to seconds; it must come back.
    sleep(Duration::from_secs(2));
    traffic.stop().map(drop)
}

fn stopped(lab: &mut Lab) -> Result<()> {
    lab.bring_up(&["auto"; 2])?;
    let host = lab.host(1);
    let env = fs::read(host.files().subnet_env()).context("read subnet.env")?;
    let leases = lab.datastore().leases()?;
    let traffic = Traffic::start(lab)?;
    lab.host(1).agent()?.signal(Signal::SIGTERM)?;
    let status = lab.host_mut(1).agent_mut()?.wait_end(Duration::from_secs(5))?;
    ensure!(status.code() == Some(0), "ended with {status}");
    sleep(SOON);
    traffic.stop_without_loss()?;
    let host = lab.host(1);
    ensure!(fs::read(host.files().subnet_env()).context("read subnet.env")? == env);
    ensure!(lab.datastore().leases()? == leases, "the lease was given up");
    ensure!(host.netns().has_device("flannel0"));
    Ok(())
}

fn change_tiers(lab: &mut Lab) -> Result<()> {
    lab.bring_up(&["xdp"; 2])?;
    let options = AgentOptions::new()?;
    let traffic = Traffic::start(lab)?;
    for tier in ["tc", "xdp", "tc", "xdp"] {
        lab.host_mut(1).start_agent(&options.clone().datapath(tier))?;
        lab.wait_connected()?;
        let taken = lab.host(1).status()?;
        ensure!(taken.tier() == tier, "asked for {tier}: {}", taken.reasons());
        sleep(Duration::from_millis(300));
    }
    let (lost, _) = traffic.stop()?;
    ensure!(lost == 0, "{lost} pings lost");
    Ok(())
}

fn same_subnet(lab: &mut Lab) -> Result<()> {
    let options = AgentOptions::new()?;
    lab.host_mut(0).start_agent(&options)?.wait_ready()?;
    let first = lab.host(0).agent()?.subnet_env()?;

    // By address: the lease in etcd names us.
    lab.host_mut(0).agent_mut()?.crash()?;
    fs::remove_file(lab.host(0).files().subnet_env()).context("remove subnet.env")?;
    lab.host_mut(0).start_agent(&options)?.wait_ready()?;
    ensure!(lab.host(0).agent()?.subnet_env()? == first);

    // By subnet.env: etcd has forgotten everything.
    lab.host_mut(0).agent_mut()?.crash()?;
    lab.datastore().delete(&format!("subnets/{}", first.key()))?;
    lab.host_mut(0).start_agent(&options)?.wait_ready()?;
    ensure!(lab.host(0).agent()?.subnet_env()? == first);
    ensure!(lab.datastore().leases()?.iter().any(|(key, _)| *key == first.key()));
    Ok(())
}

fn swept(lab: &mut Lab) -> Result<()> {
    let options = AgentOptions::new()?;
    lab.bring_up_with(&[options.clone(), options.clone()])?;
    let gone = lab.host(1).agent()?.subnet_env()?;
    lab.host_mut(0).agent_mut()?.crash()?;
    lab.host_mut(1).agent_mut()?.crash()?;
    lab.datastore().delete(&format!("subnets/{}", gone.key()))?;
    // Somebody else's route to somewhere else: not ours to sweep.
    lab.host(0).netns().ip("route add 10.77.0.0/24 via 10.99.0.1")?;
    ensure!(lab.host(0).netns().ip("route show")?.contains(&gone.base().to_string()));
    lab.host_mut(0).start_agent(&options)?.wait_ready()?;
    let routes = lab.host(0).netns().ip("route show")?;
    ensure!(
        !routes.contains(&gone.base().to_string()),
        "the route to a peer that left is still there:\n{routes}"
    );
    ensure!(routes.contains("10.77.0.0/24"), "a route that is not ours was swept:\n{routes}");
    ensure!(lab.host(0).status()?.network == NETWORK);
    let report = Ping::new(lab.host(0).netns(), lab.host(1).address()).run()?;
    ensure!(report.lost() == 0, "{report}");
    Ok(())
}

fn twice(lab: &mut Lab) -> Result<()> {
    // Waiting for a configuration that does not come.
    lab.host_mut(0).start_agent(&AgentOptions::new()?)?;
    sleep(SOON);
    lab.host(0).agent()?.signal(Signal::SIGINT)?;
    // Either the first was enough, or the second is.
    let _ = lab.host(0).agent()?.signal(Signal::SIGINT);
    lab.host_mut(0).agent_mut()?.wait_end(SOON).map(drop)
}
