//! What two keyspaces that shall say the same owe each other: a pure function of one key in both, and of when they last
//! did say the same.
//!
//! Whoever changed since then is right. Revisions tell who did, so what the mirror wrote itself is no news to it and
//! nothing goes round in circles.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use crate::domain::lease::LeaseAttrs;

/// Ends this close are the same: a rest is told in whole seconds, and an answer takes its time.
const SAME_END: Duration = Duration::from_secs(10);

/// One of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Old,
    New,
}

/// A key as one side has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) value: String,
    pub(super) revision: u64,
    /// `None` is for ever.
    pub(super) ends: Option<Instant>,
}

/// When both sides said the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Agreed {
    pub(super) old: Point,
    pub(super) new: Point,
}

/// A key's state, by which a later one is known to be later.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Point {
    pub(super) revision: u64,
    pub(super) ends: Option<Instant>,
}

/// What makes both say the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// They do.
    Nothing,
    /// As the other side has it: the value, and what it has left to live.
    Write(Side),
    Delete(Side),
    /// Two owners of one key. It is for the caller to say who stays.
    Clash,
}

impl Seen {
    pub(super) fn point(&self) -> Point {
        Point { revision: self.revision, ends: self.ends }
    }

    /// Lives longer, by more than can't be told apart.
    pub(super) fn outlives(&self, other: &Self) -> bool {
        match (self.ends, other.ends) {
            (None, None) | (Some(_), None) => false,
            (None, Some(_)) => true,
            (Some(own), Some(others)) => own.saturating_duration_since(others) > SAME_END,
        }
    }
}

pub(super) fn decide(agreed: Option<Agreed>, old: Option<&Seen>, new: Option<&Seen>, now: Instant) -> Step {
    match (old, new) {
        (None, None) => Step::Nothing,
        (Some(old), None) => {
            alone(agreed.map(|agreed| (agreed.old, agreed.new)), old, now, (Side::Old, Side::New))
        }
        (None, Some(new)) => {
            alone(agreed.map(|agreed| (agreed.new, agreed.old)), new, now, (Side::New, Side::Old))
        }
        (Some(old), Some(new)) => both(agreed, old, new),
    }
}

/// A key that one side has; `agreed` is its own point and the other's, `sides` itself and the other.
fn alone(agreed: Option<(Point, Point)>, seen: &Seen, now: Instant, (own, other): (Side, Side)) -> Step {
    let Some((agreed, others)) = agreed else { return Step::Write(other) };
    if agreed.revision != seen.revision {
        return Step::Write(other);
    }
    // Gone from the other side, and here nothing was done since: it ended there, or was deleted.
    let soon = now + SAME_END;
    match (others.ends.is_some_and(|end| end <= soon), seen.ends.is_some_and(|end| end <= soon)) {
        (false, _) => Step::Delete(own),
        (true, true) => Step::Nothing,
        (true, false) => Step::Write(other),
    }
}

fn both(agreed: Option<Agreed>, old: &Seen, new: &Seen) -> Step {
    let changed_old = agreed.is_none_or(|agreed| agreed.old.revision != old.revision);
    let changed_new = agreed.is_none_or(|agreed| agreed.new.revision != new.revision);
    let same_value = same(&old.value, &new.value);
    match (changed_old, changed_new) {
        // A new leader of etcd gives every lease its first life again: no change of anybody's.
        (false, false) => Step::Nothing,
        _ if same_value && !old.outlives(new) && !new.outlives(old) => Step::Nothing,
        (true, false) => Step::Write(Side::New),
        (false, true) => Step::Write(Side::Old),
        (true, true) if same_value || same_owner(&old.value, &new.value) => match old.outlives(new) {
            // Who was written last lives longer.
            true => Step::Write(Side::New),
            false => Step::Write(Side::Old),
        },
        (true, true) => Step::Clash,
    }
}

/// Equal, or for configurations meaning the same.
pub(super) fn same(one: &str, other: &str) -> bool {
    let json = |text: &str| serde_json::from_str::<serde_json::Value>(text).ok();
    one == other || (owner(one).is_none() && json(one).is_some_and(|one| json(other) == Some(one)))
}

