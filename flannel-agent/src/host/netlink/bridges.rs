//! Bridges, their ports, and which port a MAC address is behind.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::time::Duration;

use netlink_packet_route::link::{BridgePortState, InfoPortKind};
use netlink_packet_route::link::{
    InfoBridge, InfoBridgePort, InfoData, InfoKind, InfoPortData, LinkAttribute, LinkExtentMask, LinkInfo,
    LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_proto::sys::{AsyncSocket, SocketAddr, TokioSocket};
use tokio::time::Instant;

use super::{Netlink, describe_io, open_socket};
use crate::host::HostError;

/// How long to let a burst of changes go on: pods often come by the dozen.
const DEBOUNCE: Duration = Duration::from_millis(20);

/// A bridge and its ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bridge {
    pub name: String,
    pub index: u32,
    /// Frames are told apart by VLAN.
    pub vlan_filtering: bool,
    pub ports: Vec<BridgePort>,
}

/// An interface that belongs to a bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BridgePort {
    pub name: String,
    pub index: u32,
    /// It takes part in forwarding (IEEE 802.1D).
    pub forwarding: bool,
    /// Nobody may send through it who did not authenticate (`IFLA_BRPORT_LOCKED`).
    pub locked: bool,
}

impl Netlink {
    /// Every bridge of the namespace.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub async fn bridges(&self) -> Result<Vec<Bridge>, HostError> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let links = self
            .dump(RouteNetlinkMessage::GetLink(message))
            .await
            .map_err(|failure| failure.while_doing("list the bridges"))?;
        let mut bridges = BTreeMap::new();
        let mut ports: Vec<(u32, BridgePort)> = Vec::new();
        for link in links {
            let RouteNetlinkMessage::NewLink(link) = link else { continue };
            if let Some(bridge) = bridge(&link) {
                bridges.insert(bridge.index, bridge);
            }
            ports.extend(port(&link));
        }
        for (owner, port) in ports {
            if let Some(bridge) = bridges.get_mut(&owner) {
                bridge.ports.push(port);
            }
        }
        Ok(bridges.into_values().collect())
    }

    /// MAC address → port, as the bridge has learned it or was told. The bridge's own addresses are left out.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub async fn forwarding(&self, bridge: u32) -> Result<BTreeMap<[u8; 6], u32>, HostError> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.attributes.push(NeighbourAttribute::Controller(bridge));
        let entries = self
            .dump(RouteNetlinkMessage::GetNeighbour(message))
            .await
            .map_err(|failure| failure.while_doing("list the bridge's forwarding entries"))?;
        Ok(entries.into_iter().filter_map(|entry| forwarding_entry(&entry, bridge)).collect())
    }
}

fn bridge(link: &LinkMessage) -> Option<Bridge> {
    let mut found =
        Bridge { name: name(link), index: link.header.index, vlan_filtering: false, ports: Vec::new() };
    let infos = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    })?;
    if !infos.contains(&LinkInfo::Kind(InfoKind::Bridge)) {
        return None;
    }
    for info in infos {
        if let LinkInfo::Data(InfoData::Bridge(settings)) = info {
            found.vlan_filtering =
                settings.iter().any(|setting| matches!(setting, InfoBridge::VlanFiltering(true)));
        }
    }
    Some(found)
}

fn port(link: &LinkMessage) -> Option<(u32, BridgePort)> {
    let mut owner = None;
    let mut settings = None;
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::Controller(index) => owner = Some(*index),
            LinkAttribute::LinkInfo(infos) if infos.contains(&LinkInfo::PortKind(InfoPortKind::Bridge)) => {
                settings = infos.iter().find_map(|info| match info {
                    LinkInfo::PortData(InfoPortData::BridgePort(settings)) => Some(settings),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    let settings = settings?;
    let forwarding =
        settings.iter().any(|setting| matches!(setting, InfoBridgePort::State(BridgePortState::Forwarding)));
    let locked = settings.iter().any(|setting| matches!(setting, InfoBridgePort::Locked(true)));
    Some((owner?, BridgePort { name: name(link), index: link.header.index, forwarding, locked }))
}

fn name(link: &LinkMessage) -> String {
    let name = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    });
    name.unwrap_or_default()
}

fn forwarding_entry(entry: &RouteNetlinkMessage, bridge: u32) -> Option<([u8; 6], u32)> {
    let RouteNetlinkMessage::NewNeighbour(entry) = entry else { return None };
    // A port's own address.
    if entry.header.family != AddressFamily::Bridge || entry.header.state == NeighbourState::Permanent {
        return None;
    }
    let mut owner = None;
    let mut mac = None;
    for attribute in &entry.attributes {
        match attribute {
            NeighbourAttribute::Controller(index) => owner = Some(*index),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            // Only frames without a tag are looked at.
            NeighbourAttribute::Vlan(_) => return None,
            _ => {}
        }
    }
    (owner == Some(bridge) && entry.header.ifindex != bridge).then_some((mac?, entry.header.ifindex))
}

/// Tells that forwarding entries of some bridge changed. As with [`Events`](super::Events), nothing is learned from a
/// notification but that it came.
pub struct ForwardingEvents {
    socket: TokioSocket,
    buffer: Vec<u8>,
    /// Something changed, and this is when to say so.
    due: Option<Instant>,
}

impl Netlink {
    /// Subscribes in the calling thread's network namespace.
    ///
    /// # Errors
    /// No socket to be had.
    pub fn forwarding_events(&self) -> Result<ForwardingEvents, HostError> {
        let failed = |e: io::Error| HostError::new("subscribe to forwarding entries", describe_io(&e));
        let mut socket = open_socket().map_err(failed)?;
        socket.socket_mut().bind(&SocketAddr::new(0, libc::RTMGRP_NEIGH.cast_unsigned())).map_err(failed)?;
        Ok(ForwardingEvents { socket, buffer: Vec::with_capacity(64 << 10), due: None })
    }
}

impl ForwardingEvents {
    /// Returns once per burst. Cancel-safe.
    pub async fn changed(&mut self) {
        let due = loop {
            if let Some(due) = self.due {
                break due;
            }
            self.buffer.clear();
            let (socket, buffer) = (&self.socket, &mut self.buffer);
            match poll_fn(|cx| socket.poll_recv_from(cx, buffer)).await {
                // struct nlmsghdr, then struct ndmsg, whose first byte is the family.
                Ok(_) if self.buffer.get(16) != Some(&(libc::AF_BRIDGE as u8)) => {}
                Ok(_) => self.due = Some(Instant::now() + DEBOUNCE),
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => self.due = Some(Instant::now()),
                Err(e) => {
                    tracing::debug!(error = %describe_io(&e), "no news of forwarding entries");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        };
        tokio::time::sleep_until(due).await;
        self.due = None;
        loop {
            self.buffer.clear();
            match self.socket.socket_ref().recv(&mut self.buffer, libc::MSG_DONTWAIT) {
                Ok(_) => {}
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(_) => return,
            }
        }
    }
}
