//! Where leases live.
//!
//! A store keeps the network's configuration and one lease per node. It is not trusted: what others wrote is decoded
//! entry by entry, an entry that can't be understood is reported as such, and it never hides the others.
//!
//! Time is kept by the store. A [`Lease`] carries the moment of its end by this host's monotonic clock, worked out
//! from the time to live the store names, so no two clocks are ever compared.

mod back_off;
pub mod embedded;
pub mod etcd;
mod http;
pub mod kube;
pub mod memory;
pub(crate) mod pem;
mod registry;
pub mod remote;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::BoxStream;

pub use self::registry::{Content, Received, RegistryNetworks};
use crate::domain::allocator::{self, NoSubnet, Previous, Wish};
use crate::domain::config::NetworkConfig;
use crate::domain::interface::PublicAddresses;
use crate::domain::lease::{Lease, LeaseAttrs, LeaseError, LeaseEvent, Reservation, Subnets, Unreadable};
use crate::domain::network_name::NetworkName;

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

impl LeaseRequest {
    /// What the node is known by in this network.
    fn node(&self) -> Option<IpAddr> {
        match self.config.v4 {
            Some(_) => Some(self.attrs.public_ip.into()).filter(|address: &IpAddr| !address.is_unspecified()),
            None => self.attrs.public_ipv6.map(IpAddr::from),
        }
    }

    fn wish(&self) -> Wish<'_> {
        let previous = match self.previous {
            None => Previous::None,
            Some(subnets) if self.previous_only => Previous::Only(subnets),
            Some(subnets) => Previous::Preferred(subnets),
        };
        Wish { config: &self.config, node: self.node(), previous }
    }
}

/// A store of leases. Every implementation passes the contract suite in `tests/`.
#[async_trait]
pub trait LeaseStore: Send + Sync {
    /// The configuration's JSON text.
    async fn network_config(&self) -> Result<String, StoreError>;

    /// Takes a lease by contract §3.5. Deletes nothing but a lease with our public IP that no longer fits.
    async fn acquire(&self, request: &LeaseRequest) -> Result<Lease, StoreError>;

    /// Prolongs `lease`, if the store still has it under our public address, and publishes `attrs` from now on. They may
    /// name another public address of this node than the lease did: then both are ours.
    async fn rewrite(&self, lease: &Lease, attrs: &LeaseAttrs) -> Result<Lease, StoreError>;

    /// [`Self::rewrite`] with what it says already.
    async fn renew(&self, lease: &Lease) -> Result<Lease, StoreError> {
        self.rewrite(lease, &lease.attrs).await
    }

    /// What nodes have for good.
    async fn reservations(&self) -> Result<Vec<Reservation>, StoreError> {
        Err(StoreError::NoReservations)
    }

    /// Gives a node a subnet for good: a free one, or the lease it has. Done already is done.
    async fn reserve(&self, _reservation: &Reservation) -> Result<(), StoreError> {
        Err(StoreError::NoReservations)
    }

    /// Makes a reservation a lease like any other, which ends a day later unless its node renews it.
    async fn unreserve(&self, _subnets: Subnets) -> Result<(), StoreError> {
        Err(StoreError::NoReservations)
    }

    /// Takes a lease away from its node, reserved or not.
    async fn revoke(&self, subnets: Subnets) -> Result<(), StoreError>;

    /// This node has another address: connections made from the former one are dead, though nobody has said so yet.
    fn reconnect(&self) {}

    /// Addresses the store has for this node, which go before `--public-ip` and `--public-ipv6` (contract §4.1).
    async fn node_addresses(&self) -> Result<PublicAddresses, StoreError> {
        Ok(PublicAddresses::default())
    }

    /// The node's network works from now on. A store with a place for that says so there, in its own time.
    fn network_is_up(&self) {}

    /// Every lease, our own too, and what changes. Reconnects by itself; never ends.
    fn watch(&self) -> BoxStream<'static, LeaseEvent>;
}

/// A place that keeps the leases of several networks (contract §5.4).
pub trait NetworkStores: Send + Sync {
    /// What it is called in messages: "etcd at http://10.0.0.1:2379".
    fn name(&self) -> &str;

    /// The leases of one network; without a name, those of the network that has none. It need not exist yet.
    fn network(&self, name: Option<&NetworkName>) -> Arc<dyn LeaseStore>;

    /// The named networks that have a configuration, and what changes. Reconnects by itself; never ends.
    fn watch_networks(&self) -> BoxStream<'static, NetworkEvent>;
}

/// What a place with several networks reports. A stream of them begins with a `Snapshot`, or with an `Interrupted`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetworkEvent {
    /// All there are; what is not in it is gone. Any of them may have changed.
    Snapshot(Vec<NetworkName>),
    /// A network's configuration was written, for the first time or again.
    Written(NetworkName),
    Removed(NetworkName),
    /// The store can't be reached; the next event after it is a `Snapshot`.
    Interrupted(String),
}

