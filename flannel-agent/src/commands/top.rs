//! `flannel-agent top`: the traffic with each peer since the last look, busiest first.
//!
//! On a terminal each page takes the place of the last, on the alternate screen, until `q` or Ctrl-C; into a pipe or file
//! they follow each other without control characters.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use comfy_table::{CellAlignment, Table, presets};
use ipnet::Ipv4Net;
use terminal_size::{Height, terminal_size};
use tokio::signal::unix::{SignalKind, signal};

use super::keys::Keys;
use super::sight::{self, Sight};
use super::status::{NO_AGENT, path_mtu};
use super::wording::{ago, bytes, count, duration};
use crate::cli::TopCommand;
use crate::host::udp::PeerReport;
use crate::status::Starting;

// ECMA-48 and xterm: alternate screen and hidden cursor; home; rest of the line, of the screen.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
const HOME: &str = "\x1b[H";
const CLEAR_LINE: &str = "\x1b[K";
const CLEAR_BELOW: &str = "\x1b[J";

const QUIT: u8 = b'q';

/// Lines around the rows of peers: four above, one below for what is left out.
const FRAME: usize = 5;

/// The exit codes of `status`, by the last look.
pub async fn run(command: &TopCommand) -> ExitCode {
    let mut screen = Screen { is_taken: false, last: Last::Agent };
    let mut keys = if io::stdout().is_terminal() { Keys::listen() } else { None };
    let result = tokio::select! {
        result = pages(command, &mut screen) => result,
        () = told_to_end() => Ok(()),
        () = quit(&mut keys) => Ok(()),
    };
    let last = screen.last;
    // What is said now stays on the screen.
    drop((screen, keys));
    match (result, last) {
        (Err(error), _) => {
            eprintln!("flannel-agent top: {error}");
            ExitCode::FAILURE
        }
        (Ok(()), Last::Agent) => ExitCode::SUCCESS,
        (Ok(()), Last::Kernel) => ExitCode::from(NO_AGENT),
        (Ok(()), Last::Nothing) => ExitCode::FAILURE,
    }
}

/// A first look that shows nothing ends it; of later ones the reason is shown, and it goes on.
async fn pages(command: &TopCommand, screen: &mut Screen) -> Result<(), String> {
    let mut before = Sample::of(&sight::look(&command.at).await?);
    let mut shown = 0;
    while command.count.is_none_or(|wanted| shown < wanted) {
        tokio::time::sleep(command.interval).await;
        let page = match sight::look(&command.at).await {
            Ok(seen) => {
                let after = Sample::of(&seen);
                screen.last = if matches!(seen, Sight::Kernel(_)) { Last::Kernel } else { Last::Agent };
                let page = page(&seen, &before, &after, screen.rows());
                before = after;
                page
            }
            Err(error) => {
                screen.last = Last::Nothing;
                format!("{error}\n")
            }
        };
        if screen.show(&page).is_err() {
            // Nobody reads on.
            return Ok(());
        }
        shown += 1;
    }
    Ok(())
}

async fn quit(keys: &mut Option<Keys>) {
    match keys {
        Some(keys) => keys.pressed(QUIT).await,
        None => std::future::pending().await,
    }
}

async fn told_to_end() {
    let on = |kind| signal(kind);
    match (on(SignalKind::interrupt()), on(SignalKind::terminate()), on(SignalKind::hangup())) {
        (Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)) => tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        },
        // Then they end the process by themselves.
        _ => std::future::pending().await,
    }
}

/// What the last look has shown.
#[derive(Clone, Copy)]
enum Last {
    Agent,
    Kernel,
    Nothing,
}

/// Where pages go. A terminal is as it was before when this is dropped.
struct Screen {
    is_taken: bool,
    last: Last,
}

impl Screen {
    /// Rows of peers that fit; `None` for all.
    fn rows(&self) -> Option<usize> {
        if !io::stdout().is_terminal() {
            return None;
        }
        let (_, Height(height)) = terminal_size()?;
        Some(usize::from(height).saturating_sub(FRAME).max(1))
    }

    fn show(&mut self, page: &str) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if !out.is_terminal() {
            writeln!(out, "{page}")?;
            return out.flush();
        }
        if !self.is_taken {
            self.is_taken = true;
            out.write_all(ENTER.as_bytes())?;
        }
        let lines: Vec<String> = page.lines().map(|line| format!("{line}{CLEAR_LINE}")).collect();
        write!(out, "{HOME}{}{CLEAR_BELOW}", lines.join("\r\n"))?;
        out.flush()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if self.is_taken {
            let mut out = io::stdout().lock();
            let _ = out.write_all(LEAVE.as_bytes()).and_then(|()| out.flush());
        }
    }
}

