//! How large a packet each peer's path carries, found out by probing (RFC 8899, as RFC 4821 before it).
//!
//! The tunnel's datagrams leave with DF 0, as kernel vxlan's: a narrow link on the way cuts them in two, which works and
//! is slow at both ends. A program can't learn from the ICMP errors of such a link, because there are none without DF. So
//! the agent asks: echo requests to the peer's tunnel address, in datagrams of its own that must not be fragmented. Any
//! host that speaks flannel's udp answers them with its kernel. What passes becomes the MTU of a route to that peer's
//! subnet alone, and the kernel tells pods and sockets by itself (ICMP fragmentation needed, `EMSGSIZE`).
//!
//! [`PathMtus`] decides whom to ask and when; `search.rs` is the search on one path. Both are values: time, chance and
//! what was heard are arguments.
//!
//! An ICMP error is a hint, never a fact: the size it names is probed, and a larger size that is answered after all wins
//! (RFC 8899 §4.6). Only paths with traffic are asked, within a budget, however many peers there are.

mod search;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use ipnet::Ipv4Net;
use rand::Rng;

use self::search::Path;

/// Outer IPv4 and UDP header of a probe.
const OVERHEAD: u32 = 28;

/// Probes a second, and how many may leave at once: full-size ones of all nodes together are a few kB/s each.
const RATE: f64 = 20.0;
const BURST: f64 = 40.0;

/// Searches under way at a time, so that those that take long are finished at all. On most paths one lasts a round trip.
const SEARCHES: usize = 8;

/// Packets to a peer since it was last asked that make its path worth asking about. More than a peer's own probes cause
/// as answers, or two idle agents would keep each other busy for ever.
const TRAFFIC: u64 = 32;

/// Probes remembered, to know which path an answer is about.
const MEMORY: usize = 1024;

/// An echo request to send to a peer, in a datagram that must not be fragmented.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// The peer's; its base address is asked.
    pub subnet: Ipv4Net,
    pub node: Ipv4Addr,
    /// Bytes of the inner packet.
    pub size: u32,
    /// Comes back with the answer.
    pub number: u16,
}

/// What came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Heard {
    /// The host at inner address `from` answered.
    Answer { number: u16, from: Ipv4Addr },
    /// Something on the way to `node`, or this host itself, could not carry a probe and names the MTU of the next link,
    /// when it does (RFC 1191 §4).
    TooBig { node: Ipv4Addr, mtu: Option<u32>, by: Option<Ipv4Addr> },
}

/// How the MTU of a path is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// It is the tunnel's; nobody has asked yet.
    Assumed,
    /// A packet of the tunnel's own MTU was answered.
    Whole,
    /// This size was answered, larger ones were not.
    Searched,
    /// A router, or this host itself, named the MTU of a link, and what fits it was answered.
    Icmp { mtu: u32, by: Option<Ipv4Addr> },
    /// A former run of the agent had found it.
    Inherited,
    /// The peer answers nothing; what was known before stays.
    Silent,
}

/// What is known of one path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathMtu {
    /// Largest inner packet in bytes.
    pub mtu: u32,
    pub how: How,
}

/// A path's MTU is another one now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Learned {
    pub subnet: Ipv4Net,
    pub node: Ipv4Addr,
    pub before: u32,
    pub now: PathMtu,
}

/// The paths to all peers.
#[derive(Debug)]
pub struct PathMtus {
    /// The tunnel's MTU; `None` while nothing is to be found out.
    ceiling: Option<u32>,
    /// A larger size is tried again after this long.
    lifetime: Duration,
    paths: BTreeMap<Ipv4Net, Path>,
    inherited: BTreeMap<Ipv4Net, u32>,
    asked: Vec<Option<(u16, Ipv4Net, u32)>>,
    next_number: u16,
    tokens: f64,
    filled: Option<Instant>,
    /// Where the next look at counters begins.
    cursor: Option<Ipv4Net>,
}

impl PathMtus {
    /// Nothing is known. `lifetime` is how long a lowered MTU stands before a larger one is tried.
    pub fn new(ceiling: Option<u32>, lifetime: Duration) -> Self {
        Self {
            ceiling,
            lifetime,
            paths: BTreeMap::new(),
            inherited: BTreeMap::new(),
            asked: vec![None; MEMORY],
            next_number: 0,
            tokens: BURST,
            filled: None,
            cursor: None,
        }
    }

    /// The tunnel's MTU is another one, or fixed by the operator: everything is found out anew.
    pub fn resize(&mut self, ceiling: Option<u32>) {
        if self.ceiling != ceiling {
            self.ceiling = ceiling;
            // What was narrow is narrow until it is known better.
            self.inherited =
                self.lowered().filter(|(_, mtu)| ceiling.is_some_and(|ceiling| *mtu < ceiling)).collect();
            let peers: Vec<_> = self.paths.iter().map(|(subnet, path)| (*subnet, path.node())).collect();
            self.paths.clear();
            self.set_peers(peers);
        }
    }

    /// What a former run had found for this subnet.
    pub fn inherit(&mut self, subnet: Ipv4Net, mtu: u32) {
        self.inherited.insert(subnet, mtu);
    }

    /// These are the peers now. A peer that moved to another node is a new one.
    pub fn set_peers(&mut self, peers: impl IntoIterator<Item = (Ipv4Net, Ipv4Addr)>) {
        let Some(ceiling) = self.ceiling else {
            self.paths.clear();
            return;
        };
        let mut former = std::mem::take(&mut self.paths);
        for (subnet, node) in peers {
            let path = former.remove(&subnet).filter(|path| path.node() == node).unwrap_or_else(|| {
                let inherited = self.inherited.remove(&subnet).filter(|mtu| *mtu < ceiling);
                Path::new(node, ceiling, inherited)
            });
            self.paths.insert(subnet, path);
        }
    }

