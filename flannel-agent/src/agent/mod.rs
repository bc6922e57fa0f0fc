//! The loop: leases come in, the backend says what the host should look like, and the agent makes it so.
//!
//! One task owns all state. Every arm of the loop that may have changed something ends in the same step,
//! [`Agent::reconcile`]: compare what is applied with what is wanted and make the difference. That a device was deleted,
//! a route flushed, a peer came or the predecessor crashed are all the same to it.
//!
//! What succeeded is recorded, not what was asked; what failed is tried again with back-off and never holds up the
//! rest. Nothing is removed before the store's first snapshot: an empty list of peers means nothing until then.

mod paths;
mod report;
mod retries;
mod said;
mod tenure;
#[cfg(test)]
mod tests;
mod underlay;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{FutureExt as _, StreamExt as _};
use rand::Rng as _;
use tokio::sync::mpsc;
use tokio::time::{Instant as TokioInstant, sleep_until};
use tokio_util::sync::CancellationToken;

use self::retries::Retries;
use self::said::Said;
use self::tenure::{Tenure, Turn};
use self::underlay::Underlay;
use crate::backends::{Backend, BackendContext};
use crate::domain::config::NetworkConfig;
use crate::domain::host_state::{Change, HostItem, HostState};
use crate::domain::interface::{ExternalInterface, Selection};
use crate::domain::lease::{Lease, LeaseEvent, Subnets};
use crate::domain::path_mtu::PathMtus;
use crate::domain::peers::{Changed, OwnLease, Peers};
use crate::health::Health;
use crate::host::{Host, News};
use crate::status::{Answer, Question};
use crate::stores::LeaseStore;
use crate::subnet_env::SubnetEnv;

/// Without any sign of damage the host is looked at this often, give or take a fifth.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// How long the first pass waits for the store's first word.
const FIRST_WORD: Duration = Duration::from_secs(2);

/// What a node has before its loop starts.
pub struct Node {
    pub config: NetworkConfig,
    /// How the interface was chosen.
    pub selection: Selection,
    /// What the backend was made of, with the interface as it is now.
    pub context: BackendContext,
    pub backend: Box<dyn Backend>,
    pub store: Arc<dyn LeaseStore>,
    pub lease: Lease,
}

/// What the operator chose about the loop.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// Where subnet.env goes.
    pub subnet_file: PathBuf,
    /// The lease is renewed this long before it ends.
    pub renew_margin: Duration,
    /// A path's lowered MTU stands this long before a larger one is tried.
    pub path_mtu_lifetime: Duration,
    pub company: Company,
}

/// Whether this loop is all there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Company {
    /// It tells systemd that the node is ready; when the lease is lost it leaves the host as it is, for the supervisor
    /// that starts the process again.
    Alone,
    /// One of several networks in this process, which tells others apart: it is started again here, maybe with another
    /// subnet, so a lost lease takes what hung on it along.
    AmongNetworks,
}

/// What the loop can be told from outside.
#[derive(Clone, Debug, Default)]
pub struct Orders {
    /// End, and leave the host as it is.
    pub stop: CancellationToken,
    /// End, and take everything of ours off the host: the network is no more.
    pub leave: CancellationToken,
}

/// Why the loop ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// It was told to. The host is left as it is.
    Stopped,
    /// It was told to leave. Nothing of its making is on the host any more.
    Left,
    /// Our subnet belongs to another node, or to nobody we can take it back from.
    LeaseLost(String),
}

/// The only owner of state.
pub struct Agent<H> {
    node: Node,
    host: H,
    options: AgentOptions,
    health: Health,
    peers: Peers,
    tenure: Tenure,
    /// What is known to be on the host; `None` until it could be read.
    applied: Option<HostState>,
    retries: Retries,
    /// What subnet.env says; systemd was told when it was written first.
    published: Option<SubnetEnv>,
    underlay: Underlay,
    paths: PathMtus,
    /// Nothing of ours was on the host when the agent started.
    found_nothing: bool,
    refused: BTreeSet<String>,
    /// How many peers the log has told of.
    peers_said: usize,
}

