//! `flannel-agent cleanup`: takes away what the agent leaves on a host on purpose when it ends, for a node that leaves
//! the overlay or goes back to flanneld.

use std::process::ExitCode;

use crate::cli::CleanupCommand;
use crate::host::HostError;
use crate::host::leftovers::{self, Leftover};
use crate::host::netlink::Netlink;
use crate::status;

/// Exit code 0 when nothing of ours is left, or with `--dry-run`; 1 when something is, or an agent runs.
pub async fn run(command: &CleanupCommand) -> ExitCode {
    match clean(command).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            eprintln!("flannel-agent cleanup: {reason}");
            ExitCode::FAILURE
        }
    }
}

async fn clean(command: &CleanupCommand) -> Result<(), String> {
    let text = |e: HostError| e.to_string();
    let netlink = Netlink::new().map_err(text)?;
    let found = leftovers::find(&netlink, &command.bpffs_path).await.map_err(text)?;
    if command.dry_run {
        if found.is_empty() {
            println!("nothing of flannel-agent's is on this host");
        }
        found.iter().for_each(|leftover| println!("{leftover}"));
        if let Some(reason) = running(command, &found).await {
            eprintln!("flannel-agent cleanup: nothing of this would be removed now: {reason}");
        }
        return Ok(());
    }
    if let Some(reason) = running(command, &found).await {
        return Err(reason);
    }
    let mut failed = 0;
    for leftover in &found {
        match leftover.remove(&netlink).await {
            Ok(()) => leftover.to_string().lines().for_each(|line| println!("removed {line}")),
            Err(error) => {
                failed += 1;
                eprintln!("flannel-agent cleanup: {error}");
            }
        }
    }
    if found.is_empty() {
        println!("nothing of flannel-agent's is on this host");
    }
    match failed {
        0 => Ok(()),
        _ => Err("not everything could be removed; it needs root, or CAP_NET_ADMIN and CAP_BPF".to_owned()),
    }
}

/// Why it is not the time to clean up.
async fn running(command: &CleanupCommand, found: &[Leftover]) -> Option<String> {
    let of_networks = status::networks_beside(&command.socket);
    let of_networks = of_networks.iter().map(|name| status::socket_of(&command.socket, name));
    for socket in std::iter::once(command.socket.clone()).chain(of_networks) {
        if let Ok(answer) = status::read(&socket).await {
            return Some(format!(
                "an agent (pid {}) runs and answers on {}; it would put everything back, so stop it first",
                answer.pid(),
                socket.display()
            ));
        }
    }
    let device = found.iter().find_map(Leftover::in_use)?;
    Some(format!("a running process holds {device} open; if it is an agent, stop it first"))
}
