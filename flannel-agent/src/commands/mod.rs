//! What the binary can be told to do: the daemon, clients of the running daemon, and what is done without it.

mod claims;
pub mod cleanup;
pub mod daemon;
mod keys;
pub mod migrate;
pub mod migrate_etcd;
mod network;
mod networks;
mod open;
pub mod reservations;
mod serve;
mod sight;
pub mod status;
pub mod top;
mod wording;
