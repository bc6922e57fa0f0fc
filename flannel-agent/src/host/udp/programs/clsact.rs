//! The tc hook of kernels before 6.6, which have no tcx links: a classifier on the `clsact` qdisc.
//!
//! Such a filter is not a file that can be pinned. It outlives the agent by itself, and is found again by its name and
//! handle, which is the tunnel's ([`handle_of`]): filters of one priority run one after the other until one has an
//! opinion, so any number of tunnels stand side by side on an underlay. Filters run in the order of their priorities, and one may end the processing of a packet; so ours moves in
//! front of whoever takes a lower number, down to 1. Others' filters are never touched; the qdisc stays when ours go,
//! because nobody can tell who else relies on it.

use std::io;

use aya::programs::links::Link as _;
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, SchedClassifierLinkId, TcAttachOptions, TcAttachType, TcError, TcHandle,
    qdisc_add_clsact,
};
use aya::programs::{ProgramError, SchedClassifier};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;

use super::{Hook, Order};
use crate::host::udp::errno::Refusal;

/// Before what other agents use by default (Cilium 1, others 49152): a final verdict of theirs must not come first,
/// and ours ends nothing that isn't the tunnel's.
const PRIORITY: u16 = 50;

// linux/rtnetlink.h, linux/pkt_sched.h, linux/pkt_cls.h
const RTM_NEWTFILTER: u16 = 44;
const RTM_GETTFILTER: u16 = 46;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const CLSACT_INGRESS: u32 = 0xffff_fff2;
const CLSACT_EGRESS: u32 = 0xffff_fff3;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_CHAIN: u16 = 11;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_ID: u16 = 11;

/// The handle of a filter on a device that no two tunnels share.
pub const ALONE: u32 = 1;

/// The handle of a tunnel's filter on its underlay: 1 of `flannel0`, 2 of `flannel1`, and so on.
#[must_use]
pub fn handle_of(device: &str) -> u32 {
    let number = device.strip_prefix("flannel").and_then(|number| number.parse::<u16>().ok());
    u32::from(number.unwrap_or(0)) + 1
}

/// The tunnel device whose filters have this handle.
fn device_of(handle: u32) -> String {
    format!("flannel{}", handle.saturating_sub(1))
}

/// A filter on a hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    pub(super) priority: u16,
    handle: u32,
    chain: u32,
    /// The program's, or the classifier's kind where it is none of BPF.
    pub(super) name: String,
    pub(super) program: Option<u32>,
}

impl Filter {
    /// This tunnel's.
    fn is(&self, ours: &Ours<'_>) -> bool {
        self.is_kin(ours) && self.handle == ours.handle
    }

    /// Some tunnel's of this host: it ends the processing of packets of its own port only.
    fn is_kin(&self, ours: &Ours<'_>) -> bool {
        self.chain == 0 && self.name == ours.name
    }

    fn link(&self, hook: &Hook<'_>) -> io::Result<SchedClassifierLink> {
        SchedClassifierLink::attached(hook.device, hook.side.tc(), self.priority, handle(self.handle), None)
    }
}

/// What tells a tunnel's filter on a hook from all others.
#[derive(Clone, Copy, Debug)]
struct Ours<'a> {
    name: &'a str,
    handle: u32,
}

fn handle(number: u32) -> TcHandle {
    TcHandle::new((number >> 16) as u16, number as u16)
}

