//! All that was measured, for programs: `--json`.
//!
//! Units are in the keys. Of traffic every sample is there, so that ratios can be made anew.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};
use serde_json::{Map, Value, json};

use super::{
    figures::{Metric, Summary},
    floors::Broken,
    peers::Peers,
    programs::Programs,
    rest::Rest,
    start::Started,
    stores::{self, Stores},
    traffic::{Measured, Mode, Row},
    variants::{HOST_GW, PROXY, VXLAN},
};

/// What of the parts was run.
#[derive(Default)]
pub(super) struct Report {
    pub(super) traffic: Vec<Measured>,
    pub(super) started: Option<Started>,
    pub(super) peers: Vec<Peers>,
    pub(super) programs: Option<Programs>,
    pub(super) stores: Vec<Stores>,
    pub(super) rest: Vec<Rest>,
    pub(super) broken: Vec<Broken>,
}

impl Report {
    /// Writes it to `path`.
    pub(super) fn write_json(&self, path: &Path) -> Result<()> {
        let mut text = serde_json::to_string_pretty(&self.json()).context("write JSON")?;
        text.push('\n');
        fs::write(path, text).with_context(|| format!("write {}", path.display()))
    }

    fn json(&self) -> Value {
        let traffic: Map<String, Value> = self
            .traffic
            .iter()
            .map(|measured| (key_of(measured.mode).to_owned(), traffic(measured)))
            .collect();
        let peers: Vec<Value> = self
            .peers
            .iter()
            .map(|peers| {
                json!({
                    "backend": peers.backend,
                    "peers": peers.count,
                    "start_to_programmed_ms": peers.start,
                    "restart_to_programmed_ms": peers.restart,
                    "one_change_ms": summary(peers.change),
                    "rss_mb": peers.memory,
                })
            })
            .collect();
        json!({
            "machine": machine(),
            "traffic": traffic,
            "start_to_ready_ms": self.started.as_ref().map(|started| json!({
                "fresh_lease": summary(started.fresh),
                "fresh_lease_in_kernel": summary(started.in_kernel),
                "reused_lease": summary(started.reused),
            })),
            "peers": peers,
            "stores": self.stores.iter().map(|store| json!({
                "store": store.store,
                "leases": stores::LEASES,
                "start_to_ready_ms": summary(store.start),
                "change_at_every_agent_ms": summary(store.change),
            })).collect::<Vec<_>>(),
            "at_rest": self.rest.iter().map(|rest| json!({
                "store": rest.store,
                "backend": rest.backend,
                "peers": rest.peers,
                "percent_of_a_core": rest.with_store,
                "store_gone_percent_of_a_core": rest.alone,
            })).collect::<Vec<_>>(),
            "programs_ns": self.programs.as_ref().map(programs),
            "below_the_floor": self.broken.iter().map(ToString::to_string).collect::<Vec<_>>(),
        })
    }
}

fn key_of(mode: Mode) -> &'static str {
    match mode {
        Mode::Wire => "wire",
        Mode::SuperPackets => "super_packets",
    }
}

fn traffic(measured: &Measured) -> Value {
    let variants: Vec<Value> = measured.rows.iter().map(|row| variant(measured, row)).collect();
    json!({ "rounds": measured.rounds, "variants": variants })
}

fn variant(measured: &Measured, row: &Row) -> Value {
    let mut metrics = Map::new();
    for metric in Metric::ALL {
        let Some(figures) = row.summary(metric) else { continue };
        let ratio = |reference| measured.ratio(row, metric, reference).map(summary);
        let value = json!({
            "median": figures.median,
            "min": figures.least,
            "max": figures.most,
            "samples": row.samples.get(&metric),
            "ratio_to_host_gw": ratio(HOST_GW),
            "ratio_to_vxlan": ratio(VXLAN),
            "ratio_to_proxy": ratio(PROXY),
        });
        metrics.insert(metric.key().to_owned(), value);
    }
    json!({ "name": row.name, "tier": row.path, "metrics": metrics })
}

fn summary(summary: Summary) -> Value {
    json!({ "median": summary.median, "min": summary.least, "max": summary.most })
}

fn programs(programs: &Programs) -> Value {
    let loaded: Vec<Value> = programs
        .loaded
        .iter()
        .map(|((tier, program, check), figures)| {
            json!({ "tier": tier, "program": program, "source_check": check, "ns_per_run": summary(*figures) })
        })
        .collect();
    let test_runs: Map<String, Value> = programs
        .test_runs
        .iter()
        .map(|(name, median, spread)| (name.clone(), json!({ "ns": median, "plus_minus": spread })))
        .collect();
    json!({ "under_load": loaded, "test_runs": test_runs })
}

/// Where it was measured.
fn machine() -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let processor = read("/proc/cpuinfo").lines().find_map(|line| {
        line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name.trim().to_owned())
    });
    json!({
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "processor": processor,
        "cpus": std::thread::available_parallelism().ok().map(std::num::NonZero::get),
    })
}
