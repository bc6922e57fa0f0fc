//! What every program has in common (it loads, within its budget), and the small programs.

use anyhow::{Context as _, Result, ensure};
use flannel_common::{
    counter::Counter,
    tunnel::{DRESSED, SOURCE_CHECK_ENFORCE, SOURCE_CHECK_OBSERVE, Settings},
};
use flannel_tests::programs::{ALL, Context, Programs, is_for_this_kernel, verdict};
use libtest_mimic::Trial;

use crate::{
    packets::{Ip, POD, REMOTE_POD, TCP, ethernet, peer, peer_subnet, settings, transport},
    trial,
};

/// Instructions the verifier may walk; a quarter above what it walks today, far below its limit of a million. Growth
/// means a branch that should have been folded, or a copy that became a loop.
const BUDGETS: [(&str, u32); 6] = [
    ("flannel_encap", 550),
    ("flannel_ingress", 2800),
    ("flannel_gro", 30),
    ("flannel_decap_xdp", 3500),
    ("flannel_decap_xdp_frags", 3500),
    ("flannel_pass", 2),
];

/// The same for ingress where it has a room to dress packets for.
const DRESSING: u32 = 4400;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("programs::every_program_loads_within_its_budget", budgets),
        trial("programs::gro_takes_ipv4_only", gro),
        trial("programs::pass_passes", pass),
        trial("encap::what_has_no_peer_goes_to_the_reader_untouched", no_peer),
        trial("encap::ttl_0_and_1_end_here", ttl),
    ]
}

fn budgets() -> Result<()> {
    for flags in [0, SOURCE_CHECK_OBSERVE, SOURCE_CHECK_ENFORCE, SOURCE_CHECK_OBSERVE | DRESSED] {
        let programs = match flags & DRESSED {
            0 => Programs::load(&settings(flags))?,
            _ => Programs::load(&Settings { gro_pair: 4, ..settings(flags) })?,
        };
        for (name, budget) in BUDGETS.into_iter().filter(|(name, _)| is_for_this_kernel(name)) {
            let budget = if name == "flannel_ingress" && flags & DRESSED != 0 { DRESSING } else { budget };
            // Linux 5.16 and newer tell; the verifier looks at them all the same.
            let Some(verified) = programs.verified_instructions(name)? else {
                println!("{name}, flags {flags}: untold instructions verified");
                continue;
            };
            let size = programs.translated_size(name)?.unwrap_or_default() / 8;
            println!("{name}, flags {flags}: {verified} instructions verified, {size} loaded");
            ensure!(verified <= budget, "{name}: {verified} instructions verified, more than {budget}");
        }
    }
    ensure!(BUDGETS.len() == ALL.len(), "a program has no budget");
    Ok(())
}

fn gro() -> Result<()> {
    let mut programs = Programs::load(&settings(0))?;
    let packet = ethernet(0x0800, &Ip { protocol: TCP, ..Ip::default() }.bytes());
    let outcome = programs.run("flannel_gro", &packet, Context::Plain)?;
    ensure!(outcome.verdict == verdict::TC_REDIRECT && outcome.packet == packet, "{outcome:?}");
    let solicitation = ethernet(0x86DD, &[0; 64]);
    let outcome = programs.run("flannel_gro", &solicitation, Context::Plain)?;
    ensure!(outcome.verdict == verdict::NEXT && outcome.packet == solicitation, "{outcome:?}");
    Ok(())
}

fn pass() -> Result<()> {
    let mut programs = Programs::load(&settings(0))?;
    let packet = ethernet(0x0800, &Ip::default().bytes());
    let outcome = programs.run("flannel_pass", &packet, Context::Plain)?;
    ensure!(outcome.verdict == verdict::XDP_PASS && outcome.packet == packet, "{outcome:?}");
    Ok(())
}

/// A packet as `flannel_encap` sees it: without Ethernet header. A test run takes what stands at byte 12 for the
/// EtherType, so the source begins with 8.0, and it believes that there is an Ethernet header, so success can only be
/// tested on a real device.
fn outgoing(destination: [u8; 4]) -> Ip {
    Ip { source: [8, 0, 1, 5], destination, payload: transport(60), ..Ip::default() }
}

fn no_peer() -> Result<()> {
    let mut programs = Programs::load(&settings(SOURCE_CHECK_ENFORCE))?;
    programs.add_peer(peer_subnet(), peer(2))?;
    for (what, destination) in
        [("nobody's subnet", [10, 244, 9, 1]), ("our own subnet", POD), ("the outside", [1, 1, 1, 1])]
    {
        let packet = outgoing(destination).bytes();
        let outcome = programs.run("flannel_encap", &packet, Context::Plain)?;
        ensure!(outcome.verdict == verdict::TC_OK && outcome.packet == packet, "{what}: {outcome:?}");
        ensure!(outcome.counted.keys().eq([&Counter::NoPeer]), "{what}: {:?}", outcome.counted);
    }
    let gso = Context::Gso { size: 1400, segments: 7 };
    let outcome = programs.run("flannel_encap", &outgoing(POD).bytes(), gso)?;
    let count = outcome.counted.get(&Counter::NoPeer).context("not counted")?;
    ensure!((count.packets, count.bytes) == (7, 80), "{count:?}");

    let ipv6 = ethernet(0x86DD, &[0; 60]);
    let outcome = programs.run("flannel_encap", &ipv6, Context::Plain)?;
    ensure!(outcome.verdict == verdict::TC_OK && outcome.packet == ipv6, "IPv6: {outcome:?}");
    ensure!(outcome.counted.is_empty(), "IPv6: {:?}", outcome.counted);
    Ok(())
}

fn ttl() -> Result<()> {
    let mut programs = Programs::load(&settings(SOURCE_CHECK_ENFORCE))?;
    programs.add_peer(peer_subnet(), peer(2))?;
    for ttl in [0, 1] {
        let packet = Ip { ttl, ..outgoing(REMOTE_POD) }.bytes();
        let outcome = programs.run("flannel_encap", &packet, Context::Plain)?;
        ensure!(outcome.verdict == verdict::TC_SHOT && outcome.packet == packet, "TTL {ttl}: {outcome:?}");
        ensure!(outcome.counted.keys().eq([&Counter::TtlExpired]), "TTL {ttl}: {:?}", outcome.counted);
    }
    Ok(())
}
