//! The udp tunnel.
