//! The search on one path, as a state machine without a clock.
//!
//! | RFC 8899 §5.2 | here |
//! |---|---|
//! | DISABLED, BASE | resting, [`How::Assumed`]: the tunnel's MTU is used until somebody asks |
//! | SEARCHING | probes are out |
//! | SEARCH_COMPLETE | resting at a size that was answered; confirmed and raised at intervals, when there is traffic |
//! | ERROR | resting, [`How::Silent`] |
//!
//! Unlike the RFC's, the search goes down from the top: nearly every path carries the whole MTU, which one probe shows,
//! and until the rest is known packets are fragmented on the way and not lost. Sizes go out as a volley and are told
//! apart by who answers: one round divides what is open by the number of its sizes.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use super::{How, OVERHEAD, PathMtu, TRAFFIC};

/// What every IPv4 host takes in one piece (RFC 791 §3.1: 576), less the outer headers. Nothing is lowered below.
pub(super) const LEAST: u32 = 576 - OVERHEAD;

/// A size is taken not to pass after this many probes without an answer (RFC 8899 §5.1.2, MAX_PROBES).
const MAX_PROBES: u8 = 3;
/// As many are enough when a smaller one of the same moment was answered.
const ENOUGH: u8 = 2;

/// How long an answer may take before the next probe (RFC 8899 §5.1.1: PROBE_TIMER, at least a second). A little less, so
/// that a caller that ticks every second is not late. Later answers count still.
const PROBE_TIMER: Duration = Duration::from_millis(900);

/// A size that passed is confirmed this often.
const CONFIRM: Duration = Duration::from_secs(60);

/// The search ends when no more than this is open, in bytes.
const GRAIN: u32 = 4;

/// Sizes of one volley between two bounds.
const VOLLEY: u32 = 6;
/// Volleys of one search. Each divides what is open by seven, so 64 KiB need six.
const VOLLEYS: u8 = 8;

/// MTUs that links and tunnels are known to have: PPPoE, 6in4 and IPIP, GRE, GRE with key, VXLAN, VXLAN over IPsec and
/// clouds, WireGuard, and the least of IPv6. Asked first, since the answer is likely to be one of them.
const COMMON: [u32; 10] = [1492, 1480, 1476, 1460, 1450, 1440, 1420, 1400, 1350, 1280];

