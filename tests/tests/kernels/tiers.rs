//! Every value of `--udp-datapath`: which tier is taken and why, that everything passes, and what an agent that is killed
//! and comes back costs.

use std::{
    fs, iter,
    path::PathBuf,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use flannel_common::LAYOUT_VERSION;
use flannel_tests::{
    agent::{AgentOptions, Status},
    bpf,
    pods::{all_pairs, nothing_refused, pings, stream},
    probe::ping::{Ping, RunningPing},
    topology::{Host, Lab, cards},
};
use libtest_mimic::Trial;

use crate::{
    expected::{Attachment, attachment, has_ebtables},
    hosts::Hosts,
    shortcut,
};

const STREAM: u64 = 2 << 20;
const LIMIT: Duration = Duration::from_secs(60);

/// A value of `--udp-datapath` and what it comes to between two hosts whose interfaces are veth.
pub(crate) struct Choice {
    option: &'static str,
    path: &'static str,
    /// Of the reason.
    reasons: &'static [&'static str],
    /// The counter of packets received this way.
    counter: &'static str,
}

static CHOICES: [Choice; 5] = [
    Choice {
        option: "auto",
        path: "tc+bridge",
        reasons: &["eth0 is a veth, over which packets stay whole in tc", "packets pass cni0 by"],
        counter: "decap_tc",
    },
    Choice {
        option: "ebpf",
        path: "xdp",
        reasons: &["native XDP attached, marks proven"],
        counter: "decap_xdp",
    },
    Choice {
        option: "xdp",
        path: "xdp",
        reasons: &["native XDP attached, marks proven"],
        counter: "decap_xdp",
    },
    Choice { option: "tc", path: "tc+gro", reasons: &["chosen by --udp-datapath=tc"], counter: "decap_tc" },
    Choice { option: "tun", path: "tun", reasons: &["chosen by --udp-datapath=tun"], counter: "decap_user" },
];

/// Between cards whose driver has native XDP.
fn on_cards() -> impl Iterator<Item = &'static Choice> {
    static AUTO: Choice = Choice {
        option: "auto",
        path: "xdp",
        reasons: &["native XDP attached, marks proven"],
        counter: "decap_xdp",
    };
    iter::once(&AUTO).chain(CHOICES.iter().filter(|choice| matches!(choice.option, "tc" | "tun")))
}

pub(crate) fn trials(hosts: &Hosts) -> Vec<Trial> {
    let mut trials = Vec::new();
    for choice in &CHOICES {
        let Choice { option, path, .. } = choice;
        let mut add = |sentence: String, test: fn(&mut Lab, &'static Choice) -> Result<()>| {
            trials.push(hosts.trial(sentence, move |lab| {
                bring_up(lab, choice)?;
                test(lab, choice)
            }));
        };
        add(format!("{option}_becomes_{path}_and_says_why_and_two_hosts_reach_each_other"), carried);
        match *option {
            "tun" => add("over_tun_traffic_returns_with_the_agent".to_owned(), killed_tun),
            // What xdp becomes, too.
            "ebpf" => {}
            _ => add(format!("over_{option}_nothing_is_lost_when_an_agent_is_killed_and_returns"), killed),
        }
        // On Debian's kernels it is known what they have.
        if *option == "auto" && cards::are_lent() {
            add("vlans_on_the_pods_bridge_end_the_shortcut_until_they_go".to_owned(), shortcut::vlans);
            if has_ebtables() {
                add("ebtables_ends_the_shortcut_until_it_goes".to_owned(), shortcut::ebtables);
            }
        }
        if *option == "auto" {
            add("the_tunnel_settles_when_the_pods_bridge_goes_and_comes_back".to_owned(), shortcut::gone);
        }
        if matches!(*option, "xdp" | "tc") {
            add(format!("over_{option}_nothing_is_lost_by_a_change_of_the_map_layout"), another_layout);
        }
        if *option == "tc" {
            add("a_filter_that_would_swallow_the_tunnels_packets_ends_up_behind_ours".to_owned(), displaced);
            add("an_agent_that_can_t_have_its_tier_leaves_the_one_before_it_at_work".to_owned(), refused);
            add("the_tunnel_settles_when_the_mtu_changes_while_xdp_awaits_its_proof".to_owned(), unproven);
        }
    }
    trials
}

