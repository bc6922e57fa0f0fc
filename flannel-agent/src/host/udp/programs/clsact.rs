//! The tc hook of kernels before 6.6, which have no tcx links: a classifier on the `clsact` qdisc.
//!
//! Such a filter is not a file that can be pinned. It outlives the agent by itself, and is found again by its fixed
//! priority, handle and name. Others' filters have other priorities and are never touched; the qdisc stays when ours
//! go, because nobody can tell who else relies on it.

use std::io;

use aya::programs::SchedClassifier;
use aya::programs::links::Link as _;
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcAttachType, TcError, TcHandle, qdisc_add_clsact,
};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;

use super::Hook;
use crate::host::udp::errno::Refusal;

/// Before what other agents use by default (Cilium 1, others 49152): a final verdict of theirs must not come first,
/// and ours ends nothing that isn't the tunnel's.
const PRIORITY: u16 = 50;
const HANDLE: TcHandle = TcHandle::new(0, 1);

// linux/rtnetlink.h, linux/pkt_sched.h, linux/pkt_cls.h
const RTM_NEWTFILTER: u16 = 44;
const RTM_GETTFILTER: u16 = 46;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const ETH_P_ALL: u16 = 3;
const CLSACT_INGRESS: u32 = 0xffff_fff2;
const CLSACT_EGRESS: u32 = 0xffff_fff3;
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_ID: u16 = 11;

/// The filter at our priority and handle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    pub(super) name: String,
    pub(super) program: Option<u32>,
}

/// Puts the program in place, in one step if an earlier one of ours is there.
pub(super) fn attach(program: &mut SchedClassifier, hook: &Hook<'_>, name: &str) -> Result<(), Refusal> {
    let doing = || format!("attach {name} to {} of {} with clsact", hook.side.word(), hook.device);
    let id = match find(hook).map_err(|e| Refusal::from_io(doing(), &e))? {
        Some(filter) if filter.name == name => {
            let old = SchedClassifierLink::attached(hook.device, hook.side.tc(), PRIORITY, HANDLE, None)
                .map_err(|e| Refusal::from_io(doing(), &e))?;
            program.attach_to_link(old)
        }
        Some(other) => {
            let reason =
                format!("priority {PRIORITY} is taken by the filter {:?} of someone else", other.name);
            return Err(Refusal::new(doing(), reason));
        }
        None => {
            add_qdisc(hook.device).map_err(|e| Refusal::from_tc(doing(), &e))?;
            let options =
                TcAttachOptions::Netlink(NlOptions { priority: PRIORITY, handle: HANDLE, classid: None });
            program.attach_with_options(hook.device, hook.side.tc(), options)
        }
    }
    .map_err(|e| Refusal::from_program(doing(), &e))?;
    let link = program.take_link(id).map_err(|e| Refusal::from_program(doing(), &e))?;
    // Dropping it would detach; the filter shall outlive us.
    std::mem::forget(link);
    Ok(())
}

/// Removes our filter; that there is none, or no such device, is a success.
pub(super) fn detach(hook: &Hook<'_>, name: &str) -> Result<(), Refusal> {
    let doing = || format!("detach {name} from {} of {}", hook.side.word(), hook.device);
    match find(hook) {
        Ok(Some(filter)) if filter.name == name => {
            SchedClassifierLink::attached(hook.device, hook.side.tc(), PRIORITY, HANDLE, None)
                .map_err(|e| Refusal::from_io(doing(), &e))?
                .detach()
                .map_err(|e| Refusal::from_program(doing(), &e))
        }
        Ok(_) => Ok(()),
        Err(e) => Err(Refusal::from_io(doing(), &e)),
    }
}

fn add_qdisc(device: &str) -> Result<(), TcError> {
    match qdisc_add_clsact(device) {
        Err(TcError::NetlinkError(e)) if e.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        result => result,
    }
}

