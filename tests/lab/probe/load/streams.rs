//! TCP streams that send as fast as they can.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{Shutdown, SocketAddrV4, TcpListener, TcpStream},
    os::fd::AsRawFd as _,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{Cpus, Ends, busy_time, joined, require_time};
use crate::probe::{PATIENCE, patiently};

const PORT: u16 = 5201;
/// Given to and taken from the kernel at a time, as iperf3 does.
const CHUNK: usize = 128 * 1024;

/// A load of streams in one direction.
#[derive(Clone, Copy, Debug)]
pub struct Streams {
    /// How many at once.
    pub count: u16,
    /// How long.
    pub time: Duration,
}

/// What went through.
#[derive(Clone, Copy, Debug)]
pub struct Throughput {
    /// Bytes the servers received.
    pub bytes: u64,
    /// From the first byte that arrived to the last.
    pub elapsed: Duration,
    /// Segments sent again, all streams together (`TCP_INFO`).
    pub retransmits: u64,
    /// CPU time of the whole machine meanwhile.
    pub busy: Duration,
}

impl Throughput {
    /// Of payload.
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    pub fn gbit_per_second(&self) -> f64 {
        self.bytes as f64 * 8.0 / self.elapsed.as_secs_f64().max(1e-9) / 1e9
    }

    /// In units of 10⁹ bytes.
    #[expect(clippy::cast_precision_loss, reason = "a figure for people")]
    pub fn gigabytes(&self) -> f64 {
        (self.bytes as f64 / 1e9).max(1e-9)
    }
}

struct Received {
    bytes: u64,
    first: Instant,
    last: Instant,
}

impl Streams {
    /// Runs it.
    ///
    /// # Errors
    /// No connection, or nothing goes through for ten seconds.
    pub fn run(&self, ends: &Ends, cpus: Cpus) -> Result<Throughput> {
        require_time(self.time)?;
        let way = format!("{} TCP streams {} → {}", self.count, ends.client.name(), ends.server.name());
        self.measure(ends, cpus).context(way)
    }

    fn measure(&self, ends: &Ends, cpus: Cpus) -> Result<Throughput> {
        let (mut servers, mut clients) = (Vec::new(), Vec::new());
        let mut connections = Vec::new();
        for number in 0..self.count {
            let address = SocketAddrV4::new(ends.address, PORT + number);
            let listener = ends.server.run(|| {
                patiently(|| TcpListener::bind(address)).with_context(|| format!("listen on {address}"))
            })?;
            let socket = ends.client.run(|| {
                TcpStream::connect_timeout(&address.into(), PATIENCE)
                    .with_context(|| format!("connect to {address}"))
            })?;
            socket.set_write_timeout(Some(PATIENCE)).context("set a time limit")?;
            let (accepted, _) = listener.accept().context("accept")?;
            accepted.set_read_timeout(Some(PATIENCE)).context("set a time limit")?;
            connections.push((socket, accepted));
        }
        let before = busy_time()?;
        let started = Instant::now();
        let time = self.time;
        for (socket, accepted) in connections {
            servers.push(ends.server_thread(cpus, move || receive(accepted)));
            clients.push(ends.client_thread(cpus, move || send(socket, started + time)));
        }
        let sent: Vec<Result<u64>> = clients.into_iter().map(joined).collect();
        let received: Vec<Result<Received>> = servers.into_iter().map(joined).collect();
        let busy = busy_time()?.saturating_sub(before);

        let retransmits = sent.into_iter().sum::<Result<u64>>().context("the sender")?;
        let received = received.into_iter().collect::<Result<Vec<_>>>().context("the receiver")?;
        let first = received.iter().map(|r| r.first).min().context("no stream")?;
        let last = received.iter().map(|r| r.last).max().context("no stream")?;
        let bytes = received.iter().map(|r| r.bytes).sum();
        ensure!(bytes > 0, "nothing arrived");
        Ok(Throughput { bytes, elapsed: last.duration_since(first), retransmits, busy })
    }
}

fn receive(mut socket: TcpStream) -> Result<Received> {
    let mut buffer = vec![0; CHUNK];
    let mut bytes = 0u64;
    let mut first = Instant::now();
    loop {
        let length = socket.read(&mut buffer).with_context(|| format!("after {bytes} bytes"))?;
        if length == 0 {
            return Ok(Received { bytes, first, last: Instant::now() });
        }
        if bytes == 0 {
            first = Instant::now();
        }
        bytes += length as u64;
    }
}

/// Sends until `end`, then tells how many segments went twice.
fn send(mut socket: TcpStream, end: Instant) -> Result<u64> {
    let buffer = vec![0x5a; CHUNK];
    while Instant::now() < end {
        match socket.write(&buffer) {
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                bail!("nothing went through for {PATIENCE:?}")
            }
            Err(e) => return Err(e).context("send"),
        }
    }
    socket.shutdown(Shutdown::Write).context("end the stream")?;
    // Until all of it is acknowledged, what is lost may still be sent again.
    let waiting = Instant::now();
    loop {
        let info = tcp_info(&socket)?;
        // FIN acknowledged: neither ESTABLISHED, FIN_WAIT1 nor CLOSING any more (net/tcp_states.h).
        if !matches!(info.tcpi_state, 1 | 4 | 11) || waiting.elapsed() > PATIENCE {
            return Ok(u64::from(info.tcpi_total_retrans));
        }
        sleep(Duration::from_micros(200));
    }
}

fn tcp_info(socket: &TcpStream) -> Result<libc::tcp_info> {
    // SAFETY: all zeroes is a valid tcp_info.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).context("size of tcp_info")?;
    // SAFETY: the kernel writes at most `length` bytes into `info`, and the length it wrote into `length`.
    let failed = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    } != 0;
    if failed {
        return Err(std::io::Error::last_os_error()).context("ask for TCP_INFO");
    }
    Ok(info)
}
