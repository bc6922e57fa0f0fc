//! The map of pods behind the node's bridge: MAC address → port.

use bytemuck::{Pod as Plain, Zeroable};

/// Key of `PODS`: a destination MAC address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Plain, Zeroable)]
pub struct PodKey {
    pub mac: [u8; 6],
    pub padding: [u8; 2],
}

impl PodKey {
    #[inline(always)]
    #[must_use]
    pub const fn new(mac: [u8; 6]) -> Self {
        Self { mac, padding: [0; 2] }
    }
}

/// Value of `PODS`, and key of `PORTS`: the interface index of the bridge's port.
pub type PortIndex = u32;

/// Entries of `PODS` and `PORTS`.
pub const MAX_PODS: u32 = 4096;

#[cfg(feature = "user")]
// SAFETY: repr(C), no padding, every bit pattern is valid (bytemuck checks all three).
unsafe impl aya::Pod for PodKey {}
