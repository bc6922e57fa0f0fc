//! The kernel's part of a running tunnel: its programs with their settings, where they hang, and the way from one tier to
//! another.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::time::Instant;

use flannel_common::peer::MAX_SUBNETS;
use flannel_common::tunnel::{
    COARSE_CLOCK, DRESSED, FIXED_SOURCE_PORT, SOURCE_CHECK_ENFORCE, SOURCE_CHECK_OBSERVE, SUBNETS_IN_ORDER,
    Settings, XDP_PROBE,
};
use ipnet::Ipv4Net;

use super::{Ground, is_kernel_before, lost, wants_shortcut};
use crate::domain::host_state::{SourceCheck, SourcePort};
use crate::host::HostError;
use crate::host::netlink::{Netlink, NextHop};
use crate::host::udp::errno::Refusal;
use crate::host::udp::ethtool::{Ethtool, Feature, Switch};
use crate::host::udp::filters;
use crate::host::udp::gro_pair::GroPair;
use crate::host::udp::maps::{self, Maps, Towards, from_wire, to_wire};
use crate::host::udp::place::Place;
use crate::host::udp::programs::{
    self, ALONE, BRIDGE, ENCAP, GRO, Hook, INGRESS, LinkPin, Order, PinFolder, Programs, Side, TcKind,
    inspect,
};
use crate::host::udp::proof::{Adoption, Proof};
use crate::host::udp::shortcut::{self, PodBridge, Shortcut};
use crate::host::udp::underlay;

/// The kernel's part of a running tunnel. Dropping it detaches nothing.
pub(in crate::host::udp) struct KernelPath {
    pub(in crate::host::udp) pins: PinFolder,
    pub(in crate::host::udp) maps: Maps,
    pub(super) programs: Programs,
    pub(super) device: (String, u32),
    pub(super) underlay: (String, u32),
    pub(super) tc: TcKind,
    pub(super) xdp: Option<XdpPart>,
    pub(super) pair: Option<GroPair>,
    /// What the pair was chosen by: peers' super-packets stay whole on the underlay.
    pub(super) whole: bool,
    pub(super) place: Place,
    /// Somebody else's XDP program is why this is not the XDP tier.
    pub(super) xdp_taken: bool,
    /// Offloads of the underlay that were brought to what is wanted.
    pub(super) tuned: Vec<(Feature, Switch)>,
    /// The shortcut is to be taken where it can.
    pub(super) wants_shortcut: bool,
    pub(super) shortcut: Option<Shortcut>,
    /// It could be passed by, but the kernel refused; tried again with the next repair.
    pub(super) bridge_refused: Option<PodBridge>,
    /// An earlier agent may have left its filter on a bridge that only it knew.
    pub(super) bridges_unswept: bool,
}

pub(super) struct XdpPart {
    pub(super) program: &'static str,
    pub(super) proof: Proof,
}

/// What the settings depend on beside the tunnel itself.
pub(in crate::host::udp) struct Parts<'a> {
    pub(in crate::host::udp) pair: Option<&'a GroPair>,
    /// What it was chosen by, [`KernelPath::whole`].
    pub(in crate::host::udp) whole: bool,
    pub(in crate::host::udp) probing: bool,
}

/// The path with programs of these settings; nothing is attached yet.
pub(super) fn load<'s>(
    ground: &Ground<'_>,
    pins: &PinFolder,
    parts: &Parts<'_>,
    slot: &'s mut Option<KernelPath>,
) -> Result<&'s mut KernelPath, HostError> {
    let settings = settings(ground, parts);
    let device = (ground.tunnel.device.clone(), ground.device.index);
    let underlay = (ground.tunnel.underlay.clone(), ground.underlay.index);
    let pair = parts.pair.cloned();
    match slot {
        Some(path) => {
            // A map that lost its pin is still ours; loading would make another.
            path.maps.ensure_pinned(pins)?;
            if path.programs.settings() != settings {
                (path.programs, path.maps) = Programs::load(settings, pins)?;
            }
            if path.underlay != underlay {
                path.xdp = None;
            }
            path.device = device;
            path.wants_shortcut = wants_shortcut(ground);
            path.underlay = underlay;
            path.pair = pair;
            path.whole = parts.whole;
        }
        None => {
            let (programs, mut maps) = Programs::load(settings, pins)?;
            for older in pins.of_other_versions(maps::PEERS_PIN) {
                let taken = maps.inherit(&older, underlay.1)?;
                tracing::info!("{taken} peers taken over from {}", older.display());
            }
            let pins = pins.clone();
            let tc = TcKind::Tcx;
            *slot = Some(KernelPath {
                pins,
                maps,
                programs,
                device,
                underlay,
                tc,
                xdp: None,
                pair,
                whole: parts.whole,
                place: Place::default(),
                xdp_taken: false,
                tuned: Vec::new(),
                wants_shortcut: wants_shortcut(ground),
                shortcut: None,
                bridge_refused: None,
                bridges_unswept: true,
            });
        }
    }
    slot.as_mut().ok_or_else(|| lost(ground.tunnel))
}

