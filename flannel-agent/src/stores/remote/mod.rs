//! Leases from a flannel server (`--remote`, contract §5.3), this project's or flanneld 0.7.0's.
//!
//! Beyond flanneld's client: several addresses with failover, back-off, an end to every call, and polls that notice a
//! server that hangs. The server's part is the crate's `server` folder; both speak [`wire`].

mod client;
mod poll;
pub mod wire;

pub use self::client::{RemoteNetworks, RemoteOptions, RemoteOptionsError};
