//! Is everything where it was put? What to look at, and what is news.

use std::time::Instant;

use flannel_common::counter::Counter;
use flannel_common::tunnel::XDP_PROBE;

use super::path::{KernelPath, is_tuned};
use crate::domain::host_state::Tunnel;
use crate::host::netlink::Netlink;
use crate::host::udp::ethtool::Ethtool;
use crate::host::udp::gro_pair;
use crate::host::udp::place::Ahead;
use crate::host::udp::programs::{BRIDGE, ENCAP, GRO, INGRESS, XDP_FRAGS};
use crate::host::udp::proof::{Proof, Seen};
use crate::host::udp::shortcut;

impl KernelPath {
    /// Is the shortcut taken where it may be, and only there?
    ///
    /// # Errors
    /// What has changed.
    pub(in crate::host::udp) async fn check_shortcut(
        &self,
        netlink: &Netlink,
        tunnel: &Tunnel,
    ) -> Result<(), String> {
        if !self.wants_shortcut {
            return Ok(());
        }
        match (shortcut::find(netlink, tunnel.own_subnet).await, &self.shortcut) {
            (Ok(bridge), Some(shortcut)) if bridge == shortcut.bridge => Ok(()),
            (Ok(bridge), None) if self.bridge_refused.as_ref() == Some(&bridge) => Ok(()),
            (Ok(bridge), _) => Err(format!("{} may be passed by now", bridge.name)),
            (Err(why), Some(shortcut)) => {
                Err(format!("{} may not be passed by: {why}", shortcut.bridge.name))
            }
            (Err(_), None) => Ok(()),
        }
    }

    pub(in crate::host::udp) fn xdp_reason(&self) -> String {
        let Some(xdp) = &self.xdp else { return String::new() };
        let build = if xdp.program == XDP_FRAGS { " (build for frames over one page)" } else { "" };
        let proof = match xdp.proof {
            Proof::Proven => "marks proven",
            Proof::Awaited { .. } => "marks to be proven by traffic",
            Proof::Disproved => "marks do not arrive",
        };
        format!("native XDP attached{build}, {proof}")
    }

    pub(super) fn seen(&self) -> Seen {
        let packets = |counter| self.maps.open().count(counter).packets;
        Seen {
            sent: packets(Counter::DecapXdp).wrapping_add(packets(Counter::MarkSent)),
            marked: packets(Counter::MarkSeen),
        }
    }

    /// Is everything where it was put? Also carries the proof of XDP forward and speaks up when another program moved
    /// in front of ours.
    ///
    /// # Errors
    /// The first thing that is not, in words.
    pub(in crate::host::udp) fn look(&mut self, now: Instant) -> Result<(), String> {
        if let Some(name) = self.maps.unpinned(&self.pins) {
            return Err(format!("the pin of map {name} is gone"));
        }
        let (programs, pins) = (&self.programs, &self.pins);
        for (name, ifindex) in [&self.device, &self.underlay] {
            match nix::net::if_::if_nametoindex(name.as_str()) {
                Ok(index) if index == *ifindex => {}
                Ok(_) => return Err(format!("{name} was made anew")),
                Err(_) => return Err(format!("{name} is gone")),
            }
        }
        programs.check_tc(ENCAP, self.tc, &self.encap_hook(), pins)?;
        programs.check_tc(INGRESS, self.tc, &self.ingress_hook(), pins)?;
        if let Some(pair) = &self.pair {
            programs.check_tc(GRO, self.tc, &Self::gro_hook(pair), pins)?;
        }
        if let Some(xdp) = &self.xdp {
            programs.check_xdp(xdp.program, self.underlay.1, pins)?;
        }
        if let Some(shortcut) = &self.shortcut {
            programs.check_tc(BRIDGE, self.tc, &Self::bridge_hook(&shortcut.bridge), pins)?;
            // No event tells of these.
            if let Err(why) = shortcut::is_unwatched(&shortcut.bridge.name) {
                return Err(format!("{} may not be passed by: {why}", shortcut.bridge.name));
            }
        }
        let ahead = self.ahead();
        self.place.look(ahead, now)?;
        self.look_at_proof(now)
    }

    /// A program that somebody attached in front of ours.
    pub(super) fn ahead(&self) -> Option<Ahead> {
        [(INGRESS, self.ingress_hook()), (ENCAP, self.encap_hook())].into_iter().find_map(|(name, hook)| {
            let front = self.programs.ahead_of(name, self.tc, &hook, &self.pins)?;
            let hook = format!("{} of {}", hook.side.word(), hook.device);
            Some(Ahead { what: front.what, hook, stays: front.stays })
        })
    }

    /// Who is, or was, in front of us.
    pub(in crate::host::udp) fn place(&self) -> Option<String> {
        self.place.report()
    }

    fn look_at_proof(&mut self, now: Instant) -> Result<(), String> {
        let seen = self.seen();
        let probing = self.programs.settings().flags & XDP_PROBE != 0;
        let Some(xdp) = &mut self.xdp else { return Ok(()) };
        let before = xdp.proof;
        xdp.proof = before.look(seen, now);
        match xdp.proof {
            Proof::Proven if probing => Err("XDP's marks are proven, decapsulation moves to it".to_owned()),
            Proof::Proven => {
                if before != Proof::Proven {
                    tracing::info!("udp datapath xdp on {}: marks proven by traffic", self.underlay.0);
                }
                Ok(())
            }
            Proof::Awaited { .. } => Ok(()),
            Proof::Disproved => {
                let (name, ifindex) = &self.underlay;
                if let Err(e) = self.pins.note_xdp_disproved(*ifindex) {
                    tracing::warn!("{e}");
                }
                Err(format!("packets decapsulated by XDP on {name} arrive without its mark"))
            }
        }
    }

    /// Are the devices around the programs as they were made: the GRO pair, the underlay's offloads? And is the reason for
    /// doing without XDP still there?
    ///
    /// # Errors
    /// What is missing or wrong, or can be had by now.
    pub(in crate::host::udp) async fn check_around(&self, netlink: &Netlink, mtu: u32) -> Result<(), String> {
        let underlay = &self.underlay.0;
        if let Some(pair) = &self.pair {
            let link = netlink.link(underlay).await.map_err(|e| e.to_string())?;
            let whole = gro_pair::stays_whole(underlay, link.and_then(|link| link.kind).as_deref());
            if whole != self.whole {
                let word = if whole { "stay whole on" } else { "are split by" };
                return Err(format!("super-packets {word} {underlay} by now"));
            }
            let wanted = gro_pair::Wanted { device: &self.device.0, mtu, whole };
            if gro_pair::find(netlink, &wanted).await? != *pair {
                return Err("the GRO pair was made anew".to_owned());
            }
        }
        let ethtool = Ethtool::open().map_err(|e| e.to_string())?;
        for (feature, wanted) in &self.tuned {
            if !is_tuned(&ethtool, underlay, (*feature, *wanted)) {
                return Err(format!("{} of {underlay} is not {}", feature.name(), wanted.word()));
            }
        }
        if self.xdp_taken
            && netlink.link(underlay).await.is_ok_and(|link| link.is_some_and(|l| l.xdp.is_none()))
        {
            return Err(format!("the other XDP program on {underlay} is gone"));
        }
        Ok(())
    }
}
