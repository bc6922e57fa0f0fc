//! Network devices: what there is, and the few things the agent changes about them.
//!
//! TUN devices can't be made through netlink on any kernel (`/dev/net/tun` makes them, `host/udp`); veth pairs can.

use std::collections::BTreeMap;
use std::os::fd::RawFd;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, Nla};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, InfoVxlan, LinkAttribute, LinkExtentMask, LinkFlags,
    LinkInfo as LinkInfoAttribute, LinkLayerType, LinkMessage, LinkXdp,
};

use super::{Failure, Netlink};
use crate::host::HostError;

/// A network device as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkInfo {
    pub name: String,
    pub index: u32,
    /// Bytes of the largest packet, without link-layer header.
    pub mtu: u32,
    /// Switched on by its administrator (`IFF_UP`), with or without carrier.
    pub up: bool,
    /// Packets can leave it (`IFF_LOWER_UP`); a TUN has carrier while a process holds it open.
    pub carrier: bool,
    /// The driver's name for software devices: `tun`, `veth`, `bridge`; `None` for most hardware.
    pub kind: Option<String>,
    /// For devices of kind `tun` that carry IP packets (`IFF_TUN`, not `IFF_TAP`).
    pub tun: Option<TunInfo>,
    /// Id of the XDP program on it, whoever's.
    pub xdp: Option<u32>,
}

/// The other end of a veth pair.
#[derive(Clone, Copy, Debug)]
pub struct VethEnd<'a> {
    pub name: &'a str,
    /// MAC address; without one the kernel makes one up.
    pub address: Option<[u8; 6]>,
    /// Descriptor of the network namespace it goes to; without one it stays here.
    pub namespace: Option<RawFd>,
}

/// A vxlan device to be made.
#[derive(Clone, Copy, Debug)]
pub struct Vxlan<'a> {
    pub name: &'a str,
    /// Network identifier.
    pub id: u32,
    /// UDP port its socket listens on.
    pub port: u16,
    /// MAC address.
    pub address: [u8; 6],
    pub mtu: u32,
    /// Descriptor of the network namespace it goes to.
    pub namespace: RawFd,
}

/// How a TUN device was opened. Kernels before 4.20 don't say; then everything is taken to be as the agent makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunInfo {
    /// Outlives the process that made it (`TUNSETPERSIST`).
    pub persistent: bool,
    /// `IFF_MULTI_QUEUE`
    pub multi_queue: bool,
    /// `IFF_VNET_HDR`
    pub vnet_header: bool,
}

