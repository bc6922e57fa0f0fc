//! What a packet costs in each program, `cargo test -p flannel-tests --test ebpf -- --bench`. Nothing is asserted: the
//! floors of `cargo xtask bench` are ratios of the same minute, these are nanoseconds of a machine.
//!
//! tc and XDP test runs hand a program its own result again. So a decapsulation that can be repeated is one of a tunnel
//! in a tunnel in a tunnel; encapsulation can't be repeated, and a single run is measured against a single run of a
//! program that does nothing.

use anyhow::{Result, ensure};
use flannel_common::tunnel::{SOURCE_CHECK_ENFORCE, SOURCE_CHECK_OBSERVE as OBSERVE, Settings};
use flannel_tests::programs::{
    Context, Programs,
    verdict::{TC_OK, XDP_PASS},
};
use libtest_mimic::{Failed, Measurement, Trial};

use crate::packets::{
    Ip, NODE, OVERHEAD, OWN, POD, REMOTE_POD, TCP, datagram, ethernet, frame, hashed, peer, peer_subnet,
    settings, transport,
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        bench("cost::tc_both_ways", || warm("cost_tc", 0, &outgoing())),
        bench("cost::tc_both_ways_observed", || warm("cost_tc", OBSERVE, &outgoing())),
        bench("cost::tc_both_ways_hashed", || warm_under(&hashed(0), "cost_tc", &outgoing())),
        bench("cost::tc_both_ways_helpers_alone", || warm("cost_tc_helpers", 0, &outgoing())),
        bench("cost::tc_both_ways_room_alone", || warm("cost_tc_room", 0, &outgoing())),
        bench("cost::tc_both_ways_nothing", || warm("cost_tc_nothing", 0, &outgoing())),
        bench("cost::xdp_and_back", || warm("cost_xdp", 0, &frame(&Ip::default()))),
        bench("cost::xdp_and_back_observed", || warm("cost_xdp", OBSERVE, &frame(&Ip::default()))),
        bench("cost::xdp_and_back_hashed", || warm_under(&hashed(0), "cost_xdp", &frame(&Ip::default()))),
        bench("cost::xdp_and_back_helpers_alone", || warm("cost_xdp_helpers", 0, &frame(&Ip::default()))),
        bench("cost::xdp_and_back_room_alone", || warm("cost_xdp_room", 0, &frame(&Ip::default()))),
        bench("cost::xdp_and_back_nothing", || warm("cost_xdp_nothing", 0, &frame(&Ip::default()))),
        bench("cost::encap_once", || once("flannel_encap", "flannel_gro", 0, &outgoing())),
        bench("cost::tc_decap_once", || once("flannel_ingress", "flannel_gro", 0, &frame(&Ip::default()))),
        bench("cost::tc_decap_once_enforced", || {
            once("flannel_ingress", "flannel_gro", SOURCE_CHECK_ENFORCE, &frame(&Ip::default()))
        }),
        bench("cost::xdp_decap_once", || {
            once("flannel_decap_xdp", "flannel_pass", 0, &frame(&Ip::default()))
        }),
        bench("cost::xdp_decap_once_enforced", || {
            once("flannel_decap_xdp", "flannel_pass", SOURCE_CHECK_ENFORCE, &frame(&Ip::default()))
        }),
        bench("cost::tc_decap_repeated", || nested("flannel_ingress", 0)),
        bench("cost::tc_decap_repeated_observed", || nested("flannel_ingress", OBSERVE)),
        bench("cost::xdp_decap_repeated", || nested("flannel_decap_xdp", 0)),
        bench("cost::xdp_decap_repeated_observed", || nested("flannel_decap_xdp", OBSERVE)),
        bench("cost::tc_egress_no_peer", || repeated("flannel_encap", &outgoing_to(POD))),
        bench("cost::tc_ingress_not_ours", || repeated("flannel_ingress", &foreign())),
        bench("cost::xdp_not_ours", || repeated("flannel_decap_xdp", &foreign())),
        bench("cost::pass", || repeated("flannel_pass", &foreign())),
    ]
}

