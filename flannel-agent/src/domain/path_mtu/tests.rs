//! Paths of made-up networks: what is found out, in how long and with how many probes.

use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::search::LEAST;
use super::*;

const TUNNEL: u32 = 1472;
const LIFETIME: Duration = Duration::from_secs(600);

/// What the routers on the way do with a probe that does not fit.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Icmp {
    Sent,
    Filtered,
}

/// One node, its peers, and one narrow link between them.
struct World {
    paths: PathMtus,
    now: Instant,
    rng: StdRng,
    /// MTU of the link.
    link: u32,
    icmp: Icmp,
    /// Peers answer at all.
    answers: bool,
    packets: u64,
    probes: Vec<Probe>,
    learned: Vec<String>,
}

fn subnet(number: u32) -> Ipv4Net {
    Ipv4Net::new(Ipv4Addr::from(0x0af4_0000 + (number << 8)), 24).unwrap()
}

fn node(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a63_0000 + number)
}

impl World {
    fn new(peers: u32, tunnel: u32, link: u32) -> Self {
        let mut paths = PathMtus::new(Some(tunnel), LIFETIME);
        paths.set_peers((1..=peers).map(|number| (subnet(number), node(number))));
        Self {
            paths,
            now: Instant::now(),
            rng: StdRng::seed_from_u64(7),
            link,
            icmp: Icmp::Sent,
            answers: true,
            packets: 0,
            probes: Vec::new(),
            learned: Vec::new(),
        }
    }

    fn filtered(mut self) -> Self {
        self.icmp = Icmp::Filtered;
        self
    }

    /// What a narrow link makes of a probe.
    fn carry(&self, probe: &Probe) -> Option<Heard> {
        if probe.size + OVERHEAD > self.link {
            let by = Some(Ipv4Addr::new(10, 99, 0, 1));
            return (self.icmp == Icmp::Sent).then_some(Heard::TooBig {
                node: probe.node,
                mtu: Some(self.link),
                by,
            });
        }
        self.answers.then_some(Heard::Answer { number: probe.number, from: probe.subnet.network() })
    }

    /// Sends what is due and brings back what comes of it, until nothing is due.
    fn turn(&mut self) {
        loop {
            let (probes, learned) = self.paths.due(self.now, &mut self.rng);
            self.learned.extend(learned.iter().map(ToString::to_string));
            if probes.is_empty() {
                return;
            }
            for probe in probes {
                self.probes.push(probe);
                if let Some(heard) = self.carry(&probe)
                    && let Some(learned) = self.paths.hear(heard, self.now)
                {
                    self.learned.push(learned.to_string());
                }
            }
        }
    }

    /// Traffic to everybody for so many seconds.
    fn run(&mut self, seconds: u32) {
        for _ in 0..seconds {
            self.packets += 100;
            for subnet in self.paths.to_watch(usize::MAX) {
                self.paths.watched(subnet, self.packets);
            }
            self.turn();
            self.now += Duration::from_secs(1);
        }
    }

    fn mtu(&self) -> (u32, String) {
        let PathMtu { mtu, how } = self.paths.path(subnet(1)).unwrap();
        (mtu, how.to_string())
    }
}

#[test]
fn a_path_that_carries_the_whole_tunnel_costs_one_probe_a_minute() {
    let mut world = World::new(1, TUNNEL, 1500);
    assert_eq!(world.mtu(), (1472, "the tunnel's, not probed for lack of traffic".into()));
    world.run(3);
    assert_eq!(world.mtu(), (1472, "the tunnel's, answered".into()));
    assert_eq!(world.probes.len(), 1);
    world.run(600);
    assert!((8..=13).contains(&world.probes.len()), "{} probes in ten minutes", world.probes.len());
    assert_eq!(world.paths.lowered().count(), 0);
    assert!(world.learned.is_empty());
}

#[test]
fn nobody_is_asked_without_traffic() {
    let mut world = World::new(50, TUNNEL, 1400);
    for _ in 0..100 {
        world.turn();
        world.now += Duration::from_secs(1);
    }
    // What answers to a peer's own probes makes is no traffic.
    for subnet in world.paths.to_watch(usize::MAX) {
        world.paths.watched(subnet, TRAFFIC - 1);
    }
    world.turn();
    assert!(world.probes.is_empty());
}

