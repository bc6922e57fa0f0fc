//! `cargo xtask bench`: what the data paths carry, side by side in one run, and what the agent itself takes.
//!
//! On a shared or virtual machine absolute figures move by a factor of two between hours, ratios of the same minute
//! hardly. So every variant has a lab of its own, all of them stand at once, and each round measures every variant, in
//! an order that rotates. What is compared, printed and judged are medians of the ratios within a round.
//!
//! Two underlays, because they flatter different things. *wire*: each frame is what a network card would see, at most an
//! MTU long, segments and checksums made by the sender, merged again by GRO at the receiver. *super-packets*: the nodes
//! are joined by veth, as containers of one machine are, and packets of 64 KiB cross whole.

mod figures;
mod floors;
mod peers;
mod plot;
mod programs;
mod report;
mod rest;
mod start;
mod stores;
mod table;
mod traffic;
mod variants;

use std::{
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use flannel_tests::namespace::private_mounts;

use self::{
    report::Report,
    traffic::{Load, Mode, Pace},
    variants::Variant,
};
use crate::{
    build_ebpf,
    progress::{cargo, cargo_step, seconds},
    setup, test, workspace,
};

/// Prefix of the labs' folders.
const NAME: &str = "bench";

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Measure only these parts (repeatable, or separated by commas); else all of them
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Only variants whose name contains one of these; without host-gw and vxlan among them there is nothing to compare with
    #[arg(long, value_delimiter = ',')]
    variants: Vec<String>,
    /// Only these loads, where traffic is measured; one TCP stream is also what CPU and retransmits are told of
    #[arg(long, value_enum, value_delimiter = ',')]
    loads: Vec<Load>,
    /// How many rounds; fewer than 10 do not resolve 10 %
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// Everything once, briefly, with unoptimised builds: shows in a minute that it works, judges nothing
    #[arg(long)]
    quick: bool,
    /// Write all figures to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw the traffic figures into this file
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
enum Part {
    /// Traffic where each frame is at most an MTU long
    Wire,
    /// Traffic where packets of 64 KiB cross whole
    Super,
    /// Start of the agent to ready
    Start,
    /// Up to 10,000 peers: time to program them, memory
    Peers,
    /// Nanoseconds in the eBPF programs
    Programs,
    /// A thousand leases in etcd and in a server: start, one change, and an agent at rest with its store there and gone
    Stores,
}

impl Part {
    fn name(self) -> String {
        clap::ValueEnum::to_possible_value(&self)
            .map_or_else(String::new, |value| value.get_name().to_owned())
    }

    const ALL: [Self; 6] = [Self::Wire, Self::Super, Self::Start, Self::Peers, Self::Programs, Self::Stores];
}

/// Builds, measures, judges.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let started = Instant::now();
    ensure!(
        test::may_make_networks()?,
        "the bench builds hosts out of network namespaces and loads eBPF programs: run as root \
         (`sudo -E env PATH=$PATH cargo xtask bench`)"
    );
    if cfg!(debug_assertions) {
        setup::run()?;
        build_ebpf::run()?;
        if !arguments.quick {
            return run_optimised();
        }
    }
    let agent = build_agent(arguments)?;
    // Before any thread. Labs mount a bpffs each.
    private_mounts()?;

    let bench = Bench {
        agent,
        rounds: if arguments.quick { 1 } else { usize::from(arguments.rounds) },
        pace: if arguments.quick { Pace::QUICK } else { Pace::FULL },
        quick: arguments.quick,
        variants: arguments.variants.clone(),
        loads: arguments.loads.clone(),
    };
    let mut parts = if arguments.only.is_empty() { Part::ALL.to_vec() } else { arguments.only.clone() };
    parts.sort_unstable();
    parts.dedup();

    let mut report = Report::default();
    for part in parts {
        bench.run(part, &mut report).with_context(|| format!("bench --only {}", part.name()))?;
    }
    if let Some(path) = &arguments.json {
        report.write_json(path)?;
    }
    if let Some(path) = &arguments.plot {
        plot::write(path, &report.traffic)?;
    }
    println!("\nall of it: {}", seconds(started.elapsed()));
    if arguments.quick {
        println!(
            "--quick: everything ran; figures of short loads and unoptimised builds mean nothing, none was judged"
        );
        return Ok(());
    }
    let broken: Vec<String> = report.broken.iter().map(ToString::to_string).collect();
    ensure!(
        broken.is_empty(),
        "{} figures are worse than they may be:\n  {}",
        broken.len(),
        broken.join("\n  ")
    );
    Ok(())
}

