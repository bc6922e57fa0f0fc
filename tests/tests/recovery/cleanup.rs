//! `flannel-agent cleanup`: everything of the agent's goes, everything else stays.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::Output,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use flannel_agent::host::udp::programs::inspect;
use flannel_tests::{
    agent::AgentOptions,
    agent_binary,
    scenario::{TIERS, scenario},
    topology::{Host, Lab},
};
use libtest_mimic::Trial;
use nix::{
    mount::{MsFlags, mount},
    net::if_::if_nametoindex,
    sys::signal::Signal,
};

const LIMIT: Duration = Duration::from_secs(30);

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> = TIERS
        .into_iter()
        .map(|tier| {
            scenario(
                format!("cleanup_takes_everything_of_ours_away_and_nothing_else_over_{tier}"),
                Lab::new(&format!("cleanup-{tier}")),
                move |lab| cleaned(lab, AgentOptions::new()?.datapath(tier)),
            )
        })
        .collect();
    trials.push(scenario(
        "cleanup_takes_the_routes_of_host_gw_away",
        Lab::new("cleanup-gw").config(r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#),
        |lab| cleaned(lab, AgentOptions::new()?),
    ));
    trials.push(scenario(
        "cleanup_takes_a_room_away_when_nothing_else_is_left_and_no_other_hosts",
        Lab::new("cleanup-room").hosts(1).without_etcd(),
        rooms,
    ));
    trials
}

/// Exit code, standard output, standard error.
type Said = (Option<i32>, String, String);

fn cleanup(host: &Host, flags: &[&str]) -> Result<Said> {
    cleanup_asking(host, &host.files().socket(), flags)
}

fn finds_nothing(host: &Host) -> Result<()> {
    let said = cleanup(host, &[])?;
    ensure!(said.1 == "nothing of flannel-agent's is on this host\n", "{said:?}");
    Ok(())
}

fn cleanup_asking(host: &Host, socket: &Path, flags: &[&str]) -> Result<Said> {
    let bpffs = host.bpffs().context("no bpffs was mounted")?;
    let Output { status, stdout, stderr } = host
        .netns()
        .command(agent_binary()?)
        .arg("cleanup")
        .arg(format!("--socket={}", socket.display()))
        .arg(format!("--bpffs-path={}", bpffs.display()))
        .args(flags)
        .output()
        .context("start flannel-agent cleanup")?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok((status.code(), text(stdout), text(stderr)))
}

/// Everything about a host that the agent could have touched, as text.
/// What the host looks like once that stands still: the kernel's link watcher says up to a second later that a device is up
/// (net/core/link_watch.c).
fn portrait(host: &Host) -> Result<String> {
    let started = Instant::now();
    let mut last = sketch(host)?;
    loop {
        sleep(Duration::from_millis(1200));
        let now = sketch(host)?;
        if now == last {
            return Ok(now);
        }
        ensure!(started.elapsed() < LIMIT, "it does not stand still:\n{last}\n{now}");
        last = now;
    }
}

fn sketch(host: &Host) -> Result<String> {
    let mut text = String::new();
    for command in [
        "ip -o link show",
        "ip -o addr show",
        "ip route show table all",
        "ip -6 route show table all proto 85",
        "ethtool -k eth0",
        "tc qdisc show",
        "tc filter show dev eth0 ingress",
        "iptables-save",
    ] {
        text += &host.netns().output(command).with_context(|| command.to_owned())?;
    }
    let hooks = host.netns().run(|| {
        let eth0 = if_nametoindex("eth0")?;
        // BPF_TCX_INGRESS, BPF_TCX_EGRESS
        Ok((inspect::tcx_programs(eth0, 46)?, inspect::tcx_programs(eth0, 47)?))
    })?;
    let pins = everything_below(host.bpffs().context("no bpffs was mounted")?)?;
    // Packet counts and times move by themselves.
    let lines = text.lines().filter(|line| !line.starts_with(['#', ':'])).collect::<Vec<_>>().join("\n");
    Ok(format!("{lines}\n{hooks:?}\n{pins:?}"))
}

fn everything_below(folder: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        found.push(path.display().to_string());
        if path.is_dir() {
            found.extend(everything_below(&path)?);
        }
    }
    found.sort();
    Ok(found)
}

