//! What is expected where.

use aya::util::KernelVersion;
use flannel_tests::kernel::TCX;

/// How the tc programs hang on their interfaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Attachment {
    /// Pinned links (6.6).
    Tcx,
    /// Filters on the clsact qdisc.
    Clsact,
}

pub(crate) fn attachment() -> Attachment {
    if TCX.met() { Attachment::Tcx } else { Attachment::Clsact }
}

/// Debian's kernels have the module ebtable_filter up to 6.12; 7.3 is built without it.
pub(crate) fn has_ebtables() -> bool {
    KernelVersion::current().is_ok_and(|version| version < KernelVersion::new(7, 0, 0))
}
