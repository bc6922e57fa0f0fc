//! What the bench fails on. Floors are generous, goals are not written here: a floor that breaks on a busy machine is
//! soon ignored.

use std::fmt;

use super::{
    figures::Metric,
    rest::Rest,
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
    Line(Mode::SuperPackets, "udp tc", [0.30, 0.5, 3.0, 0.70, 1.2, 1.3]),
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
    fn a_floor_that_is_kept_or_was_not_measured_is_not_mentioned() {
        let rows = vec![row(HOST_GW, &[10.0]), row("udp xdp", &[9.0])];
        assert!(judge(&Measured { mode: Mode::Wire, rounds: 1, rows }).is_empty());
        assert!(
            judge(&Measured { mode: Mode::Wire, rounds: 1, rows: vec![row("udp xdp", &[0.1])] }).is_empty()
        );
    }
}
