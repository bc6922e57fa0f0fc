//! `status` and `top`: of a running agent, and of what the kernel does without one.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    process::{Command, ExitStatus, Output, Stdio},
    thread::{scope, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use flannel_tests::{
    agent::AgentOptions,
    agent_binary,
    probe::ping::Ping,
    scenario::scenario,
    topology::{Host, Lab},
};
use libtest_mimic::Trial;
use nix::{
    pty::openpty,
    sys::{
        prctl::set_pdeathsig,
        signal::{Signal, kill},
        termios::{LocalFlags, Termios, tcgetattr},
    },
    unistd::{Pid, setsid},
};
use serde_json::Value;

const HOST_GW: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"host-gw"}}"#;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> = ["xdp", "tc"]
        .into_iter()
        .map(|tier| {
            scenario(
                format!("status_and_top_go_on_from_the_pinned_maps_when_the_agent_is_gone_over_{tier}"),
                Lab::new(&format!("looks-{tier}")),
                move |lab| in_kernel(lab, tier),
            )
        })
        .collect();
    trials.push(scenario(
        "status_says_that_nothing_is_carried_when_the_user_space_tunnel_is_gone",
        Lab::new("looks-tun"),
        in_user_space,
    ));
    trials.push(scenario(
        "status_lists_the_routes_that_carry_on_without_an_agent",
        Lab::new("looks-gw").config(HOST_GW),
        routed,
    ));
    trials.push(scenario(
        "status_of_an_agent_that_waits_for_its_store_says_so_at_once_and_what_is_carried_meanwhile",
        Lab::new("looks-waiting"),
        waiting,
    ));
    trials.push(scenario(
        "top_on_a_terminal_ends_on_q_and_on_signals_and_leaves_the_terminal_as_it_was",
        Lab::new("looks-top").hosts(1),
        on_a_terminal,
    ));
    trials
}

/// Exit code, standard output, standard error.
type Said = (Option<i32>, String, String);

fn ask(host: &Host, words: &[&str]) -> Result<Said> {
    let bpffs = host.bpffs().context("no bpffs was mounted")?;
    let Output { status, stdout, stderr } = host
        .netns()
        .command(agent_binary()?)
        .args(words)
        .arg(format!("--socket={}", host.files().socket().display()))
        .arg(format!("--bpffs-path={}", bpffs.display()))
        .output()
        .with_context(|| format!("start flannel-agent {words:?}"))?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok((status.code(), text(stdout), text(stderr)))
}

fn json(host: &Host, code: i32) -> Result<Value> {
    let (found, text, said) = ask(host, &["status", "--json"])?;
    ensure!(found == Some(code), "{found:?}, not {code}: {text}{said}");
    serde_json::from_str(&text).with_context(|| text)
}

fn at(value: &Value, pointer: &str) -> Value {
    value.pointer(pointer).cloned().unwrap_or_default()
}

fn sent(value: &Value) -> Result<u64> {
    at(value, "/tunnels/0/peers/0/tx_packets").as_u64().with_context(|| format!("{value}"))
}

fn pings(lab: &Lab, count: u32) -> Result<()> {
    let report = Ping::new(&lab.host(0).pod()?.netns, lab.host(1).pod()?.address).count(count).run()?;
    ensure!(report.lost() == 0, "{report}");
    Ok(())
}