#[test]
fn a_narrow_link_that_says_so_is_known_at_once() {
    let mut world = World::new(1, TUNNEL, 1400);
    world.run(2);
    assert_eq!(world.mtu(), (1372, "10.99.0.1 said by ICMP that its next link carries 1400".into()));
    assert_eq!(world.probes.iter().map(|probe| probe.size).collect::<Vec<_>>(), [1472, 1372]);
    assert_eq!(
        world.learned,
        [
            "path to 10.244.1.0/24 at 10.99.0.1: MTU was 1472 and is 1372 (10.99.0.1 said by ICMP that its next link \
              carries 1400)"
        ]
    );
    assert_eq!(world.paths.lowered().collect::<Vec<_>>(), [(subnet(1), 1372)]);
    // Said once.
    world.run(1000);
    assert_eq!(world.learned.len(), 1);
}

#[test]
fn a_narrow_link_whose_icmp_is_filtered_is_found_in_seconds() {
    for link in [1492, 1480, 1450, 1420, 1400, 1280] {
        let mut world = World::new(1, TUNNEL, link).filtered();
        world.run(15);
        assert_eq!(world.mtu(), (link - 28, "answered, larger probes were not".into()), "{link}");
        assert!(world.probes.len() < 80, "{} probes", world.probes.len());
        assert_eq!(world.learned.len(), 1, "{:?}", world.learned);
    }
    let mut jumbo = World::new(1, 8972, 4000).filtered();
    jumbo.run(40);
    assert!((3968..=3972).contains(&jumbo.mtu().0), "{:?}", jumbo.mtu());
}

#[test]
fn a_path_grows_back_and_shrinks_again() {
    for icmp in [Icmp::Sent, Icmp::Filtered] {
        let mut world = World::new(1, TUNNEL, 1400);
        world.icmp = icmp;
        world.run(15);
        assert_eq!(world.mtu().0, 1372);
        world.link = 1500;
        let before = world.probes.len();
        world.run(450);
        assert_eq!(world.mtu().0, 1372, "a larger size is not tried all the time");
        assert!(world.probes.len() - before < 12, "{} confirmations", world.probes.len() - before);
        world.run(300);
        assert_eq!(world.mtu(), (1472, "the tunnel's, answered".into()));
        world.link = 1300;
        world.run(80);
        assert!((1268..=1272).contains(&world.mtu().0), "{:?}", world.mtu());
    }
}

#[test]
fn a_path_that_stays_narrow_is_not_searched_all_over_each_time() {
    let mut world = World::new(1, TUNNEL, 1400).filtered();
    world.run(15);
    let before = world.probes.len();
    world.run(6000);
    assert_eq!(world.mtu().0, 1372);
    assert!(world.probes.len() - before < 400, "{} probes in 100 minutes", world.probes.len() - before);
}

#[test]
fn a_forged_icmp_error_loses_to_an_answer() {
    let mut world = World::new(1, TUNNEL, 1500);
    world.packets = 100;
    world.paths.watched(subnet(1), 100);
    let (probes, _) = world.paths.due(world.now, &mut world.rng);
    let whole = probes[0];
    let forged = |mtu: u32| Heard::TooBig { node: whole.node, mtu: Some(mtu), by: Some(Ipv4Addr::LOCALHOST) };
    world.paths.hear(forged(700), world.now);
    world.turn();
    // Too late to be waited for, and in time to be right.
    world.paths.hear(Heard::Answer { number: whole.number, from: whole.subnet.network() }, world.now);
    world.run(3);
    assert_eq!(world.mtu(), (1472, "the tunnel's, answered".into()));
    // Out of the blue it does nothing, and nothing is lowered below what every host takes.
    world.paths.hear(forged(68), world.now);
    assert_eq!(world.mtu().0, 1472);
    world.run(70);
    assert_eq!(world.mtu().0, 1472);
}

#[test]
fn an_answer_from_another_host_or_to_nothing_counts_for_nothing() {
    let mut world = World::new(2, TUNNEL, 1500);
    world.answers = false;
    world.run(2);
    let asked = world.probes[0];
    for heard in [
        Heard::Answer { number: asked.number, from: subnet(2).network() },
        Heard::Answer { number: asked.number.wrapping_add(999), from: subnet(1).network() },
        Heard::TooBig { node: asked.node, mtu: None, by: None },
    ] {
        assert_eq!(world.paths.hear(heard, world.now), None);
    }
    assert_ne!(world.mtu().1, "the tunnel's, answered");
}

#[test]
fn a_peer_that_answers_nothing_changes_nothing_and_is_asked_ever_more_seldom() {
    let mut world = World::new(1, TUNNEL, 1500);
    world.answers = false;
    world.run(10);
    assert_eq!(world.mtu(), (1472, "the node answers no probes".into()));
    let first = world.probes.len();
    world.run(3600);
    let later = world.probes.len() - first;
    assert!(later < 12 * first, "{first} probes at first, {later} in the hour after");
    world.answers = true;
    world.run(700);
    assert_eq!(world.mtu(), (1472, "the tunnel's, answered".into()));
}

