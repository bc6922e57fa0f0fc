//! Loads the programs with their settings and hangs them on the interfaces, so that they stay there without us.
//!
//! Settings are read-only to the programs (the verifier folds them into the code), so another setting is another
//! [`Programs`]. It takes the place of the old one through the pinned links (`bpf_link_update`), one program at a time
//! and without losing a packet; the maps stay the same. The same step takes over what an earlier agent pinned.
//!
//! A pinned link whose interface is gone answers ENOLINK; it is dropped and the program attached afresh. Nothing here
//! ever detaches a program that is where it should be. Everything resolves in the calling thread's network namespace.

mod clsact;
pub mod inspect;
mod links;
mod load;
mod pins;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::path::PathBuf;

use aya::programs::links::{FdLink, LinkOrder};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::xdp::XdpLink;
use aya::programs::{SchedClassifier, TcAttachType, Xdp, XdpMode};
use flannel_common::tunnel::Settings;

use super::errno::Refusal;
use super::maps::{self, Maps};
use super::object;
pub use clsact::{ALONE, handle_of};
use inspect::LinkKind;
use links::{Adopted, adopt, check_link, is_severed, pin_link};
pub use load::LoadedMaps;
use load::{Accepted, Loadable};
pub use pins::{LinkPin, PinFolder, ensure_bpffs};

// linux/bpf.h, enum bpf_attach_type
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;

/// tc egress of the tunnel device.
pub const ENCAP: &str = "flannel_encap";
/// tc ingress of the underlay.
pub const INGRESS: &str = "flannel_ingress";
/// tc egress of the pods' bridge.
pub const BRIDGE: &str = "flannel_bridge";
/// tc ingress of the GRO pair's receiving end.
pub const GRO: &str = "flannel_gro";
/// XDP of the underlay.
pub const XDP: &str = "flannel_decap_xdp";
/// The same for frames that don't fit one page.
pub const XDP_FRAGS: &str = "flannel_decap_xdp_frags";
/// XDP that does nothing, for the GRO pair's receiving end on kernels before 5.13.
pub const PASS: &str = "flannel_pass";

/// Direction of a tc hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Ingress,
    Egress,
}

impl Side {
    /// As `tc` says it.
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }

    const fn tc(self) -> TcAttachType {
        match self {
            Self::Ingress => TcAttachType::Ingress,
            Self::Egress => TcAttachType::Egress,
        }
    }

    const fn tcx(self) -> u32 {
        match self {
            Self::Ingress => BPF_TCX_INGRESS,
            Self::Egress => BPF_TCX_EGRESS,
        }
    }
}

/// A tc hook of an interface, and the pin of our link to it.
#[derive(Clone, Copy, Debug)]
pub struct Hook<'a> {
    pub device: &'a str,
    pub ifindex: u32,
    pub side: Side,
    pub order: Order,
    pub pin: LinkPin,
    /// Of the tunnel's filter on clsact: [`handle_of`] where tunnels meet, else [`ALONE`].
    pub handle: u32,
}

/// Where in the line of programs at a tcx hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    First,
    Last,
}

impl Order {
    fn tcx(self) -> LinkOrder {
        match self {
            Self::First => LinkOrder::first(),
            Self::Last => LinkOrder::last(),
        }
    }
}

/// How classifiers are attached on this kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcKind {
    /// A pinned link (6.6).
    Tcx,
    /// A filter on the clsact qdisc.
    Clsact,
}

/// Who runs before ours at a hook.
pub struct Front {
    pub what: String,
    /// Nothing can be put before it.
    pub stays: bool,
}

/// Loaded programs with one set of settings.
pub struct Programs {
    loadable: Loadable,
    accepted: BTreeMap<&'static str, Accepted>,
    settings: Settings,
    pins: PinFolder,
}

impl Programs {
    /// Loads the object over the pinned maps, or new ones where there are none of the right shape, and has the
    /// verifier look at the tc programs. Attaches nothing.
    ///
    /// # Errors
    /// Built without the object; no BPF in this kernel; a capability is missing; the verifier refuses a program.
    pub fn load(settings: Settings, pins: &PinFolder) -> Result<(Self, Maps), Refusal> {
        if !object::is_built() {
            return Err(Refusal::new("load the eBPF object", object::NOT_BUILT));
        }
        lift_memory_lock_limit();
        maps::discard_strangers(pins, &settings)?;
        let (loadable, loaded) = Loadable::open(&settings, pins)?;
        let maps = Maps::take(loaded, &settings)?;
        let mut programs = Self { loadable, accepted: BTreeMap::new(), settings, pins: pins.clone() };
        programs.classifier(ENCAP)?;
        programs.classifier(INGRESS)?;
        Ok((programs, maps))
    }