impl<H: Host> Agent<H> {
    pub fn new(node: Node, host: H, options: AgentOptions, health: Health) -> Self {
        let peers = no_peers(&node);
        let paths = PathMtus::new(node.backend.probed_mtu(), options.path_mtu_lifetime);
        let tenure = Tenure::new(node.store.clone(), options.renew_margin, now());
        health.wait("watch", "the other nodes' leases are not known yet");
        health.wait("host", "the host is not set up yet");
        health.begin();
        Self {
            node,
            host,
            options,
            health,
            peers,
            tenure,
            applied: None,
            retries: Retries::default(),
            published: None,
            underlay: Underlay::default(),
            paths,
            found_nothing: false,
            refused: BTreeSet::new(),
            peers_said: 0,
        }
    }

    /// Runs until it is told to end or until the lease is lost for good. `questions` are answered in between.
    pub async fn run(mut self, orders: Orders, questions: &mut mpsc::Receiver<Question>) -> End {
        let end = self.turn(&orders, questions).await;
        // A start that never became ready on a host where nothing of ours was leaves nothing behind.
        let never_began = self.published.is_none() && self.found_nothing;
        let gone = match end {
            End::Left => true,
            End::LeaseLost(_) => self.options.company == Company::AmongNetworks,
            End::Stopped => false,
        };
        if never_began || gone {
            self.clear().await;
        }
        end
    }

    async fn turn(&mut self, orders: &Orders, questions: &mut mpsc::Receiver<Question>) -> End {
        let mut events = self.node.store.watch();
        // The store's first word is usually a matter of milliseconds, and spares a pass with half the truth.
        let first_word = tokio::time::timeout(FIRST_WORD, events.next());
        let first_word = tokio::select! {
            () = orders.stop.cancelled() => return End::Stopped,
            () = orders.leave.cancelled() => return End::Left,
            ((), first_word) = async { tokio::join!(self.look(), first_word) } => first_word,
        };
        self.found_nothing = self.applied.as_ref().is_some_and(HostState::is_empty);
        self.inherit_paths();
        if let Ok(Some(event)) = first_word {
            self.fold(event);
        }
        self.tenure.begin(&self.node.lease, now());
        let mut next_look = after(jittered(LOOK_AGAIN));
        let mut heartbeat = tokio::time::interval(Duration::from_secs(1));
        heartbeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        // Building and comparing the states of thousands of peers takes milliseconds: not for a heartbeat or a question.
        let mut may_differ = true;
        loop {
            while let Some(Some(event)) = events.next().now_or_never() {
                self.fold(event);
                may_differ = true;
            }
            if std::mem::replace(&mut may_differ, true) {
                self.reconcile().await;
            }
            self.health.turn(now());
            tokio::select! {
                () = orders.stop.cancelled() => return End::Stopped,
                () = orders.leave.cancelled() => return End::Left,
                event = events.next() => if let Some(event) = event { self.fold(event) },
                news = self.host.news() => match news {
                    News::Disturbed => {
                        tracing::debug!("something of ours may have been touched, looking");
                        self.look().await;
                    }
                    News::Heard(heard) => may_differ = self.hear_of_paths(&heard).await,
                },
                () = sleep_until(next_look) => {
                    self.look().await;
                    next_look = after(jittered(LOOK_AGAIN));
                }
                () = self.retries.due() => {
                    if self.applied.is_none() {
                        self.look().await;
                    }
                }
                turn = self.tenure.turn() => match self.tenure.take(turn, &self.node, now()) {
                    Turn::Holds(lease) => self.hold(*lease),
                    Turn::Waits(reason) => self.health.wait("lease", reason),
                    Turn::Lost(reason) => return End::LeaseLost(reason),
                },
                question = questions.recv() => if let Some(question) = question {
                    // An asker that went away is not our trouble.
                    let _ = question.send(Answer::Running(Box::new(self.status())));
                    may_differ = false;
                },
                _ = heartbeat.tick() => may_differ = self.ask_about_paths().await,
            }
        }
    }

    /// The store says that this is our lease.
    fn hold(&mut self, lease: Lease) {
        let names_us = lease.attrs.names_the_node_of(&self.node.backend.lease_attrs());
        if names_us || self.tenure.is_settled() {
            self.health.done("lease");
            self.peers.hold(&lease);
            // A former address is no longer ours once the store does not show it.
            self.renumber_peers();
        }
        self.node.lease = lease;
    }

