//! The udp tunnel.

pub mod object;
