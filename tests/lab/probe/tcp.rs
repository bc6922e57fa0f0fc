//! A TCP stream whose every byte is compared with what was sent.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Shutdown, SocketAddr, SocketAddrV4, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{JoinHandle, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};

use super::{PATIENCE, patiently, stream, wait_for};
use crate::namespace::{Namespace, panic_text};

const CHUNK: usize = 256 * 1024;

/// Who talks to whom. `connect` and `listen` differ where an address is translated on the way.
#[derive(Clone, Debug)]
pub struct TcpPath {
    /// Where the client is.
    pub client: Arc<Namespace>,
    /// Where the server is.
    pub server: Arc<Namespace>,
    /// What the server binds.
    pub listen: SocketAddrV4,
    /// What the client asks for.
    pub connect: SocketAddrV4,
}

/// A stream that arrived whole.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// Bytes received and compared.
    pub bytes: u64,
    /// From the first byte to the server's receipt for the last one.
    pub elapsed: Duration,
    /// Longest time the server waited for more.
    pub longest_pause: Duration,
    /// The client's address as the server saw it.
    pub peer: SocketAddr,
}

impl Transfer {
    /// Of payload.
    pub fn gbit_per_second(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
        let bits = self.bytes as f64 * 8.0;
        bits / self.elapsed.as_secs_f64().max(1e-9) / 1e9
    }
}

impl TcpPath {
    /// Client and server talk directly.
    pub fn new(client: &Arc<Namespace>, server: &Arc<Namespace>, address: SocketAddrV4) -> Self {
        Self { client: Arc::clone(client), server: Arc::clone(server), listen: address, connect: address }
    }

    /// The client asks for another address than the server binds.
    #[must_use]
    pub fn by_way_of(mut self, connect: SocketAddrV4) -> Self {
        self.connect = connect;
        self
    }

    /// Sends `bytes` from client to server.
    ///
    /// # Errors
    /// No connection, a pause of more than ten seconds, or a wrong byte (its position is told).
    pub fn transfer(&self, bytes: u64) -> Result<Transfer> {
        self.start(Load::Bytes(bytes))?.finish()
    }

    /// Sends as much as goes through in `time`.
    ///
    /// # Errors
    /// As [`Self::transfer`].
    pub fn transfer_for(&self, time: Duration) -> Result<Transfer> {
        self.start(Load::For(time))?.finish()
    }

    /// Starts a stream of some 30 MB/s that goes on until [`Flow::finish`].
    ///
    /// # Errors
    /// The server can't be made.
    pub fn flow(&self) -> Result<Flow> {
        self.start(Load::UntilStopped)
    }

    fn start(&self, load: Load) -> Result<Flow> {
        let listen = self.listen;
        let listener = self
            .server
            .run(|| patiently(|| TcpListener::bind(listen)).with_context(|| format!("listen on {listen}")))
            .with_context(|| format!("TCP server in {}", self.server.name()))?;
        let stop = Arc::new(AtomicBool::new(false));
        let arrived = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&arrived);
        let server = self.server.spawn(move || serve(&listener, &count));
        let (connect, flag) = (self.connect, Arc::clone(&stop));
        let client = self.client.spawn(move || send(connect, load, &flag));
        let way = format!("TCP {} → {} ({})", self.client.name(), self.server.name(), self.connect);
        Ok(Flow { way, stop, arrived, server, client })
    }
}

/// A stream at work.
#[derive(Debug)]
pub struct Flow {
    way: String,
    stop: Arc<AtomicBool>,
    arrived: Arc<AtomicU64>,
    server: JoinHandle<Result<Received>>,
    client: JoinHandle<Result<(u64, Duration)>>,
}

impl Flow {
    /// Lets the client end the stream (one of a given length ends by itself) and waits for the server's receipt.
    ///
    /// # Errors
    /// As [`TcpPath::transfer`].
    pub fn finish(self) -> Result<Transfer> {
        self.stop.store(true, Ordering::Relaxed);
        let client = joined(self.client);
        let server = joined(self.server);
        let ((sent, elapsed), received) = match (client, server) {
            (Ok(client), Ok(server)) => (client, server),
            (Err(client), Ok(_)) => return Err(client.context(self.way)),
            (Ok(_), Err(server)) => return Err(server.context(self.way)),
            (Err(client), Err(server)) => bail!("{}: client: {client:#}; server: {server:#}", self.way),
        };
        ensure!(sent == received.bytes, "{}: {sent} bytes sent, {} received", self.way, received.bytes);
        Ok(Transfer {
            bytes: received.bytes,
            elapsed,
            longest_pause: received.longest_pause,
            peer: received.peer,
        })
    }

