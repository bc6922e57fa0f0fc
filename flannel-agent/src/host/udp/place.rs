//! Our place among the programs of others at a tc hook: first, because a verdict of theirs would end the processing of
//! packets that are the tunnel's, while ours lets everything else pass.
//!
//! A program that was attached in front of ours is let stand where it is, behind ours: the place is taken back without a
//! packet lost. An agent that insists as we do would make that a race for ever, so it is run a few times a minute only;
//! in between `status` says who is in front.

use std::collections::VecDeque;
use std::fmt;
use std::time::{Duration, Instant};

/// The place is taken back this often within [`WINDOW`].
const ATTEMPTS: usize = 3;
const WINDOW: Duration = Duration::from_secs(60);

/// Who stands in front of us, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ahead {
    /// "BPF program 9", "filter u32 of priority 10"
    pub(super) what: String,
    /// "ingress of eth0"
    pub(super) hook: String,
    /// Nothing can be put before it.
    pub(super) stays: bool,
}

impl fmt::Display for Ahead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} runs before ours on {}", self.what, self.hook)
    }
}

/// What is known of our place. Time is an argument.
#[derive(Debug, Default)]
pub(super) struct Place {
    ahead: Option<Ahead>,
    /// When it was taken back, oldest first; none older than [`WINDOW`] counts.
    taken: VecDeque<Instant>,
    total: u32,
}

impl Place {
    /// Takes note of who is in front, says so once, and decides.
    ///
    /// # Errors
    /// The place is to be taken back now.
    pub(super) fn look(&mut self, ahead: Option<Ahead>, now: Instant) -> Result<(), String> {
        let may_take = self.may_take(now) && ahead.as_ref().is_none_or(|other| !other.stays);
        if let Some(other) = &ahead
            && self.ahead != ahead
            && !may_take
        {
            tracing::warn!(
                "{other} and is left there for now; if it ends the processing of tunnel packets, they are lost"
            );
        }
        self.ahead = ahead;
        match &self.ahead {
            Some(other) if may_take => Err(other.to_string()),
            _ => Ok(()),
        }
    }

    /// Whether there were few attempts lately.
    pub(super) fn may_take(&self, now: Instant) -> bool {
        self.taken.iter().filter(|then| now.duration_since(**then) < WINDOW).count() < ATTEMPTS
    }

    /// We are in front again, or have tried to be.
    pub(super) fn taken(&mut self, now: Instant) {
        self.taken.push_back(now);
        if self.taken.len() > ATTEMPTS {
            self.taken.pop_front();
        }
        self.total += 1;
        self.ahead = None;
    }

    /// For `status`: nothing while nobody ever moved in front.
    pub(super) fn report(&self) -> Option<String> {
        match (&self.ahead, self.total) {
            (Some(ahead), _) => Some(ahead.to_string()),
            (None, 0) => None,
            (None, 1) => Some("displaced once by another program, first again".to_owned()),
            (None, times) => Some(format!("displaced {times} times by other programs, first again")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn other() -> Option<Ahead> {
        Some(Ahead { what: "BPF program 9".to_owned(), hook: "ingress of eth0".to_owned(), stays: false })
    }

    #[test]
    fn the_place_is_taken_back_three_times_a_minute_and_then_only_reported() {
        let (mut place, start) = (Place::default(), Instant::now());
        let second = |n| start + Duration::from_secs(n);
        assert_eq!((place.look(None, start), place.report()), (Ok(()), None));
        for n in 0..3 {
            let wanted = Err("BPF program 9 runs before ours on ingress of eth0".to_owned());
            assert_eq!(place.look(other(), second(n)), wanted);
            place.taken(second(n));
        }
        assert_eq!(place.report().unwrap(), "displaced 3 times by other programs, first again");
        assert_eq!(place.look(other(), second(4)), Ok(()));
        assert_eq!(place.report().unwrap(), "BPF program 9 runs before ours on ingress of eth0");
        assert_eq!(place.look(other(), second(59)), Ok(()));
        // The first attempt is a minute ago.
        assert!(place.look(other(), second(61)).is_err());
        place.taken(second(61));
        assert!(place.look(other(), second(61)).is_err(), "so is the second");
        place.taken(second(61));
        assert_eq!(place.look(other(), second(61)), Ok(()));
    }

    #[test]
    fn one_that_nothing_comes_before_is_only_reported() {
        let (mut place, now) = (Place::default(), Instant::now());
        let first = Ahead { stays: true, ..other().unwrap() };
        assert_eq!(place.look(Some(first), now), Ok(()));
        assert_eq!(place.report().unwrap(), "BPF program 9 runs before ours on ingress of eth0");
        assert_eq!((place.look(None, now), place.report()), (Ok(()), None));
    }
}
