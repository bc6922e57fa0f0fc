//! What is expected where.

use anyhow::Result;
use flannel_tests::{kernel::TCX, namespace::Namespace};

/// How the tc programs hang on their interfaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attachment {
    /// Pinned links (6.6).
    Tcx,
    /// Filters on the clsact qdisc.
    Clsact,
}

/// Debian's kernels have it; a bridge that could filter says that it does not.
pub(crate) fn has_vlan_filtering(host: &Namespace) -> Result<bool> {
    Ok(host.ip("-d link show dev cni0")?.contains("vlan_filtering 0"))
}

/// A module on all of Debian's.
pub(crate) fn has_ebtables(host: &Namespace) -> bool {
    host.output("modprobe --dry-run ebtable_filter").is_ok()
}

pub(crate) fn attachment() -> Attachment {
    if TCX.met() { Attachment::Tcx } else { Attachment::Clsact }
}
