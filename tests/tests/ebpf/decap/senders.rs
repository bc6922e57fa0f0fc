//! Who may send what to whom, and under whose name packets are counted.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use flannel_common::{
    counter::Counter,
    tunnel::{SOURCE_CHECK_ENFORCE, SOURCE_CHECK_OBSERVE, SUBNETS_IN_ORDER, Settings},
};
use flannel_tests::programs::{Context, Programs, verdict, xdp_builds};
use nix::{
    sys::time::TimeValLike as _,
    time::{ClockId, clock_gettime},
};

use super::{Fate, Row, check, expect, load, tc};
use crate::packets::{
    Ip, NODE, OWN, PEER, POD, REMOTE_POD, STRANGER, datagram, delivered, ethernet, frame, hashed, peer,
};

pub(super) fn source_rows() -> Result<()> {
    const RIGHT: Option<(Counter, Counter)> = None;
    const SOURCE: Option<(Counter, Counter)> = Some((Counter::SourceObserved, Counter::SourceRefused));
    const DESTINATION: Option<(Counter, Counter)> =
        Some((Counter::DestinationObserved, Counter::DestinationRefused));
    let cases = [
        ("peer's pod", NODE, REMOTE_POD, POD, RIGHT),
        ("peer's tunnel device", NODE, [10, 244, 2, 0], POD, RIGHT),
        ("peer's host address", NODE, NODE, POD, RIGHT),
        ("to our tunnel device", NODE, REMOTE_POD, [10, 244, 1, 0], RIGHT),
        ("unknown node", STRANGER, REMOTE_POD, POD, SOURCE),
        ("right node, nobody's pod", NODE, [10, 244, 3, 7], POD, SOURCE),
        ("right node, from the outside", NODE, [8, 8, 8, 8], POD, SOURCE),
        ("right node, another's host address", NODE, STRANGER, POD, SOURCE),
        ("right node, our own subnet", NODE, [10, 244, 1, 9], POD, SOURCE),
        ("right node, our underlay address", NODE, OWN, POD, SOURCE),
        ("right node, loopback", NODE, [127, 0, 0, 1], POD, SOURCE),
        ("right node, multicast", NODE, [224, 0, 0, 5], POD, SOURCE),
        ("our own subnet as host address", [10, 244, 1, 9], [10, 244, 1, 9], POD, SOURCE),
        ("loopback as host address", [127, 0, 0, 1], [127, 0, 0, 1], POD, SOURCE),
        ("multicast as host address", [224, 0, 0, 5], [224, 0, 0, 5], POD, SOURCE),
        ("to another node's pod", NODE, REMOTE_POD, [10, 244, 3, 1], DESTINATION),
        ("back to the sender's pods", NODE, REMOTE_POD, [10, 244, 2, 9], DESTINATION),
    ];
    let outside_the_network = [
        ("to our underlay address", OWN),
        ("to loopback", [127, 0, 0, 1]),
        ("to multicast", [224, 0, 0, 5]),
        ("to the outside", [8, 8, 8, 8]),
    ];
    let mut off = load(0)?;
    let mut observe = load(SOURCE_CHECK_OBSERVE)?;
    let mut enforce = load(SOURCE_CHECK_ENFORCE)?;
    for (what, node, source, destination, objection) in cases {
        let inner = Ip { source, destination, ..Ip::default() };
        let frame = ethernet(0x0800, &datagram(node, OWN, &inner.bytes()).bytes());
        let row = |fate| [Row { what, frame: frame.clone(), fate }];
        let whole = delivered(&inner);
        check(&mut off, &row(Fate::Delivered(whole.clone()))).context("off")?;
        match objection {
            None => {
                check(&mut observe, &row(Fate::Delivered(whole.clone()))).context("observe")?;
                check(&mut enforce, &row(Fate::Delivered(whole))).context("enforce")?;
            }
            Some((observed, refused)) => {
                check(&mut observe, &row(Fate::Observed(observed, whole))).context("observe")?;
                check(&mut enforce, &row(Fate::Dropped(refused))).context("enforce")?;
            }
        }
    }
    for (what, destination) in outside_the_network {
        let inner = Ip { destination, ..Ip::default() };
        let row = |fate| Row { what, frame: frame(&inner), fate };
        let whole = delivered(&inner);
        tc(&mut off, &row(Fate::Delivered(whole.clone()))).with_context(|| format!("off: {what}"))?;
        tc(&mut observe, &row(Fate::Observed(Counter::DestinationObserved, whole)))
            .with_context(|| format!("observe: {what}"))?;
        check(&mut enforce, &[row(Fate::Dropped(Counter::DestinationRefused))]).context("enforce")?;
    }
    Ok(())
}

