//! IP addresses of devices.
//!
//! Addresses are put with scope global and without label or broadcast address, as flanneld's are (contract §8).

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Failure, Message, Netlink, OnDevice, Verb, request};
use crate::domain::host_state::{Address, HostItem};
use crate::host::HostError;

/// An address the kernel lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressEntry {
    pub ifindex: u32,
    /// The host's own address with its prefix length, host bits kept.
    pub net: IpNet,
    /// Its lifetime ends (DHCP, router advertisement).
    pub dynamic: bool,
    /// RFC 8981 privacy address.
    pub temporary: bool,
    /// Not to be used as the source of new connections.
    pub deprecated: bool,
}

impl Netlink {
    /// Every address of every device, IPv4 first, in the kernel's order.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub async fn addresses(&self) -> Result<Vec<AddressEntry>, HostError> {
        let mut entries = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = AddressMessage::default();
            message.header.family = family;
            let messages = self
                .dump(RouteNetlinkMessage::GetAddress(message))
                .await
                .map_err(|failure| failure.while_doing("list the addresses"))?;
            entries.extend(messages.into_iter().filter_map(|message| match message {
                // A kernel without IPv6 answers for IPv6 with what it has.
                RouteNetlinkMessage::NewAddress(address) if address.header.family == family => {
                    address_entry(&address)
                }
                _ => None,
            }));
        }
        Ok(entries)
    }

    /// Adds each address to its device, or makes the existing one equal to it. One result per address.
    pub async fn put_addresses(&self, addresses: &[&Address]) -> Vec<Result<(), HostError>> {
        self.change_all(Verb::Put, addresses).await
    }

    /// Removes each address; that it, or its device, is gone already is a success. One result per address.
    pub async fn remove_addresses(&self, addresses: &[&Address]) -> Vec<Result<(), HostError>> {
        self.change_all(Verb::Remove, addresses).await
    }
}

impl OnDevice for Address {
    fn device(&self) -> &str {
        &self.device
    }

    fn item(&self) -> HostItem {
        HostItem::Address(self.clone())
    }

    fn request(&self, verb: Verb, index: u32) -> Message {
        let message = address_message(self.net, index);
        match verb {
            Verb::Put => {
                request(RouteNetlinkMessage::NewAddress(message), NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE)
            }
            Verb::Remove => request(RouteNetlinkMessage::DelAddress(message), NLM_F_ACK),
        }
    }

    fn says_gone(failure: &Failure) -> bool {
        failure.is(libc::EADDRNOTAVAIL) || failure.is(libc::ENODEV)
    }

    fn cause(&self, failure: &Failure) -> Option<String> {
        (failure.is(libc::EACCES) && self.net.addr().is_ipv6())
            .then(|| format!("IPv6 is switched off on {}", self.device))
    }
}

fn address_message(net: IpNet, index: u32) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = net.prefix_len();
    message.header.scope = AddressScope::Universe;
    message.header.family = match net {
        IpNet::V4(_) => AddressFamily::Inet,
        IpNet::V6(_) => AddressFamily::Inet6,
    };
    message.attributes = vec![AddressAttribute::Local(net.addr()), AddressAttribute::Address(net.addr())];
    message
}

fn address_entry(message: &AddressMessage) -> Option<AddressEntry> {
    let mut local: Option<IpAddr> = None;
    let mut address: Option<IpAddr> = None;
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    // IFA_ADDRESS is the other end's address on a point-to-point link; then IFA_LOCAL is ours.
    let net = IpNet::new(local.or(address)?, message.header.prefix_len).ok()?;
    // IFA_F_TEMPORARY and IFA_F_SECONDARY are one bit: the first on IPv6, the second on IPv4.
    let temporary = net.addr().is_ipv6() && flags.contains(AddressFlags::Secondary);
    Some(AddressEntry {
        ifindex: message.header.index,
        net,
        dynamic: !flags.contains(AddressFlags::Permanent),
        temporary,
        deprecated: flags.contains(AddressFlags::Deprecated),
    })
}