/// The same between two hosts with a network card each.
pub(crate) fn trials_on_cards(hosts: &Hosts) -> Vec<Trial> {
    let mut trials = Vec::new();
    for choice in on_cards() {
        let Choice { option, path, .. } = choice;
        let mut add = |sentence: String, test: fn(&mut Lab, &'static Choice) -> Result<()>| {
            trials.push(hosts.trial(sentence, move |lab| {
                bring_up(lab, choice)?;
                test(lab, choice)
            }));
        };
        add(format!("between_cards_{option}_becomes_{path}_and_two_hosts_reach_each_other"), carried);
        match *option {
            "tun" => {}
            _ => add(
                format!("between_cards_over_{option}_nothing_is_lost_when_an_agent_is_killed_and_returns"),
                killed,
            ),
        }
    }
    trials
}

/// Agents with this option on both hosts, unless that is what runs, and a pod on each; whatever tier there was before.
fn bring_up(lab: &mut Lab, choice: &Choice) -> Result<()> {
    if lab.hosts().iter().all(|host| host.status().is_ok_and(|status| choice.fits(&status))) {
        return Ok(());
    }
    let options = AgentOptions::new()?.datapath(choice.option);
    for index in 0..lab.hosts().len() {
        lab.host_mut(index).start_agent(&options)?;
    }
    lab.wait_connected()?;
    for index in 0..lab.hosts().len() {
        if lab.host(index).pods().is_empty() {
            lab.host_mut(index).attach_pod()?;
        }
    }
    settle(lab, choice)
}

impl Choice {
    fn fits(&self, status: &Status) -> bool {
        status.path() == self.path && self.reasons.iter().all(|reason| status.reasons().contains(reason))
    }
}

/// Waits until both hosts have the tier of the choice, and that it carries.
pub(crate) fn settle(lab: &Lab, choice: &Choice) -> Result<()> {
    let proof = (choice.path == "xdp").then(|| Pings::start(lab)).transpose()?;
    for host in lab.hosts() {
        let wanted = format!("{} ({})", choice.path, choice.reasons.join(", "));
        host.agent()?.wait_status(&wanted, |status| choice.fits(status))?;
    }
    drop(proof);
    lab.ping_all_pairs(1)
}

fn carried(lab: &mut Lab, choice: &Choice) -> Result<()> {
    let counted = |host: &Host| -> Result<u64> { Ok(host.status()?.counted(choice.counter)) };
    let before: Vec<u64> = lab.hosts().iter().map(counted).collect::<Result<_>>()?;
    all_pairs(lab, pings)?;
    all_pairs(lab, |from, to| stream(from, to, STREAM))?;
    nothing_refused(lab)?;
    for (host, before) in lab.hosts().iter().zip(before) {
        let packets = counted(host)? - before;
        ensure!(packets > 100, "{}: {packets} more packets in {}", host.name(), choice.counter);
        attached(host, choice)?;
    }
    Ok(())
}

