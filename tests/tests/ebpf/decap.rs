//! Decapsulation, every row through tc and through both XDP programs: the same packet must have the same fate in all.

use std::cell::RefCell;
use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use flannel_common::{
    counter::Counter,
    tunnel::{
        DRESSED, SOURCE_CHECK_ENFORCE, SOURCE_CHECK_OBSERVE, Settings, XDP_MARK, XDP_PROBE, XDP_PROBE_MARK,
    },
};
use flannel_tests::{
    kernel::{Needs, XDP_TEST_METADATA},
    programs::{Context, Outcome, Programs, verdict, xdp_builds},
};
use libtest_mimic::Trial;
use nix::{
    sys::time::TimeValLike as _,
    time::{ClockId, clock_gettime},
};
use proptest::{
    prelude::*,
    test_runner::{Config, TestCaseError, TestRunner},
};

use crate::{
    packets::{
        ETHERNET, Ip, NODE, OVERHEAD, OWN, PEER, POD, PORT, REMOTE_POD, STRANGER, TCP, datagram, delivered,
        ethernet, frame, peer, peer_subnet, settings, transport, udp, with_udp_checksum,
    },
    trial,
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("decap::a_datagram_of_the_tunnel_is_one_inner_packet_afterwards", delivered_rows),
        trial("decap::what_is_not_the_tunnels_goes_on_untouched", foreign_rows),
        trial("decap::odd_lengths_go_to_the_socket_and_are_counted", length_rows),
        trial("decap::a_frame_cut_at_any_byte_is_never_read_past_its_end", truncation),
        trial("decap::ttl_ends_at_one_and_the_checksum_follows_it", ttl_rows),
        trial("decap::ecn_is_combined_as_rfc_6040_says", ecn_rows),
        trial("decap::the_source_check_enforces_observes_or_is_off", source_rows),
        trial("decap::the_probe_marks_and_changes_nothing", probe_rows),
        XDP_TEST_METADATA.trial(trial("decap::without_room_for_the_mark_the_frame_stays_whole", no_metadata)),
        trial("decap::xdp_leaves_to_tc_what_tc_would_not_believe", outside_the_network),
        trial("decap::tcp_is_dressed_for_the_room_while_its_door_is_there", dressed_rows),
        trial("decap::a_gso_packet_counts_its_segments", gso_rows),
        trial("decap::packets_of_a_peer_are_counted_for_it", peer_counts),
        trial("decap::dropped_packets_count_for_the_peer_they_claim_to_come_from", peer_drops),
        trial("decap::random_datagrams_come_out_whole", random_rows),
    ]
}

/// One packet and what must come of it.
struct Row {
    what: &'static str,
    frame: Vec<u8>,
    fate: Fate,
}

enum Fate {
    /// Delivered as these bytes.
    Delivered(Vec<u8>),
    /// As above, and counted as observed.
    Observed(Counter, Vec<u8>),
    Untouched,
    /// Untouched and counted by whoever is last, i.e. tc.
    HandedOn(Counter),
    Dropped(Counter),
}

fn load(flags: u16) -> Result<Programs> {
    let mut programs = Programs::load(&settings(flags))?;
    programs.add_peer(peer_subnet(), peer(2))?;
    Ok(programs)
}

