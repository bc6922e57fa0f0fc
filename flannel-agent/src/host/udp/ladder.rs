//! Which tier carries the packets, and why that one.
//!
//! The first that works is taken, top down; `--udp-datapath` cuts the ladder off at either end:
//!
//! | tier | sends | receives |
//! |---|---|---|
//! | `xdp` | tc egress of the tunnel device | native XDP, before GRO; tc ingress delivers |
//! | `tc+bridge` | the same | tc ingress; super-packets pass the pods' bridge by ([`super::shortcut`]) |
//! | `tc+gro` | the same | tc ingress, TCP merged by the GRO pair |
//! | `tc` | the same | tc ingress |
//! | `tun` | user space | user space |
//!
//! `auto` leaves XDP out on a veth: nodes joined by veth send each other packets of 64 KiB, which XDP makes the sender split
//! and which tc takes whole. `ebpf` prefers XDP everywhere.
//!
//! Climbing is repeatable: what is in place stays untouched, what an earlier agent pinned is taken over, and only what
//! is missing or has other settings is attached or replaced. XDP and tc can change places under traffic, because tc
//! ingress takes both marked and unmarked packets; so the tc part is there first and goes last.

use std::path::Path;
use std::time::{Duration, Instant};

use aya::util::KernelVersion;
use flannel_common::counter::Counter;
use flannel_common::tunnel::{
    COARSE_CLOCK, FIXED_SOURCE_PORT, SOURCE_CHECK_ENFORCE, SOURCE_CHECK_OBSERVE, Settings, XDP_PROBE,
};
use serde::{Deserialize, Serialize};

use super::errno::Refusal;
use super::ethtool::{Ethtool, Feature, Switch};
use super::filters;
use super::gro_pair::{self, GroPair};
use super::maps::{self, Maps, to_wire};
use super::place::{Ahead, Place};
use super::programs::{
    self, BRIDGE, ENCAP, GRO, Hook, INGRESS, LinkPin, Order, PinFolder, Programs, Side, TcKind, XDP_FRAGS,
    inspect,
};
use super::proof::{Adoption, Proof, Seen};
use super::shortcut::{self, PodBridge, Shortcut};
use super::underlay;
use crate::domain::host_state::{Datapath, SourceCheck, SourcePort, Tunnel};
use crate::host::HostError;
use crate::host::netlink::{LinkInfo, Netlink};

/// Who carries packets. The order is the ladder's, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Tier {
    #[serde(rename = "xdp")]
    Xdp,
    #[serde(rename = "tc+bridge")]
    TcBridge,
    #[serde(rename = "tc+gro")]
    TcGro,
    #[serde(rename = "tc")]
    Tc,
    #[serde(rename = "tun")]
    Tun,
}

impl Tier {
    /// As `status` and the log say it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Xdp => "xdp",
            Self::TcBridge => "tc+bridge",
            Self::TcGro => "tc+gro",
            Self::Tc => "tc",
            Self::Tun => "tun",
        }
    }
}

/// A tier and the reason why it was taken and none above it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rung {
    pub(super) tier: Tier,
    pub(super) reason: String,
}

/// What the ladder stands on.
pub(super) struct Ground<'a> {
    pub(super) netlink: &'a Netlink,
    pub(super) bpffs: &'a Path,
    pub(super) tunnel: &'a Tunnel,
    /// The tunnel device.
    pub(super) device: LinkInfo,
    pub(super) underlay: LinkInfo,
}

/// The kernel's part of a running tunnel. Dropping it detaches nothing.
pub(super) struct KernelPath {
    pub(super) pins: PinFolder,
    pub(super) maps: Maps,
    programs: Programs,
    device: (String, u32),
    underlay: (String, u32),
    tc: TcKind,
    xdp: Option<XdpPart>,
    pair: Option<GroPair>,
    place: Place,
    /// Somebody else's XDP program is why this is not the XDP tier.
    xdp_taken: bool,
    /// Offloads of the underlay that were brought to what is wanted.
    tuned: Vec<(Feature, Switch)>,
    /// The shortcut is to be taken where it can.
    wants_shortcut: bool,
    shortcut: Option<Shortcut>,
    /// An earlier agent may have left its filter on a bridge that only it knew.
    bridges_unswept: bool,
}