pub(super) fn outside_the_network() -> Result<()> {
    let mut programs = load(SOURCE_CHECK_OBSERVE)?;
    let frame = frame(&Ip { destination: [8, 8, 8, 8], ..Ip::default() });
    for program in xdp_builds() {
        expect(&programs.run(program, &frame, Context::Plain)?, verdict::XDP_PASS, &frame, &[])
            .context(program)?;
    }
    Ok(())
}

pub(super) fn peer_counts() -> Result<()> {
    let mut programs = load(SOURCE_CHECK_OBSERVE)?;
    let pods = frame(&Ip::default());
    let strangers = ethernet(0x0800, &datagram(STRANGER, OWN, &Ip::default().bytes()).bytes());
    let hosts = frame(&Ip { source: NODE, ..Ip::default() });
    for frame in [&pods, &strangers, &hosts] {
        programs.run("flannel_ingress", frame, Context::Plain)?;
        programs.run("flannel_decap_xdp", frame, Context::Plain)?;
    }
    let count = programs.peer_count(PEER)?;
    ensure!((count.rx_packets, count.rx_bytes) == (2, 80), "{count:?}");
    ensure!((count.tx_packets, count.tx_bytes) == (0, 0), "{count:?}");
    let now = u64::try_from(clock_gettime(ClockId::CLOCK_MONOTONIC)?.num_nanoseconds())?;
    let age = now.saturating_sub(count.last_seen);
    ensure!(count.last_seen > 0 && age < 60_000_000_000, "seen {age} ns ago: {count:?}");
    // Stranger's packets that claim to be the peer's: delivered, and held against the peer's name.
    let drops = programs.peer_drops(PEER)?;
    ensure!(drops == BTreeMap::from([(Counter::SourceObserved, 2)]), "{drops:?}");
    Ok(())
}

/// Packets that are dropped, each twice (tc and XDP), under the peer they belong to.
pub(super) fn peer_drops() -> Result<()> {
    let mut programs = load(SOURCE_CHECK_ENFORCE)?;
    let old = Ip { ttl: 1, ..Ip::default() };
    let elsewhere = Ip { destination: [10, 244, 3, 1], ..Ip::default() };
    let nobodys = Ip { source: [10, 244, 3, 7], ..Ip::default() };
    let forged = ethernet(0x0800, &datagram(STRANGER, OWN, &Ip::default().bytes()).bytes());
    for frame in [frame(&old), frame(&elsewhere), frame(&nobodys), forged] {
        programs.run("flannel_ingress", &frame, Context::Plain)?;
        programs.run("flannel_decap_xdp", &frame, Context::Plain)?;
    }
    let drops = programs.peer_drops(PEER)?;
    let wanted = [Counter::TtlExpired, Counter::SourceRefused, Counter::DestinationRefused].map(|c| (c, 2));
    ensure!(drops == BTreeMap::from(wanted), "{drops:?}");
    Ok(())
}

/// A network that fills all places: the first and the last subnet of a /8, and those next to it.
pub(super) fn places() -> Result<()> {
    for in_order in [SUBNETS_IN_ORDER, 0] {
        let mut programs = Programs::load(&Settings {
            network: u32::from_ne_bytes([10, 0, 0, 0]),
            network_mask: u32::from_ne_bytes([255, 0, 0, 0]),
            ..hashed(SOURCE_CHECK_ENFORCE | in_order)
        })?;
        for subnet in [[10, 0, 0, 0], [10, 255, 255, 0]] {
            programs.add_peer(subnet.into(), peer(2))?;
        }
        let rows: Vec<Row> = [
            ("the first address of the first subnet", [10, 0, 0, 0], true),
            ("the last address of the last subnet", [10, 255, 255, 255], true),
            ("a subnet nobody leases", [10, 0, 1, 0], false),
            ("in front of the network", [9, 255, 255, 255], false),
            ("behind it, where the map's order stands", [11, 0, 0, 0], false),
            ("far behind it", [223, 255, 255, 255], false),
        ]
        .into_iter()
        .map(|(what, source, is_right)| {
            let inner = Ip { source, ..Ip::default() };
            let fate = match is_right {
                true => Fate::Delivered(delivered(&inner)),
                false => Fate::Dropped(Counter::SourceRefused),
            };
            Row { what, frame: frame(&inner), fate }
        })
        .collect();
        check(&mut programs, &rows).with_context(|| format!("flags {in_order}"))?;
    }
    Ok(())
}
