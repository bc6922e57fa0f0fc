//! What a network between a node and etcd can do to their conversation.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// A TCP relay in front of etcd that can hold what passes.
pub(crate) struct Relay {
    address: SocketAddr,
    state: Arc<RelayState>,
    _tasks: JoinSet<()>,
}

#[derive(Default)]
struct RelayState {
    connections: AtomicU32,
    armed: AtomicBool,
    holding: Arc<AtomicBool>,
    stalled: AtomicBool,
}

impl Relay {
    pub(crate) async fn start(target: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let state = Arc::new(RelayState::default());
        let shared = state.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                shared.connections.fetch_add(1, Ordering::SeqCst);
                let Ok(far) = TcpStream::connect(target).await else { continue };
                let (near_read, near_write) = near.into_split();
                let (far_read, far_write) = far.into_split();
                connections.spawn(shared.clone().pass_requests(near_read, far_write));
                connections.spawn(shared.clone().pass_answers(far_read, near_write));
            }
        });
        Ok(Self { address, state, _tasks: tasks })
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn connections(&self) -> u32 {
        self.state.connections.load(Ordering::SeqCst)
    }

    /// The next answer with a list in it passes, and nothing the client sends after it.
    pub(crate) fn hold_requests_after_the_next_answer(&self) {
        self.state.armed.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_holding(&self) -> Arc<AtomicBool> {
        self.state.holding.clone()
    }

    /// Nothing passes, in neither direction.
    pub(crate) fn stall(&self) {
        self.state.stalled.store(true, Ordering::SeqCst);
    }

    pub(crate) fn release(&self) {
        self.state.stalled.store(false, Ordering::SeqCst);
        self.state.holding.store(false, Ordering::SeqCst);
    }
}

impl RelayState {
    async fn pass_requests(
        self: Arc<Self>,
        mut from: tokio::net::tcp::OwnedReadHalf,
        mut to: tokio::net::tcp::OwnedWriteHalf,
    ) {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            while self.holding.load(Ordering::SeqCst) || self.stalled.load(Ordering::SeqCst) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            if to.write_all(&buffer[..length]).await.is_err() {
                return;
            }
        }
    }

    async fn pass_answers(
        self: Arc<Self>,
        mut from: tokio::net::tcp::OwnedReadHalf,
        mut to: tokio::net::tcp::OwnedWriteHalf,
    ) {
        const ENTRIES: usize = 150;
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            if length > ENTRIES && self.armed.swap(false, Ordering::SeqCst) {
                self.holding.store(true, Ordering::SeqCst);
            }
            while self.stalled.load(Ordering::SeqCst) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            if to.write_all(&buffer[..length]).await.is_err() {
                return;
            }
        }
    }
}