/// Puts the program in place, in one step if an earlier one of ours is there: at [`PRIORITY`], or before whoever is there
/// with a lower number.
pub(super) fn attach(program: &mut SchedClassifier, hook: &Hook<'_>, name: &str) -> Result<(), Refusal> {
    let doing = || format!("attach {name} to {} of {} with clsact", hook.side.word(), hook.device);
    let filters = list(hook).map_err(|e| Refusal::from_io(doing(), &e))?;
    let ours = Ours { name, handle: hook.handle };
    let id = match first_of(&filters, |filter| filter.is(&ours)) {
        Some(first) => {
            // An agent was killed between two steps of moving in front.
            remove(hook, filters.iter().filter(|filter| filter.is(&ours) && *filter != first))?;
            let old = first.link(hook).map_err(|e| Refusal::from_io(doing(), &e))?;
            program.attach_to_link(old)
        }
        None => {
            let priority = free_priority(&filters, &ours, hook.order);
            add_qdisc(hook.device).map_err(|e| Refusal::from_tc(doing(), &e))?;
            let handle = handle(hook.handle);
            let options = TcAttachOptions::Netlink(NlOptions { priority, handle, classid: None });
            program.attach_with_options(hook.device, hook.side.tc(), options)
        }
    }
    .map_err(|e| Refusal::from_program(doing(), &e))?;
    forget(program, id).map_err(|e| Refusal::from_program(doing(), &e))?;
    // Of a tunnel that is gone while no agent looked.
    let is_orphan = |filter: &&Filter| {
        let is_there = || nix::net::if_::if_nametoindex(device_of(filter.handle).as_str()).is_ok();
        filter.is_kin(&ours) && !filter.is(&ours) && !is_there()
    };
    remove(hook, filters.iter().filter(is_orphan))
}

/// Puts the program before all other filters, and only then takes the one of ours away that is behind them.
///
/// # Errors
/// Priority 1 is taken: nothing comes before it.
pub(super) fn attach_in_front(
    program: &mut SchedClassifier,
    hook: &Hook<'_>,
    name: &str,
) -> Result<(), Refusal> {
    let doing = || format!("attach {name} first to {} of {} with clsact", hook.side.word(), hook.device);
    let filters = list(hook).map_err(|e| Refusal::from_io(doing(), &e))?;
    let ours = Ours { name, handle: hook.handle };
    if ahead_of(&filters, &ours).is_none() {
        return Ok(());
    }
    let priority = before(&filters, &ours)
        .ok_or_else(|| Refusal::new(doing(), "priority 1 is taken, and nothing comes before it"))?;
    let options =
        TcAttachOptions::Netlink(NlOptions { priority, handle: handle(hook.handle), classid: None });
    let id = program
        .attach_with_options(hook.device, hook.side.tc(), options)
        .map_err(|e| Refusal::from_program(doing(), &e))?;
    forget(program, id).map_err(|e| Refusal::from_program(doing(), &e))?;
    remove(hook, filters.iter().filter(|filter| filter.is(&ours)))
}

fn remove<'f>(hook: &Hook<'_>, filters: impl Iterator<Item = &'f Filter>) -> Result<(), Refusal> {
    for filter in filters {
        let doing = || format!("detach {} from {} of {}", filter.name, hook.side.word(), hook.device);
        let link = filter.link(hook).map_err(|e| Refusal::from_io(doing(), &e))?;
        link.detach().map_err(|e| Refusal::from_program(doing(), &e))?;
    }
    Ok(())
}

/// The filter shall outlive us; dropping the link would detach it.
fn forget(program: &mut SchedClassifier, id: SchedClassifierLinkId) -> Result<(), ProgramError> {
    program.take_link(id).map(std::mem::forget)
}

/// A number for a new filter: where it belongs, else a free one as near as possible.
fn free_priority(filters: &[Filter], ours: &Ours<'_>, order: Order) -> u16 {
    let numbers: Vec<u16> =
        filters.iter().filter(|filter| filter.chain == 0).map(|filter| filter.priority).collect();
    let wanted = match order {
        Order::First => {
            // Beside another tunnel's, if nobody else is before that.
            let kin = first_of(filters, |filter| filter.is_kin(ours)).map(|filter| filter.priority);
            let stranger = first_of(filters, |filter| !filter.is_kin(ours)).map(|filter| filter.priority);
            match kin.filter(|kin| stranger.is_none_or(|stranger| *kin < stranger)) {
                Some(beside) => return beside,
                None => before(filters, ours),
            }
        }
        Order::Last => {
            numbers.iter().max().and_then(|last| last.checked_add(1)).map(|next| next.max(PRIORITY))
        }
    };
    let is_free = |number: &u16| !numbers.contains(number);
    wanted.or_else(|| (PRIORITY..).find(is_free)).unwrap_or(PRIORITY)
}

