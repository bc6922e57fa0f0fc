//! What every store must do, run against each of them, and what only etcd can get wrong.
//!
//! Needs no root. All contract cases share one etcd, and one of 3.6, each under a prefix of its own; cases that break
//! etcd start one for themselves.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a case that fails this way has failed")]

mod contract;
mod etcd;
mod ground;
mod kubernetes;
mod relay;
mod server;
mod transcript;
mod trouble;

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::io::Write;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use flannel_agent::stores::etcd::EtcdApi;
use flannel_tests::agent::at_rest;
use flannel_tests::etcd::{Etcd, Setup, Version};
use libtest_mimic::{Arguments, Failed, Trial};

use self::ground::Ground;
use self::ground::kube::Cluster;

/// No case may hang; the slowest waits about ten seconds for a frozen etcd.
const CASE_LIMIT: Duration = Duration::from_secs(50);

/// Five troubles one after the other, each of which lasts a while.
const TROUBLE_LIMIT: Duration = Duration::from_secs(240);

/// Everything the agent logs while the cases run.
static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

thread_local! {
    /// Lines of a level that an operator sees. A case and all its tasks have one thread.
    static LINES: Cell<u32> = const { Cell::new(0) };
    /// What they are, for the verdict on the case.
    static SAID: RefCell<String> = const { RefCell::new(String::new()) };
}

/// An agent that a case ran as a process said this.
fn heard(log: &str) {
    SAID.with_borrow_mut(|said| said.push_str(log));
}

struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let line = String::from_utf8_lossy(bytes);
        if [" INFO ", " WARN ", " ERROR "].iter().any(|level| line.contains(level)) {
            LINES.set(LINES.get() + 1);
            heard(&line);
        }
        LOG.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn run(case: impl Future<Output = anyhow::Result<()>>) -> Result<(), Failed> {
    run_within(CASE_LIMIT, case)
}

fn run_within(limit: Duration, case: impl Future<Output = anyhow::Result<()>>) -> Result<(), Failed> {
    SAID.take();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(async { tokio::time::timeout(limit, case).await });
    // Calls to a server that hangs are not waited for.
    runtime.shutdown_background();
    match result {
        Ok(Ok(())) => at_rest(&SAID.take()).map_err(|error| format!("{error:#}").into()),
        Ok(Err(error)) => Err(format!("{error:#}").into()),
        Err(_) => Err(format!("not done after {} s", limit.as_secs()).into()),
    }
}

macro_rules! contract {
    ($trials:ident, $etcd:ident, $newer:ident, $cluster:ident: $($case:ident)*) => {$(
        let name = stringify!($case);
        if cfg!(feature = "kube") && kubernetes::exemption(name).is_none() {
            let cluster = $cluster.clone();
            $trials.push(Trial::test(format!("kubernetes::{name}"), move || {
                kubernetes::run_on(&cluster, contract::$case)
            }));
        }
        $trials.push(Trial::test(format!("memory::{name}"), || {
            run(async { contract::$case(Ground::memory().await?).await })
        }));
        $trials.push(Trial::test(format!("embedded::{name}"), || {
            run(async { contract::$case(Ground::embedded().await?).await })
        }));
        $trials.push(Trial::test(format!("remote_embedded::{name}"), || {
            run(async { contract::$case(Ground::embedded().await?.served().await?).await })
        }));
        let etcd = $etcd.clone();
        $trials.push(Trial::test(format!("etcd_v3::{name}"), move || {
            run(async move { contract::$case(Ground::etcd(&etcd, EtcdApi::V3, name).await?).await })
        }));
        let etcd = $newer.clone();
        $trials.push(Trial::test(format!("etcd_3_6::{name}"), move || {
            run(async move { contract::$case(Ground::etcd(&etcd, EtcdApi::V3, name).await?).await })
        }));
        let etcd = $etcd.clone();
        $trials.push(Trial::test(format!("etcd_v2::{name}"), move || {
            run(async move { contract::$case(Ground::etcd(&etcd, EtcdApi::V2, name).await?).await })
        }));
        let etcd = $etcd.clone();
        $trials.push(Trial::test(format!("remote_etcd::{name}"), move || {
            run(async move {
                let name = concat!("served_", stringify!($case));
                let ground = Ground::etcd(&etcd, EtcdApi::V3, name).await?;
                contract::$case(ground.served().await?).await
            })
        }));
    )*
    /// All there are.
    const CONTRACT: &[&str] = &[$(stringify!($case)),*];
    };
}

