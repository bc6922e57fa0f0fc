//! `flannel-agent status`: what the agent does, or what goes on without it, for people or as JSON.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;

use comfy_table::{CellAlignment, Table, presets};

use super::sight::{self, Awaiting, InKernel, Sight};
use super::wording::{ago, bytes, count, duration};
use crate::cli::StatusCommand;
use crate::domain::wording::shown;
use crate::host::udp::{PeerReport, TunnelReport};
use crate::status::{Starting, Status};

/// As `systemctl status` has it for what does not run.
pub(super) const NO_AGENT: u8 = 3;

/// Exit code 0 when the agent answered, ready or not; 3 when none did and packets are carried all the same; 1 when there is
/// nothing.
pub async fn run(command: &StatusCommand) -> ExitCode {
    let seen = match sight::look(&command.at).await {
        Ok(seen) => seen,
        Err(error) => {
            eprintln!("flannel-agent status: {error}");
            return ExitCode::FAILURE;
        }
    };
    let text = if command.json {
        match serde_json::to_string_pretty(&seen) {
            Ok(text) => text + "\n",
            Err(error) => {
                eprintln!("flannel-agent status: {error}");
                return ExitCode::FAILURE;
            }
        }
    } else {
        human(&seen)
    };
    // A reader that has seen enough (`| head`) is not our trouble.
    let _ = std::io::stdout().write_all(text.as_bytes());
    match seen {
        Sight::Agent(_) | Sight::Starting(_) => ExitCode::SUCCESS,
        Sight::Kernel(_) => ExitCode::from(NO_AGENT),
    }
}

fn human(seen: &Sight) -> String {
    match seen {
        Sight::Agent(status) => agent(status),
        Sight::Starting(awaiting) => starting(awaiting),
        Sight::Kernel(unattended) => {
            let mut text = format!("no agent  {}\n", unattended.no_agent);
            kernel(&mut text, &unattended.kernel);
            text
        }
    }
}

fn starting(seen: &Awaiting) -> String {
    let Starting { version, pid, not_ready, .. } = &seen.agent;
    let mut text =
        format!("flannel-agent {version} (pid {pid}) is starting\nready     no: {}\n", not_ready.join("; "));
    kernel(&mut text, &seen.kernel);
    text
}

// Writing to a String can't fail.
fn agent(status: &Status) -> String {
    let mut text = String::new();
    let interface = &status.interface;
    let _ = writeln!(
        text,
        "flannel-agent {} (pid {}), backend {}, network {}",
        status.version, status.pid, status.backend, status.network,
    );
    let _ = write!(
        text,
        "lease     {}, held for {}, renewed {} ago",
        status.lease,
        duration(status.lease_held_for),
        duration(status.lease_renewed_ago)
    );
    let _ = match status.lease_expires_in {
        Some(seconds) => writeln!(text, ", {} left", duration(seconds)),
        None => writeln!(text, ", a reservation without end"),
    };
    let _ = write!(text, "interface {} {}", interface.name, interface.address);
    if interface.public_ip != interface.address {
        let _ = write!(text, " (published as {})", interface.public_ip);
    }
    let _ = writeln!(text, ", MTU {}", interface.mtu);
    if let Some(reason) = &interface.away {
        let _ = writeln!(text, "          carries nothing: {reason}");
    }
    if let Some(other) = &interface.preferred {
        let _ = writeln!(text, "          a restart would choose {other}");
    }
    let _ = writeln!(text, "pods' MTU {}: {}", status.mtu, status.mtu_reason);
    let _ = match status.ready {
        true => writeln!(text, "ready     yes"),
        false => writeln!(text, "ready     no: {}", status.not_ready.join("; ")),
    };
    for report in &status.tunnels {
        tunnel(&mut text, report);
    }
    let in_place: BTreeSet<String> =
        status.tunnels.iter().flat_map(|tunnel| &tunnel.peers).map(|peer| peer.subnet.to_string()).collect();
    for peer in status.peers.iter().filter(|peer| !in_place.contains(&peer.subnet)) {
        let missing = if status.tunnels.is_empty() { "" } else { ": not in the tunnel" };
        let _ = writeln!(text, "peer      {} at {}{missing}", peer.subnet, peer.public_ip);
    }
    for refused in &status.refused {
        let _ = writeln!(text, "refused   {}: {}", shown(&refused.key), refused.reason);
    }
    text
}

fn kernel(text: &mut String, seen: &InKernel) {
    for found in &seen.tunnels {
        let _ = writeln!(
            text,
            "kernel    carries {} of {} on as node {}, MTU {}; it does not know what changed since",
            found.subnet, found.network, found.address, found.mtu
        );
        tunnel(text, &found.report);
    }
    for reason in &seen.not_told {
        let _ = writeln!(text, "not told  {reason}");
    }
    for route in &seen.routes {
        let _ = writeln!(text, "{route}");
    }
}

