//! Numbered datagrams from pod to pod while something is done to the tunnel, and where those went that did not arrive.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::net::UdpSocket;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use crate::rig::{DEVICE, Node, PATIENCE, Rig, UNDERLAY};

impl Rig {
    /// Sends numbered datagrams from A's pod to B's at about 5,000 a second until the flood is ended.
    pub(crate) fn flood(&self) -> Result<Flood> {
        let (sender, receiver) = (self.a.pod_socket(0)?, self.b.pod_socket(0)?);
        let to = receiver.local_addr()?;
        let (end, ended) = mpsc::channel::<()>();
        let dropped_before = self.dropped()?;
        let sending = thread::spawn(move || -> std::io::Result<Sent> {
            let (mut sent, mut pause) = (0_u64, Duration::ZERO);
            let start = Instant::now();
            let mut before = start;
            while ended.try_recv().is_err() && start.elapsed() < PATIENCE {
                for _ in 0..10 {
                    sender.send_to(&sent.to_be_bytes(), to)?;
                    sent += 1;
                }
                thread::sleep(Duration::from_millis(2));
                pause = pause.max(before.elapsed());
                before = Instant::now();
            }
            Ok(Sent { count: sent, pause })
        });
        // Read while it runs: a socket that nobody reads drops what no longer fits, and that would look like a loss.
        receiver.set_read_timeout(Some(Duration::from_millis(500)))?;
        let (total, told) = mpsc::channel::<u64>();
        let receiving = thread::spawn(move || receive(&receiver, &told));
        Ok(Flood { end, sending, total, receiving, dropped_before })
    }

    /// What each node's devices and sockets dropped so far, by name.
    fn dropped(&self) -> Result<BTreeMap<String, u64>> {
        let mut all = BTreeMap::new();
        for node in [&self.a, &self.b] {
            node.dropped(&mut all)?;
        }
        Ok(all)
    }
}

impl Node {
    /// What the tunnel counted; nothing while no agent runs.
    fn counted(&self) -> BTreeMap<String, u64> {
        let counters = self.report().map(|report| report.counters).unwrap_or_default();
        let packets = counters.into_iter().map(|(name, tally)| (name, tally.packets));
        packets.filter(|(_, packets)| *packets > 0).collect()
    }

    /// A TUN device drops what its queue has no room for because nobody reads it (`tun_net_xmit`, drivers/net/tun.c).
    fn dropped(&self, all: &mut BTreeMap<String, u64>) -> Result<()> {
        // Of a device's line, its name being the first (proc_pid_net(5)).
        const COLUMNS: [(&str, usize); 2] = [("rx", 4), ("tx", 12)];
        let of = |file: &str| {
            let path = format!("/proc/{}/net/{file}", self.id);
            fs::read_to_string(&path).with_context(|| format!("read {path}"))
        };
        let node = self.number;
        for line in of("dev")?.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let device = words.first().copied().unwrap_or_default().trim_end_matches(':');
            if [DEVICE, UNDERLAY].contains(&device) {
                for (way, column) in COLUMNS {
                    let count = words.get(column).context("a column of drops")?.parse()?;
                    all.insert(format!("node {node}: {device} {way}"), count);
                }
            }
        }
        let snmp = of("snmp")?;
        for protocol in ["Ip: ", "Udp: "] {
            let mut lines = snmp.lines().filter_map(|line| line.strip_prefix(protocol));
            let (names, values) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
            for (name, value) in names.split(' ').zip(values.split(' ')) {
                if ["Err", "Discards", "NoRoutes", "Fails", "NoPorts"].iter().any(|sign| name.contains(sign))
                {
                    all.insert(format!("node {node}: {protocol}{name}"), value.parse()?);
                }
            }
        }
        Ok(())
    }
}

/// Which datagrams arrived, until all that were sent have, or none has for a while after that number is told.
fn receive(receiver: &UdpSocket, told: &mpsc::Receiver<u64>) -> Result<Vec<bool>> {
    let (mut seen, mut count, mut sent) = (Vec::new(), 0, None);
    let mut buffer = [0; 16];
    loop {
        sent = sent.or_else(|| told.try_recv().ok());
        if sent.is_some_and(|sent| count >= sent) {
            return Ok(seen);
        }
        let length = match receiver.recv(&mut buffer) {
            Ok(length) => length,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                if sent.is_some() {
                    return Ok(seen);
                }
                continue;
            }
            Err(e) => return Err(e).context("receive a datagram of the flood"),
        };
        ensure!(length == 8, "{length} bytes instead of 8");
        let number = usize::try_from(u64::from_be_bytes(buffer[..8].try_into()?))?;
        if seen.len() <= number {
            seen.resize(number + 1, false);
        }
        count += u64::from(!std::mem::replace(&mut seen[number], true));
    }
}

struct Sent {
    count: u64,
    /// The longest between two batches of ten: how long this machine let a thread wait.
    pause: Duration,
}

pub(crate) struct Flood {
    end: mpsc::Sender<()>,
    sending: JoinHandle<std::io::Result<Sent>>,
    total: mpsc::Sender<u64>,
    receiving: JoinHandle<Result<Vec<bool>>>,
    dropped_before: BTreeMap<String, u64>,
}

impl Flood {
    /// Ends it and checks that every datagram arrived; how many there were.
    pub(crate) fn end_complete(self, rig: &Rig) -> Result<u64> {
        thread::sleep(Duration::from_millis(100));
        let _ = self.end.send(());
        let Sent { count: sent, pause } =
            self.sending.join().map_err(|_| anyhow!("the sender panicked"))??;
        let _ = self.total.send(sent);
        let mut seen = self.receiving.join().map_err(|_| anyhow!("the receiver panicked"))??;
        seen.resize(usize::try_from(sent)?, false);
        let missing: Vec<usize> =
            seen.iter().enumerate().filter(|(_, seen)| !**seen).map(|(number, _)| number).collect();
        if missing.is_empty() {
            return Ok(sent);
        }
        let mut dropped = rig.dropped()?;
        for (name, before) in self.dropped_before {
            dropped.entry(name).and_modify(|count| *count = count.saturating_sub(before));
        }
        dropped.retain(|_, count| *count > 0);
        let stretches = 1 + missing.windows(2).filter(|pair| pair[1] != pair[0] + 1).count();
        let counters = [&rig.a, &rig.b].map(Node::counted);
        bail!(
            "{} of {sent} datagrams are missing, in {stretches} stretches, numbers {:?}…; dropped by the kernel: \
             {dropped:?}; the sender's longest pause: {pause:?}; counted by the tunnel: {counters:?}",
            missing.len(),
            &missing[..missing.len().min(8)]
        )
    }
}