    /// The next at most `count` peers whose traffic is worth a look, in turn.
    pub fn to_watch(&mut self, count: usize) -> Vec<Ipv4Net> {
        let after = |subnet: &Ipv4Net| self.cursor.is_none_or(|cursor| *subnet > cursor);
        let behind = self.paths.keys().filter(|subnet| after(subnet));
        let before = self.paths.keys().filter(|subnet| !after(subnet));
        let chosen: Vec<Ipv4Net> = behind.chain(before).take(count).copied().collect();
        self.cursor = chosen.last().copied();
        chosen
    }

    /// `packets` have been sent to this peer so far.
    pub fn watched(&mut self, subnet: Ipv4Net, packets: u64) {
        if let Some(path) = self.paths.get_mut(&subnet) {
            path.sent(packets);
        }
    }

    /// What is to be sent now, and what has come of probes that nobody answered.
    pub fn due(&mut self, now: Instant, rng: &mut impl Rng) -> (Vec<Probe>, Vec<Learned>) {
        self.refill(now);
        let (mut probes, mut learned) = (Vec::new(), Vec::new());
        let Some(ceiling) = self.ceiling else { return (probes, learned) };
        let mut due: Vec<(bool, Instant, Ipv4Net)> = self
            .paths
            .iter()
            .filter_map(|(subnet, path)| Some((!path.is_searching(), path.due_at(now)?, *subnet)))
            .filter(|(_, at, _)| *at <= now)
            .collect();
        // What was begun is finished, then who has waited longest: a small budget starves nobody.
        due.sort();
        let mut searches = self.paths.values().filter(|path| path.is_searching()).count();
        for (is_new, _, subnet) in due {
            if self.tokens < 1.0 || (is_new && searches >= SEARCHES) {
                break;
            }
            searches += usize::from(is_new);
            let Some(path) = self.paths.get_mut(&subnet) else { continue };
            let before = path.mtu();
            let rest = self.lifetime.mul_f64(rng.random_range(0.8..=1.2));
            let sizes = path.step(now, ceiling, rest);
            if path.mtu().mtu != before.mtu {
                learned.push(Learned { subnet, node: path.node(), before: before.mtu, now: path.mtu() });
            }
            let node = path.node();
            for size in sizes {
                self.tokens -= 1.0;
                let number = self.next_number;
                self.next_number = number.wrapping_add(1);
                if let Some(slot) = self.asked.get_mut(usize::from(number) % MEMORY) {
                    *slot = Some((number, subnet, size));
                }
                probes.push(Probe { subnet, node, size, number });
            }
        }
        (probes, learned)
    }

    /// Takes over what came back. [`Self::due`] may have something to send right after.
    pub fn hear(&mut self, heard: Heard, now: Instant) -> Option<Learned> {
        let ceiling = self.ceiling?;
        match heard {
            Heard::Answer { number, from } => {
                let (_, subnet, size) = (*self.asked.get(usize::from(number) % MEMORY)?)
                    .filter(|(asked, ..)| *asked == number)?;
                let path = self.paths.get_mut(&subnet).filter(|_| subnet.network() == from)?;
                let before = path.mtu().mtu;
                path.answered(size, now, ceiling);
                let after = path.mtu();
                (after.mtu != before).then(|| Learned { subnet, node: path.node(), before, now: after })
            }
            Heard::TooBig { node, mtu, by } => {
                let mtu = mtu?;
                for path in self.paths.values_mut().filter(|path| path.node() == node) {
                    path.hint(mtu, by, now);
                }
                None
            }
        }
    }

    /// The subnets whose path carries less than the tunnel, and how much.
    pub fn lowered(&self) -> impl Iterator<Item = (Ipv4Net, u32)> {
        let ceiling = self.ceiling.unwrap_or(0);
        let mtus = self.paths.iter().map(|(subnet, path)| (*subnet, path.mtu().mtu));
        mtus.filter(move |(_, mtu)| *mtu < ceiling)
    }

    /// What is known of the path to a subnet; `None` when it is not looked at.
    pub fn path(&self, subnet: Ipv4Net) -> Option<PathMtu> {
        self.paths.get(&subnet).map(Path::mtu)
    }

    fn refill(&mut self, now: Instant) {
        let passed = self.filled.map_or(Duration::ZERO, |filled| now.saturating_duration_since(filled));
        self.tokens = (self.tokens + passed.as_secs_f64() * RATE).min(BURST);
        self.filled = Some(now);
    }
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Assumed => f.write_str("the tunnel's, not probed for lack of traffic"),
            Self::Whole => f.write_str("the tunnel's, answered"),
            Self::Searched => f.write_str("answered, larger probes were not"),
            Self::Icmp { mtu, by: Some(by) } => {
                write!(f, "{by} said by ICMP that its next link carries {mtu}")
            }
            Self::Icmp { mtu, by: None } => write!(f, "this host's way there carries {mtu}"),
            Self::Inherited => f.write_str("found by a former run"),
            Self::Silent => f.write_str("the node answers no probes"),
        }
    }
}

impl fmt::Display for Learned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { subnet, node, before, now: PathMtu { mtu, how } } = self;
        write!(f, "path to {subnet} at {node}: MTU was {before} and is {mtu} ({how})")
    }
}