/// The agent as it is released, or for a quick run as the tests have built it already.
fn build_agent(arguments: &Arguments) -> Result<PathBuf> {
    let mut build = cargo();
    build.args(["build", "--package", "flannel-agent"]);
    let (what, folder) = if arguments.quick {
        ("build the agent", "debug")
    } else {
        build.arg("--release");
        ("build the agent (release)", "release")
    };
    cargo_step(what, "bench-agent", &mut build)?;
    let agent = workspace().join("target").join(folder).join("flannel-agent");
    ensure!(agent.is_file(), "cargo built no {}", agent.display());
    Ok(agent)
}

/// The same again in a release build: the proxy that stands for the original is part of this program.
fn run_optimised() -> Result<()> {
    use std::os::unix::process::CommandExt as _;
    let mut build = cargo();
    build.args(["build", "--release", "--package", "xtask", "--features", "bare"]);
    cargo_step("build the bench (release)", "bench-xtask", &mut build)?;
    let me = workspace().join("target/release/xtask");
    let failed = Command::new(&me).args(std::env::args_os().skip(1)).exec();
    Err(failed).with_context(|| format!("start {}", me.display()))
}

/// How to measure.
struct Bench {
    agent: PathBuf,
    rounds: usize,
    pace: Pace,
    quick: bool,
    variants: Vec<String>,
    loads: Vec<Load>,
}

impl Bench {
    fn loads(&self) -> &[Load] {
        if self.loads.is_empty() { &Load::ALL } else { &self.loads }
    }

    fn wants(&self, variant: &Variant) -> bool {
        self.variants.is_empty() || self.variants.iter().any(|part| variant.name.contains(part.as_str()))
    }

    /// How long a flood of datagrams lasts.
    fn flood(&self) -> Duration {
        self.pace.flood
    }

    fn run(&self, part: Part, report: &mut Report) -> Result<()> {
        match part {
            Part::Wire => self.traffic(Mode::Wire, report)?,
            Part::Super => self.traffic(Mode::SuperPackets, report)?,
            Part::Start => {
                let started = start::measure(self)?;
                println!("\n{}", table::start(&started));
                report.broken.extend(floors::judge_start(&started));
                report.started = Some(started);
            }
            Part::Peers => {
                report.peers = peers::measure(self)?;
                println!("\n{}", table::peers(&report.peers));
                report.broken.extend(floors::judge_peers(&report.peers));
            }
            Part::Programs => {
                let programs = programs::measure(self)?;
                println!("\n{}", table::programs(&programs));
                report.programs = Some(programs);
            }
            Part::Stores => {
                report.stores = stores::measure(self)?;
                println!("\n{}", table::stores(&report.stores));
                report.rest = rest::measure(self)?;
                println!("\n{}", table::rest(&report.rest));
                report.broken.extend(floors::judge_stores(&report.stores, &report.rest));
            }
        }
        Ok(())
    }

    fn traffic(&self, mode: Mode, report: &mut Report) -> Result<()> {
        let measured = traffic::measure(self, mode)?;
        println!("\n{}", table::traffic(&measured));
        report.broken.extend(floors::judge(&measured));
        report.traffic.push(measured);
        Ok(())
    }
}