    /// Takes news of the store over.
    fn fold(&mut self, event: LeaseEvent) {
        match &event {
            LeaseEvent::Interrupted(reason) => {
                tracing::warn!(
                    "the watch of leases is interrupted, traffic flows on with the peers known: {reason}"
                );
                self.health.wait("watch", format!("the other nodes' leases may be out of date: {reason}"));
            }
            LeaseEvent::Snapshot(leases, _) => {
                if self.health.done_and_wait("watch", "host", "the leases just known are not acted on yet") {
                    tracing::info!(leases = leases.len(), "the other nodes' leases are known");
                }
            }
            LeaseEvent::Added(_) | LeaseEvent::Removed(_) | LeaseEvent::Unreadable(_) => {}
        }
        let folded = self.peers.fold(event);
        if folded.peers == Changed::Yes {
            self.peers_have_paths();
        }
        match folded.own {
            Some(OwnLease::Changed(lease)) if lease.revision >= self.node.lease.revision => {
                self.hold(lease);
                self.tenure.begin(&self.node.lease, now());
            }
            Some(OwnLease::Changed(_)) | None => {}
            Some(OwnLease::Gone) => {
                tracing::warn!(lease = %self.node.lease.subnets, "our lease is gone, taking it again");
                self.health.wait("lease", "our lease is gone and is being taken again");
                self.tenure.retake(&self.node);
            }
        }
        self.report_refusals();
    }

    /// Each refused or unreadable entry is said once.
    fn report_refusals(&mut self) {
        let now: BTreeSet<String> = self
            .peers
            .refused()
            .map(|refused| refused.to_string())
            .chain(self.peers.unreadable().map(|entry| format!("entry {entry}")))
            .collect();
        for text in now.difference(&self.refused) {
            tracing::warn!("{text}");
        }
        self.refused = now;
    }

    /// Reads what is on the host.
    async fn look(&mut self) {
        match self.host.observe().await {
            Ok(state) => {
                self.applied = Some(state);
                self.retries.looked();
            }
            Err(error) => {
                if self.retries.could_not_look(now()) {
                    tracing::error!("the host can't be read, trying again: {error}");
                }
                self.health.wait("host", error.to_string());
            }
        }
        self.follow_interface().await;
    }

    /// Makes the host look as it should, as far as it can be done now.
    async fn reconcile(&mut self) {
        let peers = self.peers.len();
        let before = std::mem::replace(&mut self.peers_said, peers);
        if before != peers {
            tracing::info!(peers, before, "peers changed");
        }
        // A tunnel that was just put may have taken over the map of a former run, with peers that are gone:
        // look once more and compare again. Two rounds are enough, what is left comes with the next pass.
        for _ in 0..2 {
            let Some(applied) = &self.applied else { return };
            let wanted = self.node.backend.desired(&self.node.lease, &self.peers, &self.paths);
            let mut devices = applied.changes_to(&wanted);
            self.retries.forget_all_but(&devices, now());
            let others =
                devices.split_off(devices.iter().take_while(|change| makes_a_device(change)).count());
            let taken_over = self.make(devices).await;
            if taken_over {
                self.look().await;
                continue;
            }
            let Some(applied) = &self.applied else { return };
            // A route to a tunnel that carries nothing would swallow packets. Looked for once, not for each of the peers.
            let unready: BTreeSet<&str> =
                wanted.iter().filter_map(|item| item.makes().filter(|_| !applied.contains(item))).collect();
            let ready = |device: &str| !unready.contains(device);
            let others = others
                .into_iter()
                .filter(|change| match change {
                    Change::Put(item) => item.device().is_none_or(ready),
                    Change::Remove(_) => self.peers.is_known(),
                })
                .collect();
            self.make(others).await;
            let outstanding = self.applied.as_ref().map_or(0, |applied| applied.changes_to(&wanted).len());
            self.settle(outstanding);
            return;
        }
        self.retries.soon(now());
    }

