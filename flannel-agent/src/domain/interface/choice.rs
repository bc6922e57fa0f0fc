//! The choice itself: selectors in order, then the addresses that go with the interface.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{
    ExternalInterface, Families, HostFacts, Interface, InterfaceAddress, InterfaceError, Pattern,
    PublicAddresses, Selector,
};

/// Interfaces an error lists: a host with many pods has thousands.
const LISTED: usize = 24;

/// An interface, and the addresses on it that were asked for by themselves.
pub(super) struct Found<'a> {
    interface: &'a Interface,
    v4: Option<Ipv4Addr>,
    v6: Option<Ipv6Addr>,
}

/// The interface of that name.
pub(super) fn by_name<'a>(facts: &'a HostFacts, name: &str) -> Option<&'a Interface> {
    facts.interfaces.iter().find(|interface| interface.name == name)
}

/// Chooses the interface that carries the overlay.
///
/// Selectors are tried in order. Without any, `--public-ip` or else `--public-ipv6` selects the interface that has that
/// address (contract §14, T19), and without those the default route does.
///
/// # Errors
/// Says of every selector why it did not work, and which interfaces there are.
pub fn choose(
    selectors: &[Selector],
    facts: &HostFacts,
    public: PublicAddresses,
    families: Families,
) -> Result<ExternalInterface, InterfaceError> {
    let choice = Choice { facts, public, families };
    let mut tried = Vec::new();
    if selectors.is_empty() {
        match choice.without_selectors().and_then(|found| found.addressed(public, families)) {
            Ok(interface) => return Ok(interface),
            Err(reason) => tried.push(reason),
        }
    }
    for selector in selectors {
        match choice.find(selector).and_then(|found| found.addressed(public, families)) {
            Ok(interface) => return Ok(interface),
            Err(reason) => tried.push(format!("{selector}: {reason}")),
        }
    }
    Err(InterfaceError { tried, present: listing(&facts.interfaces) })
}

struct Choice<'a> {
    facts: &'a HostFacts,
    public: PublicAddresses,
    families: Families,
}

impl<'a> Choice<'a> {
    fn without_selectors(&self) -> Result<Found<'a>, String> {
        let (flag, address) = match (self.public.v4, self.public.v6) {
            (Some(v4), _) => ("--public-ip", IpAddr::V4(v4)),
            (None, Some(v6)) => ("--public-ipv6", IpAddr::V6(v6)),
            (None, None) => return self.by_default_route(),
        };
        if self.holder(address).is_none() {
            return Err(format!(
                "{flag}={address}: no interface has that address; if it is one behind NAT, name with --iface the interface that leads there"
            ));
        }
        self.by_address(address).map_err(|reason| format!("{flag}={address}: {reason}"))
    }

    fn by_default_route(&self) -> Result<Found<'a>, String> {
        let (route, family) = match self.families {
            Families::V4 | Families::Dual => (self.facts.default_route_v4, "IPv4"),
            Families::V6 => (self.facts.default_route_v6, "IPv6"),
        };
        let index = route.ok_or_else(|| {
            format!("there is no {family} default route to choose an interface by; name one with --iface")
        })?;
        let interface = self.by_index(index)?;
        if self.families == Families::Dual {
            match self.facts.default_route_v6 {
                Some(other) if other == index => {}
                Some(other) => {
                    let other = self.by_index(other)?;
                    return Err(format!(
                        "the default routes leave by different interfaces, IPv4 by {} and IPv6 by {}; name one with --iface",
                        interface.name, other.name
                    ));
                }
                None => {
                    return Err(
                        "there is no IPv6 default route to choose an interface by; name one with --iface"
                            .to_owned(),
                    );
                }
            }
        }
        Ok(Found::of(interface))
    }

    fn find(&self, selector: &Selector) -> Result<Found<'a>, String> {
        match selector {
            Selector::Address(address) => self.by_address(*address),
            Selector::Name(name) => by_name(self.facts, name)
                .map(Found::of)
                .ok_or_else(|| "there is no interface of that name".to_owned()),
            Selector::Pattern(pattern) => self.by_pattern(pattern),
            Selector::CanReach(address) => {
                let (_, route) = self
                    .facts
                    .can_reach
                    .iter()
                    .find(|(reached, _)| reached == address)
                    .ok_or("there is no route to it")?;
                let interface = self.by_index(route.index)?;
                Ok(match route.source {
                    Some(IpAddr::V4(source)) => Found { interface, v4: Some(source), v6: None },
                    Some(IpAddr::V6(source)) => Found { interface, v4: None, v6: Some(source) },
                    None => Found::of(interface),
                })
            }
        }
    }

    /// The interface that has exactly this address. With two families a local `--public-ipv6` goes with it and must be
    /// on the same interface.
    fn by_address(&self, address: IpAddr) -> Result<Found<'a>, String> {
        let interface = self.holder(address).ok_or("no interface has that address")?;
        let (v4, mut v6) = match address {
            IpAddr::V4(v4) => (Some(v4), None),
            IpAddr::V6(v6) => (None, Some(v6)),
        };
        if let (Families::Dual, Some(public)) = (self.families, self.public.v6)
            && v4.is_some()
        {
            match self.holder(IpAddr::V6(public)) {
                Some(other) if other.index == interface.index => v6 = Some(public),
                Some(other) => {
                    return Err(format!(
                        "it is on {} but --public-ipv6={public} is on {}; both must be on one interface",
                        interface.name, other.name
                    ));
                }
                None => return Err(format!("no interface has --public-ipv6={public}")),
            }
        }
        Ok(Found { interface, v4, v6 })
    }

    /// Addresses before names: the first interface with a matching address of every family.
    fn by_pattern(&self, pattern: &Pattern) -> Result<Found<'a>, String> {
        let by_address = self.facts.interfaces.iter().find_map(|interface| {
            let v4 = usable_v4(interface).into_iter().find(|address| pattern.matches(&address.to_string()));
            let v6 = usable_v6(interface).into_iter().find(|address| pattern.matches(&address.to_string()));
            let v4 = if self.families.has_v4() { Some(v4?) } else { None };
            let v6 = if self.families.has_v6() { Some(v6?) } else { None };
            Some(Found { interface, v4, v6 })
        });
        by_address
            .or_else(|| {
                let interface =
                    self.facts.interfaces.iter().find(|interface| pattern.matches(&interface.name))?;
                Some(Found::of(interface))
            })
            .ok_or_else(|| "no interface's address or name matches".to_owned())
    }

    fn by_index(&self, index: u32) -> Result<&'a Interface, String> {
        self.facts
            .interfaces
            .iter()
            .find(|interface| interface.index == index)
            .ok_or_else(|| format!("the route leaves by interface {index}, which is gone"))
    }

    fn holder(&self, address: IpAddr) -> Option<&'a Interface> {
        self.facts
            .interfaces
            .iter()
            .find(|interface| interface.addresses.iter().any(|held| held.address == address))
    }
}