/// vxlan as RFC 7348 has it, to the address and port of the room's only socket, around the packet with its TTL lowered.
fn dressed_rows() -> Result<()> {
    // Any interface can be the door: this is lo.
    const DOOR: u32 = 1;
    let flags = DRESSED | SOURCE_CHECK_ENFORCE;
    let mut programs = Programs::load(&Settings { gro_pair: DOOR, ..settings(flags) })?;
    programs.add_peer(peer_subnet(), peer(2))?;
    let tcp = |length| Ip { protocol: TCP, payload: transport(length), ..Ip::default() };
    let run = |programs: &mut Programs, inner: &Ip, want: &[u8], counter| -> Result<()> {
        let outcome = programs.run("flannel_ingress", &frame(inner), Context::Plain)?;
        expect(&outcome, verdict::TC_REDIRECT, want, &[counter])
    };
    // Without the door, packets come in as ever.
    run(&mut programs, &tcp(60), &delivered(&tcp(60)), Counter::DecapTc)?;
    programs.add_port(DOOR)?;
    for length in [20, 21, 60, 1400, 1432] {
        let inner = tcp(length);
        let behind_vxlan = ethernet(0x0800, &Ip { ttl: inner.ttl - 1, ..inner.clone() }.bytes());
        let behind_vxlan = [&frame(&inner)[..12], &behind_vxlan[12..]].concat();
        let payload = [&[0x08, 0, 0, 0, 0, 0, 1, 0], behind_vxlan.as_slice()].concat();
        let outer = Ip {
            source: [192, 0, 2, 2],
            destination: [192, 0, 2, 1],
            id: 0,
            fragment: 0,
            payload: udp(0xC123, 4789, &payload),
            ..Ip::default()
        };
        let mut want = ethernet(0x0800, &outer.bytes());
        want[..12].copy_from_slice(&[0x02, 0xF1, 0xA7, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        run(&mut programs, &inner, &want, Counter::DecapTc).with_context(|| format!("{length} bytes"))?;
    }
    let datagram = Ip::default();
    run(&mut programs, &datagram, &delivered(&datagram), Counter::DecapTc).context("UDP")?;
    // Who may send is asked before.
    let forged = ethernet(0x0800, &crate::packets::datagram(STRANGER, OWN, &tcp(60).bytes()).bytes());
    let outcome = programs.run("flannel_ingress", &forged, Context::Plain)?;
    ensure!(outcome.verdict == verdict::TC_SHOT, "{outcome:?}");
    Ok(())
}

fn check(programs: &mut Programs, rows: &[Row]) -> Result<()> {
    for row in rows {
        tc(programs, row).with_context(|| format!("tc: {}", row.what))?;
        for program in xdp_builds() {
            xdp(programs, program, row).with_context(|| format!("{program}: {}", row.what))?;
        }
    }
    Ok(())
}

fn tc(programs: &mut Programs, row: &Row) -> Result<()> {
    let outcome = programs.run("flannel_ingress", &row.frame, Context::Plain)?;
    match &row.fate {
        Fate::Delivered(packet) => expect(&outcome, verdict::TC_REDIRECT, packet, &[Counter::DecapTc]),
        Fate::Observed(counter, packet) => {
            expect(&outcome, verdict::TC_REDIRECT, packet, &[Counter::DecapTc, *counter])
        }
        Fate::Untouched => expect(&outcome, verdict::NEXT, &row.frame, &[]),
        Fate::HandedOn(counter) => expect(&outcome, verdict::NEXT, &row.frame, &[*counter]),
        Fate::Dropped(counter) => expect(&outcome, verdict::TC_SHOT, &row.frame, &[*counter]),
    }
}

fn xdp(programs: &mut Programs, program: &str, row: &Row) -> Result<()> {
    let outcome = programs.run(program, &row.frame, Context::Plain)?;
    match &row.fate {
        Fate::Delivered(packet) => {
            expect(&outcome, verdict::XDP_PASS, &marked(XDP_MARK, packet), &[Counter::DecapXdp])
        }
        Fate::Observed(counter, packet) => {
            expect(&outcome, verdict::XDP_PASS, &marked(XDP_MARK, packet), &[Counter::DecapXdp, *counter])
        }
        Fate::Untouched | Fate::HandedOn(_) => expect(&outcome, verdict::XDP_PASS, &row.frame, &[]),
        Fate::Dropped(counter) => expect(&outcome, verdict::XDP_DROP, &row.frame, &[*counter]),
    }
}

/// The packet as XDP leaves it, as far as this kernel shows.
fn marked(mark: u32, packet: &[u8]) -> Vec<u8> {
    if !XDP_TEST_METADATA.met() {
        return packet.to_vec();
    }
    [&mark.to_ne_bytes()[..], packet].concat()
}

fn expect(outcome: &Outcome, verdict: i32, packet: &[u8], counted: &[Counter]) -> Result<()> {
    let mut counted = counted.to_vec();
    counted.sort();
    let got: Vec<_> = outcome.counted.keys().copied().collect();
    ensure!(outcome.verdict == verdict, "verdict {} instead of {verdict}, counted {got:?}", outcome.verdict);
    ensure!(got == counted, "counted {got:?} instead of {counted:?}");
    ensure!(
        outcome.counted.values().all(|count| count.packets == 1),
        "more than one packet: {:?}",
        outcome.counted
    );
    ensure!(outcome.packet == packet, "packet\n  {:02x?} instead of\n  {packet:02x?}", outcome.packet);
    Ok(())
}

fn delivered_rows() -> Result<()> {
    let plain = Ip::default();
    let tcp = Ip { protocol: TCP, ..Ip::default() };
    let fragments = [0x2000_u16, 0x20B9, 0x00B9].map(|fragment| Ip { fragment, ..Ip::default() });
    let nested = datagram(REMOTE_POD, POD, &Ip::default().bytes());
    let with_options = Ip { options: vec![0x94, 0x04, 0x00, 0x00], ..Ip::default() };
    let longest_header = Ip { options: vec![0x01; 40], ..Ip::default() };
    let bare = Ip { payload: Vec::new(), protocol: 253, ..Ip::default() };
    let odd = Ip { payload: vec![7; 31], ..Ip::default() };
    let full = Ip { payload: vec![0x5A; 1452], ..Ip::default() };
    let mut rows: Vec<Row> = [
        ("UDP", &plain),
        ("TCP", &tcp),
        ("first inner fragment", &fragments[0]),
        ("middle inner fragment", &fragments[1]),
        ("last inner fragment", &fragments[2]),
        ("a tunnel in the tunnel", &nested),
        ("inner options", &with_options),
        ("inner header of 60 bytes", &longest_header),
        ("a bare header", &bare),
        ("odd length", &odd),
        ("full MTU", &full),
    ]
    .into_iter()
    .map(|(what, inner)| Row { what, frame: frame(inner), fate: Fate::Delivered(delivered(inner)) })
    .collect();

    let computed = with_udp_checksum(datagram(NODE, OWN, &plain.bytes()));
    let mut wrong = computed.clone();
    wrong.payload[6] ^= 1;
    let from_any_port = Ip { payload: udp(53, PORT, &plain.bytes()), ..datagram(NODE, OWN, &[]) };
    let with_df = Ip { fragment: 0x4000, id: 9, ..datagram(NODE, OWN, &plain.bytes()) };
    for (what, outer) in [
        ("computed UDP checksum", &computed),
        ("wrong UDP checksum: the inner one decides", &wrong),
        ("any source port", &from_any_port),
        ("outer DF", &with_df),
    ] {
        rows.push(Row {
            what,
            frame: ethernet(0x0800, &outer.bytes()),
            fate: Fate::Delivered(delivered(&plain)),
        });
    }
    let padding = [0_u8; 9];
    rows.push(Row {
        what: "Ethernet padding stays behind the packet",
        frame: [&frame(&plain)[..], &padding].concat(),
        fate: Fate::Delivered([&delivered(&plain)[..], &padding].concat()),
    });
    check(&mut load(SOURCE_CHECK_ENFORCE)?, &rows)
}

fn foreign_rows() -> Result<()> {
    let inner = Ip::default().bytes();
    let usual = datagram(NODE, OWN, &inner);
    let changed = |change: fn(&mut Ip)| {
        let mut outer = usual.clone();
        change(&mut outer);
        ethernet(0x0800, &outer.bytes())
    };
    let version = |byte: u8| {
        let mut inner = inner.clone();
        inner[0] = byte;
        ethernet(0x0800, &datagram(NODE, OWN, &inner).bytes())
    };
    let tagged = [&[0x00, 0x05, 0x08, 0x00], &usual.bytes()[..]].concat();
    let rows = [
        ("another port", changed(|outer| outer.payload[2..4].copy_from_slice(&8286_u16.to_be_bytes()))),
        ("another node's address", changed(|outer| outer.destination = STRANGER)),
        ("TCP to our port", changed(|outer| outer.protocol = TCP)),
        ("outer options", changed(|outer| outer.options = vec![0x94, 0x04, 0, 0])),
        ("first outer fragment", changed(|outer| outer.fragment = 0x2000)),
        ("middle outer fragment", changed(|outer| outer.fragment = 0x20B9)),
        ("last outer fragment", changed(|outer| outer.fragment = 0x00B9)),
        ("inner IPv6", version(0x60)),
        ("inner version 0", version(0x05)),
        ("ARP", ethernet(0x0806, &usual.bytes())),
        ("IPv6", ethernet(0x86DD, &usual.bytes())),
        ("a VLAN tag", ethernet(0x8100, &tagged)),
        ("a service VLAN tag", ethernet(0x88A8, &tagged)),
        (
            "ordinary TCP",
            ethernet(0x0800, &Ip { protocol: TCP, payload: vec![1; 400], ..Ip::default() }.bytes()),
        ),
    ]
    .map(|(what, frame)| Row { what, frame, fate: Fate::Untouched });
    check(&mut load(SOURCE_CHECK_ENFORCE)?, &rows)
}

fn length_rows() -> Result<()> {
    let inner = Ip::default();
    let with = |change: fn(&mut Vec<u8>)| {
        let mut frame = frame(&inner);
        change(&mut frame);
        frame
    };
    let trailing = [&inner.bytes()[..], &[0; 4]].concat();
    // Offsets: outer total length 16, UDP length 38, inner header 42, its total length 44.
    let rows = [
        ("trailing bytes", ethernet(0x0800, &datagram(NODE, OWN, &trailing).bytes())),
        ("inner length one more", with(|f| f[45] += 1)),
        ("inner length one less", with(|f| f[45] -= 1)),
        ("inner length 0", with(|f| f[45] = 0)),
        ("inner length 65535", with(|f| f[44..46].fill(0xFF))),
        ("outer length one more", with(|f| f[17] += 1)),
        ("outer length 0", with(|f| f[16..18].fill(0))),
        ("UDP length one less", with(|f| f[39] -= 1)),
        ("UDP length 0", with(|f| f[38..40].fill(0))),
        ("inner header longer than the packet", with(|f| f[42] = 0x4F)),
        ("inner header of 16 bytes", with(|f| f[42] = 0x44)),
        ("all lengths agree on less than a header", with(|f| (f[17], f[39], f[45]) = (47, 27, 19))),
    ]
    .map(|(what, frame)| Row { what, frame, fate: Fate::HandedOn(Counter::LengthMismatch) });
    check(&mut load(SOURCE_CHECK_ENFORCE)?, &rows)
}

fn truncation() -> Result<()> {
    let inner = Ip::default();
    let whole = frame(&inner);
    let mut programs = load(SOURCE_CHECK_ENFORCE)?;
    let headers = ETHERNET + OVERHEAD + 20;
    // A test run in tc takes no frame whose outer header is cut; XDP none whose Ethernet header is.
    for length in ETHERNET..ETHERNET + 20 {
        let frame = &whole[..length];
        for program in xdp_builds() {
            let outcome = programs.run(program, frame, Context::Plain)?;
            expect(&outcome, verdict::XDP_PASS, frame, &[])
                .with_context(|| format!("cut after {length} bytes"))?;
        }
    }
    for length in ETHERNET + 20..whole.len() {
        let frame = whole[..length].to_vec();
        let fate = if length < headers {
            Fate::Untouched
        } else {
            // The headers are whole and agree: what is missing behind them the kernel notices, as it would have done
            // with the datagram.
            Fate::Delivered(delivered(&inner)[..length - OVERHEAD].to_vec())
        };
        check(&mut programs, &[Row { what: "cut", frame, fate }])
            .with_context(|| format!("cut after {length} bytes"))?;
    }
    Ok(())
}

fn ttl_rows() -> Result<()> {
    let mut programs = load(SOURCE_CHECK_ENFORCE)?;
    for ttl in 0..=255 {
        let inner = Ip { ttl, ..Ip::default() };
        let fate =
            if ttl <= 1 { Fate::Dropped(Counter::TtlExpired) } else { Fate::Delivered(delivered(&inner)) };
        check(&mut programs, &[Row { what: "ttl", frame: frame(&inner), fate }])
            .with_context(|| format!("TTL {ttl}"))?;
    }
    // Checksums around the carry: the identification moves them through every value the TTL step can meet.
    for id in [0x0000, 0x0058, 0x6D9E, 0x6E9E, 0x6D9F, 0x6E9F, 0xFFFF] {
        let inner = Ip { id, ..Ip::default() };
        let row = Row { what: "checksum", frame: frame(&inner), fate: Fate::Delivered(delivered(&inner)) };
        check(&mut programs, &[row]).with_context(|| format!("id {id:#06x}"))?;
    }
    Ok(())
}

fn ecn_rows() -> Result<()> {
    let mut programs = load(SOURCE_CHECK_ENFORCE)?;
    // RFC 6040 figure 4: rows inner, columns outer, both 00 01 10 11; 4 is "drop".
    const TABLE: [[u8; 4]; 4] = [[0, 0, 0, 4], [1, 1, 1, 3], [2, 1, 2, 3], [3, 3, 3, 3]];
    for (inner, row) in (0..).zip(TABLE) {
        for (outer, after) in (0..).zip(row) {
            let packet = Ip { tos: 0xB8 | inner, ..Ip::default() };
            let frame =
                ethernet(0x0800, &Ip { tos: 0x28 | outer, ..datagram(NODE, OWN, &packet.bytes()) }.bytes());
            let fate = if after == 4 {
                Fate::Dropped(Counter::EcnRefused)
            } else {
                Fate::Delivered(delivered(&Ip { tos: 0xB8 | after, ..packet }))
            };
            check(&mut programs, &[Row { what: "ecn", frame, fate }])
                .with_context(|| format!("{inner:02b} in {outer:02b}"))?;
        }
    }
    Ok(())
}

fn source_rows() -> Result<()> {
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

fn outside_the_network() -> Result<()> {
    let mut programs = load(SOURCE_CHECK_OBSERVE)?;
    let frame = frame(&Ip { destination: [8, 8, 8, 8], ..Ip::default() });
    for program in xdp_builds() {
        expect(&programs.run(program, &frame, Context::Plain)?, verdict::XDP_PASS, &frame, &[])
            .context(program)?;
    }
    Ok(())
}

fn probe_rows() -> Result<()> {
    let mut programs = load(SOURCE_CHECK_ENFORCE | XDP_PROBE)?;
    let good = frame(&Ip::default());
    let refused = frame(&Ip { source: [8, 8, 8, 8], ..Ip::default() });
    for program in xdp_builds() {
        let outcome = programs.run(program, &good, Context::Plain)?;
        expect(&outcome, verdict::XDP_PASS, &marked(XDP_PROBE_MARK, &good), &[Counter::MarkSent])?;
        let outcome = programs.run(program, &refused, Context::Plain)?;
        expect(&outcome, verdict::XDP_PASS, &refused, &[]).context("what tc will drop is left to tc")?;
    }
    Ok(())
}

fn no_metadata() -> Result<()> {
    // A driver that keeps no metadata refuses; so does the kernel when what is there already leaves of XDP's headroom no
    // more than the 40 bytes it keeps for itself, and before Linux 6.8 when 32 bytes are there.
    let full = if (Needs { major: 6, minor: 8, what: "more metadata" }).met() { 256 - 40 } else { 32 };
    let mut programs = load(SOURCE_CHECK_ENFORCE)?;
    let input = [&[0xEE].repeat(full)[..], &frame(&Ip::default())].concat();
    for program in xdp_builds() {
        let outcome = programs.run(program, &input, Context::Metadata(full as u32))?;
        expect(&outcome, verdict::XDP_PASS, &input, &[Counter::NoMetadata]).context(program)?;
    }
    Ok(())
}

fn gso_rows() -> Result<()> {
    let mut programs = load(SOURCE_CHECK_ENFORCE)?;
    let gso = Context::Gso { size: 1400, segments: 12 };
    let refused = frame(&Ip { source: [8, 8, 8, 8], ..Ip::default() });
    let outcome = programs.run("flannel_ingress", &refused, gso)?;
    let count = outcome.counted.get(&Counter::SourceRefused).context("not refused")?;
    ensure!((count.packets, count.bytes) == (12, 40), "{count:?}");

    // A test run can set a segment size but no segment type: a GSO packet of a type whose headers the kernel does not
    // let anyone shrink. Nothing half-decapsulated may go on.
    let outcome = programs.run("flannel_ingress", &frame(&Ip::default()), gso)?;
    ensure!(outcome.verdict == verdict::TC_SHOT, "verdict {}", outcome.verdict);
    ensure!(outcome.counted.keys().eq([&Counter::DecapFailed]), "{:?}", outcome.counted);
    Ok(())
}

fn peer_counts() -> Result<()> {
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
fn peer_drops() -> Result<()> {
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

fn random_rows() -> Result<()> {
    let programs = RefCell::new(load(SOURCE_CHECK_ENFORCE)?);
    let inner = (
        any::<(u8, u8)>(),
        any::<u8>(),
        any::<u8>(),
        2_u8..,
        any::<u16>(),
        any::<u16>(),
        0_usize..=10,
        prop::collection::vec(any::<u8>(), 0..1400),
    )
        .prop_map(|((from, to), protocol, tos, ttl, id, fragment, words, payload)| Ip {
            source: [10, 244, 2, from],
            destination: [10, 244, 1, to],
            protocol,
            tos,
            ttl,
            id,
            fragment,
            options: vec![1; 4 * words],
            payload,
        });
    let mut runner = TestRunner::new(Config { cases: 512, failure_persistence: None, ..Config::default() });
    runner
        .run(&(inner, any::<u16>(), any::<bool>()), |(inner, port, computed)| {
            let mut outer = Ip { payload: udp(port, PORT, &inner.bytes()), ..datagram(NODE, OWN, &[]) };
            if computed {
                outer = with_udp_checksum(outer);
            }
            let row = Row {
                what: "random",
                frame: ethernet(0x0800, &outer.bytes()),
                fate: Fate::Delivered(delivered(&inner)),
            };
            check(&mut programs.borrow_mut(), &[row]).map_err(|e| TestCaseError::fail(format!("{e:#}")))
        })
        .map_err(|e| anyhow::anyhow!("{e}"))
}
