//! Where leases live.

pub mod etcd;
pub mod memory;

use async_trait::async_trait;
use futures_util::stream::BoxStream;

use crate::domain::config::NetworkConfig;
use crate::domain::lease::{Lease, LeaseAttrs, LeaseEvent, Subnets};

/// What a node asks for when it takes a lease.
#[derive(Clone, Debug)]
pub struct LeaseRequest {
    pub config: NetworkConfig,
    pub attrs: LeaseAttrs,
    /// The subnet of a former run (from subnet.env), taken again when it is free and fits.
    pub previous: Option<Subnets>,
    /// Only `previous` will do: a running node never changes its subnet.
    pub previous_only: bool,
}

/// A store of leases. Every implementation passes the contract suite in `tests/`.
#[async_trait]
pub trait LeaseStore: Send + Sync {
    /// The configuration's JSON text.
    async fn network_config(&self) -> Result<String, StoreError>;

    /// Takes a lease by contract §3.5. Deletes nothing but a lease with our public IP that no longer fits.
    async fn acquire(&self, request: &LeaseRequest) -> Result<Lease, StoreError>;

    /// Prolongs `lease` if the store still has it in the revision we know.
    async fn renew(&self, lease: &Lease) -> Result<Lease, StoreError>;

    /// Every lease, our own too, and what changes. Reconnects by itself; never ends.
    fn watch(&self) -> BoxStream<'static, LeaseEvent>;
}

/// Why a store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Worth trying again.
    #[error("{store} is unreachable: {reason}")]
    Unreachable { store: String, reason: String },
    #[error("no network configuration at {place}: write one, for example {example}")]
    NoConfig { place: String, example: String },
    #[error("{0}")]
    OutOfSubnets(String),
    /// Our lease is gone or belongs to another node.
    #[error("lease {subnets} is lost: {reason}")]
    LeaseLost { subnets: Subnets, reason: String },
    /// Will not get better by itself: credentials, certificates, permissions.
    #[error("{store} refused: {reason}")]
    Refused { store: String, reason: String },
}