#[derive(Clone, Debug)]
pub(super) struct Path {
    node: Ipv4Addr,
    known: PathMtu,
    /// Packets sent, as last seen, and when it was last asked.
    packets: u64,
    packets_asked: u64,
    phase: Phase,
    /// Of the search under way, or the last one: a late answer counts.
    tries: Vec<Try>,
    /// The last ICMP error's: what would fit, and what it said.
    hint: Option<(u32, How)>,
    /// Searches in a row that nobody answered.
    silences: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// `None`: at once, when there is traffic.
    Resting {
        confirm_at: Option<Instant>,
        raise_at: Option<Instant>,
    },
    Searching {
        goal: u32,
        next: Instant,
        volleys: u8,
        raise_at: Option<Instant>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Try {
    size: u32,
    sent: u8,
    answered: Answered,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answered {
    Yes,
    NotYet,
}

impl Path {
    pub(super) fn new(node: Ipv4Addr, ceiling: u32, inherited: Option<u32>) -> Self {
        let known = match inherited {
            Some(mtu) => PathMtu { mtu, how: How::Inherited },
            None => PathMtu { mtu: ceiling, how: How::Assumed },
        };
        Self {
            node,
            known,
            packets: 0,
            packets_asked: 0,
            phase: Phase::Resting { confirm_at: None, raise_at: None },
            tries: Vec::new(),
            hint: None,
            silences: 0,
        }
    }

    pub(super) fn node(&self) -> Ipv4Addr {
        self.node
    }

    pub(super) fn mtu(&self) -> PathMtu {
        self.known
    }

    pub(super) fn is_searching(&self) -> bool {
        matches!(self.phase, Phase::Searching { .. })
    }

    /// So many packets were sent so far. A count that fell began anew.
    pub(super) fn sent(&mut self, packets: u64) {
        if packets < self.packets {
            self.packets_asked = packets;
        }
        self.packets = packets;
    }

    /// Since when [`Self::step`] has something to do, or from when on; `None` without traffic.
    pub(super) fn due_at(&self, now: Instant) -> Option<Instant> {
        match self.phase {
            Phase::Searching { next, .. } => Some(next),
            Phase::Resting { .. } if self.packets.saturating_sub(self.packets_asked) < TRAFFIC => None,
            Phase::Resting { confirm_at, raise_at } => {
                // Who was never asked has waited longest.
                let never_asked = now.checked_sub(CONFIRM).unwrap_or(now);
                Some(confirm_at.into_iter().chain(raise_at).min().unwrap_or(never_asked))
            }
        }
    }

    /// Begins a search or carries one on; the sizes to send now. A search that ends rests for `rest` before a larger size
    /// is tried.
    pub(super) fn step(&mut self, now: Instant, ceiling: u32, rest: Duration) -> Vec<u32> {
        if let Phase::Resting { raise_at, .. } = self.phase {
            self.begin(now, ceiling, raise_at);
        }
        self.advance(now, ceiling, rest)
    }

    fn begin(&mut self, now: Instant, ceiling: u32, raise_at: Option<Instant>) {
        self.packets_asked = self.packets;
        self.hint = None;
        let raise = raise_at.is_none_or(|at| at <= now);
        let goal = if raise { ceiling } else { self.known.mtu };
        self.tries.clear();
        self.add(goal);
        self.add(self.known.mtu);
        let raise_at = if raise { None } else { raise_at };
        self.phase = Phase::Searching { goal, next: now, volleys: 0, raise_at };
    }

    fn add(&mut self, size: u32) {
        if !self.tries.iter().any(|tried| tried.size == size) {
            self.tries.push(Try { size, sent: 0, answered: Answered::NotYet });
        }
    }

    /// The largest size that was answered.
    fn passes(&self) -> Option<u32> {
        self.tries.iter().filter(|tried| tried.answered == Answered::Yes).map(|tried| tried.size).max()
    }

    /// Nothing more is sent of this size.
    fn is_given_up(&self, tried: &Try, passes: Option<u32>) -> bool {
        let limit = if passes.is_some() { ENOUGH } else { MAX_PROBES };
        let hinted = self.hint.is_some_and(|(fits, _)| tried.size > fits);
        tried.answered == Answered::NotYet && (tried.sent >= limit || hinted)
    }

    fn advance(&mut self, now: Instant, ceiling: u32, rest: Duration) -> Vec<u32> {
        loop {
            let Phase::Searching { goal, next, volleys, raise_at } = self.phase else { return Vec::new() };
            if now < next {
                return Vec::new();
            }
            let passes = self.passes();
            let open: Vec<u32> = self
                .tries
                .iter()
                .filter(|tried| tried.answered == Answered::NotYet && passes.is_none_or(|p| tried.size > p))
                .filter(|tried| !self.is_given_up(tried, passes))
                .map(|tried| tried.size)
                .collect();
            let fails = self
                .tries
                .iter()
                .filter(|tried| self.is_given_up(tried, passes) && passes.is_none_or(|p| tried.size > p))
                .map(|tried| tried.size)
                .chain(self.hint.map(|(fits, _)| fits + 1))
                .min()
                .unwrap_or(goal + 1)
                .max(passes.map_or(0, |p| p + 1));
            let next_volley = volleys + 1;
            let widen = |from: u32, path: &mut Self| {
                for size in between(from, fails.min(goal + 1)) {
                    path.add(size);
                }
                path.phase = Phase::Searching { goal, next, volleys: next_volley, raise_at };
            };
            match passes {
                Some(passes) if passes >= goal => return self.finish(passes, now, (ceiling, rest)),
                Some(passes) if open.is_empty() => {
                    // Between the size in use and a larger one that fails, one look is enough until the next time.
                    let stuck = volleys > 0 && passes == self.known.mtu;
                    if fails - passes <= GRAIN || volleys >= VOLLEYS || stuck {
                        return self.finish(passes, now, (ceiling, rest));
                    }
                    widen(passes, self);
                }
                // The first answer is late: is anybody there, and for how much?
                None if volleys == 0 && self.tries.iter().all(|tried| tried.sent > 0) => {
                    self.add(LEAST.min(goal));
                    widen(LEAST, self);
                }
                None if open.is_empty() => return self.give_up(now, rest),
                Some(_) | None => {
                    self.phase = Phase::Searching { goal, next: now + PROBE_TIMER, volleys, raise_at };
                    for tried in self.tries.iter_mut().filter(|tried| open.contains(&tried.size)) {
                        tried.sent += 1;
                    }
                    return open;
                }
            }
        }
    }

    /// The search is over: `passes` is what the path carries.
    fn finish(&mut self, passes: u32, now: Instant, (ceiling, rest): (u32, Duration)) -> Vec<u32> {
        let how = match self.hint {
            _ if passes >= ceiling => How::Whole,
            Some((fits, how)) if fits == passes => how,
            // A confirmation says nothing about larger sizes.
            _ if passes == self.known.mtu && self.known.how != How::Assumed => match self.known.how {
                How::Inherited | How::Silent => How::Searched,
                how => how,
            },
            _ => How::Searched,
        };
        self.known = PathMtu { mtu: passes, how };
        self.silences = 0;
        self.rest(now + rest.min(CONFIRM), now + rest);
        Vec::new()
    }

    /// Nobody answers, not even the least size.
    fn give_up(&mut self, now: Instant, rest: Duration) -> Vec<u32> {
        if self.known.how != How::Inherited {
            self.known.how = How::Silent;
        }
        self.silences = self.silences.saturating_add(1);
        let again = now + rest.min(CONFIRM * 2_u32.saturating_pow(self.silences.min(8) - 1));
        self.rest(again, again);
        Vec::new()
    }

    fn rest(&mut self, confirm_at: Instant, raise_at: Instant) {
        let planned = match self.phase {
            Phase::Searching { raise_at, .. } | Phase::Resting { raise_at, .. } => raise_at,
        };
        let raise_at = planned.unwrap_or(raise_at);
        self.phase = Phase::Resting { confirm_at: Some(confirm_at), raise_at: Some(raise_at) };
    }

    /// A probe of this size was answered.
    pub(super) fn answered(&mut self, size: u32, now: Instant, ceiling: u32) {
        let Some(tried) = self.tries.iter_mut().find(|tried| tried.size == size) else { return };
        tried.answered = Answered::Yes;
        match self.phase {
            // An ICMP error may have been wrong, or forged.
            Phase::Resting { .. } if size > self.known.mtu => {
                let how = if size >= ceiling { How::Whole } else { How::Searched };
                self.known = PathMtu { mtu: size, how };
            }
            Phase::Resting { .. } => {}
            Phase::Searching { goal, volleys, raise_at, .. } => {
                let passes = self.passes();
                let open = self.tries.iter().any(|tried| {
                    tried.answered == Answered::NotYet
                        && passes.is_none_or(|p| tried.size > p)
                        && self.hint.is_none_or(|(fits, _)| tried.size <= fits)
                });
                if !open || size >= goal {
                    self.phase = Phase::Searching { goal, next: now, volleys, raise_at };
                }
            }
        }
    }

    /// An ICMP error says that a link carries `mtu`: what fits it is asked next.
    pub(super) fn hint(&mut self, mtu: u32, by: Option<Ipv4Addr>, now: Instant) {
        let Phase::Searching { goal, volleys, raise_at, .. } = self.phase else { return };
        let fits = mtu.saturating_sub(OVERHEAD).max(LEAST);
        let news = self.hint.is_none_or(|(known, _)| fits < known);
        // It can't be news about a size that has passed, nor about none that was sent.
        if !news || fits >= goal || self.passes().is_some_and(|passes| fits < passes) {
            return;
        }
        self.hint = Some((fits, How::Icmp { mtu, by }));
        self.add(fits);
        self.phase = Phase::Searching { goal, next: now, volleys, raise_at };
    }
}

/// Sizes above `passes` and below `fails`: those that links are known to have, else evenly spread.
fn between(passes: u32, fails: u32) -> Vec<u32> {
    let inside = |size: &u32| *size > passes && *size < fails;
    let common: Vec<u32> = COMMON.iter().map(|mtu| mtu - OVERHEAD).filter(inside).collect();
    if common.len() > 2 {
        return common;
    }
    let open = fails.saturating_sub(passes);
    let even = (1..=VOLLEY).map(|part| passes + open * part / (VOLLEY + 1)).filter(inside);
    let mut sizes: Vec<u32> = even.chain(common).collect();
    sizes.sort_unstable();
    sizes.dedup();
    sizes
}