fn tunnel(text: &mut String, tunnel: &TunnelReport) {
    let _ = writeln!(
        text,
        "tunnel    {} over {}, {}: {}",
        tunnel.device,
        tunnel.underlay,
        tunnel.tier.name(),
        tunnel.reason
    );
    let counted: Vec<String> = tunnel
        .counters
        .iter()
        .filter(|(_, tally)| tally.packets > 0)
        .map(|(name, tally)| format!("{name} {}", tally.packets))
        .collect();
    if !counted.is_empty() {
        let _ = writeln!(text, "packets   {}", counted.join(", "));
    }
    if tunnel.peers.is_empty() {
        let _ = writeln!(text, "peers     none");
        return;
    }
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "subnet",
        "node",
        "path MTU",
        "sent",
        "bytes",
        "received",
        "bytes",
        "dropped",
        "last packet",
    ]);
    for column in table.column_iter_mut().skip(2).take(5) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    for peer in &tunnel.peers {
        table.add_row([
            peer.subnet.to_string(),
            peer.node.to_string(),
            path_mtu(peer),
            count(peer.tx_packets),
            bytes(peer.tx_bytes),
            count(peer.rx_packets),
            bytes(peer.rx_bytes),
            drops(peer),
            ago(peer.last_seen_ms_ago),
        ]);
    }
    let _ = writeln!(text, "{table}");
}

pub(super) fn path_mtu(peer: &PeerReport) -> String {
    peer.path_mtu.map_or_else(|| "-".to_owned(), |mtu| mtu.to_string())
}

/// "-", or "12 ecn_refused, 3 source_observed".
fn drops(peer: &PeerReport) -> String {
    if peer.drops.is_empty() {
        return "-".to_owned();
    }
    let each: Vec<String> =
        peer.drops.iter().map(|(reason, packets)| format!("{packets} {reason}")).collect();
    each.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::sight::Unattended;
    use crate::host::udp::unattended::UnattendedTunnel;
    use crate::host::udp::{Tally, Tier};

    fn tunnel_report() -> TunnelReport {
        let peer = PeerReport {
            subnet: "10.244.1.0/24".parse().unwrap(),
            node: "10.0.0.2".parse().unwrap(),
            path_mtu: Some(1372),
            path_mtu_reason: None,
            tx_packets: 12_345,
            tx_bytes: 2048,
            rx_packets: 7,
            rx_bytes: 84,
            drops: [("ecn_refused".to_owned(), 3)].into(),
            last_seen_ms_ago: Some(65_000),
        };
        let quiet = PeerReport {
            subnet: "10.244.2.0/24".parse().unwrap(),
            path_mtu: None,
            drops: [].into(),
            last_seen_ms_ago: None,
            ..peer.clone()
        };
        let counters = [
            ("encapsulated".to_owned(), Tally { packets: 5, bytes: 1 }),
            ("no_peer".to_owned(), Tally::default()),
        ];
        TunnelReport {
            device: "flannel0".to_owned(),
            underlay: "eth0".to_owned(),
            tier: Tier::Xdp,
            reason: "attached".to_owned(),
            counters: counters.into(),
            peers: vec![peer, quiet],
        }
    }

    #[test]
    fn a_peers_line_has_path_mtu_traffic_drops_by_reason_and_when_it_was_heard() {
        let mut text = String::new();
        tunnel(&mut text, &tunnel_report());
        let words: Vec<String> =
            text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect();
        assert_eq!(
            words,
            [
                "tunnel flannel0 over eth0, xdp: attached",
                "packets encapsulated 5",
                "subnet node path MTU sent bytes received bytes dropped last packet",
                "10.244.1.0/24 10.0.0.2 1372 12.3k 2.0 KiB 7 84 B 3 ecn_refused 1 min 5 s ago",
                "10.244.2.0/24 10.0.0.2 - 12.3k 2.0 KiB 7 84 B - never",
            ]
        );
    }

    fn carried() -> InKernel {
        InKernel {
            tunnels: vec![UnattendedTunnel {
                network: "10.244.0.0/16".parse().unwrap(),
                subnet: "10.244.3.0/24".parse().unwrap(),
                address: "10.0.0.1".parse().unwrap(),
                mtu: 1472,
                report: tunnel_report(),
            }],
            not_told: vec!["read the tunnel on flannel1: why".to_owned()],
            routes: vec!["route 10.244.0.0/16 dev flannel0".to_owned()],
        }
    }

    #[test]
    fn an_agent_that_waits_says_for_what_and_what_the_kernel_carries_meanwhile() {
        let agent = Starting::waiting_for(vec!["no config yet: etcd is unreachable".to_owned()]);
        let seen = Sight::Starting(Awaiting { agent, kernel: carried() });
        let text = human(&seen);
        assert!(
            text.contains(
                ") is starting\nready     no: no config yet: etcd is unreachable\nkernel    carries"
            ),
            "{text}"
        );
        let json = serde_json::to_value(&seen).unwrap();
        let at = |pointer: &str| json.pointer(pointer).cloned().unwrap_or_default();
        assert_eq!((at("/starting"), at("/ready")), (true.into(), false.into()));
        assert_eq!(at("/tunnels/0/subnet"), "10.244.3.0/24");
    }

    #[test]
    fn without_an_agent_the_page_says_so_first_and_json_has_the_same_tunnels() {
        let seen = Sight::Kernel(Unattended { no_agent: "no agent answers".to_owned(), kernel: carried() });
        let text = human(&seen);
        assert!(
            text.starts_with("no agent  no agent answers\nkernel    carries 10.244.3.0/24 of 10.244.0.0/16"),
            "{text}"
        );
        assert!(text.contains("\nnot told  read the tunnel on flannel1: why\n"), "{text}");
        let json = serde_json::to_value(&seen).unwrap();
        let at = |pointer: &str| json.pointer(pointer).cloned().unwrap_or_default();
        assert_eq!(at("/no_agent"), "no agent answers");
        assert_eq!(at("/tunnels/0/subnet"), "10.244.3.0/24");
        assert_eq!(at("/tunnels/0/peers/0/drops/ecn_refused"), 3);
        assert_eq!(seen.tunnels().len(), 1);
    }
}