/// Both APIs do what both can, and each what is its own.
macro_rules! etcd {
    (
        both { $($both:ident)* } auto { $($auto:ident)* } v2 { $($v2:ident)* }
        without_v2 { $($module:ident::$without:ident)* }
    ) => {{
        let mut trials = Vec::new();
        $(
            let name = stringify!($both);
            trials.push(Trial::test(format!("etcd_v2::{name}"), || run(etcd::$both(EtcdApi::V2))));
            trials.push(Trial::test(format!("etcd_v3::{name}"), || run(etcd::$both(EtcdApi::V3))));
        )*
        $(trials.push(Trial::test(concat!("etcd_auto::", stringify!($auto)), || run(etcd::auto::$auto())));)*
        $(trials.push(Trial::test(concat!("etcd_v2::", stringify!($v2)), || run(etcd::v2::$v2())));)*
        $(
            let name = stringify!($without);
            trials.push(Trial::test(format!("etcd_v3::{name}"), || {
                run(etcd::$module::$without(Version::Installed))
            }));
            trials.push(Trial::test(format!("etcd_3_6::{name}"), || {
                run(etcd::$module::$without(Version::V3_6))
            }));
        )*
        trials
    }};
}

macro_rules! migrate {
    ($($case:ident)*) => {
        vec![$(Trial::test(concat!("migrate_etcd::", stringify!($case)), || run(etcd::migrate::$case()))),*]
    };
}

