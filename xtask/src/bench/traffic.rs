//! Rounds of traffic over all variants.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use flannel_tests::probe::load::{Cpus, round_trips, streams::Streams, udp_flood};

use super::{
    Bench,
    figures::{Metric, Samples, Summary},
    variants::{HOST_GW, Standing, Variant},
};
use crate::progress::Step;

/// What lies between the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    Wire,
    SuperPackets,
}

impl Mode {
    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Wire => "wire: every frame at most an MTU long, as a network card sees it",
            Self::SuperPackets => "super-packets: nodes joined by veth, packets of 64 KiB cross whole",
        }
    }
}

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Load {
    /// One TCP stream
    Tcp1,
    /// Four TCP streams at once
    Tcp4,
    /// A flood of UDP datagrams of 64 bytes
    Udp,
    /// TCP requests of one byte, one after the other
    Requests,
}

impl Load {
    pub(super) const ALL: [Self; 4] = [Self::Tcp1, Self::Tcp4, Self::Udp, Self::Requests];
}

/// How long each load runs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pace {
    one_stream: Duration,
    four_streams: Duration,
    pub(super) flood: Duration,
    requests: Duration,
}

impl Pace {
    pub(super) const FULL: Self = Self {
        one_stream: Duration::from_millis(1000),
        four_streams: Duration::from_millis(500),
        flood: Duration::from_millis(350),
        requests: Duration::from_millis(350),
    };
    pub(super) const QUICK: Self = Self {
        one_stream: Duration::from_millis(200),
        four_streams: Duration::from_millis(200),
        flood: Duration::from_millis(150),
        requests: Duration::from_millis(100),
    };
}

/// All rounds of one mode.
pub(super) struct Measured {
    pub(super) mode: Mode,
    pub(super) rounds: usize,
    pub(super) rows: Vec<Row>,
}

/// One variant.
pub(super) struct Row {
    pub(super) name: &'static str,
    /// The agent's word for what carried the packets, where it chose.
    pub(super) path: String,
    pub(super) samples: Samples,
}

impl Row {
    pub(super) fn summary(&self, metric: Metric) -> Option<Summary> {
        Summary::of(self.samples.get(&metric)?.iter().copied())
    }
}

impl Measured {
    pub(super) fn row(&self, name: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.name == name)
    }

    /// Median of the ratios to another variant within a round.
    pub(super) fn ratio(&self, row: &Row, metric: Metric, reference: &str) -> Option<Summary> {
        let reference = self.row(reference)?;
        Summary::of_ratios(row.samples.get(&metric)?, reference.samples.get(&metric)?)
    }
}

/// Builds all variants, measures them in rounds, and lets them go.
pub(super) fn measure(bench: &Bench, mode: Mode) -> Result<Measured> {
    println!("\n{}", mode.title());
    let cpus = Cpus::first_two()?;
    let wanted: Vec<Variant> =
        Variant::all(mode).into_iter().filter(|variant| bench.wants(variant)).collect();
    let step = Step::begin("labs");
    let mut standing = Vec::new();
    for variant in &wanted {
        step.note(variant.name);
        standing.push(variant.start(mode, &bench.agent)?);
    }
    step.done(&format!("{} variants stand side by side", standing.len()));

    let mut rows: Vec<Row> = standing
        .iter()
        .map(|variant| Row { name: variant.name, path: variant.path.clone(), samples: Samples::new() })
        .collect();
    for round in 0..bench.rounds {
        let step = Step::begin(&format!("round {} of {}", round + 1, bench.rounds));
        let started = Instant::now();
        for turn in 0..standing.len() {
            let index = (turn + round) % standing.len();
            let (Some(variant), Some(row)) = (standing.get(index), rows.get_mut(index)) else { continue };
            step.note(variant.name);
            let taken = sample(variant, bench, cpus)
                .with_context(|| format!("measure {}\n{}", variant.name, variant.lab.logs()))?;
            for (metric, value) in taken {
                row.samples.entry(metric).or_default().push(value);
            }
        }
        step.done(&so_far(&rows, bench.rounds - round - 1, started.elapsed()));
    }
    Ok(Measured { mode, rounds: bench.rounds, rows })
}

/// One variant, once.
fn sample(variant: &Standing, bench: &Bench, cpus: Cpus) -> Result<Vec<(Metric, f64)>> {
    let (ends, pace) = (&variant.ends, bench.pace);
    let mut taken = Vec::new();
    for load in bench.loads() {
        match load {
            Load::Tcp1 => {
                let one = Streams { count: 1, time: pace.one_stream }.run(ends, cpus)?;
                #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
                let retransmits = one.retransmits as f64 / one.gigabytes();
                taken.push((Metric::Tcp1, one.gbit_per_second()));
                taken.push((Metric::Retransmits, retransmits));
                taken.push((Metric::CpuPerGb, one.busy.as_secs_f64() / one.gigabytes()));
            }
            Load::Tcp4 => {
                let four = Streams { count: 4, time: pace.four_streams }.run(ends, cpus)?;
                taken.push((Metric::Tcp4, four.gbit_per_second()));
            }
            Load::Udp => {
                let flood = udp_flood::run(ends, cpus, pace.flood)?;
                taken.push((Metric::Udp64, flood.per_second / 1e3));
            }
            Load::Requests => {
                let requests = round_trips::run(ends, cpus, pace.requests)?;
                taken.push((Metric::Requests, requests.per_second / 1e3));
                taken.push((Metric::RoundTrip, microseconds(requests.median)));
                taken.push((Metric::RoundTrip99, microseconds(requests.p99)));
            }
        }
    }
    Ok(taken)
}

fn microseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// The newest round's ratios, and how long the rest will take.
fn so_far(rows: &[Row], left: usize, round: Duration) -> String {
    let Some(metric) = rows.first().and_then(|row| row.samples.keys().next().copied()) else {
        return String::new();
    };
    let newest = |row: &Row| row.samples.get(&metric).and_then(|samples| samples.last().copied());
    let Some(reference) = rows.iter().find(|row| row.name == HOST_GW).and_then(newest) else {
        return String::new();
    };
    let mut text: Vec<String> = rows
        .iter()
        .filter(|row| row.name != HOST_GW)
        .filter_map(|row| Some(format!("{} {:.2}", row.name, newest(row)? / reference)))
        .collect();
    if left > 0 {
        let left = round * u32::try_from(left).unwrap_or(u32::MAX);
        text.push(format!("{} to go", crate::progress::seconds(left)));
    }
    format!("× host-gw: {}", text.join(", "))
}
