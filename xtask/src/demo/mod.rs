//! `cargo xtask demo`: hosts in network namespaces, an agent on each, and pods that reach each other through the tunnel.
//!
//! Hosts, etcd and probes are those of the tests (`tests/lab`), so what is shown is what is tested. Without root it goes
//! into a user namespace, where the tunnel runs in user space; what root would add is said. Whatever happens, nothing
//! stays behind: processes die with this one, namespaces with their processes, and names and mounts are swept on the
//! way out, or at the next start if this process was killed.

mod table;
mod tidy;
mod unprivileged;

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use flannel_tests::{
    agent::{AgentOptions, Status},
    probe::{ping::Ping, tcp::TcpPath},
    topology::{Lab, NETWORK},
};

use crate::{
    build_ebpf,
    progress::{Step, cargo, cargo_step},
    setup, test, workspace,
};

/// Prefix of what the demo makes outside its own processes.
pub(crate) const NAME: &str = "flannel-demo";
const PINGS: u32 = 20;
const TRANSFER: Duration = Duration::from_secs(1);

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// How many hosts
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u8).range(2..=50))]
    hosts: u8,
    /// Which data path the agents use; auto takes the best this kernel offers
    #[arg(long, default_value = "auto", value_parser = ["auto", "xdp", "tc", "tun", "ebpf"])]
    datapath: String,
    /// Where the leases are: a flannel server with a file of its own, which is the same binary, or etcd
    #[arg(long, default_value = "embedded", value_parser = ["embedded", "etcd"])]
    store: String,
    /// Leave it running and say how to look around; Ctrl-C ends it
    #[arg(long)]
    keep: bool,
}

/// Builds, shows, tidies up.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let privileged = test::may_make_networks()?;
    if !privileged {
        unprivileged::require()?;
    }
    setup::run()?;
    build_ebpf::run()?;
    cargo_step("build the agent", "demo-agent", cargo().args(["build", "--package", "flannel-agent"]))?;
    let agent = workspace().join("target/debug/flannel-agent");
    ensure!(agent.is_file(), "cargo built no {}", agent.display());

    let lock = tidy::alone()?;
    let mut datapath = arguments.datapath.as_str();
    if !privileged {
        ensure!(
            matches!(datapath, "auto" | "tun"),
            "--datapath {datapath} loads eBPF programs, which needs root; without it: --datapath tun"
        );
        // Before any thread: the kernel lets only single-threaded processes into a new user namespace.
        unprivileged::enter()?;
        datapath = "tun";
    }
    tidy::sweep();
    tidy::on_interrupt()?;
    let shown = show(arguments, &agent, datapath, privileged);
    tidy::end();
    drop(lock);
    if shown.is_ok() && !privileged {
        println!("\n{}", unprivileged::WHAT_ROOT_ADDS);
    }
    shown
}

fn show(arguments: &Arguments, agent: &Path, datapath: &str, privileged: bool) -> Result<()> {
    let (store, plan) = match arguments.store.as_str() {
        "etcd" => ("etcd", Lab::named(NAME)),
        _ => ("lease server", Lab::named(NAME).served_by(agent)),
    };
    let step = Step::begin(&format!("hosts, underlay, {store}"));
    let plan = plan.hosts(arguments.hosts);
    let plan = if privileged { plan.listed() } else { plan };
    let mut lab = plan.build()?;
    step.done(&format!("{} hosts on 10.99.0.0/24, network {NETWORK}", arguments.hosts));

    let step = Step::begin("agents");
    let options = AgentOptions::with_binary(agent.to_owned()).datapath(datapath);
    let each = vec![options; usize::from(arguments.hosts)];
    lab.bring_up_with(&each)?;
    let first = lab.host(0).status()?;
    let reason = first.tunnels.first().map(|tunnel| tunnel.reason.clone()).unwrap_or_default();
    step.done(&format!("all ready; data path {}: {reason}", first.path()));

    let step = Step::begin("ping, all pairs of pods");
    let round_trips = round_trips(&lab, &step)?;
    let pairs = lab.hosts().len() * (lab.hosts().len() - 1);
    step.done(&format!("{pairs} pairs, {PINGS} pings each, none lost"));

    let step = Step::begin("TCP, each way between neighbours");
    let rates = rates(&lab, &step)?;
    step.done("every byte compared");

    let statuses: Vec<Status> = lab.hosts().iter().map(|host| host.status()).collect::<Result<_>>()?;
    println!("\n{}", table::table(&lab, &statuses, &round_trips, &rates));

    if arguments.keep {
        keep(&lab, agent, privileged)?;
    }
    let step = Step::begin("clean up");
    drop(lab);
    step.done("");
    Ok(())
}

