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

/// Debian's kernels have it. One without says `vlan_filtering 0` all the same, so a bridge of its own is asked.
pub(crate) fn has_vlan_filtering(host: &Namespace) -> Result<bool> {
    host.ip("link add vlans9 type bridge")?;
    let has = host.ip("link set vlans9 type bridge vlan_filtering 1").is_ok();
    host.ip("link del vlans9")?;
    Ok(has)
}

/// A module on all of Debian's.
pub(crate) fn has_ebtables(host: &Namespace) -> bool {
    host.output("modprobe --dry-run ebtable_filter").is_ok()
}

pub(crate) fn attachment() -> Attachment {
    if TCX.met() { Attachment::Tcx } else { Attachment::Clsact }
}
