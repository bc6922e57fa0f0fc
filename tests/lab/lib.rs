//! The lab: hosts that are network namespaces, an underlay between them, pods on them, etcd, the real agent binary, and
//! probes that check every byte.
//!
//! ```no_run
//! use flannel_tests::topology::Lab;
//!
//! # fn main() -> anyhow::Result<()> {
//! let mut lab = Lab::new("sketch").hosts(3).build()?;
//! lab.bring_up(&["auto"; 3])?;          // one agent per host, ready, one pod each
//! lab.ping_all_pairs(3)?;
//! # Ok(()) }
//! ```
//!
//! Namespaces, processes and mounts belong to the test's process and vanish with it. Everything here needs root (or
//! root in a user namespace); [`privilege`] is the gate in front of the tests. The modules below depend on nothing but
//! small crates, because `cargo xtask demo` is built from them; what knows the agent's inside is behind the feature
//! `parts`.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};

pub mod agent;
#[cfg(feature = "bare")]
pub mod bare;
pub mod bpf;
pub mod datastore;
pub mod etcd_v2;
pub mod lease_server;
pub mod namespace;
pub mod pods;
pub mod probe;
pub mod proxy;
pub mod readiness;
pub mod reference;
pub mod steady;
pub mod topology;

#[cfg(feature = "parts")]
pub mod etcd;
#[cfg(feature = "parts")]
pub mod kernel;
#[cfg(feature = "parts")]
pub mod kube;
#[cfg(feature = "parts")]
pub mod port;
#[cfg(feature = "parts")]
pub mod privilege;
#[cfg(feature = "parts")]
pub mod programs;
#[cfg(feature = "parts")]
pub mod scenario;

/// The agent's binary: next to this test's own folder, where cargo puts it (`target/debug/flannel-agent`).
///
/// # Errors
/// It was not built: cargo builds binaries of other packages for no test.
pub fn agent_binary() -> Result<PathBuf> {
    let me = std::env::current_exe().context("find this program's own path")?;
    // target/debug/deps/backends-0123456789abcdef → target/debug
    let folder =
        me.ancestors().nth(2).with_context(|| format!("{} lies in no target folder", me.display()))?;
    let binary = folder.join("flannel-agent");
    if binary.is_file() {
        Ok(binary)
    } else {
        anyhow::bail!("{} does not exist; run `cargo build -p flannel-agent` first", binary.display())
    }
}

/// Set to a number: a machine that is so many times slower (an emulated one), where what is waited for may take longer.
pub const SLOWER: &str = "FLANNEL_TESTS_SLOWER";

/// How much slower this machine is than one that tests are written for.
pub(crate) fn slower() -> u32 {
    std::env::var(SLOWER).ok().and_then(|times| times.parse().ok()).unwrap_or(1_u32).clamp(1, 20)
}

/// How long something is waited for that takes a second or two.
pub(crate) fn patience() -> Duration {
    Duration::from_secs(30) * slower()
}

/// The last lines of a log file, for messages.
pub fn tail(path: &Path) -> String {
    const LINES: usize = 40;
    match fs::read(path) {
        Ok(bytes) => {
            let text = String::from_utf8_lossy(&bytes);
            let lines: Vec<&str> = text.lines().collect();
            lines.get(lines.len().saturating_sub(LINES)..).unwrap_or_default().join("\n")
        }
        Err(e) => format!("({}: {e})", path.display()),
    }
}
