//! What a datagram of the tunnel is, header by header, and what comes out of it.

use std::cell::RefCell;

use anyhow::{Context as _, Result};
use flannel_common::{counter::Counter, tunnel::SOURCE_CHECK_ENFORCE};
use flannel_tests::programs::{Context, verdict, xdp_builds};
use proptest::{
    prelude::*,
    test_runner::{Config, TestCaseError, TestRunner},
};

use super::{Fate, Row, check, expect, load};
use crate::packets::{
    ETHERNET, Ip, NODE, OVERHEAD, OWN, POD, PORT, REMOTE_POD, STRANGER, TCP, datagram, delivered, ethernet,
    frame, udp, with_udp_checksum,
};

pub(super) fn delivered_rows() -> Result<()> {
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

pub(super) fn foreign_rows() -> Result<()> {
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

pub(super) fn length_rows() -> Result<()> {
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

pub(super) fn truncation() -> Result<()> {
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

pub(super) fn ttl_rows() -> Result<()> {
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

pub(super) fn ecn_rows() -> Result<()> {
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

pub(super) fn random_rows() -> Result<()> {
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
