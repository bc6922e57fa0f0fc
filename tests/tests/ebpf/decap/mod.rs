//! Decapsulation, every row through tc and through both XDP programs: the same packet must have the same fate in all.

mod company;
mod datagrams;
mod senders;

use anyhow::{Context as _, Result, ensure};
use flannel_common::{counter::Counter, tunnel::XDP_MARK};
use flannel_tests::{
    kernel::XDP_TEST_METADATA,
    programs::{Context, Outcome, Programs, verdict, xdp_builds},
};
use libtest_mimic::Trial;

use crate::{
    packets::{peer, peer_subnet, settings},
    trial,
};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("decap::a_datagram_of_the_tunnel_is_one_inner_packet_afterwards", datagrams::delivered_rows),
        trial("decap::what_is_not_the_tunnels_goes_on_untouched", datagrams::foreign_rows),
        trial("decap::odd_lengths_go_to_the_socket_and_are_counted", datagrams::length_rows),
        trial("decap::a_frame_cut_at_any_byte_is_never_read_past_its_end", datagrams::truncation),
        trial("decap::ttl_ends_at_one_and_the_checksum_follows_it", datagrams::ttl_rows),
        trial("decap::ecn_is_combined_as_rfc_6040_says", datagrams::ecn_rows),
        trial("decap::the_source_check_enforces_observes_or_is_off", senders::source_rows),
        trial("decap::the_probe_marks_and_changes_nothing", company::probe_rows),
        XDP_TEST_METADATA
            .trial(trial("decap::without_room_for_the_mark_the_frame_stays_whole", company::no_metadata)),
        trial("decap::xdp_leaves_to_tc_what_tc_would_not_believe", senders::outside_the_network),
        trial("decap::tcp_is_dressed_for_the_room_while_its_door_is_there", company::dressed_rows),
        trial("decap::a_gso_packet_counts_its_segments", company::gso_rows),
        trial("decap::a_peer_is_found_by_its_place_in_the_network_as_by_its_hash", senders::places),
        trial("decap::packets_of_a_peer_are_counted_for_it", senders::peer_counts),
        trial("decap::dropped_packets_count_for_the_peer_they_claim_to_come_from", senders::peer_drops),
        trial("decap::random_datagrams_come_out_whole", datagrams::random_rows),
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
