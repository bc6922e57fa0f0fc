//! One byte there, one byte back, over TCP with `TCP_NODELAY`.

use std::{
    io::{Read as _, Write as _},
    net::{SocketAddrV4, TcpListener, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};

use super::{Cpus, Ends, joined, require_time};
use crate::probe::{PATIENCE, patiently};

const PORT: u16 = 5301;

/// What was seen.
#[derive(Clone, Copy, Debug)]
pub struct RoundTrips {
    /// Requests answered per second.
    pub per_second: f64,
    /// Half took no longer.
    pub median: Duration,
    /// 99 of 100 took no longer.
    pub p99: Duration,
}

/// Asks and answers for `time`.
///
/// # Errors
/// No connection, or no answer for ten seconds.
pub fn run(ends: &Ends, cpus: Cpus, time: Duration) -> Result<RoundTrips> {
    require_time(time)?;
    measure(ends, cpus, time)
        .with_context(|| format!("TCP requests {} → {}", ends.client.name(), ends.server.name()))
}

fn measure(ends: &Ends, cpus: Cpus, time: Duration) -> Result<RoundTrips> {
    let address = SocketAddrV4::new(ends.address, PORT);
    let listener = ends
        .server
        .run(|| patiently(|| TcpListener::bind(address)).with_context(|| format!("listen on {address}")))?;
    let socket = ends.client.run(|| {
        TcpStream::connect_timeout(&address.into(), PATIENCE).with_context(|| format!("connect to {address}"))
    })?;
    let (accepted, _) = listener.accept().context("accept")?;
    for socket in [&socket, &accepted] {
        socket.set_nodelay(true).context("set TCP_NODELAY")?;
        socket.set_read_timeout(Some(PATIENCE)).context("set a time limit")?;
    }
    let server = ends.server_thread(cpus, move || answer(accepted));
    let client = ends.client_thread(cpus, move || ask(socket, time));
    let client = joined(client);
    joined(server).context("the server")?;
    let mut times = client.context("the client")?;
    ensure!(!times.is_empty(), "no answer came");
    let total: Duration = times.iter().sum();
    times.sort_unstable();
    let at = |percent: usize| times.get((times.len() * percent / 100).min(times.len() - 1)).copied();
    Ok(RoundTrips {
        per_second: f64::from(u32::try_from(times.len()).context("requests")?)
            / total.as_secs_f64().max(1e-9),
        median: at(50).unwrap_or_default(),
        p99: at(99).unwrap_or_default(),
    })
}

fn answer(mut socket: TcpStream) -> Result<()> {
    let mut byte = [0];
    while socket.read(&mut byte).context("receive")? == 1 {
        socket.write_all(&byte).context("answer")?;
    }
    Ok(())
}

fn ask(mut socket: TcpStream, time: Duration) -> Result<Vec<Duration>> {
    let mut times = Vec::with_capacity(1 << 18);
    let mut byte = [0];
    let started = Instant::now();
    let mut last = started;
    while last.duration_since(started) < time {
        socket.write_all(&byte).context("send")?;
        socket.read_exact(&mut byte).context("receive")?;
        let now = Instant::now();
        times.push(now.duration_since(last));
        last = now;
    }
    Ok(times)
}