    /// Waits until so many bytes have arrived: how long that takes is the machine's matter.
    ///
    /// # Errors
    /// It takes too long for any machine.
    pub fn wait_arrived(&self, bytes: u64) -> Result<()> {
        wait_for(bytes, "bytes arrived", || self.arrived.load(Ordering::Relaxed)).context(self.way.clone())
    }

    /// True while both ends are at work.
    pub fn is_alive(&self) -> bool {
        !self.client.is_finished() && !self.server.is_finished()
    }
}

fn joined<T>(thread: JoinHandle<Result<T>>) -> Result<T> {
    thread.join().map_err(|panic| anyhow!("panic: {}", panic_text(&*panic)))?
}

#[derive(Clone, Copy)]
enum Load {
    Bytes(u64),
    For(Duration),
    UntilStopped,
}

struct Received {
    bytes: u64,
    longest_pause: Duration,
    peer: SocketAddr,
}

fn serve(listener: &TcpListener, arrived: &AtomicU64) -> Result<Received> {
    listener.set_nonblocking(true).context("set the listener non-blocking")?;
    let waiting = Instant::now();
    let (mut socket, peer) = loop {
        match listener.accept() {
            Ok(connection) => break connection,
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                ensure!(waiting.elapsed() < PATIENCE, "nobody connected within {PATIENCE:?}");
                sleep(Duration::from_millis(1));
            }
            Err(e) => return Err(e).context("accept"),
        }
    };
    socket.set_nonblocking(false).context("set the connection blocking")?;
    socket.set_read_timeout(Some(PATIENCE)).context("set a time limit")?;

    let mut buffer = vec![0; CHUNK];
    let (mut bytes, mut longest_pause, mut last) = (0u64, Duration::ZERO, Instant::now());
    loop {
        let length = socket.read(&mut buffer).with_context(|| format!("after {bytes} bytes"))?;
        longest_pause = longest_pause.max(last.elapsed());
        last = Instant::now();
        let chunk = buffer.get(..length).unwrap_or_default();
        if chunk.is_empty() {
            break;
        }
        let wanted = stream(bytes, length);
        if chunk != wanted {
            let wrong = chunk.iter().zip(wanted).position(|(got, wanted)| got != wanted).unwrap_or(0);
            bail!("byte {} of the stream is not what was sent", bytes + wrong as u64);
        }
        bytes += length as u64;
        arrived.store(bytes, Ordering::Relaxed);
    }
    socket.write_all(&bytes.to_be_bytes()).context("send the receipt")?;
    Ok(Received { bytes, longest_pause, peer })
}

fn send(to: SocketAddrV4, load: Load, stop: &AtomicBool) -> Result<(u64, Duration)> {
    let mut socket = TcpStream::connect_timeout(&to.into(), PATIENCE).context("connect")?;
    socket.set_read_timeout(Some(PATIENCE)).context("set a time limit")?;
    socket.set_write_timeout(Some(PATIENCE)).context("set a time limit")?;
    let started = Instant::now();
    let mut sent = 0u64;
    loop {
        let length = match load {
            Load::Bytes(bytes) => usize::try_from(bytes - sent).unwrap_or(CHUNK).min(CHUNK),
            Load::For(time) if started.elapsed() >= time => 0,
            Load::For(_) => CHUNK,
            Load::UntilStopped if stop.load(Ordering::Relaxed) => 0,
            Load::UntilStopped => {
                sleep(Duration::from_millis(1));
                32 * 1024
            }
        };
        if length == 0 {
            break;
        }
        let length = socket.write(stream(sent, length)).with_context(|| format!("after {sent} bytes"))?;
        sent += length as u64;
    }
    socket.shutdown(Shutdown::Write).context("end the stream")?;
    let mut receipt = [0; 8];
    socket.read_exact(&mut receipt).context("wait for the receipt")?;
    let received = u64::from_be_bytes(receipt);
    ensure!(received == sent, "{sent} bytes sent, the receipt says {received}");
    Ok((sent, started.elapsed()))
}
