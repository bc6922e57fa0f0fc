//! Traffic that knows what should arrive: pings, TCP streams and datagrams whose every byte is checked, raw packets, and
//! captures. Sockets are made on a thread inside the namespace; loads are bounded in bytes and time.

pub mod capture;
pub mod load;
pub mod ping;
pub mod raw;
pub mod tcp;
pub mod udp;

use std::{
    io,
    sync::OnceLock,
    thread::sleep,
    time::{Duration, Instant},
};

/// How long a probe waits for the other side before it fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// A prime, so that a byte at a wrong offset of the stream is a wrong byte.
const PERIOD: usize = 1_048_573;

/// `length` bytes (at most [`PERIOD`]) of an endless, position-dependent stream, from `offset` on. Comparing with it is one
/// memcmp.
pub(crate) fn stream(offset: u64, length: usize) -> &'static [u8] {
    static BYTES: OnceLock<Vec<u8>> = OnceLock::new();
    let bytes = BYTES.get_or_init(|| {
        // xorshift32 (Marsaglia 2003): no pattern a checksum or a merge could mistake for another.
        let mut state = 0x9E37_79B9_u32;
        let period: Vec<u8> = (0..PERIOD)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 17;
                state ^= state << 5;
                state.to_be_bytes()[0]
            })
            .collect();
        period.repeat(2)
    });
    let start = usize::try_from(offset % PERIOD as u64).unwrap_or(0);
    bytes.get(start..start + length.min(PERIOD)).unwrap_or_default()
}

/// Waits until `reached` gives a number of `wanted` or more, for as long as a probe has patience on this machine.
pub(crate) fn wait_for(wanted: u64, what: &str, reached: impl Fn() -> u64) -> anyhow::Result<()> {
    let (started, limit) = (Instant::now(), crate::patience());
    loop {
        let now = reached();
        if now >= wanted {
            return Ok(());
        }
        anyhow::ensure!(started.elapsed() < limit, "{now} of {wanted} {what} after {limit:?}");
        sleep(Duration::from_millis(5));
    }
}

/// Binds again while the address is in use, for a second: a process that another thread is just starting holds copies of
/// all descriptors between fork and exec, of sockets closed meanwhile too.
pub(crate) fn patiently<T>(bind: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let started = Instant::now();
    loop {
        match bind() {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse && started.elapsed() < Duration::from_secs(1) => {
                sleep(Duration::from_millis(5));
            }
            done => return done,
        }
    }
}
