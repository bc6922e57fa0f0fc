//! The other nodes' leases, folded from the store's events.
/// (to be filled)
#[derive(Clone, Debug, Default)]
pub struct Peers {}
