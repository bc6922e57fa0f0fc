//! Is a tunnel still as it was put? What of it is truly in place, and what is news.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Instant;

use ipnet::Ipv4Net;

use super::{KernelsPart, Running};
use crate::domain::host_state::{HostItem, TunnelPeer};
use crate::host::netlink::Netlink;
use crate::host::udp::maps::{Towards, from_wire};

impl Running {
    /// The items that are truly in place.
    pub(in crate::host::udp) async fn observe(&mut self, netlink: &Netlink) -> Vec<HostItem> {
        let mut items = Vec::new();
        if self.is_up() && self.kernels_part != KernelsPart::Due && !self.is_due_again(Instant::now()) {
            let mut health = self.look();
            if health.is_ok()
                && let Some(kernel) = &self.kernel
            {
                health = kernel.check_around(netlink, self.tunnel.mtu).await;
            }
            if health.is_ok()
                && let Some(kernel) = &self.kernel
            {
                health = kernel.check_shortcut(netlink, &self.tunnel).await;
            }
            match health {
                Ok(()) => items.push(HostItem::Tunnel(self.tunnel.clone())),
                Err(reason) => {
                    if self.complaint.as_ref() != Some(&reason) {
                        tracing::info!("tunnel on {} needs repair: {reason}", self.tunnel.device);
                    }
                    self.complaint = Some(reason);
                }
            }
        }
        let entries = match &mut self.kernel {
            None => None,
            Some(kernel) => match kernel.maps.open().entries() {
                Ok(entries) => {
                    kernel.maps.accept(&entries);
                    Some(entries)
                }
                Err(e) => {
                    tracing::warn!("{e}");
                    return items;
                }
            },
        };
        let mut hops = BTreeMap::new();
        if entries.is_some() {
            let nodes: Vec<Ipv4Addr> = distinct(self.peers.values().copied());
            hops = nodes.iter().copied().zip(netlink.next_hops(&nodes).await).collect();
        }
        let device: Arc<str> = self.tunnel.device.as_str().into();
        // Somebody else's entry is shown, so that it is taken away.
        for (base, peer) in entries.iter().flatten() {
            let subnet = Ipv4Net::new(*base, self.tunnel.own_subnet.prefix_len());
            if let Ok(subnet) = subnet
                && !self.peers.contains_key(&subnet)
            {
                let (device, node) = (device.clone(), from_wire(peer.node));
                items.push(HostItem::TunnelPeer(TunnelPeer { device, subnet, node }));
            }
        }
        for (subnet, node) in &self.peers {
            let in_place = entries.as_ref().is_none_or(|entries| {
                let wanted = hops.get(node).and_then(|hop| Towards::by(*node, hop).ok());
                entries.get(&subnet.network()).map(|peer| Towards::from(*peer)) == wanted && wanted.is_some()
            });
            if in_place {
                items.push(HostItem::TunnelPeer(TunnelPeer {
                    device: device.clone(),
                    subnet: *subnet,
                    node: *node,
                }));
            }
        }
        items
    }

    fn look(&mut self) -> Result<(), String> {
        match &self.user {
            None => return Err("its user-space path is not running".to_owned()),
            Some(user) => user.path.is_running()?,
        }
        match &mut self.kernel {
            Some(kernel) => kernel.look(Instant::now()),
            None => Ok(()),
        }
    }

    /// Whether there is something new for the agent to look at: a part stopped working, or entries were taken over.
    pub(in crate::host::udp) fn has_news(&mut self) -> bool {
        if self.kernels_part == KernelsPart::ToCome {
            self.kernels_part = KernelsPart::Due;
            return true;
        }
        let complaint = self.look().err();
        let news = complaint.is_some() && complaint != self.complaint;
        if let Some(reason) = complaint.as_ref().filter(|_| news) {
            tracing::info!("tunnel on {} needs repair: {reason}", self.tunnel.device);
        }
        self.complaint = complaint;
        let touched = self.kernel.as_ref().is_some_and(|kernel| kernel.maps.is_touched());
        if touched {
            tracing::info!("somebody else changed entries of the peers' map of {}", self.tunnel.device);
        }
        news | touched | self.is_due_again(Instant::now()) | std::mem::take(&mut self.adopted)
    }
}

fn distinct(nodes: impl Iterator<Item = Ipv4Addr>) -> Vec<Ipv4Addr> {
    nodes.collect::<std::collections::BTreeSet<_>>().into_iter().collect()
}