const SAMPLES: usize = 300;
/// Levels of the nested tunnel: as often as the mark of 4 bytes fits in front of a frame.
const LEVELS: u32 = 32;

fn bench(name: &str, measure: fn() -> Result<Vec<u64>>) -> Trial {
    Trial::bench(name, move |_| {
        let mut samples = measure().map_err(|e| Failed::from(format!("{e:#}")))?;
        samples.sort_unstable();
        let quartile = |n: usize| samples[samples.len() * n / 4];
        Ok(Some(Measurement { avg: quartile(2), variance: (quartile(3) - quartile(1)).pow(2) }))
    })
}

fn outgoing() -> Vec<u8> {
    outgoing_to(REMOTE_POD)
}

/// Starts as a test run of `flannel_encap` wants it: 8.0 where it looks for an EtherType.
fn outgoing_to(destination: [u8; 4]) -> Vec<u8> {
    Ip { source: [8, 0, 1, 5], destination, payload: transport(60), ..Ip::default() }.bytes()
}

fn foreign() -> Vec<u8> {
    ethernet(0x0800, &Ip { protocol: TCP, payload: transport(400), ..Ip::default() }.bytes())
}

fn load(flags: u16) -> Result<Programs> {
    // Every address lies in the network, so that the nested tunnels do too.
    let mut programs = Programs::load(&Settings { network: 0, network_mask: 0, ..hashed(flags) })?;
    for subnet in [[10, 244, 2, 0], [172, 31, 0, 0]] {
        programs.add_peer(subnet.into(), peer(2))?;
    }
    Ok(programs)
}

/// What leaves the packet as it found it, many times: no cold caches, as under load.
fn warm(program: &str, flags: u16, packet: &[u8]) -> Result<Vec<u64>> {
    warm_under(&settings(flags), program, packet)
}

fn warm_under(settings: &Settings, program: &str, packet: &[u8]) -> Result<Vec<u64>> {
    let mut programs = Programs::load_measuring(settings)?;
    programs.add_peer(peer_subnet(), peer(2))?;
    // Twice: what one run leaves changed stops the next.
    for _ in 0..2 {
        let run = programs.run(program, packet, Context::Plain)?;
        let drops: u64 =
            run.counted.iter().filter(|(counter, _)| counter.is_drop()).map(|(_, c)| c.packets).sum();
        ensure!(
            matches!(run.verdict, TC_OK | XDP_PASS) && run.packet == packet && drops == 0,
            "{program}: {run:?}"
        );
    }
    (0..20).map(|_| Ok(programs.time(program, packet, 200_000)?.as_nanos() as u64)).collect()
}

fn once(program: &str, nothing: &str, flags: u16, packet: &[u8]) -> Result<Vec<u64>> {
    let mut programs = load(flags)?;
    let mut floor = sample(&mut programs, nothing, packet, 1)?;
    floor.sort_unstable();
    let floor = floor[floor.len() / 2];
    Ok(sample(&mut programs, program, packet, 1)?.into_iter().map(|ns| ns.saturating_sub(floor)).collect())
}

fn nested(program: &str, flags: u16) -> Result<Vec<u64>> {
    let mut packet = Ip::default();
    for _ in 0..LEVELS {
        packet = datagram(NODE, OWN, &packet.bytes());
    }
    assert_eq!(packet.bytes().len(), 40 + LEVELS as usize * OVERHEAD);
    sample(&mut load(flags)?, program, &ethernet(0x0800, &packet.bytes()), LEVELS)
}

fn repeated(program: &str, packet: &[u8]) -> Result<Vec<u64>> {
    let mut programs = load(0)?;
    (0..20).map(|_| Ok(programs.time(program, packet, 200_000)?.as_nanos() as u64)).collect()
}

fn sample(programs: &mut Programs, program: &str, packet: &[u8], repeat: u32) -> Result<Vec<u64>> {
    (0..SAMPLES).map(|_| Ok(programs.time(program, packet, repeat)?.as_nanos() as u64)).collect()
}