struct XdpPart {
    program: &'static str,
    proof: Proof,
}

/// Does the tier that the tunnel's options allow exist here, and is it up? Called again, it repairs.
///
/// # Errors
/// What is missing for a BPF tier. Whatever was running before still is.
pub(super) async fn climb(ground: &Ground<'_>, slot: &mut Option<KernelPath>) -> Result<Rung, HostError> {
    let pins = PinFolder::new(ground.bpffs, &ground.tunnel.device);
    pins.prepare(ground.bpffs)?;
    let rung = climb_with(ground, &pins, slot).await?;
    // Programs of other layout versions are replaced now, and nobody needs their maps.
    pins.retire_other_versions()?;
    Ok(rung)
}

async fn climb_with(
    ground: &Ground<'_>,
    pins: &PinFolder,
    slot: &mut Option<KernelPath>,
) -> Result<Rung, HostError> {
    let Ground { netlink, tunnel, .. } = ground;
    let wish = wish_for_xdp(ground, pins);
    let bridge = match wants_shortcut(ground) {
        true => Some(shortcut::find(netlink, tunnel.own_subnet).await),
        false => None,
    };
    let mut pair = gro_pair::find(netlink, &tunnel.device, tunnel.mtu).await.ok();
    let probing = wish.is_ok() && must_probe(ground, slot.as_ref());
    let leftovers = if slot.is_some() { LEFTOVERS } else { Duration::ZERO };
    let path = load(ground, pins, &Parts { pair: pair.as_ref(), probing }, slot)?;
    patiently(leftovers, || path.attach_tc()).await?;
    path.take_place_back()?;
    path.xdp_taken = false;
    let xdp = match wish {
        Ok(()) => patiently(leftovers, || path.attach_xdp()).await.map_err(|e| {
            path.xdp_taken = is_taken(&e);
            refused(&tunnel.underlay, &e)
        }),
        Err(why) => Err(why),
    };

    match xdp {
        Ok(()) if probing => {
            path.leave_bridge()?;
            let reason = format!("until traffic proves that XDP's marks arrive on {}", tunnel.underlay);
            tune(ground, path, &[(Feature::Gro, Switch::On)]);
            Ok(Rung { tier: Tier::Tc, reason })
        }
        Ok(()) => {
            path.leave_bridge()?;
            if pair.take().is_some() {
                load(ground, pins, &Parts { pair: None, probing }, slot)?.attach_all()?;
                pins.remove_link(LinkPin::Gro)?;
                pins.remove_link(LinkPin::Pass)?;
                gro_pair::remove(netlink, &tunnel.device).await?;
            }
            let path = slot.as_mut().ok_or_else(|| lost(tunnel))?;
            tune(ground, path, &[(Feature::Gro, Switch::On)]);
            Ok(Rung { tier: Tier::Xdp, reason: path.xdp_reason() })
        }
        Err(why) if tunnel.options.datapath == Datapath::Xdp => {
            Err(HostError::new(format!("bring up udp datapath xdp on {}", tunnel.underlay), why))
        }
        Err(why) => {
            let why = match bridge {
                None => why,
                Some(Ok(bridge)) => {
                    let path = load(ground, pins, &Parts { pair: None, probing: false }, slot)?;
                    match path.pass_by(netlink, bridge).await {
                        Ok(reason) => {
                            gro_pair::remove(netlink, &tunnel.device).await?;
                            tune(ground, path, &[]);
                            return Ok(Rung { tier: Tier::TcBridge, reason: format!("{why}; {reason}") });
                        }
                        Err(e) => format!("{why}; no shortcut past the bridge: {e}"),
                    }
                }
                Some(Err(e)) => format!("{why}; no shortcut past a bridge: {e}"),
            };
            let pair = match gro_pair::ensure(netlink, &tunnel.device, tunnel.mtu).await {
                Ok(pair) => Ok(pair),
                Err(e) => Err(format!("{why}; without GRO pair: {e}")),
            };
            let path = load(ground, pins, &Parts { pair: pair.as_ref().ok(), probing: false }, slot)?;
            path.attach_tc()?;
            path.leave_xdp()?;
            path.leave_bridge()?;
            tune(ground, path, &[]);
            Ok(match pair {
                Ok(_) => Rung { tier: Tier::TcGro, reason: why },
                Err(why) => Rung { tier: Tier::Tc, reason: why },
            })
        }
    }
}