macro_rules! server {
    ($($module:ident::$case:ident)*) => {
        vec![$(Trial::test(concat!("server::", stringify!($case)), || run($module::$case()))),*]
    };
}

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // They mostly wait; more at once than there are cores.
    arguments.test_threads.get_or_insert(8);
    tracing_subscriber::fmt()
        .with_env_filter("flannel_agent=trace")
        .with_writer(|| Log)
        .with_ansi(false)
        .init();

    let newer = || Etcd::start_with(Setup { version: Version::V3_6, ..Setup::default() });
    let (etcd, newer) = match Etcd::start().and_then(|etcd| Ok((Arc::new(etcd), Arc::new(newer()?)))) {
        Ok(both) => both,
        Err(error) => {
            eprintln!("{error:#}");
            return ExitCode::FAILURE;
        }
    };
    let cluster = Arc::new(Cluster::on(&etcd));
    // The slow ones first.
    let mut trials = etcd!(
        both {
            a_frozen_etcd_is_noticed_within_ten_seconds
            an_etcd_that_is_away_is_not_asked_in_a_loop
            a_quiet_watch_is_not_broken_by_our_own_questions
            an_etcd_that_is_killed_is_one_interruption_and_then_a_snapshot
            a_dead_endpoint_is_passed_over
            a_cluster_that_loses_its_leader_loses_nothing
            a_watch_moves_to_another_endpoint_when_its_own_dies
            a_watch_that_comes_back_right_after_a_lease_was_taken_knows_all
            user_and_password_open_the_door
            mutual_tls_works_and_says_what_is_missing
            an_authority_alone_verifies_the_server
            a_running_watch_is_compared_with_a_list
            keys_outside_the_folder_are_not_ours
            the_prefix_is_cleaned
            nothing_that_cannot_work_is_accepted
        } auto {
            the_keyspace_with_the_configuration_is_taken
            of_two_configurations_that_of_v3_is_taken_with_a_warning
            while_there_is_no_configuration_both_are_looked_at
            a_v2_that_does_not_answer_keeps_nobody_waiting
            an_etcd_older_than_v3_is_taken_as_v2
        } v2 {
            a_thousand_changes_elsewhere_while_it_is_cut_off_mean_a_fresh_snapshot
            a_busy_keyspace_does_not_disturb_a_quiet_watch
            a_burst_of_changes_is_told_in_order
            a_folder_that_is_deleted_takes_its_leases_along
            directories_among_the_leases_are_passed_over
            our_lease_written_by_another_has_its_true_end
            a_renewal_that_raced_with_another_writer_overwrites_nothing
            a_proxy_that_holds_back_heads_is_no_dead_server
            leases_of_a_whole_cluster_are_listed
        } without_v2 {
            v3::history_compacted_before_the_watch_began_means_a_fresh_snapshot
            v3::a_restart_after_a_compaction_means_a_fresh_snapshot
            v3::renewals_leave_no_lease_objects_behind
            v3::a_lease_object_others_use_is_not_revoked
            v3::thousands_of_leases_are_listed_at_one_revision
            v3::our_lease_written_by_another_has_its_true_end
            v3::leases_written_at_one_revision_are_told_apart
            v3::an_etcd_that_was_replaced_is_logged_in_to_anew
            v2::a_server_without_the_api_says_so
            auto::an_etcd_with_one_api_only_is_no_trouble
        }
    );
    contract!(trials, etcd, newer, cluster:
        a_missing_configuration_is_named
        a_first_lease_is_written_as_flanneld_writes_it
        recorded_leases_are_read_and_written_back_byte_for_byte
        a_node_that_comes_back_gets_its_lease_again
        fields_of_others_survive_a_reuse_and_a_renewal
        the_previous_subnet_is_taken_when_it_is_free
        a_running_node_gets_no_other_subnet
        a_lease_that_no_longer_fits_is_replaced
        both_families_are_leased_under_one_key
        a_network_of_only_ipv6_is_leased
        a_full_network_says_so
        eight_nodes_at_once_share_eight_subnets
        two_nodes_with_one_public_address_share_a_lease
        a_reservation_keeps_having_no_end
        a_renewal_moves_the_end
        a_node_with_a_new_address_keeps_its_lease
        a_moved_nodes_lease_that_was_taken_over_is_lost
        a_lease_that_was_taken_over_is_not_overwritten
        a_lease_of_only_ipv6_that_was_taken_over_is_lost
        a_deleted_lease_is_lost
        a_damaged_lease_is_put_right
        what_changes_is_told_after_a_snapshot
        a_lease_that_ends_is_told
        an_entry_that_cannot_be_read_hides_nothing
        an_address_of_the_wrong_family_is_refused
        a_reserved_subnet_waits_for_its_node
        a_subnet_of_only_ipv6_is_reserved
        a_lease_becomes_a_reservation_and_a_lease_again
        a_reservation_that_cannot_be_is_refused_with_the_reason
        a_revoked_lease_is_told_and_free
    );
    if cfg!(feature = "kube") {
        trials.extend(kubernetes::trials(&cluster, CONTRACT));
    }
    for (name, api) in [("etcd_v3", EtcdApi::V3), ("etcd_v2", EtcdApi::V2)] {
        trials.push(Trial::test(
            format!("server::a_store_that_hangs_is_named_before_the_client_gives_up_{name}"),
            move || run(server::a_store_that_hangs_is_named_before_the_client_gives_up(api)),
        ));
        let shared = etcd.clone();
        trials.push(Trial::test(format!("{name}::each_trouble_on_the_way_is_survived"), move || {
            run_within(TROUBLE_LIMIT, async move {
                trouble::each_is_survived(Ground::etcd(&shared, api, "trouble").await?, trouble::OVER).await
            })
        }));
    }
    trials.push(Trial::test("remote_embedded::each_trouble_on_the_way_is_survived", || {
        run_within(TROUBLE_LIMIT, async {
            trouble::each_is_survived(Ground::embedded().await?.served().await?, trouble::OVER).await
        })
    }));
    trials.extend(migrate!(
        nodes_in_both_keyspaces_live_side_by_side
        no_subnet_is_left_with_two_owners
        leases_come_to_v3_as_they_are
        deleting_the_old_keyspace_leaves_the_new_one_alone
    ));
    trials.extend(server!(
        server::nothing_acknowledged_is_lost_in_twenty_kills
        server::clients_that_hang_hurt_nobody_else
        server::a_thousand_watching_clients_cost_one_watch_of_the_store
        server::bad_requests_are_answered_as_flanneld_answers_them
        server::clients_without_a_certificate_are_refused
        server::a_client_moves_on_when_its_server_dies
        server::a_server_that_is_away_is_one_interruption_and_then_a_snapshot
        server::a_file_has_one_server_at_a_time
        server::a_disk_that_was_full_costs_the_writes_of_that_time_only
        server::a_damaged_file_is_named_with_what_to_do
        server::a_file_that_was_deleted_is_written_anew_with_every_lease
        server::a_file_that_was_replaced_is_left_alone_and_nothing_is_promised
        server::a_lease_that_stays_is_never_told_as_gone
        server::no_lease_ends_right_after_a_start
        server::a_socket_of_systemd_is_taken_over
        server::leases_move_between_a_file_and_etcd
        server::reservations_are_kept_by_a_command
        transcript::a_recorded_client_hears_what_it_heard_from_flanneld
        transcript::our_client_understands_flannelds_server
        transcript::a_recorded_client_of_several_networks_hears_what_it_heard_from_flanneld
    ));
    trials.push(Trial::test("a_case_whose_parts_never_come_to_rest_has_failed", || {
        let over_and_over = "2026-11-26T21:26:23.182945Z  WARN flannel_agent: again\n".repeat(20);
        let verdict = run(async {
            heard(&over_and_over);
            Ok(())
        });
        match verdict {
            Err(failed) if failed.message().is_some_and(|text| text.contains("20 times in 0.0 s: WARN")) => {
                // And it is this case's alone.
                run(async { Ok(()) })
            }
            other => Err(format!("{other:?}").into()),
        }
    }));
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(cluster);
    drop((etcd, newer));

    let log = LOG.lock().unwrap_or_else(PoisonError::into_inner);
    if String::from_utf8_lossy(&log).contains(etcd::PASSWORD) {
        eprintln!("the log holds the password");
        return ExitCode::FAILURE;
    }
    if conclusion.has_failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
