//! What happens when things break under traffic: the agent dies, etcd goes away, someone deletes what is ours, a lease is
//! lost.

mod agent;
mod cleanup;
mod damage;
mod datastore;
mod migration;
mod others;
mod server;
mod underlay;

use std::{process::ExitCode, time::Duration};

use flannel_tests::{scenario::run_in_order, steady::Traffic};

/// Deleted things are back within this time.
const SOON: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let mut trials = agent::trials();
    trials.extend(cleanup::trials());
    trials.extend(damage::trials());
    trials.extend(datastore::trials());
    trials.extend(migration::trials());
    trials.extend(others::trials());
    trials.extend(server::trials());
    trials.extend(underlay::trials());
    // What has a second to come back is not to wait for another test's processes.
    run_in_order(trials)
}