/// The programs hang where the tier says, in the way this kernel has, and nowhere else.
fn attached(host: &Host, choice: &Choice) -> Result<()> {
    let netns = host.netns();
    let xdp = netns.ip("link show dev eth0")?;
    // Native, not the stack's imitation, which says xdpgeneric.
    ensure!(xdp.contains(" xdp ") == (choice.path == "xdp"), "{xdp}");
    ensure!(!xdp.contains("xdpgeneric"), "{xdp}");
    let in_kernel = choice.path != "tun";
    let clsact = attachment() == Attachment::Clsact;
    let mut hooks = vec![("eth0", "ingress", "flannel_ingress", "link_ingress", in_kernel)];
    hooks.push(("flannel0", "egress", "flannel_encap", "link_encap", in_kernel));
    hooks.push(("cni0", "egress", "flannel_bridge", "link_bridge", choice.path == "tc+bridge"));
    // Super-packets cross a veth between the hosts whole, so there it is the room, between cards the veth pair.
    let whole = netns.ip("-d link show dev eth0")?.contains(" veth ");
    let pair = [("flannel0v", whole), ("flannel0g", !whole)];
    for (receiver, wanted) in pair {
        let wanted = wanted && choice.path == "tc+gro";
        ensure!(netns.has_device(receiver) == wanted, "{receiver}: wanted is {wanted}");
        if wanted {
            hooks.push((receiver, "ingress", "flannel_gro", "link_gro", true));
        }
    }
    for (device, side, program, pin, wanted) in hooks {
        let filters = netns.output(&format!("tc filter show dev {device} {side}")).unwrap_or_default();
        let is_filter = filters.contains("pref 50 ") && filters.contains(program);
        ensure!(is_filter == (wanted && clsact), "{program} on {device}: {filters:?}");
        let pin = pins(host)?.join(pin);
        ensure!(pin.exists() == (wanted && !clsact), "{}", pin.display());
    }
    Ok(())
}

fn pins(host: &Host) -> Result<PathBuf> {
    let bpffs = host.bpffs().context("no bpffs was mounted")?;
    Ok(bpffs.join(format!("flannel/flannel0/v{LAYOUT_VERSION}")))
}

/// Kills the second host's agent, does something while nobody looks, and starts it again.
fn restart(lab: &mut Lab, choice: &Choice, meanwhile: impl FnOnce(&Host) -> Result<()>) -> Result<()> {
    lab.host_mut(1).agent_mut()?.crash()?;
    meanwhile(lab.host(1))?;
    lab.host_mut(1).start_agent(&AgentOptions::new()?.datapath(choice.option))?;
    lab.wait_connected()
}

fn killed(lab: &mut Lab, choice: &Choice) -> Result<()> {
    let pings = Pings::start(lab)?;
    restart(lab, choice, |_| Ok(()))?;
    pings.all_answered()?;
    settle(lab, choice)
}

fn another_layout(lab: &mut Lab, choice: &Choice) -> Result<()> {
    let pings = Pings::start(lab)?;
    let (now, other) = (pins(lab.host(1))?, pins(lab.host(1))?.with_file_name("v1"));
    restart(lab, choice, |_| fs::rename(&now, &other).context("rename the pins"))?;
    ensure!(now.is_dir() && !other.exists(), "{} is still there", other.display());
    pings.all_answered()?;
    settle(lab, choice)
}

/// From pod to pod and back, a hundred a second: more would leave an emulated CPU no time for the agent. Where XDP's marks
/// have to be proven by traffic, they are the traffic, for as long as that takes.
struct Pings([RunningPing; 2]);

impl Pings {
    fn start(lab: &Lab) -> Result<Self> {
        let (a, b) = (lab.host(0).pod()?, lab.host(1).pod()?);
        let ping = |from, to| Ping::new(from, to).count(100_000).interval(Duration::from_millis(10)).start();
        Ok(Self([ping(&a.netns, b.address)?, ping(&b.netns, a.address)?]))
    }

    fn all_answered(self) -> Result<()> {
        sleep(Duration::from_millis(400));
        for ping in self.0 {
            ping.wait_sent(21)?;
            let report = ping.stop()?;
            ensure!(report.sent > 20, "too few to tell: {report}");
            ensure!(report.lost() == 0, "{report}");
        }
        Ok(())
    }
}