impl<'a> Found<'a> {
    pub(super) fn of(interface: &'a Interface) -> Self {
        Self { interface, v4: None, v6: None }
    }

    /// Fills in the addresses that were not asked for, and refuses an interface that can't carry anything.
    pub(super) fn addressed(
        self,
        public: PublicAddresses,
        families: Families,
    ) -> Result<ExternalInterface, String> {
        let Found { interface, v4, v6 } = self;
        if interface.mtu == 0 {
            return Err(format!("{} has an MTU of 0", interface.name));
        }
        let lacking = |family: &str| format!("{} has no usable {family} address", interface.name);
        let address = if families.has_v4() {
            let usable = v4.or_else(|| usable_v4(interface).into_iter().next());
            Some(usable.ok_or_else(|| lacking("IPv4"))?)
        } else {
            None
        };
        let address_v6 = if families.has_v6() {
            let usable = v6.or_else(|| usable_v6(interface).into_iter().next());
            Some(usable.ok_or_else(|| lacking("IPv6"))?)
        } else {
            None
        };
        Ok(ExternalInterface {
            name: interface.name.clone(),
            index: interface.index,
            mtu: interface.mtu,
            address,
            public_ip: address.map(|address| public.v4.unwrap_or(address)),
            address_v6,
            public_ipv6: address_v6.map(|address| public.v6.unwrap_or(address)),
        })
    }
}

/// The addresses a node can be reached by, best first: global before link-local, permanent before dynamic,
/// lasting before temporary, else in the kernel's order.
fn usable_v4(interface: &Interface) -> Vec<Ipv4Addr> {
    ranked(interface, |address| match address {
        IpAddr::V4(v4) => {
            let unusable = v4.is_unspecified() || v4.is_loopback() || v4.is_multicast() || v4.is_broadcast();
            (!unusable).then_some((v4, v4.is_link_local()))
        }
        IpAddr::V6(_) => None,
    })
}

fn usable_v6(interface: &Interface) -> Vec<Ipv6Addr> {
    ranked(interface, |address| match address {
        IpAddr::V6(v6) => {
            let unusable = v6.is_unspecified() || v6.is_loopback() || v6.is_multicast();
            (!unusable).then_some((v6, v6.is_unicast_link_local()))
        }
        IpAddr::V4(_) => None,
    })
}

/// `usable` gives an address of its family and whether it is link-local.
fn ranked<A: Copy>(interface: &Interface, usable: impl Fn(IpAddr) -> Option<(A, bool)>) -> Vec<A> {
    let mut ranked: Vec<_> = interface
        .addresses
        .iter()
        .filter(|held| !held.deprecated)
        .filter_map(|held| {
            let InterfaceAddress { address, dynamic, temporary, .. } = *held;
            usable(address).map(|(address, link_local)| ((link_local, dynamic, temporary), address))
        })
        .collect();
    ranked.sort_by_key(|(rank, _)| *rank);
    ranked.into_iter().map(|(_, address)| address).collect()
}

fn listing(interfaces: &[Interface]) -> String {
    let mut listed: Vec<String> = interfaces
        .iter()
        .take(LISTED)
        .map(|interface| {
            let addresses: Vec<_> = interface.addresses.iter().map(|held| held.address.to_string()).collect();
            format!("{}:[{}]", interface.name, addresses.join(" "))
        })
        .collect();
    match interfaces.len() {
        0 => "no interfaces".to_owned(),
        count if count > LISTED => {
            listed.push(format!("and {} more", count - LISTED));
            listed.join(", ")
        }
        _ => listed.join(", "),
    }
}
