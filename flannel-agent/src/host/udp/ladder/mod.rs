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

mod leave;
mod looks;
mod path;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

use aya::util::KernelVersion;
use ipnet::Ipv4Net;

use self::path::{Parts, load, tune};
use crate::domain::host_state::{Datapath, Tunnel};
use crate::host::HostError;
use crate::host::netlink::{LinkInfo, Netlink};
use crate::host::udp::errno::Refusal;
use crate::host::udp::ethtool::{Ethtool, Feature, Switch};
use crate::host::udp::gro_pair;
use crate::host::udp::programs::{LinkPin, PinFolder};
use crate::host::udp::proof::Proof;
use crate::host::udp::shortcut;
use crate::host::udp::underlay;
use serde::{Deserialize, Serialize};

pub(in crate::host::udp) use self::leave::{clear, tear_down};
pub(in crate::host::udp) use self::path::KernelPath;

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
pub(in crate::host::udp) struct Rung {
    pub(in crate::host::udp) tier: Tier,
    pub(in crate::host::udp) reason: String,
}

/// What the ladder stands on.
pub(in crate::host::udp) struct Ground<'a> {
    pub(in crate::host::udp) netlink: &'a Netlink,
    pub(in crate::host::udp) bpffs: &'a Path,
    pub(in crate::host::udp) tunnel: &'a Tunnel,
    /// The tunnel device.
    pub(in crate::host::udp) device: LinkInfo,
    pub(in crate::host::udp) underlay: LinkInfo,
    /// Those that user space sends to already.
    pub(in crate::host::udp) peers: &'a BTreeMap<Ipv4Net, Ipv4Addr>,
}

/// Does the tier that the tunnel's options allow exist here, and is it up? Called again, it repairs.
///
/// # Errors
/// What is missing for a BPF tier. Whatever was running before still is.
pub(in crate::host::udp) async fn climb(
    ground: &Ground<'_>,
    slot: &mut Option<KernelPath>,
) -> Result<Rung, HostError> {
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
    let may_end_on_tc_gro =
        wish.is_err() && tunnel.options.datapath != Datapath::Xdp && !matches!(bridge, Some(Ok(_)));
    // Programs know the pair's index: made now, it spares loading and attaching them a second time.
    let whole = gro_pair::stays_whole(&tunnel.underlay, ground.underlay.kind.as_deref());
    let wanted = gro_pair::Wanted { device: &tunnel.device, mtu: tunnel.mtu, whole };
    let mut pair = match may_end_on_tc_gro {
        true => gro_pair::ensure(netlink, &wanted).await.ok(),
        false => gro_pair::find(netlink, &wanted).await.ok(),
    };
    let probing = wish.is_ok() && must_probe(ground, slot.as_ref());
    let leftovers = if slot.is_some() { LEFTOVERS } else { Duration::ZERO };
    let fresh = slot.is_none();
    let path = load(ground, pins, &Parts { pair: pair.as_ref(), whole, probing }, slot)?;
    if fresh {
        path.put_peers(netlink, ground.peers).await;
    }
    patiently(leftovers, || path.attach_tc()).await?;
    path.take_place_back()?;
    path.xdp_taken = false;
    let xdp = match wish {
        Ok(()) => match patiently(leftovers, || path.attach_xdp()).await {
            Ok(()) => Ok(()),
            Err(e) => {
                path.xdp_taken = is_taken(&e) && has_xdp(netlink, &tunnel.underlay).await;
                Err(refused(&tunnel.underlay, &e, path.xdp_taken))
            }
        },
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
                load(ground, pins, &Parts { pair: None, whole, probing }, slot)?.attach_all()?;
            }
            // One that was out of shape was not found above.
            pins.remove_link(LinkPin::Gro)?;
            pins.remove_link(LinkPin::Pass)?;
            gro_pair::remove(netlink, &tunnel.device).await?;
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
                    let path = load(ground, pins, &Parts { pair: None, whole, probing: false }, slot)?;
                    let passed = path.pass_by(netlink, bridge.clone()).await;
                    path.bridge_refused = passed.is_err().then_some(bridge);
                    match passed {
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
            let pair = match gro_pair::ensure(netlink, &wanted).await {
                Ok(pair) => Ok(pair),
                Err(e) => Err(format!("{why}; without GRO pair: {e}")),
            };
            let path = load(ground, pins, &Parts { pair: pair.as_ref().ok(), whole, probing: false }, slot)?;
            path.attach_tc()?;
            path.leave_xdp()?;
            path.leave_bridge()?;
            path.open_door()?;
            if let Ok(pair) = &pair {
                gro_pair::remove_all_but(netlink, &tunnel.device, pair).await?;
            }
            tune(ground, path, &[]);
            Ok(match pair {
                Ok(pair) if pair.dressed => {
                    Rung { tier: Tier::TcGro, reason: format!("{why}; super-packets stay whole") }
                }
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

/// A refusal says "taken" of other things too: of a macvlan on the interface that has a program, for one
/// (`dev_xdp_attach`, net/core/dev.c). Nobody would see that program go.
async fn has_xdp(netlink: &Netlink, device: &str) -> bool {
    netlink.link(device).await.is_ok_and(|link| link.is_some_and(|link| link.xdp.is_some()))
}

/// Why native XDP is not used, in words.
fn refused(underlay: &str, refusal: &Refusal, taken: bool) -> String {
    if taken {
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