fn in_kernel(lab: &mut Lab, tier: &str) -> Result<()> {
    lab.bring_up(&[tier; 2])?;
    pings(lab, 5)?;
    let peer = lab.host(1).address().to_string();
    let running = json(lab.host(0), 0)?;
    for field in ["lease_held_for", "lease_renewed_ago", "lease_expires_in"] {
        ensure!(at(&running, &format!("/{field}")).is_u64(), "no {field} in {running}");
    }
    ensure!(at(&running, "/tunnels/0/peers/0/last_seen_ms_ago").is_u64(), "{running}");
    let (code, text, _) = ask(lab.host(0), &["status"])?;
    ensure!(code == Some(0), "{code:?} {text}");
    for part in ["held for", "renewed", "left", "path MTU", "dropped", "last packet", &peer] {
        ensure!(text.contains(part), "no {part:?} in\n{text}");
    }
    let (code, text, said) = ask(lab.host(0), &["top", "--interval=0.1", "--count=2"])?;
    ensure!(code == Some(0) && !text.contains('\u{1b}'), "{code:?} {text}{said}");
    ensure!(text.matches("1 peers, per second").count() == 2 && text.contains(&peer), "{text}");

    lab.host_mut(0).agent_mut()?.crash()?;
    let alone = json(lab.host(0), 3)?;
    ensure!(at(&alone, "/no_agent").as_str().is_some_and(|reason| reason.contains("no agent answers")));
    let base = lab.host(0).agent()?.subnet_env()?.base();
    ensure!(at(&alone, "/tunnels/0/subnet") == format!("{base}/24"), "{alone}");
    for field in ["device", "underlay", "tier", "peers/0/subnet", "peers/0/node"] {
        let pointer = format!("/tunnels/0/{field}");
        ensure!(at(&alone, &pointer) == at(&running, &pointer), "{field}: {running}\n{alone}");
    }
    ensure!(sent(&alone)? >= sent(&running)?, "{running}\n{alone}");
    pings(lab, 20)?;
    let later = json(lab.host(0), 3)?;
    ensure!(sent(&later)? >= sent(&alone)? + 20, "{alone}\n{later}");
    let (code, text, _) = ask(lab.host(0), &["status"])?;
    ensure!(code == Some(3) && text.starts_with("no agent") && text.contains(&peer), "{code:?} {text}");
    let (code, text, _) = ask(lab.host(0), &["top", "--interval=0.1", "--count=1"])?;
    ensure!(code == Some(3) && text.starts_with("NO AGENT") && text.contains(&peer), "{code:?} {text}");

    // Programs that somebody has taken off are not said to carry anything.
    let pins = lab.host(0).bpffs().context("no bpffs")?.join("flannel/flannel0");
    for version in std::fs::read_dir(&pins).context("read the pins")? {
        let link = version?.path().join("link_encap");
        if link.exists() {
            std::fs::remove_file(link).context("remove the pin")?;
        }
    }
    let damaged = json(lab.host(0), 3)?;
    ensure!(at(&damaged, "/tunnels") == Value::Array(Vec::new()), "{damaged}");
    ensure!(
        at(&damaged, "/not_told/0").as_str().is_some_and(|reason| reason.contains("is not attached")),
        "{damaged}"
    );
    Ok(())
}

fn in_user_space(lab: &mut Lab) -> Result<()> {
    lab.bring_up(&["tun"; 2])?;
    pings(lab, 5)?;
    // In user space, packets are counted after they were sent.
    let started = Instant::now();
    let running = loop {
        let running = json(lab.host(0), 0)?;
        if sent(&running)? >= 5 {
            break running;
        }
        ensure!(started.elapsed() < LIMIT, "five pings, and {running}");
        sleep(Duration::from_millis(20));
    };
    ensure!(at(&running, "/tunnels/0/tier") == "tun", "{running}");
    lab.host_mut(0).agent_mut()?.crash()?;
    let (code, text, said) = ask(lab.host(0), &["status"])?;
    // Its route leads to a device that nobody reads.
    ensure!(
        code == Some(3) && text.contains("flannel0") && !text.contains("kernel "),
        "{code:?} {text}{said}"
    );
    lab.host(0).netns().output("ip link del flannel0")?;
    let (code, text, said) = ask(lab.host(0), &["status"])?;
    ensure!(code == Some(1) && text.is_empty(), "{code:?} {text}");
    ensure!(
        said.contains("no agent answers") && said.contains("nothing carries packets without it"),
        "{said}"
    );
    Ok(())
}

fn routed(lab: &mut Lab) -> Result<()> {
    lab.bring_up_with(&vec![AgentOptions::new()?; 2])?;
    lab.host_mut(0).agent_mut()?.crash()?;
    let (code, text, said) = ask(lab.host(0), &["status"])?;
    let base = lab.host(1).agent()?.subnet_env()?.base();
    let route = format!("{base}/24 via {}", lab.host(1).address());
    ensure!(code == Some(3) && text.contains(&route), "{code:?} {text}{said}");
    pings(lab, 5)
}

fn waiting(lab: &mut Lab) -> Result<()> {
    lab.bring_up(&["tc"; 2])?;
    let base = lab.host(0).agent()?.subnet_env()?.base();
    lab.host_mut(0).agent_mut()?.crash()?;
    lab.datastore_mut().stop()?;
    lab.host_mut(0).start_agent(&AgentOptions::new()?.datapath("tc"))?;
    let started = Instant::now();
    let starting = loop {
        match json(lab.host(0), 0) {
            Ok(value) if at(&value, "/not_ready").to_string().contains("etcd") => break value,
            // Until the socket is there, and the first try has failed.
            other => ensure!(started.elapsed() < LIMIT, "{other:?}"),
        }
        sleep(Duration::from_millis(20));
    };
    ensure!(at(&starting, "/starting") == true && at(&starting, "/ready") == false, "{starting}");
    ensure!(at(&starting, "/tunnels/0/subnet") == format!("{base}/24"), "{starting}");
    let (code, text, said) = ask(lab.host(0), &["status"])?;
    ensure!(
        code == Some(0) && text.contains("is starting") && text.contains("etcd"),
        "{code:?} {text}{said}"
    );
    ensure!(text.contains("kernel    carries"), "{text}");
    let (code, text, said) = ask(lab.host(0), &["top", "--interval=0.1", "--count=1"])?;
    ensure!(code == Some(0) && text.contains("is STARTING"), "{code:?} {text}{said}");
    let (code, _, said) = ask(lab.host(0), &["cleanup"])?;
    ensure!(code == Some(1) && said.contains("an agent (pid"), "{code:?} {said}");
    lab.datastore_mut().restart()?;
    lab.host_mut(0).agent_mut()?.wait_ready()?;
    ensure!(at(&json(lab.host(0), 0)?, "/starting").is_null());
    Ok(())
}

