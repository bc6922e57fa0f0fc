//! More small datagrams than any path takes; what counts is how many arrive.
//!
//! The receiver looks every so often instead of sleeping in the call. One that sleeps is woken for nearly every datagram,
//! on behalf of the sender's CPU, and waking an idle virtual CPU costs more than any path here: variants would differ by
//! how often their receiver happens to be asleep. One that spins would take the CPU that user-space forwarders need.

use std::{
    io::ErrorKind,
    net::{SocketAddrV4, UdpSocket},
    os::fd::AsRawFd as _,
    ptr::null_mut,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{setsockopt, sockopt};

use super::{Cpus, Ends, joined, messages, require_time};
use crate::probe::patiently;

const PORT: u16 = 5401;
/// UDP payload, bytes.
pub const PAYLOAD: usize = 64;
/// Datagrams per system call.
const BATCH: usize = 64;
/// Room for a datagram at the receiver, bytes.
const ROOM: usize = 2048;
/// How long the receiver leaves what came, when it was less than a batch. The buffer holds a hundred times that.
const REST: Duration = Duration::from_micros(150);
/// The receiver stops when nothing came for so long.
const SILENCE: Duration = Duration::from_millis(100);

/// What arrived.
#[derive(Clone, Copy, Debug)]
pub struct Flood {
    /// Datagrams given to the sender's kernel.
    pub sent: u64,
    /// Datagrams the server read.
    pub received: u64,
    /// Those, per second.
    pub per_second: f64,
}

/// Floods for `time`.
///
/// # Errors
/// Sockets can't be made, or not one datagram arrives.
pub fn run(ends: &Ends, cpus: Cpus, time: Duration) -> Result<Flood> {
    require_time(time)?;
    measure(ends, cpus, time).with_context(|| format!("UDP {} → {}", ends.client.name(), ends.server.name()))
}

fn measure(ends: &Ends, cpus: Cpus, time: Duration) -> Result<Flood> {
    let address = SocketAddrV4::new(ends.address, PORT);
    let receiver = ends
        .server
        .run(|| patiently(|| UdpSocket::bind(address)).with_context(|| format!("bind UDP {address}")))?;
    setsockopt(&receiver, sockopt::RcvBufForce, &(32 << 20)).context("enlarge the receive buffer")?;
    let sender = ends.client.run(|| {
        let socket = UdpSocket::bind(("0.0.0.0", 0)).context("bind the sender")?;
        socket.connect(address).with_context(|| format!("connect UDP to {address}"))?;
        Ok(socket)
    })?;
    setsockopt(&sender, sockopt::SndBuf, &(4 << 20)).context("enlarge the send buffer")?;

    let over = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&over);
    let receiving = ends.server_thread(cpus, move || receive(&receiver, &flag));
    let sending = ends.client_thread(cpus, move || send(&sender, time));
    let sent = joined(sending);
    over.store(true, Ordering::Relaxed);
    let (received, elapsed) = joined(receiving).context("the receiver")?;
    let sent = sent.context("the sender")?;
    ensure!(received > 0, "none of {sent} datagrams arrived");
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    let per_second = received as f64 / elapsed.as_secs_f64().max(1e-9);
    Ok(Flood { sent, received, per_second })
}

/// Message headers for a batch, each with a buffer of its own or all with the same.
struct Batch {
    /// What the headers point to.
    _vectors: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
}

impl Batch {
    /// Buffers of `size` bytes, `stride` apart in `bytes`, which must outlive the batch.
    fn new(bytes: &mut [u8], size: usize, stride: usize) -> Self {
        let mut vectors: Vec<libc::iovec> = (0..BATCH)
            .map(|number| libc::iovec {
                iov_base: bytes.as_mut_ptr().wrapping_add(number * stride).cast(),
                iov_len: size,
            })
            .collect();
        let headers = vectors
            .iter_mut()
            .map(|vector| {
                // SAFETY: all zeroes is a valid mmsghdr: no name, no control data.
                let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
                header.msg_hdr.msg_name = null_mut();
                header.msg_hdr.msg_iov = vector;
                header.msg_hdr.msg_iovlen = 1;
                header
            })
            .collect();
        Self { _vectors: vectors, headers }
    }
}

fn send(socket: &UdpSocket, time: Duration) -> Result<u64> {
    let mut payload = [0x5a; PAYLOAD];
    let mut batch = Batch::new(&mut payload, PAYLOAD, 0);
    let started = Instant::now();
    let mut sent = 0;
    while started.elapsed() < time {
        // SAFETY: the headers, their vectors and the payload live until the call returns; the kernel only reads the payload.
        let result = unsafe {
            libc::sendmmsg(socket.as_raw_fd(), batch.headers.as_mut_ptr(), BATCH as libc::c_uint, 0)
        };
        match messages(result) {
            Ok(count) => sent += count,
            // A full queue on the way is what a flood is about.
            Err(e) if matches!(e.raw_os_error(), Some(libc::ENOBUFS | libc::EAGAIN | libc::ECONNREFUSED)) => {
            }
            Err(e) => return Err(e).context("sendmmsg"),
        }
    }
    Ok(sent)
}

/// How many came, and the time from the first to the last.
fn receive(socket: &UdpSocket, over: &AtomicBool) -> Result<(u64, Duration)> {
    let mut space = vec![0; BATCH * ROOM];
    let mut batch = Batch::new(&mut space, ROOM, ROOM);
    let mut received = 0;
    let mut span: Option<(Instant, Instant)> = None;
    loop {
        // SAFETY: the headers, their vectors and the space behind them live until the call returns, and each vector says
        // how long its part of the space is.
        let result = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                batch.headers.as_mut_ptr(),
                BATCH as libc::c_uint,
                libc::MSG_DONTWAIT,
                null_mut(),
            )
        };
        match messages(result) {
            Ok(count) => {
                let now = Instant::now();
                span = Some((span.map_or(now, |(first, _)| first), now));
                received += count;
                if count < BATCH as u64 {
                    sleep(REST);
                }
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if over.load(Ordering::Relaxed) && span.is_none_or(|(_, last)| last.elapsed() > SILENCE) {
                    let elapsed = span.map_or(Duration::ZERO, |(first, last)| last.duration_since(first));
                    return Ok((received, elapsed));
                }
                sleep(REST);
            }
            Err(e) => return Err(e).context("recvmmsg"),
        }
    }
}