/// [`PRIORITY`], or the number before the first; nothing comes before 1.
fn before(filters: &[Filter], ours: &Ours<'_>) -> Option<u16> {
    match first_of(filters, |filter| !filter.is_kin(ours)) {
        Some(first) if first.priority <= PRIORITY => {
            first.priority.checked_sub(1).filter(|before| *before > 0)
        }
        _ => Some(PRIORITY),
    }
}

fn first_of(filters: &[Filter], wanted: impl Fn(&Filter) -> bool) -> Option<&Filter> {
    filters.iter().filter(|filter| filter.chain == 0 && wanted(filter)).min_by_key(|filter| filter.priority)
}

/// The filter of others that packets meet before ours, if one does.
pub(super) fn ahead(hook: &Hook<'_>, name: &str) -> Option<Filter> {
    ahead_of(&list(hook).ok()?, &Ours { name, handle: hook.handle }).cloned()
}

fn ahead_of<'f>(filters: &'f [Filter], ours: &Ours<'_>) -> Option<&'f Filter> {
    let own = first_of(filters, |filter| filter.is(ours))?;
    first_of(filters, |filter| !filter.is_kin(ours)).filter(|other| other.priority < own.priority)
}

/// Removes our filter; that there is none, or no such device, is a success.
pub(super) fn detach(hook: &Hook<'_>, name: &str) -> Result<(), Refusal> {
    let doing = || format!("detach {name} from {} of {}", hook.side.word(), hook.device);
    let filters = list(hook).map_err(|e| Refusal::from_io(doing(), &e))?;
    let ours = Ours { name, handle: hook.handle };
    remove(hook, filters.iter().filter(|filter| filter.is(&ours)))
}

fn add_qdisc(device: &str) -> Result<(), TcError> {
    match qdisc_add_clsact(device) {
        Err(TcError::NetlinkError(e)) if e.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        result => result,
    }
}

/// Our filter on the hook.
pub(super) fn find(hook: &Hook<'_>, name: &str) -> io::Result<Option<Filter>> {
    let ours = Ours { name, handle: hook.handle };
    Ok(first_of(&list(hook)?, |filter| filter.is(&ours)).cloned())
}

/// Handles of the filters by that name on the hook, of whichever tunnels.
pub(super) fn handles(hook: &Hook<'_>, name: &str) -> io::Result<Vec<u32>> {
    let ours = Ours { name, handle: hook.handle };
    Ok(list(hook)?.iter().filter(|filter| filter.is_kin(&ours)).map(|filter| filter.handle).collect())
}

/// Every filter on the hook; none where there is no qdisc or no such device.
fn list(hook: &Hook<'_>) -> io::Result<Vec<Filter>> {
    let parent = match hook.side.tc() {
        TcAttachType::Egress => CLSACT_EGRESS,
        TcAttachType::Ingress | TcAttachType::Custom(_) => CLSACT_INGRESS,
    };
    let mut request = Vec::with_capacity(36);
    request.extend(36_u32.to_ne_bytes());
    request.extend(RTM_GETTFILTER.to_ne_bytes());
    request.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    request.extend(1_u32.to_ne_bytes());
    request.extend(0_u32.to_ne_bytes());
    // struct tcmsg: family, padding, ifindex, handle, parent, info
    request.extend([0_u8; 4]);
    request.extend(hook.ifindex.to_ne_bytes());
    request.extend([0_u8; 4]);
    request.extend(parent.to_ne_bytes());
    request.extend([0_u8; 4]);

    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.send(&request, 0)?;
    let mut filters = Vec::new();
    loop {
        let (answer, _) = socket.recv_from_full()?;
        if parse(&answer, &mut filters)? {
            return Ok(filters);
        }
    }
}

