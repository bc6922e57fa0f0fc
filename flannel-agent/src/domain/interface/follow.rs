//! What has become of the interface that was chosen when the agent started.
//!
//! The choice is *sticky*: which interface carries the overlay is decided once. Its MTU, index and addresses are
//! followed, another interface is never taken by itself: a VPN client that takes the default route for an hour must not
//! carry a node's lease, and with it the traffic of every peer, to an address the others can't reach. What a restart
//! would choose instead is only told ([`preferred`]).
//!
//! An address is as sticky: it is kept for as long as it is there, whatever else ranks better now. When it is gone and
//! the interface has another that the operator's flags allow, the node is renumbered. When it is gone and there is no
//! other, or the flags name the very address, the agent waits for it.

use std::net::IpAddr;

use super::choice::{Found, by_name, choose};
use super::{ExternalInterface, Families, HostFacts, Interface, PublicAddresses, Selector};

/// How the interface was chosen, and would be again.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    /// In the order they are tried.
    pub selectors: Vec<Selector>,
    pub public: PublicAddresses,
    pub families: Families,
}

/// The state of the chosen interface now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Followed {
    /// It can carry the overlay; as it was, or with another index, MTU or address.
    There(ExternalInterface),
    /// It can't for now, and why: wait.
    Away(String),
}

/// What has become of `current`.
pub fn follow(current: &ExternalInterface, selection: &Selection, facts: &HostFacts) -> Followed {
    let Some(interface) = by_name(facts, &current.name) else {
        return Followed::Away(format!("interface {} is gone", current.name));
    };
    if interface.mtu == 0 {
        return Followed::Away(format!("interface {} has an MTU of 0", current.name));
    }
    let lost = current.addresses().find(|address| !holds(interface, *address));
    if lost.is_none() {
        return Followed::There(ExternalInterface {
            index: interface.index,
            mtu: interface.mtu,
            ..current.clone()
        });
    }
    match renumbered(current, selection, facts) {
        Some(found) => Followed::There(found),
        None => {
            let lost: Vec<String> = lost.iter().map(ToString::to_string).collect();
            let lost = lost.join(" and ");
            Followed::Away(format!("{} has lost its address {lost} and has no other to take", current.name))
        }
    }
}

/// The interface that the same flags would choose now, when it is another one.
pub fn preferred(current: &ExternalInterface, selection: &Selection, facts: &HostFacts) -> Option<String> {
    let Selection { selectors, public, families } = selection;
    let found = choose(selectors, facts, *public, *families).ok()?;
    (found.name != current.name).then_some(found.name)
}

/// The same interface with the addresses the flags give it now.
fn renumbered(
    current: &ExternalInterface,
    selection: &Selection,
    facts: &HostFacts,
) -> Option<ExternalInterface> {
    let Selection { selectors, public, families } = selection;
    // The default route that chose the interface goes and comes with the address; the choice stands.
    let by_default_route = selectors.is_empty() && *public == PublicAddresses::default();
    let found = if by_default_route {
        let interface = by_name(facts, &current.name)?;
        Found::of(interface).addressed(*public, *families).ok()?
    } else {
        choose(selectors, facts, *public, *families).ok()?
    };
    (found.name == current.name).then_some(found)
}

fn holds(interface: &Interface, address: IpAddr) -> bool {
    interface.addresses.iter().any(|held| held.address == address)
}
