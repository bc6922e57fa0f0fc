//! The words of `--udp-datapath`, `--udp-source-check` and `--udp-source-port`: said, shown and read alike.

use std::fmt;
use std::str::FromStr;

/// What the operator may choose about the tunnel (`--udp-*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct TunnelOptions {
    pub datapath: Datapath,
    pub source_check: SourceCheck,
    pub source_port: SourcePort,
}

/// `--udp-datapath`: which tier may carry packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Datapath {
    /// The best tier that works here.
    #[default]
    Auto,
    /// `ebpf`: XDP or tc, never user space.
    Ebpf,
    Xdp,
    Tc,
    Tun,
}

/// `--udp-source-check`: may a node send packets from a subnet it does not lease?
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum SourceCheck {
    /// Count and drop.
    Enforce,
    /// Count and deliver.
    #[default]
    Observe,
    Off,
}

/// `--udp-source-port`: the outer UDP source port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum SourcePort {
    /// 0xC000 + 14 bits of the flow's hash, so that ECMP and RSS spread flows.
    #[default]
    Flow,
    /// The tunnel's own port, as flanneld sends.
    Fixed,
}

impl fmt::Display for Datapath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Ebpf => "ebpf",
            Self::Xdp => "xdp",
            Self::Tc => "tc",
            Self::Tun => "tun",
        })
    }
}

impl fmt::Display for SourceCheck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Enforce => "enforce",
            Self::Observe => "observe",
            Self::Off => "off",
        })
    }
}

impl fmt::Display for SourcePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Flow => "flow",
            Self::Fixed => "fixed",
        })
    }
}

impl FromStr for Datapath {
    type Err = String;

    /// The inverse of `Display`; the error lists the words there are.
    fn from_str(word: &str) -> Result<Self, String> {
        one_of(word, [Self::Auto, Self::Ebpf, Self::Xdp, Self::Tc, Self::Tun])
    }
}

impl FromStr for SourceCheck {
    type Err = String;

    /// The inverse of `Display`; the error lists the words there are.
    fn from_str(word: &str) -> Result<Self, String> {
        one_of(word, [Self::Enforce, Self::Observe, Self::Off])
    }
}

impl FromStr for SourcePort {
    type Err = String;

    /// The inverse of `Display`; the error lists the words there are.
    fn from_str(word: &str) -> Result<Self, String> {
        one_of(word, [Self::Flow, Self::Fixed])
    }
}

/// The choice that prints itself as `word`.
fn one_of<T: fmt::Display + Copy, const N: usize>(word: &str, choices: [T; N]) -> Result<T, String> {
    choices
        .into_iter()
        .find(|choice| choice.to_string() == word)
        .ok_or_else(|| format!("must be one of {}", choices.map(|choice| choice.to_string()).join(", ")))
}
