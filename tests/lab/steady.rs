//! Traffic that goes on while something is done to the hosts, and what of it was lost.

use std::{net::SocketAddrV4, time::Duration};

use anyhow::{Context as _, Result, ensure};

use crate::{
    probe::{
        ping::{Ping, RunningPing},
        tcp::{Flow, TcpPath, Transfer},
    },
    topology::Lab,
};

/// So few pings tell nothing.
const MOST_TELLING: u32 = 50;

/// Pings in both directions, milliseconds apart, and a TCP stream, from pod to pod of the first two hosts.
#[derive(Debug)]
pub struct Traffic {
    pings: [RunningPing; 2],
    flow: Flow,
}

impl Traffic {
    pub fn start(lab: &Lab) -> Result<Self> {
        Self::start_every(lab, Duration::from_millis(4))
    }

    /// With a ping each `interval` in both directions.
    pub fn start_every(lab: &Lab, interval: Duration) -> Result<Self> {
        let (a, b) = (lab.host(0).pod()?, lab.host(1).pod()?);
        // Neighbours are resolved before anything is counted.
        lab.ping_all_pairs(1)?;
        let ping = |from, to| Ping::new(from, to).count(1_000_000).interval(interval).start();
        let address = SocketAddrV4::new(b.address, 5001);
        let traffic = Self {
            pings: [ping(&a.netns, b.address)?, ping(&b.netns, a.address)?],
            flow: TcpPath::new(&a.netns, &b.netns, address).flow()?,
        };
        // What is done next, is done to traffic that flows.
        traffic.pings.iter().try_for_each(|ping| ping.wait_received(1))?;
        traffic.flow.wait_arrived(1)?;
        Ok(traffic)
    }

    /// Stops it; pings lost (both directions) and the stream, which must have arrived whole.
    pub fn stop(self) -> Result<(u32, Transfer)> {
        // Some more: after what was done, too.
        self.pings.iter().try_for_each(|ping| ping.wait_sent(MOST_TELLING + 1))?;
        ensure!(
            self.flow.is_alive(),
            "the TCP connection is gone: {:#}",
            self.flow.finish().err().context("ended")?
        );
        let transfer = self.flow.finish()?;
        let mut lost = 0;
        for ping in self.pings {
            let report = ping.stop()?;
            ensure!(report.sent > MOST_TELLING, "{report}");
            if report.lost() > 0 {
                println!("{report}");
            }
            lost += report.lost();
        }
        Ok((lost, transfer))
    }

    /// [`Self::stop`], and nothing may have been lost.
    pub fn stop_without_loss(self) -> Result<()> {
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
