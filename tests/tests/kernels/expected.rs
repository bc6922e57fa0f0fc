//! What is expected where.

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
