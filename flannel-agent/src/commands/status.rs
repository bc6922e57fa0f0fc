//! `flannel-agent status`: what the running agent does, for people or as JSON.

use std::fmt::Write as _;
use std::process::ExitCode;

use comfy_table::{Table, presets};

use crate::cli::StatusCommand;
use crate::status::{self, Status};

/// Exit code 0 when the agent answered, ready or not; 1 when it did not.
pub async fn run(command: &StatusCommand) -> ExitCode {
    let status = match status::read(&command.socket).await {
        Ok(status) => status,
        Err(error) => {
            eprintln!("flannel-agent status: {error}");
            return ExitCode::FAILURE;
        }
    };
    let text = if command.json {
        match serde_json::to_string_pretty(&status) {
            Ok(text) => text + "\n",
            Err(error) => {
                eprintln!("flannel-agent status: {error}");
                return ExitCode::FAILURE;
            }
        }
    } else {
        human(&status)
    };
    print!("{text}");
    ExitCode::SUCCESS
}

fn human(status: &Status) -> String {
    let mut text = String::new();
    let interface = &status.interface;
    // Writing to a String can't fail.
    let _ = writeln!(
        text,
        "flannel-agent {} (pid {}), backend {}, network {}",
        status.version, status.pid, status.backend, status.network,
    );
    let _ = write!(text, "lease     {}", status.lease);
    let _ = match status.lease_expires_in {
        Some(seconds) => writeln!(text, ", {} h {} min left", seconds / 3600, seconds % 3600 / 60),
        None => writeln!(text, ", a reservation"),
    };
    let _ = writeln!(
        text,
        "interface {} {} (public {}), MTU {}, pods' MTU {}",
        interface.name, interface.address, interface.public_ip, interface.mtu, status.mtu
    );
    let _ = match status.ready {
        true => writeln!(text, "ready     yes"),
        false => writeln!(text, "ready     no: {}", status.not_ready.join("; ")),
    };
    for tunnel in &status.tunnels {
        let _ = writeln!(text, "tunnel    {} over {}: {}", tunnel.device, tunnel.underlay, tunnel.reason);
        let counted: Vec<String> = tunnel
            .counters
            .iter()
            .filter(|(_, tally)| tally.packets > 0)
            .map(|(name, tally)| format!("{name} {}", tally.packets))
            .collect();
        if !counted.is_empty() {
            let _ = writeln!(text, "packets   {}", counted.join(", "));
        }
        if !tunnel.peers.is_empty() {
            let mut table = Table::new();
            table.load_style(presets::NOTHING);
            table.set_header(["subnet", "node", "sent", "bytes", "received", "bytes"]);
            for peer in &tunnel.peers {
                table.add_row([
                    peer.subnet.to_string(),
                    peer.node.to_string(),
                    peer.tx_packets.to_string(),
                    peer.tx_bytes.to_string(),
                    peer.rx_packets.to_string(),
                    peer.rx_bytes.to_string(),
                ]);
            }
            let _ = writeln!(text, "{table}");
        }
    }
    if status.tunnels.is_empty() {
        for peer in &status.peers {
            let _ = writeln!(text, "peer      {} at {}", peer.subnet, peer.public_ip);
        }
    }
    for refused in &status.refused {
        let _ = writeln!(text, "refused   {}: {}", refused.key, refused.reason);
    }
    text
}
