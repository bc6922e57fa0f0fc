//! What the eBPF programs and the agent must agree on: map keys and values, settings, counters, header code.
//!
//! `no_std`, no allocation, no panics: the same code runs under the verifier and in plain unit tests. Every shared
//! struct is `repr(C)` without hidden padding (`bytemuck::Pod` refuses it otherwise), and its layout is part of the
//! pins: a change raises [`LAYOUT_VERSION`].
#![cfg_attr(not(test), no_std)]

pub mod counter;
pub mod header;
pub mod peer;
pub mod pod;
pub mod tunnel;

/// Version of the pinned maps' layout; part of the pin path (`flannel/<device>/v4/`).
///
/// Whatever a version changes, `PEERS` keeps its key and begins its value with the node's address ([`peer`]): by these an
/// agent fills its own map from that of any other version before it replaces the programs.
pub const LAYOUT_VERSION: u32 = 4;

/// Outer IPv4 (20 bytes, no options) and UDP (8 bytes) header in front of every inner packet.
pub const OVERHEAD: u32 = 28;