/// Average round trip from each host's pod to all others.
fn round_trips(lab: &Lab, step: &Step) -> Result<Vec<Duration>> {
    let mut averages = Vec::new();
    for from in lab.hosts() {
        let mut times = Vec::new();
        for to in lab.hosts().iter().filter(|to| to.address() != from.address()) {
            step.note(&format!("{} → {}", from.name(), to.name()));
            let ping = Ping::new(&from.pod()?.netns, to.pod()?.address);
            // The first packet resolves neighbours, and is not what the tunnel takes.
            ping.clone().count(1).run()?;
            let report = ping.count(PINGS).interval(Duration::from_millis(5)).run()?;
            ensure!(
                report.lost() == 0,
                "pod of {} → pod of {}: {report}\n{}",
                from.name(),
                to.name(),
                lab.logs()
            );
            times.push(report.rtt.context("ping printed no round trip time")?);
        }
        let count = u32::try_from(times.len()).context("hosts")?;
        averages.push(times.iter().sum::<Duration>() / count.max(1));
    }
    Ok(averages)
}

/// Gbit/s that each host's pod sent to its neighbours on a ring of hosts, average.
fn rates(lab: &Lab, step: &Step) -> Result<Vec<f64>> {
    let count = lab.hosts().len();
    let mut sums = vec![(0.0, 0u32); count];
    for index in 0..count {
        let next = (index + 1) % count;
        for (from, to) in [(index, next), (next, index)] {
            // Two hosts are each other's neighbour on both sides.
            if count == 2 && index == 1 {
                continue;
            }
            let (sender, receiver) = (lab.host(from), lab.host(to));
            step.note(&format!("{} → {}", sender.name(), receiver.name()));
            let path = TcpPath::new(
                &sender.pod()?.netns,
                &receiver.pod()?.netns,
                std::net::SocketAddrV4::new(receiver.pod()?.address, 5001),
            );
            let done = path.transfer_for(TRANSFER).with_context(|| lab.logs())?;
            if let Some((sum, count)) = sums.get_mut(from) {
                *sum += done.gbit_per_second();
                *count += 1;
            }
        }
    }
    Ok(sums.iter().map(|(sum, count)| sum / f64::from((*count).max(1))).collect())
}

fn keep(lab: &Lab, agent: &Path, privileged: bool) -> Result<()> {
    let host = lab.host(0);
    let other = lab.host(1).pod()?.address;
    let agent = agent.strip_prefix(workspace()).unwrap_or(agent).display().to_string();
    let (inside, pod) = if privileged {
        (format!("ip netns exec {NAME}-h1 "), format!("ip netns exec {NAME}-pod1 "))
    } else {
        let me = std::process::id();
        let enter = |path: String| {
            let fd = path.rsplit('/').next().unwrap_or_default().to_owned();
            format!("nsenter --user=/proc/{me}/ns/user --preserve-credentials --net=/proc/{me}/fd/{fd} ")
        };
        (enter(host.netns().path()), enter(host.pod()?.netns.path()))
    };
    println!(
        "\nIt keeps running. Host 1 and its pod, from another terminal in {}:\n\
         \n  {agent} status --socket {}\
         \n  {pod}ping {other}\
         \n  {inside}ip route\
         \n  {inside}ip -d link show flannel0\
         \n  {inside}tcpdump -ni eth0 udp port 8285\
         \n  tail -f {}\n\
         \nCtrl-C ends it and cleans up.",
        workspace().display(),
        host.files().socket().display(),
        host.files().log().display(),
    );
    tidy::wait_for_interrupt();
    Ok(())
}
