//! What the binary can be told to do: the daemon, and clients of the running daemon.

pub mod daemon;
pub mod status;
