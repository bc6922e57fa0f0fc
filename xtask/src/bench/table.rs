//! What a person reads at the end.

use comfy_table::{Cell, CellAlignment, Table, presets::UTF8_FULL_CONDENSED};

use super::{
    figures::{Metric, Summary},
    peers::Peers,
    programs::Programs,
    rest::Rest,
    start::Started,
    stores::Stores,
    traffic::{Measured, Row},
    variants::{HOST_GW, VXLAN},
};

/// A row per variant; each cell has the median and its range, and below the ratios to host-gw and to vxlan.
pub(super) fn traffic(measured: &Measured) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    let mut header = vec![format!("{} rounds", measured.rounds)];
    header.extend(Metric::ALL.iter().map(|metric| metric.title().replacen(", ", "\n", 1)));
    table.set_header(header);
    for row in &measured.rows {
        let mut cells = vec![Cell::new(name(row))];
        for metric in Metric::ALL {
            cells.push(Cell::new(cell(measured, row, metric)).set_alignment(CellAlignment::Right));
        }
        table.add_row(cells);
    }
    table
}

fn name(row: &Row) -> String {
    if row.path.is_empty() { row.name.to_owned() } else { format!("{}\n{}", row.name, row.path) }
}

fn cell(measured: &Measured, row: &Row, metric: Metric) -> String {
    let Some(summary) = row.summary(metric) else { return String::new() };
    let ratio = |reference| {
        measured
            .ratio(row, metric, reference)
            .map_or_else(|| "–".to_owned(), |ratio| format!("{:.2}", ratio.median))
    };
    let range = range(summary);
    if metric == Metric::Retransmits {
        return range;
    }
    format!("{range}\n× {} gw, {} vx", ratio(HOST_GW), ratio(VXLAN))
}

/// `5.96 (5.5–6.7)`
fn range(summary: Summary) -> String {
    let digits = match summary.median {
        big if big >= 100.0 => 0,
        big if big >= 10.0 => 1,
        _ => 2,
    };
    format!("{:.digits$} ({:.digits$}–{:.digits$})", summary.median, summary.least, summary.most)
}

/// Start to ready.
pub(super) fn start(started: &Started) -> Table {
    let mut table = new(&["start to ready", "ms"]);
    table.add_row(["fresh lease".to_owned(), range(started.fresh)]);
    table.add_row(["fresh lease, in the kernel".to_owned(), range(started.in_kernel)]);
    table.add_row(["reused lease".to_owned(), range(started.reused)]);
    table
}

/// A thousand leases.
pub(super) fn stores(rows: &[Stores]) -> Table {
    let mut table = new(&["store", "start to ready, ms", "a change at every agent, ms"]);
    for row in rows {
        table.add_row([row.store.to_owned(), range(row.start), range(row.change)]);
    }
    table
}

/// Agents to whom nothing happens.
pub(super) fn rest(rows: &[Rest]) -> Table {
    let mut table = new(&["store", "backend", "peers", "at rest, % of a core", "store gone, % of a core"]);
    for row in rows {
        table.add_row([
            row.store.to_owned(),
            row.backend.to_owned(),
            row.peers.to_string(),
            format!("{:.2}", row.with_store),
            format!("{:.2}", row.alone),
        ]);
    }
    table
}

/// Large networks.
pub(super) fn peers(rows: &[Peers]) -> Table {
    let mut table = new(&[
        "backend",
        "peers",
        "start to programmed, ms",
        "after a crash, ms",
        "one change, ms",
        "RSS at rest, MB",
    ]);
    for row in rows {
        table.add_row([
            row.backend.to_owned(),
            row.count.to_string(),
            format!("{:.0}", row.start),
            format!("{:.0}", row.restart),
            range(row.change),
            format!("{:.1}", row.memory),
        ]);
    }
    table
}

/// Nanoseconds in the programs.
pub(super) fn programs(programs: &Programs) -> Table {
    let mut table = new(&["program", "source check", "ns per run"]);
    for ((tier, program, check), figures) in &programs.loaded {
        table.add_row([format!("{tier} tier: {program}"), (*check).to_owned(), range(*figures)]);
    }
    for (name, median, spread) in &programs.test_runs {
        table.add_row([
            format!("test run: {}", name.replace('_', " ")),
            String::new(),
            format!("{median:.0} ± {spread:.0}"),
        ]);
    }
    table
}

fn new(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header(header);
    table
}
