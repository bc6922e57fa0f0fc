//! What happens when things break under traffic: the agent dies, etcd goes away, someone deletes what is ours, a lease is
//! lost.

mod agent;
mod cleanup;
mod damage;
mod datastore;
mod others;
mod server;
mod underlay;

use std::{process::ExitCode, thread::sleep, time::Duration};

use anyhow::{Context as _, Result, ensure};
use flannel_tests::{
    probe::{
        ping::{Ping, RunningPing},
        tcp::{Flow, TcpPath, Transfer},
    },
    scenario::run,
    topology::Lab,
};

/// Deleted things are back within this time.
const SOON: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let mut trials = agent::trials();
    trials.extend(cleanup::trials());
    trials.extend(damage::trials());
    trials.extend(datastore::trials());
    trials.extend(others::trials());
    trials.extend(server::trials());
    trials.extend(underlay::trials());
    run(trials)
}

/// Pings in both directions, milliseconds apart, and a TCP stream, from pod to pod of the first two hosts.
struct Traffic {
    pings: [RunningPing; 2],
    flow: Flow,
}

impl Traffic {
    fn start(lab: &Lab) -> Result<Self> {
        Self::start_every(lab, Duration::from_millis(4))
    }

    /// With a ping each `interval` in both directions.
    fn start_every(lab: &Lab, interval: Duration) -> Result<Self> {
        let (a, b) = (lab.host(0).pod()?, lab.host(1).pod()?);
        // Neighbours are resolved before anything is counted.
        lab.ping_all_pairs(1)?;
        let ping = |from, to| Ping::new(from, to).count(1_000_000).interval(interval).start();
        let address = std::net::SocketAddrV4::new(b.address, 5001);
        let traffic = Self {
            pings: [ping(&a.netns, b.address)?, ping(&b.netns, a.address)?],
            flow: TcpPath::new(&a.netns, &b.netns, address).flow()?,
        };
        sleep(Duration::from_millis(300));
        Ok(traffic)
    }

    /// Stops it; pings lost (both directions) and the stream, which must have arrived whole.
    fn stop(self) -> Result<(u32, Transfer)> {
        ensure!(
            self.flow.is_alive(),
            "the TCP connection is gone: {:#}",
            self.flow.finish().err().context("ended")?
        );
        let transfer = self.flow.finish()?;
        let mut lost = 0;
        for ping in self.pings {
            let report = ping.stop()?;
            ensure!(report.sent > 50, "{report}");
            // The one in flight when ping is interrupted counts as sent.
            lost += report.lost().saturating_sub(1);
        }
        Ok((lost, transfer))
    }

    /// [`Self::stop`], and nothing may have been lost.
    fn stop_without_loss(self) -> Result<()> {
        let (lost, transfer) = self.stop()?;
        ensure!(lost == 0, "{lost} pings lost");
        ensure!(
            transfer.longest_pause < Duration::from_millis(500),
            "the TCP stream stood still for {:?}",
            transfer.longest_pause
        );
        Ok(())
    }
}
