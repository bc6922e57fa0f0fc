//! What the programs are told beside the packet: that they are probed, that a room is there, metadata, segments.

use anyhow::{Context as _, Result, ensure};
use flannel_common::{
    counter::Counter,
    tunnel::{DRESSED, SOURCE_CHECK_ENFORCE, Settings, XDP_PROBE, XDP_PROBE_MARK},
};
use flannel_tests::{
    kernel::Needs,
    programs::{Context, Programs, verdict, xdp_builds},
};

use super::{expect, load, marked};
use crate::packets::{
    Ip, OWN, STRANGER, TCP, delivered, ethernet, frame, peer, peer_subnet, settings, transport, udp,
};

pub(super) fn probe_rows() -> Result<()> {
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

pub(super) fn no_metadata() -> Result<()> {
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

/// vxlan as RFC 7348 has it, to the address and port of the room's only socket, around the packet with its TTL lowered.
pub(super) fn dressed_rows() -> Result<()> {
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

pub(super) fn gso_rows() -> Result<()> {
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