/// Counts at one moment.
struct Sample {
    at: Instant,
    peers: BTreeMap<(String, Ipv4Net), Traffic>,
}

/// Packets and bytes: counted, or of one second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Traffic {
    tx_packets: u64,
    tx_bytes: u64,
    rx_packets: u64,
    rx_bytes: u64,
    dropped: u64,
}

impl Sample {
    fn of(seen: &Sight) -> Self {
        let peers = seen.tunnels().into_iter().flat_map(|tunnel| {
            tunnel.peers.iter().map(|peer| ((tunnel.device.clone(), peer.subnet), Traffic::of(peer)))
        });
        Self { at: Instant::now(), peers: peers.collect() }
    }

    /// What one of them did in each second since an earlier sample. A peer that was not there then counts from zero.
    fn rates(&self, earlier: &Self, peer: &(String, Ipv4Net)) -> Traffic {
        let now = self.peers.get(peer).copied().unwrap_or_default();
        let before = earlier.peers.get(peer).copied().unwrap_or_default();
        now.since(&before, self.at.saturating_duration_since(earlier.at))
    }
}

impl Traffic {
    fn of(peer: &PeerReport) -> Self {
        Self {
            tx_packets: peer.tx_packets,
            tx_bytes: peer.tx_bytes,
            rx_packets: peer.rx_packets,
            rx_bytes: peer.rx_bytes,
            dropped: peer.drops.values().sum(),
        }
    }

    /// Counts that began anew (an agent that counted in user space has ended) are no traffic.
    fn since(&self, before: &Self, time: Duration) -> Self {
        let seconds = time.as_secs_f64().max(0.001);
        let rate = |now: u64, before: u64| (now.saturating_sub(before) as f64 / seconds).round() as u64;
        Self {
            tx_packets: rate(self.tx_packets, before.tx_packets),
            tx_bytes: rate(self.tx_bytes, before.tx_bytes),
            rx_packets: rate(self.rx_packets, before.rx_packets),
            rx_bytes: rate(self.rx_bytes, before.rx_bytes),
            dropped: rate(self.dropped, before.dropped),
        }
    }

    fn and(&self, other: &Self) -> Self {
        Self {
            tx_packets: self.tx_packets.saturating_add(other.tx_packets),
            tx_bytes: self.tx_bytes.saturating_add(other.tx_bytes),
            rx_packets: self.rx_packets.saturating_add(other.rx_packets),
            rx_bytes: self.rx_bytes.saturating_add(other.rx_bytes),
            dropped: self.dropped.saturating_add(other.dropped),
        }
    }

    fn bytes(&self) -> u64 {
        self.tx_bytes.saturating_add(self.rx_bytes)
    }
}

/// One peer's line.
struct Row<'a> {
    peer: &'a PeerReport,
    rates: Traffic,
}

fn page(seen: &Sight, before: &Sample, after: &Sample, fit: Option<usize>) -> String {
    let tunnels = seen.tunnels();
    let mut rows: Vec<Row<'_>> = Vec::new();
    for tunnel in &tunnels {
        rows.extend(tunnel.peers.iter().map(|peer| {
            let rates = after.rates(before, &(tunnel.device.clone(), peer.subnet));
            Row { peer, rates }
        }));
    }
    rows.sort_by_key(|row| (Reverse(row.rates.bytes()), row.peer.subnet));
    let total = rows.iter().fold(Traffic::default(), |sum, row| sum.and(&row.rates));
    let carried: Vec<String> = tunnels
        .iter()
        .map(|tunnel| format!("{} over {} ({})", tunnel.device, tunnel.underlay, tunnel.tier.name()))
        .collect();
    let mut text = String::new();
    // Writing to a String can't fail.
    let _ = writeln!(text, "{}", head(seen));
    let _ = match carried.is_empty() {
        true => writeln!(text, "there is no tunnel, and so nothing is counted"),
        false => writeln!(text, "{}", carried.join(", ")),
    };
    let _ = writeln!(
        text,
        "{} peers, per second: sent {} packets, {}; received {} packets, {}; dropped {}",
        rows.len(),
        count(total.tx_packets),
        bytes(total.tx_bytes),
        count(total.rx_packets),
        bytes(total.rx_bytes),
        count(total.dropped),
    );
    let shown = fit.unwrap_or(rows.len()).min(rows.len());
    if shown > 0 {
        let _ = writeln!(text, "{}", table(rows.iter().take(shown)));
    }
    if shown < rows.len() {
        let _ = writeln!(text, "and {} less busy", rows.len() - shown);
    }
    text
}

