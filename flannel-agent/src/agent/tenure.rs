//! Holding our lease: when to renew it, what to do when it is gone.
//!
//! The store is asked from a task of its own, so that a store that hangs never holds up the repair of the host.
//! What it says of the node follows the node: an interface that got another address is published in the same lease.
//! A running node never changes its subnet: a lost lease is taken again under the same subnet or not at all.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rand::Rng as _;
use tokio::task::JoinHandle;
use tokio::time::sleep_until;

use super::Node;
use crate::domain::lease::{Lease, LeaseAttrs};
use crate::stores::{LeaseRequest, LeaseStore, StoreError};

/// After a failed renewal the store is asked again within this time (flanneld: after exactly a minute).
const AGAIN: Duration = Duration::from_secs(60);
const AGAIN_FIRST: Duration = Duration::from_secs(1);

/// Renewals of nodes that started together are spread over this time.
const SPREAD: Duration = Duration::from_secs(300);

pub(super) struct Tenure {
    store: Arc<dyn LeaseStore>,
    margin: Duration,
    next: Next,
    failures: u32,
    /// When this agent took the lease, or took it over.
    held_since: Instant,
    /// When the store took its end anew, last.
    renewed: Instant,
    /// The store does not say yet what is published of this node now.
    outdated: bool,
    /// What it was asked to say of the node, last. What it says may be another address: in Kubernetes an annotation of
    /// the operator goes before ours.
    asked: Option<LeaseAttrs>,
}

enum Next {
    /// A reservation, or not begun.
    Nothing,
    RenewAt(Instant),
    RetakeAt(Instant),
    Asking(What, JoinHandle<Result<Lease, StoreError>>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Renewal,
    Retake,
}

/// What came of waiting.
pub(super) enum Event {
    Due(Due),
    Answer { retake: bool, result: Result<Lease, StoreError> },
}

#[derive(Clone, Copy)]
pub(super) enum Due {
    Renew,
    Retake,
}

/// What it means for the node.
pub(super) enum Turn {
    Holds(Box<Lease>),
    Waits(String),
    Lost(String),
}

impl Tenure {
    /// Of a lease that was taken just now.
    pub(super) fn new(store: Arc<dyn LeaseStore>, margin: Duration, now: Instant) -> Self {
        Self {
            store,
            margin,
            next: Next::Nothing,
            failures: 0,
            held_since: now,
            renewed: now,
            outdated: false,
            asked: None,
        }
    }

    /// The store has taken what is published of this node, and the lease is not being taken again.
    pub(super) fn is_settled(&self) -> bool {
        !self.outdated && !matches!(self.next, Next::Asking(What::Retake, _) | Next::RetakeAt(_))
    }

    /// How long this agent has held the lease without a break.
    pub(super) fn held_for(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.held_since)
    }

