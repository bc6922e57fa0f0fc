//! What lies between one node and the store, and what it can do to their conversation.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use flannel_agent::domain::lease::{Lease, LeaseAttrs, LeaseEvent, Subnets};
use flannel_agent::stores::memory::MemoryStore;
use flannel_agent::stores::{LeaseRequest, LeaseStore, StoreError};
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until};

/// How long after a repetition or a changed order everything is told anew: real watches compare themselves with a list.
const COMPARE: Duration = Duration::from_secs(20);

/// A node's way to the store. A clone is a second handle on it.
#[derive(Clone)]
pub(crate) struct Link {
    store: Arc<dyn LeaseStore>,
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
}

#[derive(Default)]
struct State {
    trouble: Trouble,
    /// Watches are told everything anew.
    compacted: u64,
}

/// What is wrong with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Trouble {
    #[default]
    None,
    /// Nobody answers.
    Cut,
    /// Everything takes this long.
    Slow(Duration),
    /// What is asked is done, and the answer is lost: it will be asked again.
    AnswersLost,
    /// Answers that mean nothing.
    Garbage,
    /// Events come twice.
    Doubled,
    /// Events overtake each other.
    Overtaking,
}

impl Link {
    pub(crate) fn new(store: &MemoryStore) -> Self {
        Self { store: store.open(), state: Arc::default(), changed: Arc::default() }
    }

    pub(crate) fn set(&self, trouble: Trouble) {
        self.lock().trouble = trouble;
        self.changed.notify_waiters();
    }

    pub(crate) fn compact(&self) {
        self.lock().compacted += 1;
        self.changed.notify_waiters();
    }

    fn trouble(&self) -> Trouble {
        self.lock().trouble
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Before a call.
    async fn ask(&self) -> Result<(), StoreError> {
        match self.trouble() {
            Trouble::Cut => Err(unreachable("nobody answers")),
            Trouble::Garbage => Err(unreachable("its answer can't be understood")),
            Trouble::Slow(wait) => {
                sleep(wait).await;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// After it.
    fn answer<T>(&self, answer: T) -> Result<T, StoreError> {
        match self.trouble() {
            Trouble::AnswersLost | Trouble::Cut => Err(unreachable("the answer was lost")),
            _ => Ok(answer),
        }
    }
}

fn unreachable(reason: &str) -> StoreError {
    StoreError::Unreachable { store: "the simulated store".into(), reason: reason.into() }
}

#[async_trait]
impl LeaseStore for Link {
    async fn network_config(&self) -> Result<String, StoreError> {
        self.ask().await?;
        let answer = self.store.network_config().await?;
        self.answer(answer)
    }

    async fn acquire(&self, request: &LeaseRequest) -> Result<Lease, StoreError> {
        self.ask().await?;
        let answer = self.store.acquire(request).await?;
        self.answer(answer)
    }

    async fn rewrite(&self, lease: &Lease, attrs: &LeaseAttrs) -> Result<Lease, StoreError> {
        self.ask().await?;
        let answer = self.store.rewrite(lease, attrs).await?;
        self.answer(answer)
    }

    async fn revoke(&self, subnets: Subnets) -> Result<(), StoreError> {
        self.ask().await?;
        self.store.revoke(subnets).await?;
        self.answer(())
    }

    fn watch(&self) -> BoxStream<'static, LeaseEvent> {
        let watch = Watch {
            link: self.clone(),
            events: None,
            ready: VecDeque::new(),
            compacted: 0,
            compare_at: None,
            away: false,
        };
        stream::unfold(watch, |mut watch| async move { Some((watch.next().await, watch)) }).boxed()
    }
}

struct Watch {
    link: Link,
    events: Option<BoxStream<'static, LeaseEvent>>,
    ready: VecDeque<LeaseEvent>,
    compacted: u64,
    compare_at: Option<Instant>,
    away: bool,
}

impl Watch {
    async fn next(&mut self) -> LeaseEvent {
        loop {
            let link = self.link.clone();
            let changed = link.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let (trouble, compacted) = {
                let state = link.lock();
                (state.trouble, state.compacted)
            };
            if matches!(trouble, Trouble::Cut | Trouble::Garbage) {
                self.events = None;
                self.ready.clear();
                if !std::mem::replace(&mut self.away, true) {
                    return LeaseEvent::Interrupted("the simulated store is away".into());
                }
                changed.await;
                continue;
            }
            if std::mem::replace(&mut self.compacted, compacted) != compacted {
                self.events = None;
                self.ready.clear();
            }
            if let Some(event) = self.ready.pop_front() {
                return event;
            }
            let events = self.events.get_or_insert_with(|| link.store.watch());
            let compare = async {
                match self.compare_at {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let event = tokio::select! {
                biased;
                () = changed => continue,
                event = events.next() => event,
                () = compare => {
                    self.compare_at = None;
                    self.events = None;
                    continue;
                }
            };
            let Some(event) = event else {
                self.events = None;
                continue;
            };
            if matches!(event, LeaseEvent::Snapshot(..)) {
                self.away = false;
            }
            match trouble {
                Trouble::Slow(wait) => sleep(wait).await,
                Trouble::Doubled => {
                    self.ready.push_back(event.clone());
                    self.compare_at.get_or_insert(Instant::now() + COMPARE);
                }
                Trouble::Overtaking if !matches!(event, LeaseEvent::Snapshot(..)) => {
                    // Held back until the next one has passed it, or a list is due.
                    self.ready.push_back(event);
                    let at = *self.compare_at.get_or_insert(Instant::now() + COMPARE);
                    let next = tokio::select! {
                        next = events.next() => next,
                        () = sleep_until(at) => None,
                    };
                    match next {
                        Some(next) => return next,
                        None => continue,
                    }
                }
                _ => {}
            }
            return event;
        }
    }
}