    /// Makes those of the changes that need not wait; whether a tunnel was put.
    async fn make(&mut self, mut changes: Vec<Change>) -> bool {
        let now = now();
        changes.retain(|change| !self.retries.holds_back(&change.item().key(), now));
        if changes.is_empty() {
            return false;
        }
        let results = self.host.apply(&changes).await;
        let Some(applied) = self.applied.as_mut() else { return false };
        let (mut tunnel, mut said) = (false, Said::default());
        for (change, result) in changes.iter().zip(results) {
            let key = change.item().key();
            match result {
                Ok(()) => {
                    if self.retries.succeeded(&key) {
                        said.done_after_all(change);
                    } else {
                        tracing::debug!("{change}");
                    }
                    if matches!(change, Change::Put(_)) && self.retries.made(key, now) {
                        said.undone(change);
                    }
                    applied.record(change);
                    tunnel |= matches!(change, Change::Put(HostItem::Tunnel(_)));
                }
                Err(error) => {
                    if self.retries.failed(key, &error.to_string(), now) {
                        said.failed(change, &error);
                    }
                }
            }
        }
        said.sum_up();
        tunnel
    }

    /// Takes everything of ours off the host.
    async fn clear(&mut self) {
        let Some(applied) = &self.applied else { return };
        let changes = applied.changes_to(&HostState::new());
        for (change, result) in changes.iter().zip(self.host.apply(&changes).await) {
            if let Err(error) = result {
                tracing::warn!("{change}: {error}");
            }
        }
    }

    /// Says how far the host is from what is wanted, and publishes the subnet once its own part is in place.
    fn settle(&mut self, outstanding: usize) {
        if let (0, Some(coming)) = (outstanding, self.host.coming()) {
            self.health.wait("host", coming);
        } else if outstanding == 0 {
            if self.health.done("host") {
                tracing::info!(peers = self.peers.len(), "the host looks as it should");
            }
        } else if self.peers.is_known() {
            let reason = self.retries.latest().unwrap_or("they are being made");
            self.health.wait("host", format!("{outstanding} changes of the host are outstanding: {reason}"));
        }
        self.publish();
    }

    /// Writes subnet.env and tells systemd when everything but the peers is in place; writes it again when it has to say
    /// something else.
    fn publish(&mut self) {
        let env = SubnetEnv {
            networks: networks(&self.node.config),
            subnets: self.node.lease.subnets,
            mtu: self.node.backend.mtu(),
            ip_masq: false,
        };
        if self.published.as_ref() == Some(&env) {
            return;
        }
        let Some(applied) = &self.applied else { return };
        let own_part = self.node.backend.desired(
            &self.node.lease,
            &no_peers(&self.node),
            &PathMtus::new(None, self.options.path_mtu_lifetime),
        );
        if !own_part.iter().all(|item| applied.contains(item)) {
            return;
        }
        if let Err(error) = env.write(&self.options.subnet_file) {
            let text = error.to_string();
            if self.retries.could_not_publish(&text, now()) {
                tracing::error!("{text}");
            }
            self.health.wait("subnet.env", text);
            return;
        }
        self.health.done("subnet.env");
        let file = self.options.subnet_file.display();
        match self.published.replace(env) {
            None => {
                self.node.store.network_is_up();
                tracing::info!("ready: {} leased, {file} written", self.node.lease.subnets);
                if self.options.company == Company::Alone {
                    crate::health::tell_systemd();
                }
            }
            Some(before) => tracing::info!(
                "{file} written again: FLANNEL_MTU was {} and is {}; pods made before keep theirs and are told by ICMP \
                 what is too big",
                before.mtu,
                self.node.backend.mtu(),
            ),
        }
    }
}

/// Whether a change is part of setting up a device, before anything can hang on it.
fn makes_a_device(change: &Change) -> bool {
    match change {
        Change::Put(item) => item.device().is_none(),
        Change::Remove(_) => false,
    }
}

fn no_peers(node: &Node) -> Peers {
    Peers::new(&node.lease, &node.config, &own_addresses(&node.context.interface))
}

fn own_addresses(interface: &ExternalInterface) -> Vec<IpAddr> {
    interface.addresses().chain(interface.public_addresses()).collect()
}

fn networks(config: &NetworkConfig) -> Subnets {
    Subnets { v4: config.v4.map(|range| range.network), v6: config.v6.map(|range| range.network) }
}

fn after(wait: Duration) -> TokioInstant {
    TokioInstant::now() + wait
}

/// The loop's clock: monotonic, and one with the timers it waits on.
fn now() -> Instant {
    TokioInstant::now().into_std()
}

/// Give or take a fifth, so that nodes that started together drift apart.
fn jittered(period: Duration) -> Duration {
    period.mul_f64(crate::chance::rng().random_range(0.8..=1.2))
}