/// How long a link whose pin somebody removed may still hold its place (an RCU grace period, and some).
const LEFTOVERS: Duration = Duration::from_millis(300);

/// Tries again while the place is taken, but not longer than `limit`.
async fn patiently(limit: Duration, mut attach: impl FnMut() -> Result<(), Refusal>) -> Result<(), Refusal> {
    let start = Instant::now();
    loop {
        match attach() {
            Err(e) if is_taken(&e) && start.elapsed() < limit => tokio::time::sleep(limit / 10).await,
            result => return result,
        }
    }
}

fn is_taken(refusal: &Refusal) -> bool {
    matches!(refusal.errno, Some(libc::EBUSY | libc::EEXIST))
}

/// Why native XDP is not used, in words.
fn refused(underlay: &str, refusal: &Refusal) -> String {
    if is_taken(refusal) {
        format!("another XDP program is on {underlay}: {}", refusal.reason())
    } else {
        let driver = Ethtool::open().and_then(|ethtool| ethtool.driver(underlay));
        let driver = driver.map_or_else(|_| String::new(), |driver| format!(" (driver {driver})"));
        format!("{underlay}{driver} refused native XDP: {}", refusal.reason())
    }
}

/// Whether XDP is to be tried, else why not.
fn wish_for_xdp(ground: &Ground<'_>, pins: &PinFolder) -> Result<(), String> {
    let Tunnel { underlay, options, .. } = ground.tunnel;
    if options.datapath == Datapath::Tc {
        return Err("chosen by --udp-datapath=tc".to_owned());
    }
    if wants_shortcut(ground) {
        return Err(format!("{underlay} is a veth, over which packets stay whole in tc"));
    }
    underlay::may_have_native_xdp(underlay, ground.underlay.kind.as_deref())?;
    if pins.is_xdp_disproved(ground.underlay.index) {
        return Err(format!(
            "packets that XDP decapsulated on {underlay} arrived without its mark; the driver drops metadata"
        ));
    }
    Ok(())
}

/// Whether super-packets may come over the underlay whole, and nobody has chosen a tier.
fn wants_shortcut(ground: &Ground<'_>) -> bool {
    ground.tunnel.options.datapath == Datapath::Auto && ground.underlay.kind.as_deref() == Some("veth")
}

/// veth before 6.1 may lose the mark of frames redirected by XDP: there it is proven before anything depends on it.
fn must_probe(ground: &Ground<'_>, path: Option<&KernelPath>) -> bool {
    let proven = path.and_then(|path| path.xdp.as_ref()).is_some_and(|xdp| xdp.proof == Proof::Proven);
    ground.underlay.kind.as_deref() == Some("veth") && is_kernel_before(6, 1) && !proven
}

/// False also when the kernel does not say: then it is newer than this check.
fn is_kernel_before(major: u8, minor: u8) -> bool {
    KernelVersion::current().is_ok_and(|version| version < KernelVersion::new(major, minor, 0))
}

fn lost(tunnel: &Tunnel) -> HostError {
    HostError::new(format!("bring up the tunnel on {}", tunnel.device), "its programs are not loaded")
}

/// What the settings depend on beside the tunnel itself.
struct Parts<'a> {
    pair: Option<&'a GroPair>,
    probing: bool,
}

/// The path with programs of these settings; nothing is attached yet.
fn load<'s>(
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
                place: Place::default(),
                xdp_taken: false,
                tuned: Vec::new(),
                wants_shortcut: wants_shortcut(ground),
                shortcut: None,
                bridges_unswept: true,
            });
        }
    }
    slot.as_mut().ok_or_else(|| lost(ground.tunnel))
}

fn settings(ground: &Ground<'_>, parts: &Parts<'_>) -> Settings {
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
    Settings {
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
    }
}