    #[must_use]
    pub fn settings(&self) -> Settings {
        self.settings
    }

    /// Hangs a tc program on its hook: in its order, or in place of the version that is there.
    ///
    /// # Errors
    /// No such interface, missing permission, a foreign filter at our place.
    pub fn attach_tc(
        &mut self,
        name: &'static str,
        hook: &Hook<'_>,
        pins: &PinFolder,
    ) -> Result<TcKind, Refusal> {
        let doing = || format!("attach {name} to {} of {}", hook.side.word(), hook.device);
        let pin = pins.link(hook.pin);
        let program = self.classifier(name)?;
        let id = program.info().map_err(|e| Refusal::from_program(doing(), &e))?.id();
        let _turn = pins.turn();
        match adopt(&pin, LinkKind::Tcx(hook.side.tcx()), hook.ifindex, id)
            .map_err(|e| e.into_refusal(doing()))?
        {
            Adopted::InPlace => return Ok(TcKind::Tcx),
            Adopted::Update(link) => {
                let link =
                    SchedClassifierLink::try_from(link).map_err(|e| Refusal::from_link(doing(), &e))?;
                match program.attach_to_link(link) {
                    Ok(id) => {
                        let link = program.take_link(id).map_err(|e| Refusal::from_program(doing(), &e))?;
                        drop(FdLink::try_from(link));
                        return Ok(TcKind::Tcx);
                    }
                    Err(e) if is_severed(&e) => pins.remove_link(hook.pin)?,
                    Err(e) => return Err(Refusal::from_program(doing(), &e)),
                }
            }
            Adopted::Nothing => {}
        }
        let order = TcAttachOptions::TcxOrder(hook.order.tcx());
        match program.attach_with_options(hook.device, hook.side.tc(), order) {
            Ok(id) => {
                let link = program.take_link(id).map_err(|e| Refusal::from_program(doing(), &e))?;
                pin_link(FdLink::try_from(link), &pin, doing)?;
                Ok(TcKind::Tcx)
            }
            Err(e) => {
                let refusal = Refusal::from_program(doing(), &e);
                // What a kernel before 6.6 says to an attach type it does not know.
                if refusal.errno != Some(libc::EINVAL) {
                    return Err(refusal);
                }
                clsact::attach(program, hook, name)?;
                Ok(TcKind::Clsact)
            }
        }
    }

    /// As [`Programs::attach_tc`] on a kernel before 6.6, whatever this kernel is.
    ///
    /// # Errors
    /// As there, and where sch_ingress or cls_bpf are missing.
    pub fn attach_clsact(&mut self, name: &'static str, hook: &Hook<'_>) -> Result<(), Refusal> {
        clsact::attach(self.classifier(name)?, hook, name)
    }

    /// Hangs a tc program on its hook in front of all others, and only then lets go of the one of ours that is there.
    ///
    /// # Errors
    /// As [`Programs::attach_tc`]; and when this very program is attached there already.
    pub fn attach_in_front(
        &mut self,
        name: &'static str,
        kind: TcKind,
        hook: &Hook<'_>,
        pins: &PinFolder,
    ) -> Result<(), Refusal> {
        let doing = || format!("attach {name} first to {} of {}", hook.side.word(), hook.device);
        let program = self.classifier(name)?;
        if kind == TcKind::Clsact {
            return clsact::attach_in_front(program, hook, name);
        }
        let order = TcAttachOptions::TcxOrder(LinkOrder::first());
        let _turn = pins.turn();
        let id = program
            .attach_with_options(hook.device, hook.side.tc(), order)
            .map_err(|e| Refusal::from_program(doing(), &e))?;
        let link = program.take_link(id).map_err(|e| Refusal::from_program(doing(), &e))?;
        let successor = pins.make_way_for_successor(hook.pin)?;
        pin_link(FdLink::try_from(link), &successor, doing)?;
        pins.succeed(hook.pin)
    }

