//! The udp tunnel.

pub mod object;
pub mod userspace;