/// Two leases of one node.
pub(super) fn same_owner(one: &str, other: &str) -> bool {
    owner(one).is_some_and(|one| owner(other) == Some(one))
}

/// The node of a lease. A configuration is JSON too, and has none.
pub(super) fn owner(value: &str) -> Option<IpAddr> {
    LeaseAttrs::from_json(value).ok()?.node()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const A: &str = r#"{"PublicIP":"192.0.2.1"}"#;
    const A_TODAY: &str = r#"{"PublicIP":"192.0.2.1","PublicIPv6":null}"#;
    const B: &str = r#"{"PublicIP":"192.0.2.2"}"#;

    fn seen(value: &str, revision: u64, ends: Option<Instant>) -> Seen {
        Seen { value: value.into(), revision, ends }
    }

    fn agreed(old: &Seen, new: &Seen) -> Option<Agreed> {
        Some(Agreed { old: old.point(), new: new.point() })
    }

    #[test]
    fn what_one_side_did_the_other_does() {
        let now = Instant::now();
        let end = |seconds| Some(now + Duration::from_secs(seconds));
        let (old, new) = (seen(A, 5, end(3600)), seen(A, 7, end(3601)));
        let both = agreed(&old, &new);
        assert_eq!(decide(both, Some(&old), Some(&new), now), Step::Nothing);
        // A renewal, a new owner, another form, a reservation made and ended.
        for changed in [
            seen(A, 9, end(86400)),
            seen(B, 9, end(86400)),
            seen(A_TODAY, 9, end(3600)),
            seen(A, 9, None),
            seen(A, 9, end(60)),
        ] {
            assert_eq!(decide(both, Some(&changed), Some(&new), now), Step::Write(Side::New), "{changed:?}");
            assert_eq!(decide(both, Some(&old), Some(&changed), now), Step::Write(Side::Old), "{changed:?}");
        }
        // Deleted.
        assert_eq!(decide(both, None, Some(&new), now), Step::Delete(Side::New));
        assert_eq!(decide(both, Some(&old), None, now), Step::Delete(Side::Old));
        // Deleted here, and done anew there: it lives.
        assert_eq!(decide(both, None, Some(&seen(A, 9, end(86400))), now), Step::Write(Side::Old));
        assert_eq!(decide(both, None, None, now), Step::Nothing);
    }

    #[test]
    fn a_copy_that_ended_before_its_original_is_no_deletion() {
        let now = Instant::now();
        let end = |seconds| Some(now + Duration::from_secs(seconds));
        let (old, new) = (seen(A, 5, end(8)), seen(A, 7, end(1)));
        assert_eq!(decide(agreed(&old, &new), Some(&old), None, now), Step::Nothing);
        let old = seen(A, 5, end(500));
        assert_eq!(decide(agreed(&old, &new), Some(&old), None, now), Step::Write(Side::New));
    }

    #[test]
    fn a_new_leader_prolongs_nothing_on_the_other_side() {
        let now = Instant::now();
        let end = |seconds| Some(now + Duration::from_secs(seconds));
        let (old, new) = (seen(A, 5, end(3600)), seen(A, 7, end(3600)));
        let longer = seen(A, 7, end(86400));
        assert_eq!(decide(agreed(&old, &new), Some(&old), Some(&longer), now), Step::Nothing);
    }

    #[test]
    fn at_first_sight_the_one_written_last_is_right_and_two_owners_clash() {
        let now = Instant::now();
        let end = |seconds| Some(now + Duration::from_secs(seconds));
        for (old, new, wanted) in [
            (seen(A, 5, end(86400)), seen(A, 7, end(3600)), Step::Write(Side::New)),
            (seen(A, 5, end(3600)), seen(A_TODAY, 7, end(86400)), Step::Write(Side::Old)),
            (seen(A, 5, None), seen(A_TODAY, 7, end(86400)), Step::Write(Side::New)),
            (seen(A, 5, end(3600)), seen(B, 7, end(86400)), Step::Clash),
            (
                seen(r#"{"Network":"10.0.0.0/8"}"#, 5, None),
                seen(r#"{ "Network": "10.0.0.0/8" }"#, 7, None),
                Step::Nothing,
            ),
            (
                seen(r#"{"Network":"10.0.0.0/8"}"#, 5, None),
                seen(r#"{"Network":"10.0.0.0/9"}"#, 7, None),
                Step::Clash,
            ),
        ] {
            assert_eq!(decide(None, Some(&old), Some(&new), now), wanted, "{old:?} {new:?}");
        }
        assert_eq!(decide(None, Some(&seen(A, 5, None)), None, now), Step::Write(Side::New));
        assert_eq!(decide(None, None, Some(&seen(A, 5, None)), now), Step::Write(Side::Old));
    }

    /// Two keyspaces with one key, and the mirror between them.
    #[derive(Default)]
    struct Model {
        sides: BTreeMap<bool, Seen>,
        revision: u64,
        agreed: Option<Agreed>,
    }

    impl Model {
        fn put(&mut self, side: bool, value: &str, ends: Option<Instant>) {
            self.revision += 1;
            self.sides.insert(side, seen(value, self.revision, ends));
        }

        /// Mirrors until there is nothing to do; how many steps it took.
        fn settle(&mut self, now: Instant) -> usize {
            for steps in 0..10 {
                let (old, new) = (self.sides.get(&false).cloned(), self.sides.get(&true).cloned());
                let step = decide(self.agreed, old.as_ref(), new.as_ref(), now);
                match step {
                    Step::Nothing => {
                        self.agreed = old.zip(new).and_then(|(old, new)| agreed(&old, &new));
                        return steps;
                    }
                    Step::Write(side) => {
                        let from = if side == Side::New { old } else { new };
                        let from = from.unwrap();
                        self.put(side == Side::New, &from.value, from.ends);
                        self.agreed =
                            Some(Agreed { old: self.sides[&false].point(), new: self.sides[&true].point() });
                    }
                    Step::Clash => {
                        let old = old.unwrap();
                        self.put(true, &old.value, old.ends);
                    }
                    Step::Delete(side) => {
                        self.sides.remove(&(side == Side::New));
                    }
                }
            }
            10
        }
    }

    proptest! {
        /// Whatever happens to either side, they agree after a step or two, then nothing moves, and what was deleted
        /// on one side, while nothing was done on the other, is gone from both.
        #[test]
        fn both_sides_agree_soon_and_then_nothing_moves(
            actions in proptest::collection::vec((any::<bool>(), 0..5_u8, any::<bool>()), 1..40)
        ) {
            let now = Instant::now();
            let mut model = Model::default();
            for (side, action, settles) in actions {
                let was_agreed = model.agreed.is_some()
                    && model.sides.get(&false).map(Seen::point) == model.agreed.map(|agreed| agreed.old)
                    && model.sides.get(&true).map(Seen::point) == model.agreed.map(|agreed| agreed.new);
                match action {
                    0 => { model.sides.remove(&side); }
                    1 => model.put(side, A, Some(now + Duration::from_secs(86400))),
                    2 => model.put(side, A_TODAY, Some(now + Duration::from_secs(50000))),
                    3 => model.put(side, B, Some(now + Duration::from_secs(3600))),
                    _ => model.put(side, A, None),
                }
                if !settles {
                    continue;
                }
                let changed = model.sides.get(&side).cloned();
                prop_assert!(model.settle(now) <= 3);
                let values = |model: &Model| {
                    [false, true].map(|side| model.sides.get(&side).map(|seen| (seen.value.clone(), seen.ends)))
                };
                let [old, new] = values(&model);
                prop_assert_eq!(&old, &new);
                if was_agreed {
                    prop_assert_eq!(old, changed.map(|seen| (seen.value, seen.ends)));
                }
                let revision = model.revision;
                model.settle(now);
                prop_assert_eq!(model.revision, revision);
            }
        }
    }
}
