//! The paths to the peers, asked about while there is traffic.
//!
//! Whom to ask, when, and what an answer means is the domain's to say ([`crate::domain::path_mtu`]); asking is the
//! host's. What is learned changes what the backend wants, and the next comparison does the rest.

use super::{Agent, now};
use crate::domain::host_state::HostItem;
use crate::domain::path_mtu::Heard;
use crate::host::Host;
use crate::host::udp::TunnelReport;

/// Peers whose counters are looked at each second, in turn: reading one takes the kernel microseconds.
const WATCHED: usize = 256;

impl<H: Host> Agent<H> {
    /// What a former run has found stands until it is known better.
    pub(super) fn inherit_paths(&mut self) {
        let Some(applied) = &self.applied else { return };
        let devices = self.node.backend.devices();
        for item in applied.iter() {
            if let HostItem::Route(route) = item
                && let (Some(mtu), ipnet::IpNet::V4(subnet)) = (route.mtu, route.destination)
                && devices.iter().any(|device| **device == *route.device)
            {
                self.paths.inherit(subnet, mtu);
            }
        }
    }

    pub(super) fn peers_have_paths(&mut self) {
        let peers = self.peers.iter().filter_map(|peer| Some((peer.subnets.v4?, peer.attrs.public_ip)));
        self.paths.set_peers(peers);
    }

    /// Once a second. Whether a path is another than it was.
    pub(super) async fn ask_about_paths(&mut self) -> bool {
        let watched = self.paths.to_watch(WATCHED);
        if watched.is_empty() {
            return false;
        }
        let sent = self.host.sent(&watched).await;
        for (subnet, packets) in watched.into_iter().zip(sent) {
            self.paths.watched(subnet, packets);
        }
        self.probe().await
    }

    /// Whether a path is another than it was.
    pub(super) async fn hear_of_paths(&mut self, heard: &[Heard]) -> bool {
        let mut any = false;
        for heard in heard {
            if let Some(learned) = self.paths.hear(*heard, now()) {
                tracing::info!("{learned}");
                any = true;
            }
        }
        self.probe().await || any
    }

    async fn probe(&mut self) -> bool {
        let (probes, learned) = self.paths.due(now(), &mut crate::chance::rng());
        for learned in &learned {
            tracing::info!("{learned}");
        }
        if !probes.is_empty()
            && let Err(error) = self.host.probe(&probes).await
        {
            // As good as no answer: it is tried again, ever more seldom.
            tracing::debug!("{error}");
        }
        !learned.is_empty()
    }

    /// The tunnels' reports, with what is known of the paths.
    pub(super) fn tunnels(&self) -> Vec<TunnelReport> {
        let mut tunnels = self.host.reports();
        for peer in tunnels.iter_mut().flat_map(|tunnel| &mut tunnel.peers) {
            if let Some(path) = self.paths.path(peer.subnet) {
                peer.path_mtu = Some(path.mtu);
                peer.path_mtu_reason = Some(path.how.to_string());
            }
        }
        tunnels
    }
}