impl Netlink {
    /// Every device of the namespace, in the kernel's order (by index).
    ///
    /// # Errors
    /// The kernel does not answer.
    pub async fn links(&self) -> Result<Vec<LinkInfo>, HostError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let messages = self
            .dump(RouteNetlinkMessage::GetLink(message))
            .await
            .map_err(|failure| failure.while_doing("list the network devices"))?;
        Ok(messages
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewLink(link) => Some(link_info(link)),
                _ => None,
            })
            .collect())
    }

    /// The device with this name, `None` when there is none.
    ///
    /// # Errors
    /// The kernel does not answer, or the name can't be one (empty, 16 bytes or longer).
    pub async fn link(&self, name: &str) -> Result<Option<LinkInfo>, HostError> {
        let doing = || format!("look up network device {name}");
        check_name(name).map_err(|reason| HostError::new(doing(), reason))?;
        match self.get(RouteNetlinkMessage::GetLink(named(name))).await {
            Ok(RouteNetlinkMessage::NewLink(link)) => Ok(Some(link_info(link))),
            Ok(_) => Err(Failure::Lost.while_doing(doing())),
            Err(failure) if failure.is(libc::ENODEV) => Ok(None),
            Err(failure) => Err(failure.while_doing(doing())),
        }
    }

    /// Interface index of each name, `None` for a device that isn't there. One request per different name.
    pub(super) async fn indexes<'a>(
        &self,
        names: impl Iterator<Item = &'a str>,
    ) -> BTreeMap<&'a str, Result<Option<u32>, String>> {
        let mut indexes = BTreeMap::new();
        for name in names {
            if !indexes.contains_key(name) {
                let link = self.link(name).await;
                indexes.insert(name, link.map(|link| link.map(|l| l.index)).map_err(|error| error.reason));
            }
        }
        indexes
    }

    /// Makes a veth pair, both ends down and with this MTU. Exists already is an error.
    ///
    /// # Errors
    /// Missing CAP_NET_ADMIN, a name in use, no veth in this kernel.
    pub async fn create_veth(&self, name: &str, peer: &str, mtu: u32) -> Result<(), HostError> {
        self.create_veth_to(name, &VethEnd { name: peer, address: None, namespace: None }, mtu).await
    }

    /// [`Self::create_veth`] with more to say about the other end.
    ///
    /// # Errors
    /// As there.
    pub async fn create_veth_to(&self, name: &str, peer: &VethEnd<'_>, mtu: u32) -> Result<(), HostError> {
        let doing = || format!("create veth pair {name} and {} with mtu {mtu}", peer.name);
        for name in [name, peer.name] {
            check_name(name).map_err(|reason| HostError::new(doing(), reason))?;
        }
        let mut other = named(peer.name);
        other.attributes.push(LinkAttribute::Mtu(mtu));
        other.attributes.extend(peer.address.map(|address| LinkAttribute::Address(address.to_vec())));
        other.attributes.extend(peer.namespace.map(LinkAttribute::NetNsFd));
        let mut message = named(name);
        message.attributes.push(LinkAttribute::Mtu(mtu));
        message.attributes.push(LinkAttribute::LinkInfo(vec![
            LinkInfoAttribute::Kind(InfoKind::Veth),
            LinkInfoAttribute::Data(InfoData::Veth(InfoVeth::Peer(other))),
        ]));
        self.execute(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL).await.map_err(
            |failure| {
                let cause = match &failure {
                    f if f.is(libc::EEXIST) => Some("a device with one of these names exists".to_owned()),
                    f if f.is(libc::EOPNOTSUPP) => Some("this kernel has no veth (modprobe veth)".to_owned()),
                    _ => None,
                };
                failure.because(doing(), cause)
            },
        )
    }

    /// Makes a vxlan device that learns nothing and sends to nobody, in another namespace; its socket stays in this one.
    ///
    /// # Errors
    /// Missing CAP_NET_ADMIN in either, a name in use, no vxlan in this kernel.
    pub async fn create_vxlan(&self, device: &Vxlan<'_>) -> Result<(), HostError> {
        let doing = || format!("create vxlan device {} with port {}", device.name, device.port);
        check_name(device.name).map_err(|reason| HostError::new(doing(), reason))?;
        let mut message = named(device.name);
        message.attributes.extend([
            LinkAttribute::Mtu(device.mtu),
            LinkAttribute::Address(device.address.to_vec()),
            LinkAttribute::NetNsFd(device.namespace),
            LinkAttribute::LinkInfo(vec![
                LinkInfoAttribute::Kind(InfoKind::Vxlan),
                LinkInfoAttribute::Data(InfoData::Vxlan(vec![
                    InfoVxlan::Id(device.id),
                    InfoVxlan::Port(device.port),
                    InfoVxlan::Learning(false),
                ])),
            ]),
        ]);
        self.execute(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL).await.map_err(
            |failure| {
                let cause = match &failure {
                    f if f.is(libc::EEXIST) => Some("a device with this name exists".to_owned()),
                    f if f.is(libc::EOPNOTSUPP) => {
                        Some("this kernel has no vxlan (modprobe vxlan)".to_owned())
                    }
                    _ => None,
                };
                failure.because(doing(), cause)
            },
        )
    }

    /// Switches the device on.
    ///
    /// # Errors
    /// No such device, missing CAP_NET_ADMIN.
    pub async fn set_up(&self, name: &str) -> Result<(), HostError> {
        let mut message = named(name);
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.set(name, message, &format!("set link {name} up")).await
    }

    /// Sets the MTU in bytes.
    ///
    /// # Errors
    /// No such device, missing CAP_NET_ADMIN, a value the device does not take.
    pub async fn set_mtu(&self, name: &str, mtu: u32) -> Result<(), HostError> {
        let mut message = named(name);
        message.attributes.push(LinkAttribute::Mtu(mtu));
        self.set(name, message, &format!("set link {name} mtu {mtu}")).await
    }

    /// Stops the device from resolving neighbours (`IFF_NOARP`).
    ///
    /// # Errors
    /// No such device, missing CAP_NET_ADMIN.
    pub async fn set_no_arp(&self, name: &str) -> Result<(), HostError> {
        let mut message = named(name);
        message.header.flags = LinkFlags::Noarp;
        message.header.change_mask = LinkFlags::Noarp;
        self.set(name, message, &format!("set link {name} arp off")).await
    }

    async fn set(&self, name: &str, message: LinkMessage, doing: &str) -> Result<(), HostError> {
        check_name(name).map_err(|reason| HostError::new(doing, reason))?;
        self.execute(RouteNetlinkMessage::SetLink(message), 0).await.map_err(|failure| {
            let cause = failure.is(libc::ENODEV).then(|| format!("there is no network device {name}"));
            failure.because(doing, cause)
        })
    }

    /// Deletes the device, whatever it is; that it is gone already is a success.
    ///
    /// # Errors
    /// Missing CAP_NET_ADMIN, a device that can't be deleted (hardware).
    pub async fn delete_link(&self, name: &str) -> Result<(), HostError> {
        let doing = || format!("delete link {name}");
        check_name(name).map_err(|reason| HostError::new(doing(), reason))?;
        match self.execute(RouteNetlinkMessage::DelLink(named(name)), 0).await {
            Err(failure) if failure.is(libc::ENODEV) => Ok(()),
            result => result.map_err(|failure| failure.while_doing(doing())),
        }
    }
}

