//! A store that misbehaves: what stands between it and a node cuts, delays, answers garbage, half or never.
//!
//! After each trouble the node must know what the store has, and its lease be its own; while it lasts, calls end in time
//! with an error that says so, few connections are tried and few lines logged.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use flannel_agent::domain::lease::{LeaseEvent, Subnets};
use flannel_agent::stores::{LEASE_TTL, LeaseStore, StoreError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::LINES;
use crate::ground::{Events, Ground, first, network, next_within, request};

/// How long each trouble lasts.
const LASTS: Duration = Duration::from_secs(4);
/// The same of those that eat a watch's news and leave its connection: what notices them is a question every five seconds
/// (etcd's v2 API has no other way), which must come in the middle of it, on a busy machine too.
const SILENCE_LASTS: Duration = Duration::from_secs(10);
/// Within this time after it everything must be as if nothing had been. A call has five seconds, a wait as many.
pub(crate) const OVER: Duration = Duration::from_secs(20);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    None,
    /// Connections are closed, and new ones at once.
    Cut,
    /// Connections are taken and nothing passes.
    Silence,
    /// What passes takes half a second more, each time.
    Delay,
    /// Answers are random bytes.
    Garbage,
    /// Answers end in the middle, and the connection stays.
    Half,
}

impl Trouble {
    const ALL: [Self; 6] = [Self::None, Self::Cut, Self::Silence, Self::Delay, Self::Garbage, Self::Half];
}

/// A TCP proxy with a will of its own.
pub(crate) struct Middle {
    address: SocketAddr,
    trouble: Arc<AtomicU8>,
    connections: Arc<AtomicU32>,
    /// Changes when open connections are to end.
    ends: watch::Sender<u32>,
    _tasks: JoinSet<()>,
}

impl Middle {
    pub(crate) async fn start(target: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (trouble, connections) = (Arc::new(AtomicU8::new(0)), Arc::new(AtomicU32::new(0)));
        let ends = watch::channel(0).0;
        let mut tasks = JoinSet::new();
        let (state, count, ended) = (trouble.clone(), connections.clone(), ends.subscribe());
        tasks.spawn(async move {
            let mut pairs = JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::SeqCst);
                if of(&state) == Trouble::Cut {
                    continue;
                }
                let Ok(far) = TcpStream::connect(target).await else { continue };
                let (state, mut ended) = (state.clone(), ended.clone());
                ended.borrow_and_update();
                pairs.spawn(async move {
                    let (near_read, near_write) = near.into_split();
                    let (far_read, far_write) = far.into_split();
                    tokio::select! {
                        _ = ended.changed() => {}
                        () = pass(near_read, far_write, state.clone(), Direction::There) => {}
                        () = pass(far_read, near_write, state, Direction::Back) => {}
                    }
                });
            }
        });
        Ok(Self { address, trouble, connections, ends, _tasks: tasks })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends every connection there is; new ones are taken.
    pub(crate) fn hang_up(&self) {
        self.ends.send_modify(|ends| *ends += 1);
    }

    fn set(&self, trouble: Trouble) {
        let index = Trouble::ALL.iter().position(|other| *other == trouble).unwrap_or(0);
        self.trouble.store(u8::try_from(index).unwrap_or(0), Ordering::SeqCst);
        if trouble == Trouble::Cut {
            self.hang_up();
        }
    }
}

fn of(trouble: &AtomicU8) -> Trouble {
    Trouble::ALL[usize::from(trouble.load(Ordering::SeqCst))]
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    There,
    Back,
}