    /// Why the program is not on its hook; `Ok` when it is this very one.
    ///
    /// # Errors
    /// What is there instead.
    pub fn check_tc(
        &self,
        name: &'static str,
        kind: TcKind,
        hook: &Hook<'_>,
        pins: &PinFolder,
    ) -> Result<(), String> {
        let id = self.id(name).ok_or_else(|| format!("{name} is not loaded"))?;
        match kind {
            TcKind::Tcx => check_link(&pins.link(hook.pin), LinkKind::Tcx(hook.side.tcx()), hook.ifindex, id),
            TcKind::Clsact => match clsact::find(hook, name) {
                Ok(Some(filter)) if filter.program.is_none_or(|p| p == id) => Ok(()),
                Ok(Some(_)) => Err(format!("the filter on {} has another program", hook.device)),
                Ok(None) => Err(format!("the filter on {} is gone", hook.device)),
                Err(e) => Err(format!("the filter on {} can't be read: {e}", hook.device)),
            },
        }
        .map_err(|reason| format!("{name}: {reason}"))
    }

    /// The program that runs before ours at a tcx hook, if one does: it may swallow what is the tunnel's. Those of this
    /// host's other tunnels do not, each takes packets of its own port only.
    #[must_use]
    pub fn ahead_of(
        &self,
        name: &'static str,
        kind: TcKind,
        hook: &Hook<'_>,
        pins: &PinFolder,
    ) -> Option<Front> {
        if kind == TcKind::Clsact {
            let filter = clsact::ahead(hook, name)?;
            let what = format!("filter {} of priority {}", filter.name, filter.priority);
            return Some(Front { what, stays: filter.priority == 1 });
        }
        let id = self.id(name)?;
        let programs = || inspect::tcx_programs(hook.ifindex, hook.side.tcx()).ok();
        let pinned = |pin: &PathBuf| Some(inspect::pinned_link(pin).ok()??.program);
        // A sibling hangs on the hook before it is pinned, and takes its turn for that.
        let _turn = pins.turn();
        let ahead: Vec<u32> = programs()?.into_iter().take_while(|other| *other != id).collect();
        if ahead.is_empty() {
            return None;
        }
        let siblings: Vec<u32> = pins.of_other_devices(hook.pin).iter().filter_map(pinned).collect();
        let other = ahead.into_iter().find(|program| !siblings.contains(program))?;
        // One that leaves takes none: what is gone by now was no stranger to reckon with either.
        programs()?.contains(&other).then(|| Front { what: format!("BPF program {other}"), stays: false })
    }

