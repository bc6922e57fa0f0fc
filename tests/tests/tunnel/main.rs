//! `Tunnels` against a real kernel: two nodes, each a network namespace of its own, joined by a veth pair; pins in a
//! bpffs of this process, so that nothing outlives it however it ends.

#![expect(clippy::unwrap_used, reason = "a step that fails ends its test, and the panic names the line")]

mod damage;
mod flood;
mod peers;
mod rig;
mod strangers;
mod takeover;
mod tiers;
mod traffic;

use std::process::ExitCode;

use anyhow::Result;
use flannel_tests::privilege;
use libtest_mimic::{Failed, Trial};

type Test = fn() -> Result<()>;

fn main() -> ExitCode {
    let tests: &[(&str, Test)] = &[
        ("ebpf_takes_xdp_on_a_veth_and_traffic_proves_it", tiers::auto_takes_xdp),
        ("every_datapath_option_takes_its_tier_and_carries_packets", tiers::every_option),
        ("tiers_that_differ_talk_to_each_other", tiers::mixed),
        ("tiers_that_differ_talk_to_each_other_on_a_wire", tiers::mixed_on_a_wire),
        ("super_packets_of_a_kernel_sender_arrive_at_a_user_space_receiver", tiers::super_packets),
        ("a_stacked_underlay_gets_tc_and_says_so", tiers::stacked),
        ("a_pinned_tier_that_does_not_work_is_an_error_and_leaves_nothing", tiers::pinned_refused),
        ("a_jumbo_underlay_gets_the_build_with_fragments", tiers::jumbo),
        ("without_permission_auto_falls_back_to_tun_and_names_the_capabilities", tiers::unprivileged),
        ("tiers_change_under_traffic_without_losing_a_packet", tiers::change_under_traffic),
        ("packets_of_the_tunnel_merge_in_the_gro_pair", tiers::merging),
        ("offloads_of_a_veth_underlay_are_changed_and_put_back", tiers::offloads),
        ("removing_a_tunnel_leaves_nothing", tiers::removing),
        ("a_foreign_tc_program_stays_and_one_in_front_ends_up_behind", strangers::foreign_tc),
        ("another_that_insists_on_being_first_is_reported_and_left_there", strangers::contested),
        ("a_sibling_that_comes_moves_and_goes_is_never_taken_for_a_stranger", strangers::sibling),
        ("a_foreign_xdp_program_stays_and_tc_is_taken_until_it_leaves", strangers::foreign_xdp),
        ("clsact_is_replaced_in_place_and_leaves_others_alone", strangers::clsact),
        ("a_new_agent_takes_over_without_losing_a_packet", takeover::nothing_lost),
        ("user_space_begins_and_the_kernel_takes_over_without_losing_a_packet", takeover::from_nothing),
        ("what_a_full_queue_drops_is_named_where_datagrams_are_missing", takeover::full_queue),
        ("packets_flow_on_while_no_agent_runs", takeover::no_agent),
        ("counters_and_peers_survive_the_agent", takeover::counters_survive),
        ("a_pinned_map_of_another_shape_is_replaced", takeover::stale_map),
        ("links_of_another_layout_version_are_taken_over", takeover::other_version),
        ("another_layout_version_and_back_lose_nothing", takeover::other_layout),
        ("other_settings_replace_the_programs_in_place", takeover::settings),
        ("another_network_gets_places_in_its_own_order", takeover::other_network),
        ("another_underlay_is_moved_to_and_the_old_one_left_clean", tiers::another_underlay),
        ("a_folder_that_is_no_bpffs_becomes_one", takeover::mounts_bpffs),
        ("a_link_lost_a_moment_ago_is_not_taken_for_a_foreign_one", damage::at_once),
        ("an_underlay_made_anew_is_attached_again", damage::recreated_underlay),
        ("a_deleted_pin_is_missed_within_a_second_and_put_back", damage::deleted_pins),
        ("entries_of_peers_that_somebody_changed_are_missed_within_a_second", damage::map_entries),
        ("a_damaged_gro_pair_is_missed_and_made_anew", damage::gro_pair),
        ("a_damaged_room_is_missed_and_made_anew", damage::room),
        ("xdp_whose_marks_do_not_arrive_is_given_up_for_good", damage::disproved),
        ("a_deleted_tunnel_device_is_missed_and_comes_back", damage::deleted_device),
        ("a_peer_s_entry_follows_the_routing_table", peers::ways),
        ("a_bad_peer_is_refused_with_the_reason_and_stops_no_other", peers::refused),
        ("a_moved_peer_keeps_its_place_and_a_new_one_starts_at_zero", peers::places),
    ];
    let pins = match tempfile::tempdir() {
        Ok(folder) => folder,
        Err(e) => {
            eprintln!("error: no folder for pins: {e}");
            return ExitCode::FAILURE;
        }
    };
    // Before the first thread. Where it fails, so does the gate, with the reason.
    if let Err(e) = privilege::private_bpffs(pins.path()) {
        eprintln!("note: {e}");
    }
    rig::set_bpffs(pins.path());
    let trials = tests
        .iter()
        .map(|&(name, test)| Trial::test(name, move || test().map_err(|e| Failed::from(format!("{e:#}")))))
        .collect();
    privilege::run(trials)
}
