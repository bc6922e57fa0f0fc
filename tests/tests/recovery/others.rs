//! Programs of others on the interface: they go on working, and so does the tunnel, whoever comes last.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use flannel_agent::host::udp::programs::inspect;
use flannel_tests::{
    agent::{AgentOptions, Status},
    bpf::{self, TcHook},
    scenario::{IN_KERNEL, over, scenario},
    topology::{Host, Lab},
};
use libtest_mimic::Trial;

use crate::{SOON, Traffic};

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(over(
        &IN_KERNEL,
        "a_classifier_in_front_of_ours_is_behind_it_within_a_second",
        "in-front",
        |lab, _| in_front(lab),
    ));
    trials.push(scenario(
        "a_foreign_xdp_program_and_tc_filters_are_left_working",
        Lab::new("foreign-xdp"),
        foreign_xdp,
    ));
    trials.push(scenario(
        "an_xdp_program_above_the_interface_that_keeps_ours_away_is_said_once_and_then_there_is_peace",
        Lab::new("xdp-above"),
        above,
    ));
    trials.push(scenario(
        "auto_goes_from_user_space_to_the_kernel_when_what_kept_it_away_is_gone",
        Lab::new("full-hook"),
        full,
    ));
    trials.push(scenario(
        "a_pair_that_was_out_of_shape_when_xdp_took_over_is_gone_too",
        Lab::new("pair-left"),
        pair,
    ));
    trials.push(scenario(
        "a_route_that_somebody_removes_all_the_time_is_put_back_more_and_more_seldom_and_for_good_in_the_end",
        Lab::new("duel"),
        duel,
    ));
    trials
}

/// Programs on tc ingress of eth0 in the order they run.
fn ingress(host: &Host) -> Result<Vec<u32>> {
    let eth0 = host.netns().ifindex("eth0")?;
    // BPF_TCX_INGRESS
    host.netns().run(|| Ok(inspect::tcx_programs(eth0, 46)?))
}

fn in_front(lab: &mut Lab) -> Result<()> {
    let traffic = Traffic::start(lab)?;
    let host = lab.host(1);
    let other = bpf::classifier_in_front(host.netns(), "eth0")?;
    let started = Instant::now();
    loop {
        // For a moment the old copy of ours is there too, last.
        let order = ingress(host)?;
        if order.len() == 2 && order[1] == other.program {
            break;
        }
        ensure!(started.elapsed() < SOON, "{order:?} after {SOON:?}: {}", host.agent()?.log());
        sleep(Duration::from_millis(5));
    }
    let reported =
        |status: &Status| status.reasons().contains("displaced once by another program, first again");
    host.agent()?.wait_status("that it says so", reported)?;
    traffic.stop_without_loss()
}

fn foreign_xdp(lab: &mut Lab) -> Result<()> {
    let host = lab.host(1);
    let other = bpf::pass(host.netns(), "eth0")?;
    for command in [
        "tc qdisc add dev eth0 clsact",
        "tc filter add dev eth0 ingress priority 1 protocol ip u32 match u32 0 0 flowid 1:1",
        "tc filter add dev eth0 egress priority 1 protocol ip u32 match u32 0 0 flowid 1:1",
    ] {
        host.netns().output(command)?;
    }
    lab.bring_up(&["ebpf"; 2])?;
    let status = lab.host(1).status()?;
    ensure!(status.tier().starts_with("tc"), "{}", status.reasons());
    ensure!(status.reasons().contains("another XDP program is on eth0"), "{}", status.reasons());
    let host = lab.host(1);
    let filters = host.netns().output("tc filter show dev eth0 ingress")?;
    ensure!(filters.contains("pref 1 u32"), "{filters}");
    // Taken away, nothing of ours goes with it. Not under traffic: the kernel stops the device to take a qdisc off, and
    // drops what is sent meanwhile (`dev_deactivate`; tracepoint skb:kfree_skb says QDISC_DROP in `__dev_queue_xmit`).
    host.netns().output("tc qdisc del dev eth0 clsact")?;
    lab.ping_all_pairs(3)?;
    let traffic = Traffic::start(lab)?;
    // A link that goes is not told to anybody: the next look that something else causes finds the free place. A name is
    // something else; a `txqueuelen` would stop the device as well.
    drop(other);
    let host = lab.host(1);
    host.netns().ip("link set eth0 alias free")?;
    host.agent()?.wait_status("that XDP is ours", |status| status.tier() == "xdp" && status.ready)?;
    // Some packets more, by the new way.
    sleep(Duration::from_millis(300));
    traffic.stop_without_loss()
}