pub(super) fn settings(ground: &Ground<'_>, parts: &Parts<'_>) -> Settings {
    let tunnel = ground.tunnel;
    let mut flags = match tunnel.options.source_check {
        SourceCheck::Enforce => SOURCE_CHECK_ENFORCE,
        SourceCheck::Observe => SOURCE_CHECK_OBSERVE,
        SourceCheck::Off => 0,
    };
    if tunnel.options.source_port == SourcePort::Fixed {
        flags |= FIXED_SOURCE_PORT;
    }
    if !is_kernel_before(5, 11) {
        flags |= COARSE_CLOCK;
    }
    if parts.probing {
        flags |= XDP_PROBE;
    }
    if parts.pair.is_some_and(|pair| pair.dressed) {
        flags |= DRESSED;
    }
    let settings = Settings {
        local: to_wire(tunnel.local),
        network: to_wire(tunnel.network.network()),
        network_mask: to_wire(tunnel.network.netmask()),
        subnet_mask: to_wire(tunnel.own_subnet.netmask()),
        own_subnet: to_wire(tunnel.own_subnet.network()),
        underlay: ground.underlay.index,
        device: ground.device.index,
        gro_pair: parts.pair.map_or(0, |pair| pair.sender.ifindex),
        port: tunnel.port.to_be(),
        flags,
        host_bits: u32::from(32 - tunnel.own_subnet.prefix_len()),
    };
    match settings.subnets() {
        1..=MAX_SUBNETS => Settings { flags: flags | SUBNETS_IN_ORDER, ..settings },
        _ => settings,
    }
}

/// The offloads a veth underlay needs; a network card is left as it is. A failure costs speed, not the tunnel.
pub(super) fn tune(ground: &Ground<'_>, path: &mut KernelPath, wanted: &[(Feature, Switch)]) {
    let mut all = Vec::new();
    if ground.underlay.kind.as_deref() == Some("veth") {
        all.push((Feature::UdpSegmentation, Switch::Off));
        all.extend_from_slice(wanted);
    }
    if let Err(e) = underlay::tune(&path.pins, &ground.tunnel.underlay, &all) {
        tracing::warn!("{e}; traffic over {} may be slower", ground.tunnel.underlay);
    }
    // What could not be switched is not missed later either.
    let ethtool = Ethtool::open();
    all.retain(|offload| ethtool.as_ref().is_ok_and(|ethtool| is_tuned(ethtool, &path.underlay.0, *offload)));
    path.tuned = all;
}

pub(super) fn is_tuned(ethtool: &Ethtool, device: &str, (feature, wanted): (Feature, Switch)) -> bool {
    ethtool.is_on(device, feature).is_ok_and(|is_on| is_on == (wanted == Switch::On))
}

impl KernelPath {
    /// Writes a peer's entry.
    ///
    /// # Errors
    /// No way to the node, or one that leads through the tunnel itself; a lease of another size than ours.
    pub(in crate::host::udp) fn put_peer(
        &mut self,
        subnet: Ipv4Net,
        node: Ipv4Addr,
        next_hop: &Result<NextHop, HostError>,
    ) -> Result<(), String> {
        let expected = from_wire(self.programs.settings().subnet_mask).to_bits().count_ones();
        if u32::from(subnet.prefix_len()) != expected {
            return Err(format!("the kernel data path needs leases of one size, and ours is a /{expected}"));
        }
        let towards = Towards::by(node, next_hop)?;
        if self.is_device(towards.ifindex) {
            return Err(format!("the way to {node} leads through the tunnel itself"));
        }
        self.maps.put(subnet.network(), towards).map_err(|refusal| refusal.to_string())
    }