    /// How long ago it was taken or renewed last.
    pub(super) fn renewed_ago(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.renewed)
    }

    /// What the others must know of us has changed: the lease is written again, at once or after the question that is
    /// under way.
    pub(super) fn publish(&mut self, node: &Node) {
        self.outdated = true;
        match self.next {
            Next::Asking(..) | Next::RetakeAt(_) => {}
            Next::Nothing | Next::RenewAt(_) => self.ask(What::Renewal, node),
        }
    }

    /// We hold `lease` from now on. A question that is under way is let finish.
    pub(super) fn begin(&mut self, lease: &Lease, now: Instant) {
        if matches!(self.next, Next::Asking(What::Renewal, _)) || self.outdated {
            return;
        }
        self.failures = 0;
        let jitter = crate::chance::rng().random_range(Duration::ZERO..=SPREAD);
        self.next = match lease.renew_at(now, self.margin, jitter) {
            Some(at) => {
                tracing::debug!("the lease is renewed in {} s", at.saturating_duration_since(now).as_secs());
                Next::RenewAt(at)
            }
            None => Next::Nothing,
        };
    }

    /// Takes the same subnet again.
    pub(super) fn retake(&mut self, node: &Node) {
        match self.next {
            // Its answer will say that the lease is gone, and lead here again.
            Next::Asking(..) => {}
            _ => self.ask(What::Retake, node),
        }
    }

    /// Returns when there is something to do or an answer is there. Cancel-safe.
    pub(super) async fn turn(&mut self) -> Event {
        match &mut self.next {
            Next::Nothing => std::future::pending().await,
            Next::RenewAt(at) => {
                sleep_until((*at).into()).await;
                Event::Due(Due::Renew)
            }
            Next::RetakeAt(at) => {
                sleep_until((*at).into()).await;
                Event::Due(Due::Retake)
            }
            Next::Asking(what, answer) => {
                let retake = *what == What::Retake;
                let result = answer.await.unwrap_or_else(|error| {
                    Err(StoreError::Unreachable {
                        store: "the store".to_owned(),
                        reason: format!("the request ended early: {error}"),
                    })
                });
                Event::Answer { retake, result }
            }
        }
    }

    /// Acts on what [`Self::turn`] returned.
    pub(super) fn take(&mut self, event: Event, node: &Node, now: Instant) -> Turn {
        let held = || Turn::Holds(Box::new(node.lease.clone()));
        match event {
            Event::Due(Due::Renew) => {
                self.ask(What::Renewal, node);
                held()
            }
            Event::Due(Due::Retake) => {
                self.ask(What::Retake, node);
                Turn::Waits("our lease is gone and is being taken again".to_owned())
            }
            Event::Answer { result: Ok(lease), retake } => {
                self.next = Next::Nothing;
                self.renewed = now;
                if retake {
                    self.held_since = now;
                }
                let published = node.backend.lease_attrs();
                if self.asked.as_ref().is_some_and(|asked| asked.names_the_node_of(&published)) {
                    self.outdated = false;
                    self.begin(&lease, now);
                } else {
                    // It was asked before the node changed.
                    self.publish(node);
                }
                if retake {
                    tracing::info!(lease = %lease.subnets, "the lease is ours again");
                } else {
                    tracing::info!(lease = %lease.subnets, "the lease is renewed");
                }
                Turn::Holds(Box::new(lease))
            }
            Event::Answer { retake: false, result: Err(StoreError::LeaseLost { reason, .. }) } => {
                tracing::warn!("our lease can't be renewed: {reason}; taking it again");
                self.ask(What::Retake, node);
                Turn::Waits(format!("our lease is lost: {reason}"))
            }
            Event::Answer {
                retake: true,
                result: Err(error @ (StoreError::LeaseLost { .. } | StoreError::OutOfSubnets(_))),
            } => {
                self.next = Next::Nothing;
                Turn::Lost(error.to_string())
            }
            Event::Answer { retake, result: Err(error) } => {
                let wait = self.back_off();
                if self.failures == 1 {
                    let doing = if retake { "taken again" } else { "renewed" };
                    tracing::warn!("the lease can't be {doing} yet, trying again: {error}");
                }
                self.next = if retake { Next::RetakeAt(now + wait) } else { Next::RenewAt(now + wait) };
                if retake {
                    Turn::Waits(format!("our lease is gone: {error}"))
                } else if self.outdated {
                    Turn::Waits(format!("our lease still names this node's former address: {error}"))
                } else if node.lease.expires.is_some_and(|expires| expires <= now) {
                    Turn::Waits(format!("our lease has run out and can't be renewed: {error}"))
                } else {
                    held()
                }
            }
        }
    }

    fn ask(&mut self, what: What, node: &Node) {
        let store = self.store.clone();
        let lease = node.lease.clone();
        let request = LeaseRequest {
            config: node.config.clone(),
            attrs: node.backend.lease_attrs(),
            previous: Some(lease.subnets),
            previous_only: true,
        };
        self.asked = Some(request.attrs.clone());
        let task = tokio::spawn(async move {
            match what {
                What::Renewal => store.rewrite(&lease, &request.attrs).await,
                What::Retake => store.acquire(&request).await,
            }
        });
        self.next = Next::Asking(what, task);
    }

    fn back_off(&mut self) -> Duration {
        self.failures = self.failures.saturating_add(1);
        let longest = AGAIN.min(AGAIN_FIRST * 2_u32.saturating_pow(self.failures.min(10) - 1));
        longest.mul_f64(crate::chance::rng().random_range(0.5..=1.0))
    }
}

impl Drop for Tenure {
    fn drop(&mut self) {
        if let Next::Asking(_, task) = &self.next {
            task.abort();
        }
    }
}
