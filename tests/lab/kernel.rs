//! Which kernel this is, and trials that need a newer one: reported as ignored with that reason, which the kernel matrix
//! takes as an answer and no other run does.

use aya::util::KernelVersion;
use libtest_mimic::{Completion, Trial};

/// Linux 6.6 has tcx links; before, a tc program is a filter on the clsact qdisc.
pub const TCX: Needs = Needs { major: 6, minor: 6, what: "tcx links" };

/// Linux 5.18 runs XDP programs over frames of several pages.
pub const XDP_FRAGS: Needs = Needs { major: 5, minor: 18, what: "XDP with fragments" };

/// Linux 5.15 takes and gives back the metadata in front of a frame when a program is run for a test.
pub const XDP_TEST_METADATA: Needs = Needs { major: 5, minor: 15, what: "metadata in XDP test runs" };

/// A kernel, and what it brought.
#[derive(Clone, Copy, Debug)]
pub struct Needs {
    pub major: u8,
    pub minor: u8,
    pub what: &'static str,
}

impl Needs {
    /// Is this kernel new enough? A version that can't be read is taken for the newest.
    #[must_use]
    pub fn met(&self) -> bool {
        KernelVersion::current()
            .map_or(true, |version| version >= KernelVersion::new(self.major, self.minor, 0))
    }

    /// The trial, where the kernel is new enough.
    #[must_use]
    pub fn trial(self, trial: Trial) -> Trial {
        if self.met() {
            return trial;
        }
        let Self { major, minor, what } = self;
        let reason = format!("needs Linux {major}.{minor}: {what}");
        Trial::ignorable_test(trial.name(), move || Ok(Completion::ignored_with(reason)))
            .with_kind(trial.kind())
    }
}
