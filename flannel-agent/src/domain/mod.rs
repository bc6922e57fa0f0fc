//! What the agent knows: networks, leases, peers, and what a host should look like.
//!
//! Nothing here does IO, keeps time, or imports another folder of this crate; everything is a value or a pure
//! function, so that it can be tested by tables. Time is an argument.

pub mod allocator;
pub mod config;
pub mod etcd;
pub mod host_state;
pub mod interface;
pub mod lease;
pub mod network_name;
pub mod path_mtu;
pub mod peers;
pub mod wording;
