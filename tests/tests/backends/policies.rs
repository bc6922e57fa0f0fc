//! udp under a network policy controller that asks user space about packets in POSTROUTING, as kube-network-policies does
//! (sigs.k8s.io/kube-network-policies, pkg/dataplane/controller.go): every packet between pods waits for its word on both
//! nodes, and what it lets go goes on as if nothing had been.

use std::{
    io::ErrorKind,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::{JoinHandle, sleep},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use flannel_tests::{
    agent::AgentOptions,
    namespace::Namespace,
    probe::ping::Ping,
    scenario::scenario,
    topology::{Host, Lab},
};
use libtest_mimic::Trial;
use nfq::{Queue, Verdict};

use crate::{
    TIERS,
    traffic::{datagrams, stream},
};

const QUEUE: u16 = 100;
const STREAM: u64 = 8 << 20;

pub(crate) fn trials() -> Vec<Trial> {
    TIERS
        .into_iter()
        .chain(["auto"])
        .map(|tier| {
            scenario(
                format!("a_policy_controller_in_user_space_decides_on_both_nodes_over_{tier}"),
                Lab::new(&format!("policies-{tier}")),
                move |lab| decides(lab, tier),
            )
        })
        .collect()
}

/// A controller on one node: says of every packet to a pod that reaches POSTROUTING whether it may go.
struct Controller {
    says: Arc<Says>,
    thread: Option<JoinHandle<Result<()>>>,
}

#[derive(Debug, Default)]
struct Says {
    forbids: AtomicBool,
    ends: AtomicBool,
    /// About echo requests and answers.
    pings: AtomicU64,
    others: AtomicU64,
    /// Of these, TCP that is split after us.
    whole: AtomicU64,
}

impl Controller {
    /// From now on nothing passes without it.
    fn start(host: &Host) -> Result<Self> {
        let says = Arc::new(Says::default());
        let queue = host.netns().run(queue)?;
        let thread = Namespace::spawn(host.netns(), {
            let says = Arc::clone(&says);
            move || answer(queue, &says)
        });
        host.netns()
            .iptables(&format!("-t mangle -A POSTROUTING -d 10.244.0.0/16 -j NFQUEUE --queue-num {QUEUE}"))?;
        Ok(Self { says, thread: Some(thread) })
    }

    fn forbid(&self, forbids: bool) {
        self.says.forbids.store(forbids, Relaxed);
    }

    /// How many pings it was asked about since the last time.
    fn pings(&self) -> u64 {
        self.says.pings.swap(0, Relaxed)
    }

    fn end(mut self) -> Result<()> {
        self.says.ends.store(true, Relaxed);
        let thread = self.thread.take().context("it has ended")?;
        thread.join().map_err(|_| anyhow!("the controller panicked"))?
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        self.says.ends.store(true, Relaxed);
    }
}

/// As kube-network-policies opens it: headers only, super-packets whole.
fn queue() -> Result<Queue> {
    let mut queue = Queue::open().context("open a netfilter queue")?;
    queue.bind(QUEUE).context("bind the netfilter queue")?;
    queue.set_copy_range(QUEUE, 128)?;
    queue.set_recv_gso(QUEUE, true)?;
    queue.set_queue_max_len(QUEUE, 8192)?;
    queue.set_nonblocking(true);
    Ok(queue)
}

fn answer(mut queue: Queue, says: &Says) -> Result<()> {
    while !says.ends.load(Relaxed) {
        match queue.recv() {
            Ok(mut packet) => {
                let counter = if is_icmp(packet.get_payload()) { &says.pings } else { &says.others };
                counter.fetch_add(1, Relaxed);
                says.whole.fetch_add(packet.is_seg_offloaded().into(), Relaxed);
                let forbids = says.forbids.load(Relaxed);
                packet.set_verdict(if forbids { Verdict::Drop } else { Verdict::Accept });
                queue.verdict(packet)?;
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => sleep(Duration::from_micros(200)),
            Err(e) => return Err(e).context("read the netfilter queue"),
        }
    }
    Ok(())
}

/// RFC 791, 3.1: the protocol is the header's tenth byte.
fn is_icmp(packet: &[u8]) -> bool {
    packet.get(9) == Some(&1)
}

fn decides(lab: &mut Lab, tier: &str) -> Result<()> {
    // With the MTU told, the agents send no pings of their own.
    let options = AgentOptions::new()?.datapath(tier).flag("--udp-mtu=1472");
    lab.bring_up_with(&[options.clone(), options])?;
    let path = match tier {
        "auto" => "tc+bridge".to_owned(),
        _ => lab.host(1).status()?.path().to_owned(),
    };
    let at_rest = |lab: &Lab| -> Result<()> {
        for host in lab.hosts() {
            host.agent()?.wait_status(&path, |status| status.path() == path)?;
        }
        Ok(())
    };
    at_rest(lab)?;
    let (a, b) = (lab.host(0), lab.host(1));
    let controllers = [Controller::start(a)?, Controller::start(b)?];
    let ping = || Ping::new(&a.pod()?.netns, b.pod()?.address).count(10).run();

    let report = ping()?;
    ensure!(report.lost() == 0, "{report}");
    // Requests and answers, on their way into the tunnel and out of it.
    for controller in &controllers {
        let asked = controller.pings();
        ensure!(asked == 20, "asked about {asked} packets of 10 requests and 10 answers");
    }
    stream(a, b, STREAM)?;
    datagrams(a, b)?;
    for controller in &controllers {
        let others = controller.says.others.load(Relaxed);
        ensure!(others > 100, "asked about {others} packets of a stream and of datagrams");
    }
    // The pod's own are whole; whether they still are on the other node is the tier's matter.
    let whole = controllers[0].says.whole.load(Relaxed);
    ensure!(whole > 50, "asked about {whole} super-packets");

    // The sender's node forbids it: nothing comes. The receiver's does: it came so far.
    for (forbids, counts) in [(0, (10, 0)), (1, (10, 10))] {
        controllers[forbids].forbid(true);
        let report = ping()?;
        ensure!(report.received == 0, "forbidden on host {}: {report}", forbids + 1);
        let asked = (controllers[0].pings(), controllers[1].pings());
        ensure!(
            asked == counts,
            "forbidden on host {}: they were asked about {asked:?} packets",
            forbids + 1
        );
        controllers[forbids].forbid(false);
    }
    let report = ping()?;
    ensure!(report.lost() == 0, "allowed again: {report}");
    at_rest(lab)?;
    for controller in controllers {
        controller.end()?;
    }
    // Without one, it is the rule's word: nothing goes.
    let (a, b) = (lab.host(0), lab.host(1));
    let report = Ping::new(&a.pod()?.netns, b.pod()?.address).count(2).run()?;
    ensure!(report.received == 0, "nobody allowed it: {report}");
    Ok(())
}