/// Takes the filters out of some messages; true when the last one was among them.
fn parse(mut answer: &[u8], filters: &mut Vec<Filter>) -> io::Result<bool> {
    let cut = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer about tc filters is cut");
    while !answer.is_empty() {
        let length = number(answer, 0).ok_or_else(cut)? as usize;
        let message = answer.get(..length).filter(|message| message.len() >= 16).ok_or_else(cut)?;
        answer = answer.get(length.next_multiple_of(4)..).unwrap_or_default();
        let kind =
            message.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes).ok_or_else(cut)?;
        match kind {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let code = number(message, 16).ok_or_else(cut)?.cast_signed();
                return match -code {
                    libc::ENOENT | libc::EINVAL | libc::ENODEV => Ok(true),
                    errno => Err(io::Error::from_raw_os_error(errno)),
                };
            }
            RTM_NEWTFILTER => {
                let (handle, info) =
                    (number(message, 24).ok_or_else(cut)?, number(message, 32).ok_or_else(cut)?);
                // Without a handle it is the head of a list.
                if handle != 0 {
                    let priority = (info >> 16) as u16;
                    filters.push(filter(priority, handle, message.get(36..).ok_or_else(cut)?));
                }
            }
            _ => {}
        }
    }
    Ok(false)
}

fn filter(priority: u16, handle: u32, body: &[u8]) -> Filter {
    let mut filter = Filter { priority, handle, chain: 0, name: String::new(), program: None };
    for (kind, value) in attributes(body) {
        match kind {
            TCA_KIND if filter.name.is_empty() => filter.name = text(value),
            TCA_CHAIN => filter.chain = number(value, 0).unwrap_or(0),
            TCA_OPTIONS => {
                for (kind, value) in attributes(value) {
                    match kind {
                        TCA_BPF_NAME if filter.name == "bpf" => filter.name = text(value),
                        TCA_BPF_ID => filter.program = number(value, 0),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    filter
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Type and value of each attribute; ends at the first that is not whole.
fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    const TYPE_MASK: u16 = 0x3fff;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?) & TYPE_MASK;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.split(|byte| *byte == 0).next().unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = u16::try_from(4 + value.len()).unwrap().to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn answer(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = u32::try_from(16 + body.len()).unwrap().to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes
    }

    /// A message about a filter: `struct tcmsg`, then the attributes.
    fn told(priority: u32, handle: u32, attributes: &[Vec<u8>]) -> Vec<u8> {
        let mut body = vec![0; 8];
        body.extend(handle.to_ne_bytes());
        body.extend(CLSACT_INGRESS.to_ne_bytes());
        body.extend((priority << 16).to_ne_bytes());
        body.extend(attributes.concat());
        answer(RTM_NEWTFILTER, &body)
    }

    fn bpf(name: &[u8], id: u32) -> [Vec<u8>; 2] {
        let options = [attribute(TCA_BPF_NAME, name), attribute(TCA_BPF_ID, &id.to_ne_bytes())].concat();
        [attribute(TCA_KIND, b"bpf\0"), attribute(TCA_OPTIONS, &options)]
    }

    fn of(name: &str, priority: u16) -> Filter {
        Filter { priority, handle: 1, chain: 0, name: name.to_owned(), program: None }
    }

    #[test]
    fn every_filter_of_a_hook_is_read_until_the_kernel_is_done() {
        let mut filters = Vec::new();
        let first = [
            told(1, 0, &[attribute(TCA_KIND, b"u32\0")]),
            told(
                1,
                0x8000_0800,
                &[attribute(TCA_KIND, b"u32\0"), attribute(TCA_CHAIN, &3_u32.to_ne_bytes())],
            ),
        ]
        .concat();
        assert!(!parse(&first, &mut filters).unwrap());
        let last = [told(50, 1, &bpf(b"flannel_encap\0", 7)), answer(NLMSG_DONE, &[0; 4])].concat();
        assert!(parse(&last, &mut filters).unwrap());
        let u32_filter = Filter { handle: 0x8000_0800, chain: 3, ..of("u32", 1) };
        assert_eq!(filters, [u32_filter, Filter { program: Some(7), ..of("flannel_encap", 50) }]);
    }

    #[test]
    fn tunnels_stand_side_by_side_and_none_is_a_stranger_to_the_other() {
        assert_eq!((handle_of("flannel0"), handle_of("flannel1"), handle_of("other")), (1, 2, 1));
        assert_eq!(device_of(handle_of("flannel7")), "flannel7");
        let (us, first) = (Ours { name: "flannel_ingress", handle: 2 }, of("flannel_ingress", 50));
        assert_eq!(free_priority(std::slice::from_ref(&first), &us, Order::First), 50);
        assert_eq!(free_priority(&[first.clone(), of("u32", 60)], &us, Order::First), 50);
        assert_eq!(free_priority(&[first.clone(), of("u32", 10)], &us, Order::First), 9);
        let second = Filter { handle: 2, ..of("flannel_ingress", 9) };
        for (ours, other) in [(us, of("u32", 10)), (Ours { handle: 1, ..us }, of("u32", 60))] {
            assert_eq!(ahead_of(&[first.clone(), second.clone(), other], &ours), None);
        }
        assert_eq!(before(&[first, second, of("u32", 10)], &us), Some(9));
    }

    #[test]
    fn no_filter_is_an_answer_and_no_permission_an_error() {
        for (errno, gone) in [(libc::ENOENT, true), (libc::EINVAL, true), (libc::EPERM, false)] {
            let result = parse(&answer(NLMSG_ERROR, &(-errno).to_ne_bytes()), &mut Vec::new());
            assert_eq!(matches!(result, Ok(true)), gone, "{errno}");
        }
        assert!(parse(&[1, 2, 3], &mut Vec::new()).is_err());
    }

    #[test]
    fn ours_goes_before_the_first_of_others_and_nothing_before_one() {
        let ours = of("flannel_ingress", 50);
        let us = Ours { name: "flannel_ingress", handle: 1 };
        let first = |filters: &[Filter]| free_priority(filters, &us, Order::First);
        assert_eq!(first(&[]), 50);
        assert_eq!(first(&[of("u32", 60)]), 50);
        assert_eq!(first(&[of("other", 50)]), 49);
        assert_eq!(first(&[of("u32", 60), of("u32", 10)]), 9);
        assert_eq!(first(&[of("u32", 1), of("u32", 50)]), 51);
        assert_eq!(before(&[of("u32", 10), ours.clone()], &us), Some(9));
        assert_eq!(before(&[of("u32", 1), ours.clone()], &us), None);
        assert_eq!(free_priority(&[of("u32", 10)], &us, Order::Last), 50);
        assert_eq!(free_priority(&[of("u32", 10), of("u32", 49152)], &us, Order::Last), 49153);
        // What another chain holds is met only by packets that are sent there.
        let elsewhere = Filter { chain: 7, ..of("other", 1) };
        assert_eq!(ahead_of(&[elsewhere, ours.clone()], &us), None);
        assert_eq!(ahead_of(&[of("u32", 60), ours.clone()], &us), None);
        let found = [of("u32", 30), ours, of("u32", 20)];
        assert_eq!(ahead_of(&found, &us).map(|filter| filter.priority), Some(20));
        assert_eq!(ahead_of(&[of("u32", 20)], &us), None, "ours is not there at all");
    }
}
