//! The user-space tunnel on a real kernel: two namespaces, a veth pair, one tunnel each.
//!
//! Bytes are compared with a recording of flanneld 0.7.0 (`fixtures/v0.7.0/udp/underlay-h1.pcap`, three hosts pinging
//! each other, captured on the first host's underlay).

#![expect(clippy::unwrap_used, reason = "a step that fails ends its test, and the panic names the line")]

mod bytes;
mod life;
mod rig;
mod traffic;
mod wire;

use std::process::ExitCode;

use anyhow::Result;
use flannel_tests::privilege;
use libtest_mimic::{Failed, Trial};

type Test = fn() -> Result<()>;

fn main() -> ExitCode {
    let tests: [(&str, Test); 24] = [
        ("a_datagram_crosses_and_costs_two_hops", traffic::a_datagram_crosses_and_costs_two_hops),
        ("tcp_arrives_byte_for_byte_in_every_role", traffic::tcp_arrives_byte_for_byte_in_every_role),
        ("tcp_arrives_byte_for_byte_without_underlay_offloads", traffic::tcp_without_underlay_offloads),
        ("tcp_arrives_byte_for_byte_over_a_smaller_path", traffic::tcp_over_a_smaller_path),
        (
            "datagrams_survive_that_merging_ends_while_they_wait",
            traffic::datagrams_survive_that_merging_ends_while_they_wait,
        ),
        ("udp_segments_arrive_as_single_datagrams", traffic::udp_segments_arrive_as_single_datagrams),
        (
            "a_full_packet_fits_and_a_larger_one_crosses_in_fragments",
            traffic::fragments_cross_one_per_datagram,
        ),
        ("a_recording_of_flanneld_is_sent_byte_for_byte", bytes::a_recording_is_sent_byte_for_byte),
        ("a_recording_of_flanneld_is_delivered_byte_for_byte", bytes::a_recording_is_delivered_byte_for_byte),
        (
            "odd_packets_leave_with_only_their_ttl_changed",
            bytes::odd_packets_leave_with_only_their_ttl_changed,
        ),
        ("checksums_left_to_us_are_right_on_the_wire", bytes::checksums_left_to_us_are_right_on_the_wire),
        ("a_ttl_that_runs_out_is_dropped_silently", bytes::a_ttl_that_runs_out_is_dropped_silently),
        ("a_spoofed_source_is_treated_as_configured", bytes::a_spoofed_source_is_treated_as_configured),
        ("only_one_whole_ipv4_packet_is_delivered", bytes::only_one_whole_ipv4_packet_is_delivered),
        ("outer_fragments_are_delivered", bytes::outer_fragments_are_delivered),
        ("an_outer_congestion_mark_reaches_the_inner_packet", bytes::congestion_marks_reach_the_inner_packet),
        ("an_unknown_destination_is_answered_on_the_device", bytes::an_unknown_destination_is_answered),
        ("a_taken_port_is_an_error_that_names_it", life::a_taken_port_is_an_error_that_names_it),
        (
            "a_restarted_tunnel_takes_the_same_device_over",
            life::a_restarted_tunnel_takes_the_same_device_over,
        ),
        ("a_device_that_was_down_carries_packets_again", life::a_device_that_was_down_carries_packets_again),
        ("a_deleted_device_ends_the_tunnel_with_a_reason", life::a_deleted_device_ends_the_tunnel),
        ("a_device_of_another_kind_is_refused_by_its_kind", life::a_device_of_another_kind_is_refused),
        ("a_tunnel_stops_promptly_under_load", life::a_tunnel_stops_promptly_under_load),
        ("peers_can_be_replaced_under_traffic", traffic::peers_can_be_replaced_under_traffic),
    ];
    let trials = tests
        .map(|(name, test)| Trial::test(name, move || test().map_err(|e| Failed::from(format!("{e:?}")))));
    privilege::run_when(privilege::require_root, trials.into())
}
