//! The kernel's answers in words: the symbol (what one searches for), the text, and the capability a refusal is
//! about.

use std::error::Error;
use std::io;

use aya::maps::MapError;
use aya::pin::PinError;
use aya::programs::ProgramError;
use aya::programs::links::LinkError;
use aya::programs::tc::TcError;
use aya::programs::xdp::XdpError;
use nix::errno::Errno;

use crate::host::HostError;

/// What loading and attaching needs (bpf(2), since kernel 5.8); before, and in containers that drop them, root.
pub(super) const CAPABILITIES: &str = "CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON";

/// "operation not supported (EOPNOTSUPP)"
pub(super) fn describe(errno: i32) -> String {
    let known = Errno::from_raw(errno);
    if known == Errno::UnknownErrno {
        return format!("error {errno}");
    }
    let mut text = known.desc().to_owned();
    // "Operation not permitted" starts a sentence; ours is under way. Acronyms stay.
    if text.chars().nth(1).is_some_and(char::is_lowercase) {
        text[..1].make_ascii_lowercase();
    }
    format!("{text} ({known:?})")
}

pub(super) fn describe_io(error: &io::Error) -> String {
    error.raw_os_error().map_or_else(|| error.to_string(), describe)
}

/// Why the kernel, or the loader before it, refused something of eBPF.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{doing}: {reason}")]
pub struct Refusal {
    doing: String,
    reason: String,
    /// The kernel's error number, when it was the kernel.
    pub errno: Option<i32>,
}

impl Refusal {
    pub(super) fn new(doing: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { doing: doing.into(), reason: reason.into(), errno: None }
    }

    /// Without what was being done.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.reason
    }

    pub(super) fn from_io(doing: impl Into<String>, error: &io::Error) -> Self {
        Self::from_errno(doing, error.raw_os_error(), &error.to_string())
    }

    fn from_errno(doing: impl Into<String>, errno: Option<i32>, otherwise: &str) -> Self {
        let reason = match errno {
            Some(e @ libc::EPERM) => format!("{}; needs {CAPABILITIES}", describe(e)),
            Some(e @ libc::ENOSYS) => format!("{}; this kernel has no eBPF", describe(e)),
            Some(e) => describe(e),
            None => otherwise.to_owned(),
        };
        Self { doing: doing.into(), reason, errno }
    }

    pub(super) fn from_map(doing: impl Into<String>, error: &MapError) -> Self {
        Self::from_chain(doing, error)
    }

    pub(super) fn from_pin(doing: impl Into<String>, error: &PinError) -> Self {
        let mut refusal = Self::from_chain(doing, error);
        if refusal.errno == Some(libc::EPERM) {
            refusal.reason.push_str(", and a bpffs to pin in");
        }
        refusal
    }

    pub(super) fn from_link(doing: impl Into<String>, error: &LinkError) -> Self {
        Self::from_chain(doing, error)
    }

    pub(super) fn from_program(doing: impl Into<String>, error: &ProgramError) -> Self {
        match error {
            ProgramError::XdpError(XdpError::NetlinkError(e))
            | ProgramError::TcError(TcError::NetlinkError(e))
            | ProgramError::NetlinkError(e) => Self::from_netlink(doing, e.raw_os_error(), e),
            ProgramError::TcError(e) => Self::from_chain(doing, e),
            e => Self::from_chain(doing, e),
        }
    }

    /// A program that was not accepted, with the last that the verifier said about it.
    pub(super) fn from_verifier(doing: impl Into<String>, error: &io::Error, log: &str) -> Self {
        let mut refusal = Self::from_io(doing, error);
        let said = log.lines().rev().find(|line| !line.trim().is_empty() && !is_statistics(line));
        if log.contains("prohibited for !root") {
            refusal.reason = format!("{}; needs CAP_PERFMON", refusal.reason);
        }
        if let Some(said) = said {
            refusal.reason = format!("{}; verifier: {}", refusal.reason, said.trim());
        }
        refusal
    }

    pub(super) fn from_tc(doing: impl Into<String>, error: &TcError) -> Self {
        match error {
            TcError::NetlinkError(e) => Self::from_netlink(doing, e.raw_os_error(), e),
            e => Self::from_chain(doing, e),
        }
    }

    /// The error number and, where the kernel added some, its own words.
    fn from_netlink(doing: impl Into<String>, errno: Option<i32>, error: &dyn Error) -> Self {
        let text = error.to_string();
        let mut refusal = Self::from_errno(doing, errno, &text);
        // netlink error: ["Driver does not support XDP"]
        if let Some((_, words)) = text.split_once("[\"")
            && let Some((words, _)) = words.split_once("\"]")
        {
            refusal.reason = format!("{}: {words}", refusal.reason);
        }
        refusal
    }

    /// The first system error in the chain, else the texts of the chain.
    fn from_chain(doing: impl Into<String>, error: &(dyn Error + 'static)) -> Self {
        let mut texts = vec![error.to_string()];
        let mut errno = system_error(error);
        let mut next = error.source();
        while let Some(cause) = next {
            texts.push(cause.to_string());
            errno = errno.or_else(|| system_error(cause));
            next = cause.source();
        }
        texts.dedup();
        Self::from_errno(doing, errno, &texts.join(": "))
    }
}

fn system_error(error: &(dyn Error + 'static)) -> Option<i32> {
    error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error)
}

/// The verifier ends its log with what it counted.
fn is_statistics(line: &str) -> bool {
    ["processed ", "verification time ", "stack depth "].iter().any(|start| line.starts_with(start))
}

impl From<Refusal> for HostError {
    fn from(refusal: Refusal) -> Self {
        Self::new(refusal.doing, refusal.reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_carry_the_symbol_and_the_words() {
        assert!(
            describe(libc::EOPNOTSUPP).starts_with("operation not supported"),
            "{}",
            describe(libc::EOPNOTSUPP)
        );
        assert!(describe(libc::EBUSY).ends_with("(EBUSY)"));
        assert_eq!(describe(99_999), "error 99999");
    }

    #[test]
    fn a_missing_permission_names_the_capabilities() {
        let error = MapError::CreateError {
            name: "PEERS".to_owned(),
            io_error: io::Error::from_raw_os_error(libc::EPERM),
        };
        let refusal = Refusal::from_map("create map PEERS", &error);
        assert_eq!(
            refusal.to_string(),
            "create map PEERS: operation not permitted (EPERM); needs CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
        );
        assert_eq!(refusal.errno, Some(libc::EPERM));
    }
}