/// The offloads a veth underlay needs; a network card is left as it is. A failure costs speed, not the tunnel.
fn tune(ground: &Ground<'_>, path: &mut KernelPath, wanted: &[(Feature, Switch)]) {
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

fn is_tuned(ethtool: &Ethtool, device: &str, (feature, wanted): (Feature, Switch)) -> bool {
    ethtool.is_on(device, feature).is_ok_and(|is_on| is_on == (wanted == Switch::On))
}

impl KernelPath {
    fn ingress_hook(&self) -> Hook<'_> {
        let (device, ifindex) = (self.underlay.0.as_str(), self.underlay.1);
        Hook { device, ifindex, side: Side::Ingress, order: Order::First, pin: LinkPin::Ingress }
    }

    fn encap_hook(&self) -> Hook<'_> {
        let (device, ifindex) = (self.device.0.as_str(), self.device.1);
        Hook { device, ifindex, side: Side::Egress, order: Order::First, pin: LinkPin::Encap }
    }

    fn gro_hook(pair: &GroPair) -> Hook<'_> {
        let (device, ifindex) = (pair.receiver.name.as_str(), pair.receiver.ifindex);
        Hook { device, ifindex, side: Side::Ingress, order: Order::First, pin: LinkPin::Gro }
    }

    /// The far end of each redirect before what redirects to it.
    fn attach_tc(&mut self) -> Result<(), Refusal> {
        if let Some(pair) = self.pair.clone() {
            self.programs.attach_tc(GRO, &Self::gro_hook(&pair), &self.pins)?;
            if is_kernel_before(5, 13) {
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
        };
        self.programs.attach_tc(INGRESS, &hook, &self.pins)?;
        let hook = Hook {
            device: &device.0,
            ifindex: device.1,
            side: Side::Egress,
            order: Order::First,
            pin: LinkPin::Encap,
        };
        self.tc = self.programs.attach_tc(ENCAP, &hook, &self.pins)?;
        Ok(())
    }

    fn attach_xdp(&mut self) -> Result<(), Refusal> {
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

    fn leave_xdp(&mut self) -> Result<(), Refusal> {
        self.xdp = None;
        self.pins.remove_link(LinkPin::Xdp)
    }

    fn bridge_hook(bridge: &PodBridge) -> Hook<'_> {
        let (device, ifindex) = (bridge.name.as_str(), bridge.index);
        Hook { device, ifindex, side: Side::Egress, order: Order::Last, pin: LinkPin::Bridge }
    }

    /// Takes the shortcut: the pods' ports are known before the program that looks them up is there, and it is there
    /// before XDP and the GRO pair go. Says so in words.
    async fn pass_by(&mut self, netlink: &Netlink, bridge: PodBridge) -> Result<String, HostError> {
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
    fn leave_bridge(&mut self) -> Result<(), Refusal> {
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
    pub(super) async fn follow_pods(&mut self, netlink: &Netlink) {
        match &mut self.shortcut {
            Some(shortcut) => shortcut.follow(netlink, &mut self.maps).await,
            None => std::future::pending().await,
        }
    }

    /// Is the shortcut taken where it may be, and only there?
    ///
    /// # Errors
    /// What has changed.
    pub(super) async fn check_shortcut(&self, netlink: &Netlink, tunnel: &Tunnel) -> Result<(), String> {
        if !self.wants_shortcut {
            return Ok(());
        }
        match (shortcut::find(netlink, tunnel.own_subnet).await, &self.shortcut) {
            (Ok(bridge), Some(shortcut)) if bridge == shortcut.bridge => Ok(()),
            (Ok(bridge), _) => Err(format!("{} may be passed by now", bridge.name)),
            (Err(why), Some(shortcut)) => {
                Err(format!("{} may not be passed by: {why}", shortcut.bridge.name))
            }
            (Err(_), None) => Ok(()),
        }
    }

    fn attach_all(&mut self) -> Result<(), Refusal> {
        self.attach_tc()?;
        if self.xdp.is_some() {
            self.attach_xdp()?;
        }
        Ok(())
    }

    pub(super) fn xdp_reason(&self) -> String {
        let Some(xdp) = &self.xdp else { return String::new() };
        let build = if xdp.program == XDP_FRAGS { " (build for frames over one page)" } else { "" };
        let proof = match xdp.proof {
            Proof::Proven => "marks proven",
            Proof::Awaited { .. } => "marks to be proven by traffic",
            Proof::Disproved => "marks do not arrive",
        };
        format!("native XDP attached{build}, {proof}")
    }

    fn seen(&self) -> Seen {
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
    pub(super) fn look(&mut self, now: Instant) -> Result<(), String> {
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
    fn ahead(&self) -> Option<Ahead> {
        // A filter's place is its priority, which nobody takes from us.
        if self.tc == TcKind::Clsact {
            return None;
        }
        [(INGRESS, self.ingress_hook()), (ENCAP, self.encap_hook())].into_iter().find_map(|(name, hook)| {
            let program = self.programs.ahead_of(name, &hook, &self.pins)?;
            Some(Ahead { program, hook: format!("{} of {}", hook.side.word(), hook.device) })
        })
    }

    /// Moves in front of whoever moved in front of us, without a gap: new copies of the programs are attached before the
    /// old ones go.
    fn take_place_back(&mut self) -> Result<(), Refusal> {
        let Some(ahead) = self.ahead() else { return Ok(()) };
        let now = Instant::now();
        if !self.place.may_take(now) {
            return Ok(());
        }
        (self.programs, self.maps) = Programs::load(self.programs.settings(), &self.pins)?;
        self.place.taken(now);
        let (underlay, device) = (self.underlay.clone(), self.device.clone());
        for (name, (device, ifindex), side, pin) in [
            (INGRESS, &underlay, Side::Ingress, LinkPin::Ingress),
            (ENCAP, &device, Side::Egress, LinkPin::Encap),
        ] {
            let hook = Hook { device, ifindex: *ifindex, side, order: Order::First, pin };
            self.programs.attach_in_front(name, &hook, &self.pins)?;
        }
        tracing::info!("{ahead}: ours is in front again");
        self.attach_tc()
    }

    /// Whether an interface index is the tunnel device's.
    pub(super) fn is_device(&self, ifindex: u32) -> bool {
        self.device.1 == ifindex
    }

    /// Who is, or was, in front of us.
    pub(super) fn place(&self) -> Option<String> {
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
    pub(super) async fn check_around(&self, netlink: &Netlink, mtu: u32) -> Result<(), String> {
        match &self.pair {
            Some(pair) if gro_pair::find(netlink, &self.device.0, mtu).await? != *pair => {
                return Err("the GRO pair was made anew".to_owned());
            }
            _ => {}
        }
        let underlay = &self.underlay.0;
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

/// Takes the kernel's part of the tunnel away, whoever put it there: links, then maps, then the pair. That nothing is
/// there is a success.
///
/// # Errors
/// What could not be removed; the rest was.
pub(super) async fn tear_down(netlink: &Netlink, bpffs: &Path, tunnel: &Tunnel) -> Result<(), HostError> {
    let pins = PinFolder::new(bpffs, &tunnel.device);
    let mut result: Result<(), HostError> = Ok(());
    for bridge in netlink.bridges().await? {
        let left = filters::leave(BRIDGE, &bridge.name, Side::Egress, LinkPin::Bridge);
        result = result.and(left.map_err(HostError::from));
    }
    let hooks = [
        (ENCAP, &tunnel.device, Side::Egress, LinkPin::Encap),
        (INGRESS, &tunnel.underlay, Side::Ingress, LinkPin::Ingress),
    ];
    for (name, device, side, pin) in hooks {
        result = result.and(filters::leave(name, device, side, pin).map_err(HostError::from));
    }
    result.and(clear(netlink, &pins, &tunnel.device).await)
}

/// The part of [`tear_down`] that the pins and names tell: offloads of the underlay back, links, maps, the pair.
///
/// # Errors
/// What could not be removed; the rest was.
pub(super) async fn clear(netlink: &Netlink, pins: &PinFolder, device: &str) -> Result<(), HostError> {
    underlay::restore(pins);
    let result = pins.remove_all().map_err(HostError::from);
    result.and(gro_pair::remove(netlink, device).await)
}