    /// Hangs XDP decapsulation on the interface in native mode, the build with fragments where the plain one does not
    /// fit its MTU. Returns the name of the program taken.
    ///
    /// # Errors
    /// The driver has no native XDP, another program is there, or the frames fit neither build.
    pub fn attach_xdp(
        &mut self,
        device: &str,
        ifindex: u32,
        pins: &PinFolder,
    ) -> Result<&'static str, Refusal> {
        let plain = match self.attach_one_xdp(XDP, LinkPin::Xdp, &(device, ifindex), pins) {
            Ok(()) => return Ok(XDP),
            Err(refusal) => refusal,
        };
        // Drivers say "too large for one page" in several ways.
        let may_be_mtu = [libc::EINVAL, libc::ERANGE, libc::EMSGSIZE, libc::EOPNOTSUPP];
        if !plain.errno.is_some_and(|errno| may_be_mtu.contains(&errno)) {
            return Err(plain);
        }
        match self.attach_one_xdp(XDP_FRAGS, LinkPin::Xdp, &(device, ifindex), pins) {
            Ok(()) => Ok(XDP_FRAGS),
            Err(refusal) => {
                tracing::debug!("{refusal}");
                Err(plain)
            }
        }
    }

    /// Switches NAPI on for a veth by an XDP program that lets everything pass.
    ///
    /// # Errors
    /// As [`Programs::attach_xdp`].
    pub fn attach_pass(&mut self, device: &str, ifindex: u32, pins: &PinFolder) -> Result<(), Refusal> {
        self.attach_one_xdp(PASS, LinkPin::Pass, &(device, ifindex), pins)
    }

    fn attach_one_xdp(
        &mut self,
        name: &'static str,
        pin: LinkPin,
        at: &(&str, u32),
        pins: &PinFolder,
    ) -> Result<(), Refusal> {
        let (device, ifindex) = *at;
        let doing = || format!("attach {name} to {device}");
        let path = pins.link(pin);
        let program = self.xdp(name)?;
        let id = program.info().map_err(|e| Refusal::from_program(doing(), &e))?.id();
        match adopt(&path, LinkKind::Xdp, ifindex, id).map_err(|e| e.into_refusal(doing()))? {
            Adopted::InPlace => return Ok(()),
            Adopted::Update(link) => {
                let link = XdpLink::try_from(link).map_err(|e| Refusal::from_link(doing(), &e))?;
                match program.attach_to_link(link) {
                    Ok(id) => {
                        let link = program.take_link(id).map_err(|e| Refusal::from_program(doing(), &e))?;
                        drop(FdLink::try_from(link));
                        return Ok(());
                    }
                    Err(e) if is_severed(&e) => pins.remove_link(pin)?,
                    Err(e) => return Err(Refusal::from_program(doing(), &e)),
                }
            }
            Adopted::Nothing => {}
        }
        let id = program
            .attach_to_if_index(ifindex, XdpMode::Driver)
            .map_err(|e| Refusal::from_program(doing(), &e))?;
        let link = program.take_link(id).map_err(|e| Refusal::from_program(doing(), &e))?;
        pin_link(FdLink::try_from(link), &path, doing)
    }

    /// Why XDP decapsulation is not on the interface; `Ok` when it is one of these very programs.
    ///
    /// # Errors
    /// What is there instead.
    pub fn check_xdp(&self, name: &'static str, ifindex: u32, pins: &PinFolder) -> Result<(), String> {
        let id = self.id(name).ok_or_else(|| format!("{name} is not loaded"))?;
        check_link(&pins.link(LinkPin::Xdp), LinkKind::Xdp, ifindex, id)
            .map_err(|reason| format!("{name}: {reason}"))
    }

    fn id(&self, name: &str) -> Option<u32> {
        let info = match self.accepted.get(name)? {
            Accepted::Classifier(program) => program.info(),
            Accepted::Xdp(program) => program.info(),
        };
        Some(info.ok()?.id())
    }

    fn classifier(&mut self, name: &'static str) -> Result<&mut SchedClassifier, Refusal> {
        match self.accepted(name)? {
            Accepted::Classifier(program) => Ok(program),
            Accepted::Xdp(_) => Err(Refusal::new(format!("load {name}"), "it is an XDP program")),
        }
    }

    fn xdp(&mut self, name: &'static str) -> Result<&mut Xdp, Refusal> {
        match self.accepted(name)? {
            Accepted::Xdp(program) => Ok(program),
            Accepted::Classifier(_) => Err(Refusal::new(format!("load {name}"), "it is a tc program")),
        }
    }

    /// Loads it when it is needed first.
    fn accepted(&mut self, name: &'static str) -> Result<&mut Accepted, Refusal> {
        Ok(match self.accepted.entry(name) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(self.loadable.load(name, &self.pins)?),
        })
    }
}

const MISSING: &str =
    "the eBPF object has no such program; the agent was built with another version's object";

/// Removes our filter where [`TcKind::Clsact`] was used; links go with their pins.
///
/// # Errors
/// Missing permission.
pub fn detach_clsact(name: &'static str, hook: &Hook<'_>) -> Result<(), Refusal> {
    clsact::detach(hook, name)
}

/// Whether a filter of ours by that name is on the hook. False also where nobody can say: no clsact, no permission.
#[must_use]
pub fn has_clsact(name: &'static str, hook: &Hook<'_>) -> bool {
    matches!(clsact::find(hook, name), Ok(Some(_)))
}

/// Handles of the filters by that name on the hook, of whichever tunnels; none where nobody can say.
#[must_use]
pub fn clsact_handles(name: &'static str, hook: &Hook<'_>) -> Vec<u32> {
    clsact::handles(hook, name).unwrap_or_default()
}

/// Id of the program of our filter by that name on the hook.
#[must_use]
pub fn clsact_program(name: &'static str, hook: &Hook<'_>) -> Option<u32> {
    clsact::find(hook, name).ok().flatten()?.program
}

/// Before 5.11 maps count against RLIMIT_MEMLOCK, 64 KiB by default. Refused where it does not matter.
fn lift_memory_lock_limit() {
    let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the limit is an initialised struct that outlives the call.
    let result = unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const unlimited) };
    if result != 0 {
        tracing::debug!("RLIMIT_MEMLOCK stays as it is: {}", io::Error::last_os_error());
    }
}
