//! Does what XDP decapsulates arrive as the tunnel's?
//!
//! XDP marks a packet with four bytes of metadata; tc ingress delivers marked packets to the tunnel device. A driver
//! that accepts metadata in XDP but does not carry it into the packet it builds then delivers them as if they had come
//! in by the underlay, which rp_filter and `-i flannel0` rules refuse. Nothing announces that, so it is observed: when
//! packets are decapsulated and none is seen marked for [`PATIENCE`], XDP is given up.
//!
//! Pure: time and counters come in as arguments.

use std::time::{Duration, Instant};

/// How long packets may go by unmarked.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Packets counted so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// By XDP: decapsulated, or marked only.
    pub sent: u64,
    /// By tc ingress, with a mark.
    pub marked: u64,
}

/// State of the proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// No mark yet; `since` when there was a packet that should have had one.
    Awaited {
        start: Seen,
        since: Option<Instant>,
    },
    Proven,
    Disproved,
}

impl Proof {
    /// Starts watching. Marks seen under a predecessor's program on the same link are as good.
    #[must_use]
    pub fn begin(now: Seen, link: Adoption) -> Self {
        match link {
            Adoption::TakenOver if now.marked > 0 => Self::Proven,
            _ => Self::Awaited { start: now, since: None },
        }
    }

    /// Takes a look at the counters. Final states stay.
    #[must_use]
    pub fn look(self, seen: Seen, now: Instant) -> Self {
        match self {
            Self::Awaited { start, .. } if seen.marked > start.marked => Self::Proven,
            Self::Awaited { start, since: None } if seen.sent > start.sent => {
                Self::Awaited { start, since: Some(now) }
            }
            Self::Awaited { since: Some(since), .. } if now.duration_since(since) >= PATIENCE => {
                Self::Disproved
            }
            state => state,
        }
    }
}

/// Where the XDP link came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Adoption {
    Fresh,
    TakenOver,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(sent: u64, marked: u64) -> Seen {
        Seen { sent, marked }
    }

    #[test]
    fn one_mark_is_the_proof() {
        let now = Instant::now();
        let proof = Proof::begin(seen(10, 3), Adoption::Fresh);
        assert_eq!(proof.look(seen(11, 4), now), Proof::Proven);
        assert_eq!(Proof::Proven.look(seen(99, 4), now + 2 * PATIENCE), Proof::Proven);
    }

    #[test]
    fn packets_without_marks_for_five_seconds_disprove_it() {
        let now = Instant::now();
        let mut proof = Proof::begin(seen(10, 0), Adoption::Fresh);
        for (second, sent, disproved) in [(0, 10, false), (60, 11, false), (64, 50, false), (65, 60, true)] {
            proof = proof.look(seen(sent, 0), now + Duration::from_secs(second));
            assert_eq!(proof == Proof::Disproved, disproved, "after {second} s");
        }
    }

    #[test]
    fn silence_proves_nothing_however_long_it_lasts() {
        let now = Instant::now();
        let proof = Proof::begin(seen(10, 0), Adoption::Fresh);
        assert_eq!(proof.look(seen(10, 0), now + 100 * PATIENCE), proof);
    }

    #[test]
    fn a_link_taken_over_brings_its_proof_along() {
        assert_eq!(Proof::begin(seen(10, 9), Adoption::TakenOver), Proof::Proven);
        assert!(matches!(Proof::begin(seen(0, 0), Adoption::TakenOver), Proof::Awaited { .. }));
        assert!(matches!(Proof::begin(seen(10, 9), Adoption::Fresh), Proof::Awaited { .. }));
    }
}