/// As two agents on one host would do for ever, as fast as the kernel tells them.
/// How often the tunnel was repaired.
fn repairs(host: &Host) -> Result<usize> {
    Ok(host.agent()?.log().matches("needs repair").count())
}

/// The kernel refuses a program below one on an upper device, with the same word as for a place that is taken.
fn above(lab: &mut Lab) -> Result<()> {
    let host = lab.host(1).netns();
    host.ip("link add link eth0 name above type macvlan")?;
    let other = bpf::pass_generic(host, "above")?;
    lab.bring_up(&["ebpf"; 2])?;
    lab.ping_all_pairs(3)?;
    let before = repairs(lab.host(1))?;
    // Four looks.
    sleep(Duration::from_secs(2));
    let (status, after) = (lab.host(1).status()?, repairs(lab.host(1))?);
    ensure!(status.ready && status.path() == "tc+gro", "{status:?}");
    ensure!(status.reasons().contains("eth0 (driver veth) refused native XDP"), "{}", status.reasons());
    ensure!(after == before, "{} repairs in two seconds:\n{}", after - before, lab.host(1).agent()?.log());
    drop(other);
    Ok(())
}

/// No kernel tells that there is room at a hook again.
fn full(lab: &mut Lab) -> Result<()> {
    let others = bpf::fill(lab.host(1).netns(), "eth0", TcHook::Ingress)?;
    lab.bring_up(&["auto"; 2])?;
    let agent = lab.host(1).agent()?;
    let refused =
        |status: &Status| status.ready && status.tier() == "tun" && status.reasons().contains("ERANGE");
    agent.wait_status("user space, and why", refused)?;
    lab.ping_all_pairs(3)?;
    drop(others);
    lab.host(1).agent()?.wait_status("the kernel's part", |status| status.path() == "tc+bridge")?;
    lab.ping_all_pairs(3)?;
    let said = lab.host(1).agent()?.log().matches("udp datapath tun on eth0: ").count();
    ensure!(said == 1, "{said} times in the log:\n{}", lab.host(1).agent()?.log());
    Ok(())
}

fn pair(lab: &mut Lab) -> Result<()> {
    lab.bring_up(&["tc"; 2])?;
    lab.host_mut(1).agent_mut()?.crash()?;
    let host = lab.host(1).netns();
    ensure!(host.has_device("flannel0d") && host.has_device("flannel0v"), "{}", host.ip("link")?);
    host.ip("link set flannel0v down")?;
    lab.host_mut(1).start_agent(&AgentOptions::new()?.datapath("ebpf"))?;
    lab.wait_connected()?;
    let host = lab.host(1);
    host.agent()?.wait_status("XDP", |status| status.path() == "xdp" && status.ready)?;
    for device in ["flannel0d", "flannel0v"] {
        ensure!(!host.netns().has_device(device), "{device} is still there");
    }
    lab.ping_all_pairs(3)
}

fn duel(lab: &mut Lab) -> Result<()> {
    lab.bring_up(&["tc"; 2])?;
    let host = lab.host(1);
    let agent = host.agent()?;
    let undone = || agent.readyz().is_ok_and(|(_, body)| body.contains("undone again and again"));
    let puts = || agent.log().matches("put route 10.244.0.0/16 dev flannel0: done").count();
    let (started, limit) = (Instant::now(), Duration::from_secs(30));
    // Until it has waited for seconds at a time.
    let mut held_back = None;
    while held_back.is_none_or(|since: Instant| since.elapsed() < Duration::from_secs(5)) {
        ensure!(started.elapsed() < limit, "it is put back as often as ever: {:?}", agent.readyz());
        // That it is not there just now is what is wanted.
        let _ = host.netns().ip("route del 10.244.0.0/16 dev flannel0");
        if held_back.is_none() && undone() {
            held_back = Some(Instant::now());
        }
    }
    host.wait_output("ip route show dev flannel0", "10.244.0.0/16", limit)?;
    ensure!(puts() == 1, "{} lines of it in the log:\n{}", puts(), agent.log());
    lab.ping_all_pairs(3)
}