fn cleaned(lab: &mut Lab, options: AgentOptions) -> Result<()> {
    // Others' things that look a little like ours.
    for command in [
        "ip tuntap add flannel9 mode tun",
        "ip tuntap add tun7 mode tun multi_queue vnet_hdr",
        "ip link add flannel8p type veth peer name other0",
        "ip route add 10.77.0.0/16 via 10.99.0.1",
        "ip route add 10.78.0.0/16 via 10.99.0.1 proto boot",
        "ip route add blackhole 10.79.0.0/16 proto 85",
        "tc qdisc add dev eth0 clsact",
        "tc filter add dev eth0 ingress priority 50 protocol ip u32 match u32 0 0 flowid 1:1",
    ] {
        lab.host(1).netns().output(command)?;
    }
    fs::create_dir(lab.host(1).bpffs().context("no bpffs")?.join("somebody")).context("make a folder")?;
    let before = portrait(lab.host(1))?;
    finds_nothing(lab.host(1))?;

    for index in 0..2 {
        lab.host_mut(index).start_agent(&options)?;
    }
    lab.wait_connected()?;
    let running = portrait(lab.host(1))?;
    ensure!(running != before);

    let (code, listed, said) = cleanup(lab.host(1), &["--dry-run"])?;
    ensure!(code == Some(0), "{code:?} {said}");
    ensure!(said.contains("nothing of this would be removed now: an agent (pid "), "{said}");
    let (code, removed, said) = cleanup(lab.host(1), &[])?;
    ensure!(code == Some(1) && removed.is_empty(), "{code:?} {removed}");
    ensure!(said.contains("it would put everything back, so stop it first"), "{said}");
    // An agent that answers elsewhere shows by the device it holds.
    if listed.contains("type tun") {
        let (code, _, said) = cleanup_asking(lab.host(1), Path::new("/nonexistent"), &[])?;
        ensure!(code == Some(1) && said.contains("a running process holds flannel0 open"), "{code:?} {said}");
    }
    ensure!(portrait(lab.host(1))? == running, "something was changed under a running agent");

    lab.host(1).agent()?.signal(Signal::SIGTERM)?;
    lab.host_mut(1).agent_mut()?.wait_end(Duration::from_secs(5))?;
    let host = lab.host(1);
    let env = fs::read(host.files().subnet_env()).context("read subnet.env")?;
    let (code, listed, said) = cleanup(host, &["--dry-run"])?;
    ensure!(code == Some(0) && said.is_empty(), "{code:?} {said}");
    let (code, removed, said) = cleanup(host, &[])?;
    ensure!(code == Some(0) && said.is_empty(), "{code:?} {said}");
    let announced: Vec<String> = listed.lines().map(|line| format!("removed {line}")).collect();
    ensure!(removed.lines().eq(announced.iter().map(String::as_str)), "{listed}\n{removed}");
    let after = portrait(host)?;
    ensure!(after == before, "before:\n{before}\nafter:\n{after}\nremoved:\n{removed}");
    ensure!(fs::read(host.files().subnet_env()).context("read subnet.env")? == env);
    finds_nothing(host)?;

    // And everything works as on a fresh host.
    lab.host_mut(1).start_agent(&options)?;
    lab.wait_connected()?;
    for index in 0..2 {
        lab.host_mut(index).attach_pod()?;
    }
    lab.ping_all_pairs(5)
}

/// Somebody took the devices and the pins away; or a container, with whose end the mount went, had them.
fn rooms(lab: &mut Lab) -> Result<()> {
    let host = lab.host(0);
    let number = fs::metadata(host.netns().path()).context("look at the host's namespace")?.ino();
    let room = |name: &str| PathBuf::from(format!("/run/flannel/{name}.room"));
    let others = [room("flannel3.1"), room(&format!("eth0.{number}"))];
    for other in &others {
        File::create_new(other).with_context(|| other.display().to_string())?;
    }
    let ours = room(&format!("flannel3.{number}"));
    for mounted in [true, false] {
        File::create_new(&ours).with_context(|| ours.display().to_string())?;
        if mounted {
            let none = None::<&str>;
            mount(Some(host.netns().path().as_str()), &ours, none, MsFlags::MS_BIND, none)?;
        }
        let line = format!("room {}\n", ours.display());
        let (code, listed, said) = cleanup(host, &["--dry-run"])?;
        ensure!(code == Some(0) && listed == line, "{code:?} {listed} {said}");
        let (code, removed, said) = cleanup(host, &[])?;
        ensure!(code == Some(0) && removed == format!("removed {line}"), "{code:?} {removed} {said}");
        ensure!(!ours.exists() && others.iter().all(|other| other.exists()), "{listed}");
        finds_nothing(host)?;
    }
    Ok(())
}