/// The filter at our place, whoever put it there.
pub(super) fn find(hook: &Hook<'_>) -> io::Result<Option<Filter>> {
    let parent = match hook.side.tc() {
        TcAttachType::Egress => CLSACT_EGRESS,
        TcAttachType::Ingress | TcAttachType::Custom(_) => CLSACT_INGRESS,
    };
    let mut request = Vec::with_capacity(36);
    request.extend(36_u32.to_ne_bytes());
    request.extend(RTM_GETTFILTER.to_ne_bytes());
    request.extend(NLM_F_REQUEST.to_ne_bytes());
    request.extend(1_u32.to_ne_bytes());
    request.extend(0_u32.to_ne_bytes());
    // struct tcmsg: family, padding, ifindex, handle, parent, info
    request.extend([0_u8; 4]);
    request.extend(hook.ifindex.to_ne_bytes());
    request.extend(u32::from(HANDLE).to_ne_bytes());
    request.extend(parent.to_ne_bytes());
    request.extend(((u32::from(PRIORITY) << 16) | u32::from(ETH_P_ALL.to_be())).to_ne_bytes());

    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.send(&request, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    parse(&answer)
}

/// `None` for the errors that say that no such filter, qdisc or device exists.
fn parse(answer: &[u8]) -> io::Result<Option<Filter>> {
    let cut = || io::Error::new(io::ErrorKind::InvalidData, "the kernel's answer about a tc filter is cut");
    let kind = answer.get(4..6).and_then(|b| b.try_into().ok()).map(u16::from_ne_bytes).ok_or_else(cut)?;
    match kind {
        NLMSG_ERROR => {
            let code =
                answer.get(16..20).and_then(|b| b.try_into().ok()).map(i32::from_ne_bytes).ok_or_else(cut)?;
            match -code {
                libc::ENOENT | libc::EINVAL | libc::ENODEV => Ok(None),
                errno => Err(io::Error::from_raw_os_error(errno)),
            }
        }
        RTM_NEWTFILTER => {
            let mut filter = Filter { name: String::new(), program: None };
            for (kind, value) in attributes(answer.get(36..).ok_or_else(cut)?) {
                match kind {
                    TCA_KIND if value != b"bpf\0" => filter.name = text(value),
                    TCA_OPTIONS => {
                        for (kind, value) in attributes(value) {
                            match kind {
                                TCA_BPF_NAME => filter.name = text(value),
                                TCA_BPF_ID => filter.program = value.try_into().ok().map(u32::from_ne_bytes),
                                _ => {}
                            }
                        }
                    }
                    _ => {}
                }
            }
            Ok(Some(filter))
        }
        _ => Err(cut()),
    }
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

    #[test]
    fn the_name_tells_whose_filter_it_is() {
        let options =
            [attribute(TCA_BPF_NAME, b"flannel_encap\0"), attribute(TCA_BPF_ID, &7_u32.to_ne_bytes())]
                .concat();
        let body = [vec![0; 20], attribute(TCA_KIND, b"bpf\0"), attribute(TCA_OPTIONS, &options)].concat();
        let wanted = Filter { name: "flannel_encap".to_owned(), program: Some(7) };
        assert_eq!(parse(&answer(RTM_NEWTFILTER, &body)).unwrap(), Some(wanted));

        let body = [vec![0; 20], attribute(TCA_KIND, b"u32\0")].concat();
        let other = Filter { name: "u32".to_owned(), program: None };
        assert_eq!(parse(&answer(RTM_NEWTFILTER, &body)).unwrap(), Some(other));
    }

    #[test]
    fn no_filter_is_an_answer_and_no_permission_an_error() {
        for (errno, gone) in [(libc::ENOENT, true), (libc::EINVAL, true), (libc::EPERM, false)] {
            let result = parse(&answer(NLMSG_ERROR, &(-errno).to_ne_bytes()));
            assert_eq!(matches!(result, Ok(None)), gone, "{errno}");
        }
        assert!(parse(&[]).is_err());
    }
}