/// On clsact a filter of a lower number comes first, until ours has moved; tcx programs run before all filters.
fn displaced(lab: &mut Lab, choice: &Choice) -> Result<()> {
    let host = lab.host(1);
    host.netns().output("tc qdisc add dev eth0 clsact").or_else(|e| match attachment() {
        Attachment::Clsact => Ok(String::new()),
        Attachment::Tcx => Err(e),
    })?;
    // Two that end the processing of every packet: one that can be passed, then one that can't.
    let add = |number: u16| {
        host.netns().output(&format!(
            "tc filter add dev eth0 ingress priority {number} protocol ip u32 match u32 0 0 flowid 1:1"
        ))
    };
    let reports = |what: &'static str| {
        host.agent()?.wait_status(what, |status| status.ready && status.reasons().contains(what))
    };
    let pings = Pings::start(lab)?;
    add(10)?;
    if attachment() == Attachment::Clsact {
        reports("displaced once by another program, first again")?;
        let filters = host.netns().output("tc filter show dev eth0 ingress")?;
        ensure!(filters.contains("pref 9 bpf") && !filters.contains("pref 50 "), "{filters}");
    }
    // What the filter took before ours had moved came by the agent's socket.
    pings.all_answered()?;
    add(1)?;
    if attachment() == Attachment::Clsact {
        reports("filter u32 of priority 1 runs before ours on ingress of eth0")?;
    } else {
        // Two looks.
        sleep(Duration::from_secs(1));
        ensure!(!host.status()?.reasons().contains("before ours"), "{}", host.status()?.reasons());
    }
    lab.ping_all_pairs(3)?;
    for number in [10, 1] {
        host.netns().output(&format!("tc filter del dev eth0 ingress priority {number}"))?;
    }
    if attachment() == Attachment::Clsact {
        // Ours stays at the number it moved to; made anew with all the rest, it has its own again.
        host.netns().output("tc qdisc del dev eth0 clsact")?;
        let started = Instant::now();
        // Without the qdisc tc answers with an error.
        let filters = || host.netns().output("tc filter show dev eth0 ingress").unwrap_or_default();
        while !filters().contains("pref 50 bpf") {
            ensure!(started.elapsed() < LIMIT, "the filter is not put back: {}", host.status()?.reasons());
            sleep(Duration::from_millis(50));
        }
    }
    settle(lab, choice)
}

/// Its predecessor's programs carry packets while an agent says that it can't have the tier it was told.
fn refused(lab: &mut Lab, _: &Choice) -> Result<()> {
    lab.host_mut(1).agent_mut()?.crash()?;
    let other = bpf::pass(lab.host(1).netns(), "eth0")?;
    lab.host_mut(1).start_agent(&AgentOptions::new()?.datapath("xdp"))?;
    lab.host(1).agent()?.wait_not_ready("another XDP program is on eth0")?;
    lab.ping_all_pairs(3)?;
    drop(other);
    let proof = Pings::start(lab)?;
    let xdp = |status: &Status| status.ready && status.path() == "xdp";
    lab.host(1).agent()?.wait_status("XDP, now that it is free", xdp)?;
    drop(proof);
    lab.ping_all_pairs(3)
}

/// No traffic proves the marks meanwhile. Whatever the way, the pair of the tier before is not left behind.
fn unproven(lab: &mut Lab, _: &Choice) -> Result<()> {
    lab.host_mut(1).agent_mut()?.crash()?;
    lab.host_mut(1).start_agent(&AgentOptions::new()?.datapath("ebpf"))?;
    lab.host_mut(1).agent_mut()?.wait_ready()?;
    let host = lab.host(1);
    for (underlay, tunnel) in [(1400, 1372), (1500, 1472)] {
        host.netns().ip(&format!("link set eth0 mtu {underlay}"))?;
        host.agent()?.wait_status("the MTU", |status| status.ready && status.mtu == tunnel)?;
        // Two looks.
        sleep(Duration::from_secs(1));
        let status = host.status()?;
        ensure!(status.ready && status.mtu == tunnel, "{status:?}");
    }
    let proof = Pings::start(lab)?;
    host.agent()?.wait_status("XDP", |status| status.ready && status.path() == "xdp")?;
    drop(proof);
    for device in ["flannel0d", "flannel0v", "flannel0p", "flannel0g"] {
        ensure!(!host.netns().has_device(device), "{device} is still there");
    }
    lab.ping_all_pairs(3)
}

fn killed_tun(lab: &mut Lab, choice: &Choice) -> Result<()> {
    restart(lab, choice, |_| Ok(()))?;
    lab.ping_all_pairs(3)?;
    all_pairs(lab, |from, to| stream(from, to, STREAM))
}
