//! What the bench fails on. Floors are generous, goals are not written here: a floor that breaks on a busy machine is
//! soon ignored.

use std::fmt;

use super::{
    figures::Metric,
    peers::Peers,
    rest::Rest,
    start::Started,
    stores::{LEASES, Stores},
    traffic::{Measured, Mode},
    variants::{HOST_GW, PROXY, VXLAN},
};

#[derive(Clone, Copy)]
enum Bound {
    AtLeast(f64),
    AtMost(f64),
}
use Bound::{AtLeast, AtMost};

struct Floor {
    mode: Mode,
    /// The variant, and where the agent chose among several ways, the way it must have taken for the floor to count.
    variant: &'static str,
    metric: Metric,
    reference: &'static str,
    bound: Bound,
}

/// Mode, variant, then TCP × host-gw, × vxlan, CPU, UDP × host-gw, × vxlan, RTT.
struct Line(Mode, &'static str, [f64; 6]);

const LINES: [Line; 6] = [
    Line(Mode::Wire, "udp xdp", [0.85, 1.05, 1.20, 0.85, 1.10, 1.25]),
    Line(Mode::Wire, "udp tc", [0.65, 0.85, 1.50, 0.80, 1.05, 1.30]),
    Line(Mode::Wire, "udp tun", [0.55, 0.70, 2.1, 0.65, 0.80, 3.0]),
    Line(Mode::SuperPackets, "udp auto", [0.80, 1.25, 1.3, 0.75, 1.25, 1.2]),
    Line(Mode::SuperPackets, "udp tc", [0.80, 1.0, 1.3, 0.70, 1.2, 1.3]),
    Line(Mode::SuperPackets, "udp xdp", [0.20, 0.3, 4.0, 0.65, 1.1, 1.4]),
];

fn floors() -> Vec<Floor> {
    let mut floors = Vec::new();
    for Line(mode, variant, [tcp_gw, tcp_vx, cpu, udp_gw, udp_vx, rtt]) in LINES {
        for (metric, reference, bound) in [
            (Metric::Tcp1, HOST_GW, AtLeast(tcp_gw)),
            (Metric::Tcp1, VXLAN, AtLeast(tcp_vx)),
            (Metric::CpuPerGb, HOST_GW, AtMost(cpu)),
            (Metric::Udp64, HOST_GW, AtLeast(udp_gw)),
            (Metric::Udp64, VXLAN, AtLeast(udp_vx)),
            (Metric::RoundTrip, HOST_GW, AtMost(rtt)),
        ] {
            floors.push(Floor { mode, variant, metric, reference, bound });
        }
    }
    for variant in ["udp xdp", "udp tc"] {
        for (metric, bound) in [
            (Metric::Tcp1, AtLeast(2.5)),
            (Metric::CpuPerGb, AtMost(0.3)),
            (Metric::Udp64, AtLeast(1.1)),
            (Metric::RoundTrip, AtMost(0.6)),
        ] {
            floors.push(Floor { mode: Mode::Wire, variant, metric, reference: PROXY, bound });
        }
    }
    floors.push(Floor {
        mode: Mode::Wire,
        variant: "udp tun",
        metric: Metric::Tcp1,
        reference: PROXY,
        bound: AtLeast(2.0),
    });
    floors
}

/// A floor that was not reached.
pub(super) struct Broken {
    text: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Floors of variants that were not measured are not judged.
pub(super) fn judge(measured: &Measured) -> Vec<Broken> {
    let mode = match measured.mode {
        Mode::Wire => "wire",
        Mode::SuperPackets => "super-packets",
    };
    let mut broken = Vec::new();
    for floor in floors().iter().filter(|floor| floor.mode == measured.mode) {
        let Some(row) = measured.row(floor.variant) else { continue };
        let Some(ratio) = measured.ratio(row, floor.metric, floor.reference) else { continue };
        let (kept, word, bound) = match floor.bound {
            AtLeast(bound) => (ratio.median >= bound, "at least", bound),
            AtMost(bound) => (ratio.median <= bound, "at most", bound),
        };
        if !kept {
            broken.push(Broken {
                text: format!(
                    "{mode}, {}, {}: {:.2} × {} ({:.2}–{:.2} in {} rounds), {word} {bound} is right",
                    floor.variant,
                    floor.metric.title(),
                    ratio.median,
                    floor.reference,
                    ratio.least,
                    ratio.most,
                    measured.rounds
                ),
            });
        }
    }
    broken
}

/// Most that stores and agents may take with a thousand leases: ms from start to ready, ms until a change is at every
/// agent (both medians), and percent of a core for an agent at rest, its store there or gone.
const MOST_START: f64 = 100.0;
const MOST_CHANGE: f64 = 50.0;
const MOST_REST: f64 = 0.5;

/// What of it takes too long or too much.
pub(super) fn judge_stores(stores: &[Stores], rest: &[Rest]) -> Vec<Broken> {
    let timed = stores.iter().flat_map(|row| {
        [
            (format!("{}, {LEASES} leases: start to ready, ms", row.store), row.start.median, MOST_START),
            (
                format!("{}, {LEASES} leases: a change at every agent, ms", row.store),
                row.change.median,
                MOST_CHANGE,
            ),
        ]
    });
    let resting = rest.iter().filter(|row| row.peers <= LEASES).flat_map(|row| {
        let name = format!("{}, {}, {} peers", row.store, row.backend, row.peers);
        [
            (format!("{name}: at rest, % of a core"), row.with_store, MOST_REST),
            (format!("{name}: store gone, % of a core"), row.alone, MOST_REST),
        ]
    });
    let over = timed.chain(resting).filter(|(_, figure, most)| figure > most);
    over.map(|(what, figure, most)| Broken { text: format!("{what}: {figure:.2}, at most {most} is right") })
        .collect()
}

/// What a start may take, ms: twice what is wanted of it.
const START: f64 = 50.0;

/// Start to ready.
pub(super) fn judge_start(started: &Started) -> Vec<Broken> {
    [("fresh", started.fresh), ("reused", started.reused)]
        .into_iter()
        .filter(|(_, figures)| figures.median > START)
        .map(|(lease, figures)| Broken {
            text: format!(
                "start to ready, {lease} lease: {:.1} ms ({:.1}–{:.1}), at most {START} is right",
                figures.median, figures.least, figures.most
            ),
        })
        .collect()
}

/// What a network of so many peers may take: times are twice or more what is wanted, memory is no matter of luck.
struct Limits {
    peers: u32,
    udp: f64,
    host_gw: f64,
    change: f64,
    memory: f64,
}

const LIMITS: [Limits; 2] = [
    Limits { peers: 100, udp: 200.0, host_gw: 200.0, change: 40.0, memory: 12.0 },
    Limits { peers: 10_000, udp: 1000.0, host_gw: 3000.0, change: 40.0, memory: 25.0 },
];

/// Large networks; numbers of peers without a limit are not judged.
pub(super) fn judge_peers(measured: &[Peers]) -> Vec<Broken> {
    let mut broken = Vec::new();
    for row in measured {
        let Some(limits) = LIMITS.iter().find(|limits| limits.peers == row.count) else { continue };
        let start = if row.backend == "udp" { limits.udp } else { limits.host_gw };
        for (what, figure, most, unit) in [
            ("start to programmed", row.start, start, "ms"),
            ("one change", row.change.median, limits.change, "ms"),
            ("RSS at rest", row.memory, limits.memory, "MB"),
        ] {
            if figure > most {
                let (backend, count) = (row.backend, row.count);
                let text =
                    format!("{backend}, {count} peers, {what}: {figure:.1} {unit}, at most {most} is right");
                broken.push(Broken { text });
            }
        }
    }
    broken
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::figures::Summary;
    use crate::bench::traffic::Row;

    fn row(name: &'static str, gbits: &[f64]) -> Row {
        Row { name, path: String::new(), samples: [(Metric::Tcp1, gbits.to_vec())].into() }
    }

    #[test]
    fn a_broken_floor_names_the_figure_and_what_would_be_right() {
        let rows = vec![row(HOST_GW, &[10.0, 10.0, 10.0]), row("udp xdp", &[7.0, 8.0, 12.0])];
        let broken = judge(&Measured { mode: Mode::Wire, rounds: 3, rows });
        let texts: Vec<String> = broken.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "wire, udp xdp, TCP, 1 stream, Gbit/s: 0.80 × host-gw (0.70–1.20 in 3 rounds), at least 0.85 is right"
            ]
        );
    }

    #[test]
    fn a_thousand_leases_that_take_too_much_are_named() {
        let summary = |median| Summary { median, least: 1.0, most: 200.0 };
        let stores = [Stores { store: "etcd", start: summary(99.0), change: summary(50.5) }];
        let rest = |peers, alone| Rest { store: "etcd", backend: "udp", peers, with_store: 0.1, alone };
        let broken = judge_stores(&stores, &[rest(1000, 0.4), rest(1000, 0.61), rest(10_000, 2.0)]);
        let texts: Vec<String> = broken.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "etcd, 1000 leases: a change at every agent, ms: 50.50, at most 50 is right",
                "etcd, udp, 1000 peers: store gone, % of a core: 0.61, at most 0.5 is right",
            ]
        );
    }

    #[test]
    fn a_start_or_a_large_network_that_takes_too_much_is_named() {
        let figures = |median| Summary { median, least: 1.0, most: 99.0 };
        let started = Started { fresh: figures(60.5), in_kernel: figures(999.0), reused: figures(20.0) };
        let texts = |broken: Vec<Broken>| broken.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(
            texts(judge_start(&started)),
            ["start to ready, fresh lease: 60.5 ms (1.0–99.0), at most 50 is right"]
        );
        let row = |count, memory| Peers {
            backend: "udp",
            count,
            start: 40.0,
            restart: 40.0,
            change: figures(1.0),
            memory,
        };
        assert_eq!(
            texts(judge_peers(&[row(100, 12.5), row(1000, 99.0), row(10_000, 24.0)])),
            ["udp, 100 peers, RSS at rest: 12.5 MB, at most 12 is right"]
        );
    }

    #[test]
    fn a_floor_that_is_kept_or_was_not_measured_is_not_mentioned() {
        let rows = vec![row(HOST_GW, &[10.0]), row("udp xdp", &[9.0])];
        assert!(judge(&Measured { mode: Mode::Wire, rounds: 1, rows }).is_empty());
        assert!(
            judge(&Measured { mode: Mode::Wire, rounds: 1, rows: vec![row("udp xdp", &[0.1])] }).is_empty()
        );
    }
}
