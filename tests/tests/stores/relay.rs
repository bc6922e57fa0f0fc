//! What a network between a node and etcd can do to their conversation.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
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
    keeps_heads: AtomicBool,
    swallows_http1: AtomicBool,
    /// Milliseconds that lists of the v2 API are on the way.
    lists_take: AtomicU64,
}

/// What is known of one connection.
#[derive(Default)]
struct Asked {
    a_list: AtomicBool,
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
                let asked = Arc::new(Asked::default());
                connections.spawn(shared.clone().pass_requests(near_read, far_write, asked.clone()));
                connections.spawn(shared.clone().pass_answers(far_read, near_write, asked));
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

    /// The head of an answer passes only with the first of its body, as through a proxy that buffers.
    pub(crate) fn keep_heads(&self) {
        self.state.keeps_heads.store(true, Ordering::SeqCst);
    }

    /// Lists that etcd's v2 API has made are on the way so long, and nothing else is.
    pub(crate) fn delay_lists(&self, time: Duration) {
        self.state.lists_take.store(u64::try_from(time.as_millis()).unwrap_or(u64::MAX), Ordering::SeqCst);
    }

    /// Requests of HTTP/1 are taken and go nowhere.
    pub(crate) fn swallow_http1(&self) {
        self.state.swallows_http1.store(true, Ordering::SeqCst);
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
        asked: Arc<Asked>,
    ) {
        let mut buffer = vec![0; 64 * 1024];
        let mut is_first = true;
        while let Ok(length @ 1..) = from.read(&mut buffer).await {
            while self.holding.load(Ordering::SeqCst) || self.stalled.load(Ordering::SeqCst) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            let first = std::mem::replace(&mut is_first, false);
            // RFC 9113 §3.4
            if first && self.swallows_http1.load(Ordering::SeqCst) && !buffer.starts_with(b"PRI * HTTP/2.0") {
                return std::future::pending().await;
            }
            let text = String::from_utf8_lossy(&buffer[..length]);
            asked.a_list.store(text.contains("quorum=true&recursive=true"), Ordering::SeqCst);
            if to.write_all(&buffer[..length]).await.is_err() {
                return;
            }
        }
    }

    async fn pass_answers(
        self: Arc<Self>,
        mut from: tokio::net::tcp::OwnedReadHalf,
        mut to: tokio::net::tcp::OwnedWriteHalf,
        asked: Arc<Asked>,
    ) {
        const ENTRIES: usize = 150;
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(mut length @ 1..) = from.read(&mut buffer).await {
            while self.keeps_heads.load(Ordering::SeqCst) && is_only_a_head(&buffer[..length]) {
                match from.read(&mut buffer[length..]).await {
                    Ok(more @ 1..) => length += more,
                    _ => return,
                }
            }
            if length > ENTRIES && self.armed.swap(false, Ordering::SeqCst) {
                self.holding.store(true, Ordering::SeqCst);
            }
            while self.stalled.load(Ordering::SeqCst) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            if asked.a_list.load(Ordering::SeqCst) {
                tokio::time::sleep(Duration::from_millis(self.lists_take.load(Ordering::SeqCst))).await;
            }
            if to.write_all(&buffer[..length]).await.is_err() {
                return;
            }
        }
    }
}

/// The head of an answer of unknown length, and nothing behind it.
fn is_only_a_head(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    text.contains("chunked") && text.find("\r\n\r\n") == Some(text.len() - 4)
}
