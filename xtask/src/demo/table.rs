//! The demo's last word.

use std::time::Duration;

use comfy_table::{Table, presets::UTF8_FULL_CONDENSED};
use flannel_tests::{agent::Status, topology::Lab};

/// One row per host: its lease, how packets are carried, how fast, and how many went to and came from each peer as the
/// data path counted them.
pub(super) fn table(lab: &Lab, statuses: &[Status], round_trips: &[Duration], rates: &[f64]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header([
        "host",
        "leased subnet",
        "data path",
        "RTT",
        "Gbit/s",
        "packets per peer: sent / received",
    ]);
    for (((host, status), round_trip), rate) in lab.hosts().iter().zip(statuses).zip(round_trips).zip(rates) {
        let mut peers: Vec<String> = status
            .tunnels
            .iter()
            .flat_map(|tunnel| &tunnel.peers)
            .map(|peer| {
                let name = lab
                    .hosts()
                    .iter()
                    .find(|host| host.address().to_string() == peer.node)
                    .map_or_else(|| peer.node.clone(), |host| host.name());
                format!("{name} {} / {}", peer.tx_packets, peer.rx_packets)
            })
            .collect();
        peers.sort();
        table.add_row([
            format!("{} {}", host.name(), host.address()),
            status.subnet.clone(),
            status.path().to_owned(),
            format!("{} µs", round_trip.as_micros()),
            format!("{rate:.1}"),
            peers.join("\n"),
        ]);
    }
    table
}
