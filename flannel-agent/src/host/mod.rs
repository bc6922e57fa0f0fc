//! The only code that touches the kernel: it makes a host look as the domain says, and says what it looks like.
//!
//! [`Host`] is the seam. [`linux::LinuxHost`] is the real one, [`fake::FakeHost`] the one of tests. Both are told
//! everything as [`Change`]s and tell everything as [`HostState`]; what is ours and what is not is decided here and
//! nowhere else.

pub mod fake;
pub mod interfaces;
pub mod leftovers;
pub mod linux;
pub mod memory;
pub mod netfilter;
pub mod netlink;
pub mod sysctl;
pub mod udp;

use async_trait::async_trait;
use ipnet::Ipv4Net;

use self::udp::TunnelReport;
use crate::domain::host_state::{Change, HostState};
use crate::domain::interface::{HostFacts, Selector};
use crate::domain::path_mtu::{Heard, Probe};

/// Why [`Host::news`] returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    /// What is ours may not be as it was: look.
    Disturbed,
    /// What came of probes.
    Heard(Vec<Heard>),
}

/// A host whose state can be read and changed.
#[async_trait]
pub trait Host: Send {
    /// What of ours is there now. Only items that are certainly ours.
    async fn observe(&mut self) -> Result<HostState, HostError>;

    /// Makes the changes in the given order and says for each how it went; one failure does not stop the others.
    /// Requests of one kind go to the kernel in batches.
    async fn apply(&mut self, changes: &[Change]) -> Vec<Result<(), HostError>>;

    /// What the choice of an interface depends on, as it is now.
    async fn facts(&mut self, selectors: &[Selector]) -> Result<HostFacts, HostError>;

    /// Returns when someone may have touched what is ours, or something came of a probe. Cancel-safe.
    async fn news(&mut self) -> News;

    /// Sends probes of path MTUs. What comes of them is told by [`Host::news`], if anything.
    ///
    /// # Errors
    /// Nothing can be sent at all.
    async fn probe(&mut self, probes: &[Probe]) -> Result<(), HostError>;

    /// Packets sent to each of these peers through a tunnel so far.
    async fn sent(&mut self, subnets: &[Ipv4Net]) -> Vec<u64>;

    /// What is done at once after [`Host::news`], although nothing is missing: packets flow already, and will better.
    fn coming(&self) -> Option<&'static str> {
        None
    }

    /// What each tunnel does and has counted; nothing where there are none.
    fn reports(&self) -> Vec<TunnelReport> {
        Vec::new()
    }
}

/// What was being done to which thing, and why it failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{doing}: {reason}")]
pub struct HostError {
    /// "add route 10.1.2.0/24 via 10.0.0.2"
    pub doing: String,
    /// The kernel's answer, with the likely cause where we know it.
    pub reason: String,
}

impl HostError {
    /// Both parts in lower case, as halves of one sentence.
    pub fn new(doing: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { doing: doing.into(), reason: reason.into() }
    }
}