#[test]
fn ten_thousand_busy_peers_are_asked_within_the_budget() {
    let mut world = World::new(10_000, TUNNEL, 1400).filtered();
    let mut seen = 0;
    for second in 1..=60_u32 {
        world.run(1);
        let sent = u32::try_from(world.probes.len()).unwrap() - seen;
        seen += sent;
        // A volley may overdraw the account, which the next second pays for.
        assert!(sent < 60, "{sent} probes in second {second}");
        assert!(
            f64::from(seen) <= BURST + RATE * f64::from(second) + 12.0,
            "{seen} probes by second {second}"
        );
    }
    // Who has begun is finished before others begin.
    assert!(world.paths.lowered().count() > 5, "{}", world.paths.lowered().count());
}

#[test]
fn peers_are_watched_in_turn() {
    let mut paths = PathMtus::new(Some(TUNNEL), LIFETIME);
    paths.set_peers((1..=5).map(|number| (subnet(number), node(number))));
    let turns: Vec<Vec<u8>> =
        (0..3).map(|_| paths.to_watch(2).iter().map(|net| net.network().octets()[2]).collect()).collect();
    assert_eq!(turns, [[1, 2], [3, 4], [5, 1]]);
    paths.set_peers([]);
    assert!(paths.to_watch(2).is_empty());
}

#[test]
fn what_a_former_run_found_stands_until_it_is_known_better() {
    let mut world = World::new(0, TUNNEL, 1500);
    world.paths.inherit(subnet(1), 1372);
    world.paths.set_peers([(subnet(1), node(1)), (subnet(2), node(2))]);
    assert_eq!(world.mtu(), (1372, "found by a former run".into()));
    assert_eq!(world.paths.lowered().collect::<Vec<_>>(), [(subnet(1), 1372)]);
    world.run(3);
    assert_eq!(world.mtu(), (1472, "the tunnel's, answered".into()));
}

#[test]
fn a_moved_peer_is_a_new_path_and_a_fixed_mtu_is_not_probed() {
    let mut world = World::new(1, TUNNEL, 1400);
    world.run(3);
    world.paths.set_peers([(subnet(1), node(9))]);
    assert_eq!(world.mtu().0, 1472);
    world.run(3);
    assert_eq!(world.mtu().0, 1372);
    world.paths.resize(Some(1300));
    assert_eq!(world.mtu(), (1300, "the tunnel's, not probed for lack of traffic".into()));
    world.paths.resize(Some(1472));
    world.run(3);
    world.paths.resize(Some(8972));
    assert_eq!(world.mtu().0, 1372, "narrow until it is known better");
    world.paths.resize(None);
    assert_eq!(world.paths.path(subnet(1)), None);
    assert_eq!(world.paths.lowered().count(), 0);
    let before = world.probes.len();
    world.run(100);
    assert_eq!(world.probes.len(), before);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// What is in use always passes, and no more than a few bytes are given away.
    #[test]
    fn every_path_is_found_to_within_a_few_bytes(
        tunnel in 600_u32..9000,
        narrower in 0_u32..9000,
        sent: bool,
    ) {
        let link = (tunnel + OVERHEAD).saturating_sub(narrower).max(LEAST + OVERHEAD);
        let mut world = World::new(1, tunnel, link);
        if !sent { world.icmp = Icmp::Filtered; }
        world.run(60);
        let (found, real) = (world.mtu().0, link - OVERHEAD);
        prop_assert!(found <= real && real - found <= 4, "{found} of {real}; {} probes", world.probes.len());
        prop_assert!(world.probes.len() < 200);
    }

    /// Whatever is heard and whenever, nothing panics and nothing leaves its bounds.
    #[test]
    fn no_sequence_of_events_leaves_the_bounds(
        events in prop::collection::vec((0_u8..4, any::<u16>(), any::<u32>(), 0_u32..90), 0..120)
    ) {
        let mut world = World::new(3, TUNNEL, 1400);
        for (kind, number, mtu, seconds) in events {
            match kind {
                0 => { world.paths.hear(Heard::Answer { number: number % 64, from: subnet(1).network() }, world.now); }
                1 => {
                    let heard = Heard::TooBig { node: node(u32::from(number % 4)), mtu: Some(mtu), by: None };
                    world.paths.hear(heard, world.now);
                }
                2 => { world.paths.due(world.now, &mut world.rng); }
                _ => world.run(seconds % 4),
            }
            world.now += Duration::from_secs(seconds.into());
            for number in 1..=3 {
                let mtu = world.paths.path(subnet(number)).unwrap().mtu;
                prop_assert!((LEAST..=TUNNEL).contains(&mtu), "{mtu}");
            }
        }
    }
}