async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    trouble: Arc<AtomicU8>,
    direction: Direction,
) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let bytes = &mut buffer[..length];
        match (of(&trouble), direction) {
            (Trouble::Silence, _) => {
                // What was lost in it stays lost: the connection is of no use any more.
                std::future::pending::<()>().await;
            }
            (Trouble::Delay, _) => tokio::time::sleep(Duration::from_millis(500)).await,
            (Trouble::Garbage, Direction::Back) => bytes.fill(0xa5),
            (Trouble::Half, Direction::Back) => {
                let _ = to.write_all(&bytes[..length / 2]).await;
                std::future::pending::<()>().await;
            }
            _ => {}
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

/// What a node believes, by its watch.
struct Belief {
    events: Events,
    leases: BTreeMap<Subnets, String>,
    interruptions: u32,
}

impl Belief {
    async fn new(store: &dyn LeaseStore) -> Result<Self> {
        let mut events = store.watch();
        let (leases, _) = first(&mut events).await?;
        let leases = leases.iter().map(|lease| (lease.subnets, lease.attrs.to_json())).collect();
        Ok(Self { events, leases, interruptions: 0 })
    }

    /// Takes in what comes within `time`, until it believes `wanted`.
    async fn follow(&mut self, time: Duration, wanted: Option<&BTreeMap<Subnets, String>>) -> bool {
        let started = Instant::now();
        loop {
            if wanted == Some(&self.leases) {
                return true;
            }
            let left = time.saturating_sub(started.elapsed());
            let Ok(event) = next_within(&mut self.events, left).await else { return false };
            match event {
                LeaseEvent::Snapshot(leases, _) => {
                    self.leases = leases.iter().map(|lease| (lease.subnets, lease.attrs.to_json())).collect();
                }
                LeaseEvent::Added(lease) => {
                    self.leases.insert(lease.subnets, lease.attrs.to_json());
                }
                LeaseEvent::Removed(subnets) => {
                    self.leases.remove(&subnets);
                }
                LeaseEvent::Interrupted(_) => self.interruptions += 1,
                LeaseEvent::Unreadable(_) => {}
            }
        }
    }
}

/// A node behind `middle`, and `ground` with which others change things meanwhile.
async fn survives(
    ground: &Ground,
    store: Arc<dyn LeaseStore>,
    middle: &Middle,
    trouble: Trouble,
    over: Duration,
) -> Result<()> {
    let lease = store.acquire(&request(&network("10.5.255.0"), "192.0.2.1")).await?;
    let mut belief = Belief::new(store.as_ref()).await?;
    let (connections, lines) = (middle.connections.load(Ordering::SeqCst), LINES.get());

    middle.set(trouble);
    ground.put("10.5.200.0-24", r#"{"PublicIP":"192.0.2.200"}"#, Some(LEASE_TTL)).await?;
    ground.put("10.5.201.0-24", r#"{"PublicIP":"192.0.2.201"}"#, Some(LEASE_TTL)).await?;
    ground.delete("10.5.200.0-24").await?;
    let asked = Instant::now();
    let lasts = match trouble {
        Trouble::Silence | Trouble::Half if ground.tells_revisions() => SILENCE_LASTS,
        _ => LASTS,
    };
    let renewed = tokio::time::timeout(Duration::from_secs(25), store.renew(&lease));
    let renewed = if ground.tells_revisions() {
        // The watch is listened to all the time, as an agent does: nothing of it goes on otherwise.
        tokio::join!(renewed, belief.follow(lasts, None)).0
    } else {
        renewed.await
    };
    let renewed = renewed.with_context(|| format!("a renewal still waits after {:?}", asked.elapsed()))?;
    belief.follow(lasts.saturating_sub(asked.elapsed()), None).await;
    if let Err(error) = &renewed {
        ensure!(matches!(error, StoreError::Unreachable { .. }), "{trouble:?}: {error:?}");
    }
    let tried = middle.connections.load(Ordering::SeqCst) - connections;
    ensure!(tried <= 60, "{tried} connections were tried in {:?}", asked.elapsed());
    ensure!(belief.interruptions <= 4, "{} interruptions were told", belief.interruptions);

    middle.set(Trouble::None);
    let renewed = loop {
        match store.renew(&lease).await {
            Ok(renewed) => break renewed,
            Err(error) => {
                ensure!(asked.elapsed() < lasts + 2 * over, "the lease can't be renewed afterwards: {error}");
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    };
    ensure!(renewed.subnets == lease.subnets, "another subnet");
    let there = ground.entries().await?;
    let there = there.iter().map(|(key, value)| {
        let attrs = flannel_agent::domain::lease::LeaseAttrs::from_json(value)?;
        Ok((key.parse()?, attrs.to_json()))
    });
    let there: BTreeMap<Subnets, String> = there.collect::<Result<_>>()?;
    ensure!(belief.follow(over, Some(&there)).await, "the node believes {:?}, not {there:?}", belief.leases);
    let said = LINES.get() - lines;
    // One per attempt would be dozens.
    ensure!(said <= 8, "{trouble:?}: {said} lines were logged");
    Ok(())
}

/// Every trouble, one after the other, on one store, which may take `over` to know everything again.
pub(crate) async fn each_is_survived(ground: Ground, over: Duration) -> Result<()> {
    let middle = Middle::start(ground.server_address()?).await?;
    let store = ground.node_through(middle.address())?;
    for trouble in [Trouble::Cut, Trouble::Silence, Trouble::Delay, Trouble::Garbage, Trouble::Half] {
        survives(&ground, store.clone(), &middle, trouble, over)
            .await
            .with_context(|| format!("{trouble:?}"))?;
        ground.delete("10.5.201.0-24").await?;
    }
    Ok(())
}
