//! Network cards of this machine that are lent to a lab: real drivers under the tunnel, with their own XDP, GRO and
//! offloads, where veth pairs only stand for them.
//!
//! Only cards that [`LENT`] names are touched. They are known by their Ethernet address, because a card comes back from a
//! namespace that is gone under whatever name is free.

use std::{
    fs,
    process::Command,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::Host;

/// Ethernet addresses of two cards that are joined and that nobody else uses, separated by a comma.
pub const LENT: &str = "FLANNEL_TESTS_CARDS";

/// How long a card takes to come back from a namespace that is gone, at most.
const BACK: Duration = Duration::from_secs(20);

/// Cards are lent to this run.
#[must_use]
pub fn are_lent() -> bool {
    std::env::var_os(LENT).is_some()
}

/// Gives each of the two hosts one as `eth0`.
pub(super) fn hand_out(hosts: &[Host], mtu: u32) -> Result<()> {
    let lent = std::env::var(LENT)
        .with_context(|| format!("no cards are lent: {LENT} has to name two, by Ethernet address"))?;
    let addresses: Vec<&str> = lent.split(',').map(str::trim).collect();
    ensure!(
        addresses.len() == hosts.len(),
        "{LENT}={lent:?} names {} cards for {} hosts",
        addresses.len(),
        hosts.len()
    );
    for (host, address) in hosts.iter().zip(addresses) {
        let card = find(address)?;
        let moved = Command::new("ip")
            .args([
                "link",
                "set",
                &card,
                "mtu",
                &mtu.to_string(),
                "netns",
                &host.netns.path(),
                "name",
                "eth0",
            ])
            .output()
            .context("start ip")?;
        ensure!(
            moved.status.success(),
            "give {card} to {}: {}",
            host.name(),
            String::from_utf8_lossy(&moved.stderr).trim_end()
        );
    }
    Ok(())
}

/// The name that the card has now.
fn find(address: &str) -> Result<String> {
    let started = Instant::now();
    loop {
        let mut seen = Vec::new();
        for entry in fs::read_dir("/sys/class/net").context("read /sys/class/net")?.flatten() {
            let found = fs::read_to_string(entry.path().join("address")).unwrap_or_default();
            let name = entry.file_name().to_string_lossy().into_owned();
            if found.trim().eq_ignore_ascii_case(address) {
                return Ok(name);
            }
            seen.push(format!("{name} {}", found.trim()));
        }
        if started.elapsed() > BACK {
            bail!("no card has the address {address} that {LENT} names; here are {}", seen.join(", "));
        }
        sleep(Duration::from_millis(50));
    }
}