fn named(name: &str) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    message
}

/// The kernel cuts nothing: a longer name is refused, without saying why.
fn check_name(name: &str) -> Result<(), String> {
    let bad = name.is_empty()
        || name.len() >= libc::IFNAMSIZ
        || name.contains(|c: char| c == '/' || c == '\0' || c.is_whitespace())
        || name == "."
        || name == "..";
    if bad {
        Err(format!("{name:?} can't be a device's name: 1 to 15 bytes without space or slash"))
    } else {
        Ok(())
    }
}

fn link_info(message: LinkMessage) -> LinkInfo {
    let mut info = LinkInfo {
        name: String::new(),
        index: message.header.index,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        carrier: message.header.flags.contains(LinkFlags::LowerUp),
        kind: None,
        tun: None,
        xdp: None,
    };
    let mut tun = TunInfo { persistent: true, multi_queue: true, vnet_header: true };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => info.name = name,
            LinkAttribute::Mtu(mtu) => info.mtu = mtu,
            LinkAttribute::Xdp(details) => {
                info.xdp = details.iter().find_map(|detail| match detail {
                    LinkXdp::ProgId(id) => Some(*id),
                    _ => None,
                });
            }
            LinkAttribute::LinkInfo(details) => {
                for detail in details {
                    match detail {
                        LinkInfoAttribute::Kind(kind) => info.kind = Some(kind.to_string()),
                        LinkInfoAttribute::Data(InfoData::Tun(attributes)) => {
                            for attribute in &attributes {
                                read_tun(attribute, &mut tun);
                            }
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    // A TAP has Ethernet's type, a TUN none.
    if info.kind.as_deref() == Some("tun") && message.header.link_layer_type == LinkLayerType::None {
        info.tun = Some(tun);
    }
    info
}

fn read_tun(attribute: &(impl Nla + ?Sized), tun: &mut TunInfo) {
    // linux/if_link.h, IFLA_TUN_*
    const VNET_HDR: u16 = 5;
    const PERSIST: u16 = 6;
    const MULTI_QUEUE: u16 = 7;
    if attribute.value_len() != 1 {
        return;
    }
    let mut value = [0_u8];
    attribute.emit_value(&mut value);
    let set = value != [0];
    match attribute.kind() {
        VNET_HDR => tun.vnet_header = set,
        PERSIST => tun.persistent = set,
        MULTI_QUEUE => tun.multi_queue = set,
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_kernel_would_refuse_are_refused_with_the_reason() {
        for name in ["", "sixteen-bytes-xx", "a b", "a/b", ".", "..", "a\0b"] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
        for name in ["flannel0", "fifteen-bytes-x", "eth0.100", "ens3@x"] {
            assert!(check_name(name).is_ok(), "{name:?}");
        }
    }
}