const LIMIT: Duration = Duration::from_secs(10);

fn on_a_terminal(lab: &mut Lab) -> Result<()> {
    lab.bring_up(&["tc"])?;
    for key in [b"q".as_slice(), b"xyz q"] {
        let (status, shown) = top(lab.host(0), |terminal, _| Ok(terminal.write_all(key)?))?;
        ensure!(status.success(), "{key:?}: {status}: {shown}");
    }
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let (status, shown) = top(lab.host(0), |_, pid| Ok(kill(pid, signal)?))?;
        ensure!(status.success(), "{signal}: {status}: {shown}");
    }
    Ok(())
}

/// Runs `top` on a terminal, ends it once a page was shown, and returns how it ended and all it wrote.
fn top(host: &Host, end: impl FnOnce(&mut File, Pid) -> Result<()>) -> Result<(ExitStatus, String)> {
    let pty = openpty(None, None).context("make a terminal")?;
    let before = tcgetattr(pty.slave.as_fd())?;
    let end_of_it = || -> Result<Stdio> { Ok(pty.slave.try_clone().context("clone a descriptor")?.into()) };
    // A terminal belongs to a session, whose leader must not lead a process group before.
    let mut command = Command::new(agent_binary()?);
    command.args(["top", "--interval=0.1", &format!("--socket={}", host.files().socket().display())]);
    command.stdin(end_of_it()?).stdout(end_of_it()?).stderr(end_of_it()?);
    // SAFETY: all are system calls that a process just forked may make.
    unsafe {
        command.pre_exec(|| {
            setsid()?;
            set_pdeathsig(Signal::SIGKILL)?;
            match libc::ioctl(0, libc::TIOCSCTTY, 0) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    let mut child = command.spawn().context("start top")?;
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    let mut terminal = File::from(pty.master.try_clone().context("clone a descriptor")?);
    let slave = &pty.slave;
    scope(|scope| {
        let mut output = File::from(pty.master.try_clone().context("clone a descriptor")?);
        let (seen, page) = std::sync::mpsc::channel();
        let reader = scope.spawn(move || {
            let (mut shown, mut bytes) = (String::new(), [0; 4096]);
            while let Ok(count @ 1..) = output.read(&mut bytes) {
                shown.push_str(&String::from_utf8_lossy(bytes.get(..count).unwrap_or_default()));
                if shown.contains("per second") {
                    let _ = seen.send(());
                }
                if shown.ends_with(END) {
                    break;
                }
            }
            shown
        });
        let shows = page.recv_timeout(LIMIT);
        let during = tcgetattr(slave.as_fd())?;
        let ended = end(&mut terminal, pid);
        let started = Instant::now();
        let status = loop {
            match child.try_wait().context("wait for top")? {
                Some(status) => break status,
                None if started.elapsed() > LIMIT => child.kill().context("end top")?,
                None => sleep(Duration::from_millis(10)),
            }
        };
        let after = tcgetattr(slave.as_fd())?;
        // Ends the reader where top did not.
        terminal.flush()?;
        File::from(slave.try_clone()?).write_all(END.as_bytes())?;
        let shown = reader.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
        ended?;
        shows.with_context(|| format!("no page was shown: {shown}"))?;
        ensure!(!is_by_line(&during) && is_by_line(&before), "keys are not read one by one");
        ensure!(after == before, "the terminal is not as it was: {before:?}, {after:?}");
        ensure!(shown.contains(LEFT), "the alternate screen was not left: {shown}");
        Ok((status, shown))
    })
}

/// What the test writes last.
const END: &str = "(end of the test)";

/// Cursor shown, alternate screen left.
const LEFT: &str = "\u{1b}[?25h\u{1b}[?1049l";

fn is_by_line(terminal: &Termios) -> bool {
    terminal.local_flags.contains(LocalFlags::ICANON | LocalFlags::ECHO)
}