fn head(seen: &Sight) -> String {
    match seen {
        Sight::Agent(status) => {
            let ready = if status.ready { "ready" } else { "NOT READY, see `flannel-agent status`" };
            let held = duration(status.lease_held_for);
            format!("flannel-agent {}, {} held for {held}, {ready}", status.version, status.subnet)
        }
        Sight::Starting(awaiting) => {
            let Starting { version, not_ready, .. } = &awaiting.agent;
            format!("flannel-agent {version} is STARTING: {}", not_ready.join("; "))
        }
        Sight::Kernel(unattended) => format!("NO AGENT: {}", unattended.no_agent),
    }
}

fn table<'a>(rows: impl Iterator<Item = &'a Row<'a>>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "subnet",
        "node",
        "path MTU",
        "sent/s",
        "bytes/s",
        "received/s",
        "bytes/s",
        "dropped/s",
        "last packet",
    ]);
    for column in table.column_iter_mut().skip(2).take(6) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for Row { peer, rates } in rows {
        table.add_row([
            peer.subnet.to_string(),
            peer.node.to_string(),
            path_mtu(peer),
            count(rates.tx_packets),
            bytes(rates.tx_bytes),
            count(rates.rx_packets),
            bytes(rates.rx_bytes),
            count(rates.dropped),
            ago(peer.last_seen_ms_ago),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::commands::sight::{InKernel, Unattended};
    use crate::host::udp::unattended::UnattendedTunnel;
    use crate::host::udp::{Tier, TunnelReport};

    fn peer(number: u8, tx_bytes: u64) -> PeerReport {
        PeerReport {
            subnet: Ipv4Net::new(Ipv4Addr::new(10, 244, number, 0), 24).unwrap(),
            node: Ipv4Addr::new(10, 0, 0, number),
            path_mtu: None,
            path_mtu_reason: None,
            tx_packets: tx_bytes / 100,
            tx_bytes,
            rx_packets: 0,
            rx_bytes: 0,
            drops: BTreeMap::new(),
            last_seen_ms_ago: None,
        }
    }

    fn seen(peers: Vec<PeerReport>) -> Sight {
        let report = TunnelReport {
            device: "flannel0".to_owned(),
            underlay: "eth0".to_owned(),
            tier: Tier::Tc,
            reason: String::new(),
            counters: BTreeMap::new(),
            peers,
        };
        Sight::Kernel(Unattended {
            no_agent: "none answers".to_owned(),
            kernel: InKernel {
                tunnels: vec![UnattendedTunnel {
                    network: "10.244.0.0/16".parse().unwrap(),
                    subnet: "10.244.9.0/24".parse().unwrap(),
                    address: Ipv4Addr::LOCALHOST,
                    mtu: 1472,
                    report,
                }],
                ..InKernel::default()
            },
        })
    }

    #[test]
    fn the_busiest_peer_is_first_and_what_does_not_fit_is_counted() {
        let before = Sample::of(&seen(vec![peer(1, 1000), peer(2, 1000), peer(3, 0)]));
        let later = seen(vec![peer(1, 1200), peer(2, 9000), peer(3, 0)]);
        let after = Sample { at: before.at + Duration::from_secs(2), ..Sample::of(&later) };
        let text = page(&later, &before, &after, Some(2));
        let words: Vec<String> =
            text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(
            words,
            [
                "NO AGENT: none answers",
                "flannel0 over eth0 (tc)",
                "3 peers, per second: sent 41 packets, 4.0 KiB; received 0 packets, 0 B; dropped 0",
                "subnet node path MTU sent/s bytes/s received/s bytes/s dropped/s last packet",
                "10.244.2.0/24 10.0.0.2 - 40 3.9 KiB 0 0 B 0 never",
                "10.244.1.0/24 10.0.0.1 - 1 100 B 0 0 B 0 never",
                "and 1 less busy",
            ]
        );
    }

    #[test]
    fn counts_that_began_anew_are_no_traffic() {
        let (old, new) = (Traffic::of(&peer(1, 5000)), Traffic::of(&peer(1, 200)));
        assert_eq!(new.since(&old, Duration::from_secs(1)), Traffic::default());
    }
}