/// Why a store could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Worth trying again.
    #[error("{store} is unreachable: {reason}")]
    Unreachable { store: String, reason: String },
    /// It answers, and does not have yet what is asked for. Worth trying again.
    #[error("{store}: {reason}")]
    NotYet { store: String, reason: String },
    #[error("no network configuration at {place}: write one, for example {example}")]
    NoConfig { place: String, example: String },
    #[error("{0}")]
    OutOfSubnets(String),
    /// Our lease is gone or belongs to another node.
    #[error("lease {subnets} is lost: {reason}")]
    LeaseLost { subnets: Subnets, reason: String },
    /// What is asked contradicts what is there.
    #[error("{0}")]
    Conflict(String),
    #[error("this store keeps no reservations: in Kubernetes a node's pod CIDR is its own for good")]
    NoReservations,
    /// Will not get better by itself: credentials, certificates, permissions.
    #[error("{store} refused: {reason}")]
    Refused { store: String, reason: String },
}

impl StoreError {
    fn taken(subnets: Subnets, by: &LeaseAttrs) -> Self {
        Self::Conflict(format!("subnet {subnets} is leased by {} already", in_words(by.node())))
    }

    fn no_reservation(subnets: Subnets) -> Self {
        Self::Conflict(format!("subnet {subnets} is not reserved"))
    }

    fn no_lease(subnets: Subnets) -> Self {
        Self::Conflict(format!("subnet {subnets} is not leased"))
    }

    fn no_subnet(error: NoSubnet, store: &str) -> Self {
        let text = error.to_string();
        match error {
            NoSubnet::Exhausted { .. } => Self::OutOfSubnets(text),
            NoSubnet::PreviousTaken { subnets, .. } | NoSubnet::PreviousUnfit(subnets) => {
                Self::LeaseLost { subnets, reason: text }
            }
            NoSubnet::NoPublicIp { .. } => Self::Refused { store: store.to_owned(), reason: text },
        }
    }
}

/// How long a lease lives without renewal: 24 h, as with flanneld. Never shortened, old daemons rely on it.
pub const LEASE_TTL: Duration = Duration::from_secs(86400);

/// What [`StoreError::NoConfig`] suggests to write.
const CONFIG_EXAMPLE: &str = r#"{"Network":"10.244.0.0/16"}"#;

/// Whether a lease of these subnets could be given out under `config` (texts as flanneld's, contract §5.2).
fn check_reservation(reservation: &Reservation, config: &NetworkConfig) -> Result<(), StoreError> {
    let subnets = &reservation.subnets;
    let address = reservation.public_ip;
    if address.is_unspecified() || address.is_multicast() || address == IpAddr::V4(Ipv4Addr::BROADCAST) {
        return Err(StoreError::Conflict(format!(
            "the reservation names no node: PublicIP is {address}, it must be an address other nodes can send to"
        )));
    }
    if reservation.public_ip.is_ipv4() != config.v4.is_some() {
        let family = if config.v4.is_some() { "IPv4" } else { "IPv6" };
        return Err(StoreError::Conflict(format!(
            "the reservation is for {}: nodes of this network are known by their {family} address",
            reservation.public_ip
        )));
    }
    let lengths = (subnets.v4.map(|net| net.prefix_len()), subnets.v6.map(|net| net.prefix_len()));
    let wanted = (config.v4.map(|range| range.subnet_len), config.v6.map(|range| range.subnet_len));
    if lengths != wanted {
        let length = |length: Option<u8>| length.map_or_else(|| "none".to_owned(), |bits| format!("/{bits}"));
        return Err(StoreError::Conflict(format!(
            "reservation subnet has mask incompatible with network config: {subnets} where leases are {} (IPv4) and {} \
             (IPv6)",
            length(wanted.0),
            length(wanted.1)
        )));
    }
    if !allocator::fits(subnets, config) {
        return Err(StoreError::Conflict(format!(
            "reservation subnet is outside of flannel network: {subnets} where leases are {}",
            ranges_of(config)
        )));
    }
    Ok(())
}

/// "from 10.1.1.0 to 10.1.255.0"
fn ranges_of(config: &NetworkConfig) -> String {
    let v4 = config.v4.map(|range| format!("from {} to {}", range.subnet_min, range.subnet_max));
    let v6 = config.v6.map(|range| format!("from {} to {}", range.subnet_min, range.subnet_max));
    v4.into_iter().chain(v6).collect::<Vec<_>>().join(" and ")
}

/// Who has a lease.
fn in_words(node: Option<IpAddr>) -> String {
    node.map_or_else(|| "a node without an address".to_owned(), |address| address.to_string())
}

/// Tells leases from other entries. `key` is the whole key, `last` its part behind the leases' folder.
fn decode(key: &str, last: &str, value: &[u8]) -> Result<(Subnets, LeaseAttrs), Unreadable> {
    let unreadable = |error: LeaseError| Unreadable { key: key.to_owned(), reason: error.to_string() };
    let subnets = last.parse().map_err(unreadable)?;
    let value = std::str::from_utf8(value).map_err(|error| Unreadable {
        key: key.to_owned(),
        reason: format!("the value is not text: {error}"),
    })?;
    Ok((subnets, LeaseAttrs::from_json(value).map_err(unreadable)?))
}
