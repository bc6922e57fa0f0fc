//! Leases: which node has which subnet, and what the others must know of it.
//!
//! Text forms are flanneld's, byte for byte (contract §3.1, §3.2): tools and older daemons compare them as text.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Instant;

use ipnet::{Ipv4Net, Ipv6Net};
use serde_json::Value;

/// The subnets of one lease: IPv4, IPv6, or both. At least one is present.
///
/// `Display` and `FromStr` are the lease key's last part: `10.5.34.0-24`, `10.12.13.0-24&fd00:12:13::-56`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subnets {
    pub v4: Option<Ipv4Net>,
    pub v6: Option<Ipv6Net>,
}

/// What a node publishes about itself in its lease.
#[derive(Clone, Debug, PartialEq)]
pub struct LeaseAttrs {
    pub public_ip: Ipv4Addr,
    pub public_ipv6: Option<Ipv6Addr>,
    /// A fixed constant per backend; empty for udp, alloc and the cloud backends.
    pub backend_type: String,
    /// The backend's own JSON.
    pub backend_data: Option<Value>,
    pub backend_v6_data: Option<Value>,
    /// Fields we do not know, kept when the value is written again.
    pub unknown: serde_json::Map<String, Value>,
}

/// A subnet given to a node for a time.
#[derive(Clone, Debug, PartialEq)]
pub struct Lease {
    pub subnets: Subnets,
    pub attrs: LeaseAttrs,
    /// When the store drops it; `None` is a reservation, which never expires and must never be given a TTL.
    pub expires: Option<Instant>,
    /// The store's version of the entry, compared at renewal; 0 where a store has none.
    pub revision: u64,
}

/// What a store reports while it is watched. A stream of them always begins with a `Snapshot`, or an
/// `Interrupted` when the store can't be reached yet.
#[derive(Clone, Debug, PartialEq)]
pub enum LeaseEvent {
    /// Everything there is; what is not in it is gone.
    Snapshot(Vec<Lease>, Vec<Unreadable>),
    Added(Lease),
    Removed(Subnets),
    /// An entry that can't be understood; others are not affected.
    Unreadable(Unreadable),
    /// The store can't be reached or the watch broke; the next event after it is a `Snapshot`.
    Interrupted(String),
}

/// An entry of the store that is not a lease we understand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    pub key: String,
    pub reason: String,
}

impl std::fmt::Display for Subnets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.v4)
    }
}
