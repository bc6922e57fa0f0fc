//! What `flannel-agent status --json` says.

use std::{collections::BTreeMap, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

/// Asks the agent behind `socket`.
///
/// # Errors
/// The command fails, or prints something else.
pub fn status(binary: &Path, socket: &Path) -> Result<Status> {
    let output = Command::new(binary)
        .args(["status", "--json", "--socket"])
        .arg(socket)
        .output()
        .with_context(|| format!("start {} status", binary.display()))?;
    ensure!(
        output.status.success(),
        "`{} status`: {}; {}",
        binary.display(),
        output.status,
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    serde_json::from_slice(&output.stdout)
        .with_context(|| format!("read the status:\n{}", String::from_utf8_lossy(&output.stdout)))
}

/// What a running agent says of itself (the fields the lab looks at).
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    /// The overlay's range.
    pub network: String,
    /// Our lease.
    pub subnet: String,
    /// `udp`, `host-gw`, `alloc`.
    pub backend: String,
    /// For pods, bytes.
    pub mtu: u32,
    /// Where it comes from.
    #[serde(default)]
    pub mtu_reason: String,
    /// As `/readyz`.
    pub ready: bool,
    /// Why not.
    #[serde(default)]
    pub not_ready: Vec<String>,
    /// The udp backend's data path; empty for others.
    #[serde(default)]
    pub tunnels: Vec<Tunnel>,
    /// The other nodes.
    #[serde(default)]
    pub peers: Vec<Peer>,
    /// Leases that were refused.
    #[serde(default)]
    pub refused: Vec<Refused>,
}

/// A tunnel device and how its packets are carried.
#[derive(Clone, Debug, Deserialize)]
pub struct Tunnel {
    /// `flannel0`
    pub device: String,
    /// `xdp`, `tc+gro`, `tc` or `tun`.
    pub tier: String,
    /// Why this tier.
    pub reason: String,
    /// What happened to packets, by name.
    #[serde(default)]
    pub counters: BTreeMap<String, Count>,
    /// As the data path counted them.
    #[serde(default)]
    pub peers: Vec<PeerCount>,
}

/// Packets and their bytes.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Bytes of inner packets.
    pub bytes: u64,
}

/// Traffic with one peer.
#[derive(Clone, Debug, Deserialize)]
pub struct PeerCount {
    /// Its lease.
    pub subnet: String,
    /// Its address on the underlay.
    pub node: String,
    /// Largest inner packet the path carries.
    #[serde(default)]
    pub path_mtu: Option<u32>,
    /// How that is known.
    #[serde(default)]
    pub path_mtu_reason: Option<String>,
    /// Packets to it.
    pub tx_packets: u64,
    /// Packets from it.
    pub rx_packets: u64,
}

/// Another node's lease.
#[derive(Clone, Debug, Deserialize)]
pub struct Peer {
    /// Its lease.
    pub subnet: String,
    /// Its address on the underlay.
    pub public_ip: String,
}

/// A lease the agent does not use.
#[derive(Clone, Debug, Deserialize)]
pub struct Refused {
    /// Key in the store.
    pub key: String,
    /// Why.
    pub reason: String,
}

impl Status {
    /// The tier of the only tunnel, or the backend's name where there is none.
    pub fn path(&self) -> &str {
        self.tunnels.first().map_or(&self.backend, |tunnel| &tunnel.tier)
    }

    /// [`Self::path`] without what helps it: `xdp`, `tc` or `tun`, as `--udp-datapath` has it.
    pub fn tier(&self) -> &str {
        self.path().split('+').next().unwrap_or_default()
    }

    /// The tunnels' tiers and why, without counters.
    pub fn reasons(&self) -> String {
        self.tunnels.iter().map(|t| format!("{}: {} ({}) ", t.device, t.tier, t.reason)).collect()
    }

    /// Packets the tunnels counted under `name`.
    pub fn counted(&self, name: &str) -> u64 {
        self.tunnels.iter().filter_map(|tunnel| tunnel.counters.get(name)).map(|count| count.packets).sum()
    }
}