    /// Writes the entries of those peers that it can: a program that is attached without them would doubt their packets.
    /// The next look at the host shows the others missing, and why.
    pub(super) async fn put_peers(&mut self, netlink: &Netlink, peers: &BTreeMap<Ipv4Net, Ipv4Addr>) {
        if peers.is_empty() {
            return;
        }
        let nodes: Vec<Ipv4Addr> = peers.values().copied().collect::<BTreeSet<_>>().into_iter().collect();
        let hops: BTreeMap<_, _> = nodes.iter().copied().zip(netlink.next_hops(&nodes).await).collect();
        for (subnet, node) in peers {
            if let Some(hop) = hops.get(node)
                && let Err(reason) = self.put_peer(*subnet, *node, hop)
            {
                tracing::debug!("peer {subnet} at {node} is not in the kernel's map: {reason}");
            }
        }
    }

    pub(super) fn ingress_hook(&self) -> Hook<'_> {
        let (device, ifindex) = (self.underlay.0.as_str(), self.underlay.1);
        let handle = programs::handle_of(&self.device.0);
        Hook { device, ifindex, side: Side::Ingress, order: Order::First, pin: LinkPin::Ingress, handle }
    }

    pub(super) fn encap_hook(&self) -> Hook<'_> {
        let (device, ifindex) = (self.device.0.as_str(), self.device.1);
        Hook { device, ifindex, side: Side::Egress, order: Order::First, pin: LinkPin::Encap, handle: ALONE }
    }

    pub(super) fn gro_hook(pair: &GroPair) -> Hook<'_> {
        let (device, ifindex) = (pair.receiver.name.as_str(), pair.receiver.ifindex);
        Hook { device, ifindex, side: Side::Ingress, order: Order::First, pin: LinkPin::Gro, handle: ALONE }
    }

    /// The far end of each redirect before what redirects to it.
    pub(super) fn attach_tc(&mut self) -> Result<(), Refusal> {
        if let Some(pair) = self.pair.clone() {
            self.programs.attach_tc(GRO, &Self::gro_hook(&pair), &self.pins)?;
            if !pair.dressed && is_kernel_before(5, 13) {
                self.programs.attach_pass(&pair.receiver.name, pair.receiver.ifindex, &self.pins)?;
            }
        }
        let (underlay, device) = (self.underlay.clone(), self.device.clone());
        let hook = Hook {
            device: &underlay.0,
            ifindex: underlay.1,
            side: Side::Ingress,
            order: Order::First,
            pin: LinkPin::Ingress,
            handle: programs::handle_of(&device.0),
        };
        self.programs.attach_tc(INGRESS, &hook, &self.pins)?;
        let hook = Hook {
            device: &device.0,
            ifindex: device.1,
            side: Side::Egress,
            order: Order::First,
            pin: LinkPin::Encap,
            handle: ALONE,
        };
        self.tc = self.programs.attach_tc(ENCAP, &hook, &self.pins)?;
        Ok(())
    }

    /// From now on TCP goes through the room, if there is one.
    pub(super) fn open_door(&mut self) -> Result<(), Refusal> {
        match &self.pair {
            Some(pair) if pair.dressed => self.maps.add_port(pair.sender.ifindex),
            _ => Ok(()),
        }
    }

    pub(super) fn attach_xdp(&mut self) -> Result<(), Refusal> {
        let (device, ifindex) = (self.underlay.0.clone(), self.underlay.1);
        let adoption = match inspect::pinned_link(&self.pins.link(LinkPin::Xdp)) {
            Ok(Some(link)) if link.ifindex == ifindex => Adoption::TakenOver,
            _ => Adoption::Fresh,
        };
        let program = self.programs.attach_xdp(&device, ifindex, &self.pins)?;
        let proof = match self.xdp.take() {
            Some(xdp) if adoption == Adoption::TakenOver => xdp.proof,
            _ => Proof::begin(self.seen(), adoption),
        };
        self.xdp = Some(XdpPart { program, proof });
        Ok(())
    }

    pub(super) fn leave_xdp(&mut self) -> Result<(), Refusal> {
        self.xdp = None;
        self.pins.remove_link(LinkPin::Xdp)
    }

    pub(super) fn bridge_hook(bridge: &PodBridge) -> Hook<'_> {
        let (device, ifindex) = (bridge.name.as_str(), bridge.index);
        Hook { device, ifindex, side: Side::Egress, order: Order::Last, pin: LinkPin::Bridge, handle: ALONE }
    }

    /// Takes the shortcut: the pods' ports are known before the program that looks them up is there, and it is there
    /// before XDP and the GRO pair go. Says so in words.
    pub(super) async fn pass_by(
        &mut self,
        netlink: &Netlink,
        bridge: PodBridge,
    ) -> Result<String, HostError> {
        if self.shortcut.as_ref().is_none_or(|shortcut| shortcut.bridge != bridge) {
            self.leave_bridge()?;
            self.shortcut = Some(Shortcut::new(netlink, bridge.clone())?);
        }
        if let Some(shortcut) = &mut self.shortcut {
            shortcut.refresh(netlink, &mut self.maps).await?;
        }
        let attached = self.programs.attach_tc(BRIDGE, &Self::bridge_hook(&bridge), &self.pins);
        if let Err(e) = attached.map(drop).and_then(|()| self.attach_tc()) {
            self.leave_bridge()?;
            return Err(e.into());
        }
        self.leave_xdp()?;
        self.pins.remove_link(LinkPin::Gro)?;
        self.pins.remove_link(LinkPin::Pass)?;
        Ok(format!("packets pass {} by, to the pods' ports", bridge.name))
    }

    /// The bridge does its work again.
    pub(super) fn leave_bridge(&mut self) -> Result<(), Refusal> {
        self.pins.remove_link(LinkPin::Bridge)?;
        if self.tc == TcKind::Clsact && std::mem::take(&mut self.bridges_unswept) {
            filters::sweep(BRIDGE, Side::Egress, LinkPin::Bridge)?;
        }
        if let Some(shortcut) = self.shortcut.take() {
            if self.tc == TcKind::Clsact {
                programs::detach_clsact(BRIDGE, &Self::bridge_hook(&shortcut.bridge))?;
            }
            tracing::info!("{} is no longer passed by", shortcut.bridge.name);
        }
        shortcut::forget_pods(&mut self.maps)
    }

    /// Follows the pods of the bridge that is passed by, if one is; never returns. Cancel-safe.
    pub(in crate::host::udp) async fn follow_pods(&mut self, netlink: &Netlink) {
        match &mut self.shortcut {
            Some(shortcut) => shortcut.follow(netlink, &mut self.maps).await,
            None => std::future::pending().await,
        }
    }

    pub(super) fn attach_all(&mut self) -> Result<(), Refusal> {
        self.attach_tc()?;
        if self.xdp.is_some() {
            self.attach_xdp()?;
        }
        Ok(())
    }

    /// Moves in front of whoever moved in front of us, without a gap: new copies of the programs are attached before the
    /// old ones go.
    pub(super) fn take_place_back(&mut self) -> Result<(), Refusal> {
        let Some(ahead) = self.ahead() else { return Ok(()) };
        let now = Instant::now();
        if ahead.stays || !self.place.may_take(now) {
            return Ok(());
        }
        (self.programs, self.maps) = Programs::load(self.programs.settings(), &self.pins)?;
        self.place.taken(now);
        let (underlay, device) = (self.underlay.clone(), self.device.clone());
        let handle = programs::handle_of(&device.0);
        for (name, (device, ifindex), side, pin, handle) in [
            (INGRESS, &underlay, Side::Ingress, LinkPin::Ingress, handle),
            (ENCAP, &device, Side::Egress, LinkPin::Encap, ALONE),
        ] {
            let hook = Hook { device, ifindex: *ifindex, side, order: Order::First, pin, handle };
            self.programs.attach_in_front(name, self.tc, &hook, &self.pins)?;
        }
        tracing::info!("{ahead}: ours is in front again");
        self.attach_tc()
    }

    /// Whether an interface index is the tunnel device's.
    pub(in crate::host::udp) fn is_device(&self, ifindex: u32) -> bool {
        self.device.1 == ifindex
    }
}
