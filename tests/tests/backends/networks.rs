//! Several networks in one agent (contract §5.4).

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use flannel_tests::{
    agent::{AgentOptions, SubnetEnv},
    agent_binary,
    lease_server::LeaseServer,
    probe::ping::Ping,
    scenario::scenario,
    topology::{Host, Lab},
};
use libtest_mimic::Trial;

const LIMIT: Duration = Duration::from_secs(20);

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        scenario(
            "networks_come_change_and_go_without_hurting_each_other",
            Lab::new("networks").without_config(),
            come_and_go,
        ),
        scenario("a_network_is_kept_over_a_restart", Lab::new("networks-again").without_config(), again),
        scenario("networks_of_a_server_are_joined", Lab::new("networks-served").without_config(), served),
    ]
}

fn folder(host: &Host) -> PathBuf {
    host.files().folder.join("networks")
}

fn options(host: &Host) -> Result<AgentOptions> {
    Ok(AgentOptions::new()?.flag(format!("--subnet-dir={}", folder(host).display())))
}

fn env(host: &Host, network: &str) -> Result<SubnetEnv> {
    SubnetEnv::read(&folder(host).join(format!("{network}.env")))
}

/// Waits until `network` has a subnet in a range that begins with `range`.
fn leased(host: &Host, network: &str, range: &str) -> Result<SubnetEnv> {
    let started = Instant::now();
    loop {
        match env(host, network) {
            Ok(env) if env.key().starts_with(range) => return Ok(env),
            other => ensure!(
                started.elapsed() < LIMIT,
                "{}: no lease of {network} in {range}: {other:?}",
                host.name()
            ),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The tunnel device that carries a subnet has its first address: pings it from the other host.
fn reach(from: &Host, to: &SubnetEnv) -> Result<()> {
    let base = to.base();
    let started = Instant::now();
    loop {
        let report = Ping::new(from.netns(), base).count(3).interval(Duration::from_millis(5)).run()?;
        if report.lost() == 0 {
            return Ok(());
        }
        ensure!(started.elapsed() < LIMIT, "{} → {base}: {report}", from.name());
    }
}

fn start(lab: &mut Lab, flags: &[&str]) -> Result<()> {
    for index in 0..lab.hosts().len() {
        let mut options = options(lab.host(index))?;
        for flag in flags {
            options = options.flag(*flag);
        }
        lab.host_mut(index).start_agent(&options)?;
    }
    Ok(())
}

fn come_and_go(lab: &mut Lab) -> Result<()> {
    let store = lab.datastore();
    store.put("blue/config", r#"{"Network":"10.1.0.0/16"}"#)?;
    store.put("red/config", r#"{"Network":"10.2.0.0/16","Backend":{"Type":"host-gw"}}"#)?;
    store.put("green/config", r#"{"Network":"10.3.0.0/16"}"#)?;
    start(lab, &["--watch-networks"])?;
    for host in lab.hosts() {
        leased(host, "red", "10.2.")?;
    }
    // Two udp networks want one port: one of them has it, the other says so, and red does not care.
    lab.host(0).agent()?.wait_not_ready("on one node every udp network needs its own, such as 8286")?;
    lab.datastore()
        .put("green/config", r#"{"Network":"10.3.0.0/16","Backend":{"Type":"udp","Port":8286}}"#)?;
    for index in 0..2 {
        lab.host_mut(index).agent_mut()?.wait_ready()?;
    }
    let networks = [("blue", "10.1."), ("green", "10.3.")];
    for (name, range) in networks {
        let (one, two) = (leased(lab.host(0), name, range)?, leased(lab.host(1), name, range)?);
        reach(lab.host(0), &two)?;
        reach(lab.host(1), &one)?;
    }
    let red = leased(lab.host(1), "red", "10.2.")?;
    lab.host(0).wait_output("ip route", &format!("{} via 10.99.0.12", red.key().replace('-', "/")), LIMIT)?;

    // Side by side on one interface, neither takes the other's program for a stranger's.
    lab.host(0).agent()?.wait_log("all networks are ready")?;
    let before = lab.host(0).agent()?.log().lines().count();
    std::thread::sleep(Duration::from_secs(2));
    let log = lab.host(0).agent()?.log();
    ensure!(log.lines().count() == before, "they don't rest:\n{log}");
    ensure!(!log.contains("in front of"), "one displaced the other:\n{log}");

    // An edit that can't be used changes nothing; one that can takes effect; nobody else notices.
    let green = leased(lab.host(1), "green", "10.3.")?;
    let watched = Ping::new(lab.host(0).netns(), green.base())
        .count(100_000)
        .interval(Duration::from_millis(5))
        .start()?;
    lab.datastore().put("blue/config", r#"{"Network":"10.1.0.0/16","SubnetLen":99}"#)?;
    lab.datastore().put("blue/config", r#"{"Network":"10.9.0.0/16","SubnetLen":26}"#)?;
    let (one, two) = (leased(lab.host(0), "blue", "10.9.")?, leased(lab.host(1), "blue", "10.9.")?);
    ensure!(two.key().ends_with("-26"), "{}", two.key());
    reach(lab.host(0), &two)?;
    reach(lab.host(1), &one)?;
    ensure!(!lab.host(0).netns().output("ip addr")?.contains("10.1."), "blue's old device is still there");

    // A network that is deleted is left; its file stays.
    lab.datastore().delete("red/config")?;
    let started = Instant::now();
    while lab.host(0).netns().output("ip route")?.contains("10.2.") {
        ensure!(started.elapsed() < LIMIT, "red's routes stay");
        std::thread::sleep(Duration::from_millis(20));
    }
    env(lab.host(0), "red")?;
    let report = watched.stop()?;
    ensure!(report.lost() == 0, "green noticed it: {report}");
    lab.host_mut(0).agent_mut()?.wait_ready()
}

fn again(lab: &mut Lab) -> Result<()> {
    lab.datastore().put("blue/config", r#"{"Network":"10.1.0.0/16"}"#)?;
    lab.datastore().put("other/config", r#"{"Network":"10.2.0.0/16","Backend":{"Type":"alloc"}}"#)?;
    let flags = ["--networks=blue,later"];
    start(lab, &flags)?;
    let (one, two) = (leased(lab.host(0), "blue", "10.1.")?, leased(lab.host(1), "blue", "10.1.")?);
    reach(lab.host(0), &two)?;
    // From then on packets need no agent.
    for host in lab.hosts() {
        host.agent()?.wait_log("udp datapath tc+gro on eth0")?;
    }
    let ping = Ping::new(lab.host(0).netns(), two.base())
        .count(100_000)
        .interval(Duration::from_millis(5))
        .start()?;
    for index in 0..2 {
        lab.host_mut(index).agent_mut()?.crash()?;
        let options = options(lab.host(index))?.flag(flags[0]);
        lab.host_mut(index).start_agent(&options)?;
    }
    // A network that is named and not there is waited for, one that is not named is not joined.
    lab.host(0).agent()?.wait_not_ready("network later: no network configuration")?;
    lab.datastore().put("later/config", r#"{"Network":"10.3.0.0/16","Backend":{"Type":"alloc"}}"#)?;
    for index in 0..2 {
        lab.host_mut(index).agent_mut()?.wait_ready()?;
    }
    let report = ping.stop()?;
    ensure!(report.lost() == 0, "{report}");
    ensure!(env(lab.host(0), "blue")?.key() == one.key(), "another subnet");
    ensure!(env(lab.host(0), "other").is_err(), "a network that is not named was joined");
    leased(lab.host(0), "later", "10.3.")?;

    // `status` wants to know which.
    let binary = agent_binary()?;
    let socket = lab.host(0).files().socket();
    let ask = |more: &[&str]| {
        std::process::Command::new(&binary).args(["status", "--socket"]).arg(&socket).args(more).output()
    };
    let which = String::from_utf8_lossy(&ask(&[])?.stderr).into_owned();
    ensure!(which.contains("name one: --network=blue or --network=later"), "{which}");
    let blue = String::from_utf8_lossy(&ask(&["--network=blue"])?.stdout).into_owned();
    ensure!(blue.contains("network 10.1.0.0/16"), "{blue}");
    Ok(())
}

fn served(lab: &mut Lab) -> Result<()> {
    let files = lab.folder().join("served");
    std::fs::create_dir_all(&files)?;
    std::fs::write(files.join("blue.json"), r#"{"Network":"10.1.0.0/16"}"#)?;
    let address = "10.99.0.1:8888".parse()?;
    let mut server = LeaseServer::new(lab.switch(), &agent_binary()?, address, lab.folder()).with_flags(&[
        format!("--store=embedded:{}", lab.folder().join("leases.redb").display()),
        format!("--net-config-path={}", files.display()),
    ]);
    server.restart()?;
    start(lab, &[&format!("--remote={address}"), "--watch-networks"])?;
    let two = leased(lab.host(1), "blue", "10.1.")?;
    leased(lab.host(0), "blue", "10.1.")?;
    reach(lab.host(0), &two)?;
    // A new file is a new network, for nodes that follow them.
    std::fs::write(files.join("red.json"), r#"{"Network":"10.2.0.0/16","Backend":{"Type":"alloc"}}"#)?;
    leased(lab.host(0), "red", "10.2.")?;
    std::fs::remove_file(files.join("blue.json"))?;
    let started = Instant::now();
    while lab.host(0).netns().output("ip addr")?.contains("10.1.") {
        ensure!(started.elapsed() < LIMIT, "blue's device stays");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
