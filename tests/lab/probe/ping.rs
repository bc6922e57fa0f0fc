//! ICMP echo requests from a namespace, and what came back of them (RFC 792).
//!
//! Not `ping`(8): once it has an answer, it waits for the last ones no longer than two round trips (or one interval), so
//! that an answer that is late on a busy machine counts as lost. Here every request has the same patience, also those that
//! were on their way when the run was stopped, and every byte that comes back is compared. What is lost is lost.

use std::{
    fmt, io,
    net::Ipv4Addr,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU16, AtomicU32, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow};
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, ppoll},
    sys::{
        socket::{
            AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn,
            connect, recv, recvmsg, send, setsockopt, socket, sockopt,
        },
        time::TimeSpec,
    },
};

use super::{stream, wait_for};
use crate::namespace::Namespace;

const ECHO_REPLY: u8 = 0;
const ECHO: u8 = 8;
/// ICMP header of an echo.
const HEADER: usize = 8;
/// IPv4 header without options.
const IPV4: u32 = 20;
/// How often a run looks whether it is to stop.
const LOOK: Duration = Duration::from_millis(10);
/// Lines kept of what routers and the own kernel said.
const LINES: usize = 20;

/// A ping to be.
#[derive(Clone, Debug)]
pub struct Ping {
    from: Arc<Namespace>,
    to: Ipv4Addr,
    count: u32,
    interval: Duration,
    patience: Duration,
    payload: u32,
    dont_fragment: bool,
    ttl: Option<u8>,
}

impl Ping {
    /// Three echo requests of 56 bytes, 20 ms apart, each of which has a second to be answered (longer where the machine is
    /// slow, [`crate::SLOWER`]).
    pub fn new(from: &Arc<Namespace>, to: Ipv4Addr) -> Self {
        Self {
            from: Arc::clone(from),
            to,
            count: 3,
            interval: Duration::from_millis(20),
            patience: Duration::from_secs(1) * crate::slower(),
            payload: 56,
            dont_fragment: false,
            ttl: None,
        }
    }

    /// How many.
    #[must_use]
    pub fn count(mut self, count: u32) -> Self {
        self.count = count;
        self
    }

    /// Time between two; one that is late is not made up for.
    #[must_use]
    pub fn interval(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// How long the last one may take to be answered.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Size of the whole IPv4 packet, bytes (28 and more).
    #[must_use]
    pub fn packet(mut self, bytes: u32) -> Self {
        self.payload = bytes.saturating_sub(IPV4 + HEADER as u32);
        self
    }

    /// Sets DF and lets the kernel apply the path MTU it knows (`IP_PMTUDISC_DO`, ip(7)).
    #[must_use]
    pub fn dont_fragment(mut self) -> Self {
        self.dont_fragment = true;
        self
    }

    /// Time to live it is sent with; without it, the kernel's default.
    #[must_use]
    pub fn ttl(mut self, ttl: u8) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// Sends them all and waits until each was answered, or its patience is over.
    ///
    /// # Errors
    /// No raw socket can be had. Lost pings are no error: see [`PingReport::lost`].
    pub fn run(&self) -> Result<PingReport> {
        self.start()?.wait()
    }

    /// Starts it and returns at once. Dropped, it ends.
    ///
    /// # Errors
    /// No raw socket can be had.
    pub fn start(&self) -> Result<RunningPing> {
        let socket =
            self.from.run(|| self.socket().with_context(|| format!("a raw socket to {}", self.to)))?;
        let wish = Arc::new(AtomicU8::new(GO_ON));
        let progress = Arc::new(Progress::default());
        let mut run = Run::new(self.clone(), socket, Arc::clone(&wish), Arc::clone(&progress));
        let thread = std::thread::spawn(move || run.go());
        Ok(RunningPing { wish, progress, thread: Some(thread) })
    }

    fn socket(&self) -> Result<OwnedFd> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Inet, SockType::Raw, flags, SockProtocol::Icmp)?;
        let discover = if self.dont_fragment { libc::IP_PMTUDISC_DO } else { libc::IP_PMTUDISC_DONT };
        setsockopt(&socket, MtuDiscover, &discover).context("IP_MTU_DISCOVER")?;
        setsockopt(&socket, sockopt::Ipv4RecvErr, &true).context("IP_RECVERR")?;
        setsockopt(&socket, sockopt::RcvBufForce, &(4 << 20)).context("SO_RCVBUFFORCE")?;
        if let Some(ttl) = self.ttl {
            setsockopt(&socket, sockopt::Ipv4Ttl, &i32::from(ttl)).context("IP_TTL")?;
        }
        Ok(socket)
    }
}

/// ip(7).
#[derive(Clone, Copy, Debug)]
struct MtuDiscover;
nix::setsockopt_impl!(MtuDiscover, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, i32, sockopt::SetStruct<'_, i32>);

/// What its owner wants of a run.
const GO_ON: u8 = 0;
/// Send no more, and wait for what is on its way.
const STOP: u8 = 1;
const ABANDON: u8 = 2;

/// What a run counted so far.
#[derive(Debug, Default)]
struct Progress {
    sent: AtomicU32,
    received: AtomicU32,
}

/// A ping at work.
#[derive(Debug)]
pub struct RunningPing {
    wish: Arc<AtomicU8>,
    progress: Arc<Progress>,
    thread: Option<JoinHandle<Result<PingReport>>>,
}

impl RunningPing {
    /// Waits until so many requests were sent: how long that takes is the machine's matter.
    ///
    /// # Errors
    /// It takes too long for any machine.
    pub fn wait_sent(&self, count: u32) -> Result<()> {
        wait_for(count.into(), "pings sent", || self.progress.sent.load(Ordering::Relaxed).into())
    }

    /// Waits until so many were answered.
    ///
    /// # Errors
    /// It takes too long for any machine.
    pub fn wait_received(&self, count: u32) -> Result<()> {
        wait_for(count.into(), "pings answered", || self.progress.received.load(Ordering::Relaxed).into())
    }

    /// Sends no more, waits for what is on its way, and returns what was counted.
    ///
    /// # Errors
    /// The socket failed.
    pub fn stop(self) -> Result<PingReport> {
        self.wish.store(STOP, Ordering::Relaxed);
        self.wait()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// The socket failed.
    pub fn wait(mut self) -> Result<PingReport> {
        let thread = self.thread.take().context("it was waited for already")?;
        thread.join().map_err(|_| anyhow!("the thread that pings panicked"))?
    }
}

impl Drop for RunningPing {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.wish.store(ABANDON, Ordering::Relaxed);
            // What it counted is of no interest any more.
            let _ = thread.join();
        }
    }
}

/// One request.
#[derive(Clone, Copy, Debug)]
struct Request {
    sent: Instant,
    answered: bool,
}

/// The work of one thread.
struct Run {
    ping: Ping,
    socket: OwnedFd,
    wish: Arc<AtomicU8>,
    progress: Arc<Progress>,
    identifier: u16,
    requests: Vec<Request>,
    report: PingReport,
    times: Duration,
}

impl Run {
    fn new(ping: Ping, socket: OwnedFd, wish: Arc<AtomicU8>, progress: Arc<Progress>) -> Self {
        static IDENTIFIER: AtomicU16 = AtomicU16::new(1);
        let report = PingReport::of(&ping);
        let identifier = IDENTIFIER.fetch_add(1, Ordering::Relaxed);
        let (requests, times) = (Vec::new(), Duration::ZERO);
        Self { ping, socket, wish, progress, identifier, requests, report, times }
    }

    fn go(&mut self) -> Result<PingReport> {
        let [a, b, c, d] = self.ping.to.octets();
        if let Err(e) = connect(self.socket.as_raw_fd(), &SockaddrIn::new(a, b, c, d, 0)) {
            // Such as no route: what ping(8) says of each request.
            self.said(format!("connect to {}: {e}", self.ping.to));
        }
        let mut space = vec![0; 65536];
        let mut next = Instant::now();
        let mut ends = None;
        loop {
            let wish = self.wish.load(Ordering::Relaxed);
            let done = self.report.sent >= self.ping.count || wish == STOP;
            if wish == ABANDON {
                break;
            }
            let now = Instant::now();
            if done {
                let last = self.requests.last().map_or(now, |request| request.sent);
                let ends = *ends.get_or_insert(last + self.ping.patience);
                if now >= ends || self.report.received == self.report.sent {
                    break;
                }
                self.wait(ends.saturating_duration_since(now))?;
            } else if now >= next {
                self.send(now);
                next = (next + self.ping.interval).max(now);
            } else {
                self.wait(next.saturating_duration_since(now))?;
            }
            self.receive(&mut space);
        }
        let missing = (1_u32..).zip(&self.requests).filter(|(_, request)| !request.answered);
        self.report.missing = missing.map(|(number, _)| number).collect();
        self.report.rtt = self.times.checked_div(self.report.received);
        Ok(self.report.clone())
    }

    fn wait(&self, limit: Duration) -> Result<()> {
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        match ppoll(&mut fds, Some(TimeSpec::from_duration(limit.min(LOOK))), None) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(e) => Err(e).context("wait for answers"),
        }
    }

    fn send(&mut self, now: Instant) {
        let message = echo(self.identifier, self.report.sent, self.ping.payload);
        self.report.sent += 1;
        self.progress.sent.store(self.report.sent, Ordering::Relaxed);
        self.requests.push(Request { sent: now, answered: false });
        for _ in 0..3 {
            match send(self.socket.as_raw_fd(), &message, MsgFlags::empty()) {
                Ok(_) => return,
                // An error that an earlier request met is told once, to whoever comes next, and nothing was sent.
                Err(e) => {
                    if !self.errors() {
                        self.said(format!("send: {e}"));
                        return;
                    }
                    if e == Errno::EMSGSIZE {
                        return;
                    }
                }
            }
        }
    }

    /// Takes what waits on the socket.
    fn receive(&mut self, space: &mut [u8]) {
        loop {
            match recv(self.socket.as_raw_fd(), space, MsgFlags::empty()) {
                Ok(length) => self.take(space.get(..length).unwrap_or_default()),
                Err(Errno::EAGAIN) => {
                    self.errors();
                    return;
                }
                Err(Errno::EINTR) => {}
                Err(e) => {
                    if !self.errors() {
                        return self.said(format!("receive: {e}"));
                    }
                }
            }
        }
    }

    fn take(&mut self, packet: &[u8]) {
        let header = packet.first().map_or(0, |first| usize::from(first & 0x0f) * 4);
        let Some(message) = packet.get(header..) else { return };
        let Some(&[ECHO_REPLY, 0, _, _, i0, i1, s0, s1]) = message.first_chunk() else { return };
        if u16::from_be_bytes([i0, i1]) != self.identifier {
            return;
        }
        // The number has 16 bits: the latest request that it can be.
        let back = (self.report.sent.wrapping_sub(1) as u16).wrapping_sub(u16::from_be_bytes([s0, s1]));
        let Some(number) = self.report.sent.checked_sub(1 + u32::from(back)) else { return };
        let wanted = echo(self.identifier, number, self.ping.payload);
        if message.get(4..) != wanted.get(4..) {
            return self.said(format!("the answer to request {} is damaged", number + 1));
        }
        let Some(request) = self.requests.get_mut(number as usize).filter(|request| !request.answered) else {
            return;
        };
        request.answered = true;
        let time = request.sent.elapsed();
        self.times += time;
        self.report.longest = self.report.longest.max(time);
        self.report.received += 1;
        self.progress.received.store(self.report.received, Ordering::Relaxed);
    }

    /// Takes what routers and the own kernel said of requests (`IP_RECVERR`, ip(7)); whether it was anything.
    fn errors(&mut self) -> bool {
        let mut any = false;
        let mut space = [0; 256];
        let mut control = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in);
        loop {
            let mut pieces = [io::IoSliceMut::new(&mut space)];
            let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
            let Ok(message) =
                recvmsg::<SockaddrIn>(self.socket.as_raw_fd(), &mut pieces, Some(&mut control), flags)
            else {
                return any;
            };
            any = true;
            let lines: Vec<String> = message
                .cmsgs()
                .into_iter()
                .flatten()
                .filter_map(|message| match message {
                    ControlMessageOwned::Ipv4RecvErr(error, offender) => Some(line(&error, offender)),
                    _ => None,
                })
                .collect();
            lines.into_iter().for_each(|line| self.said(line));
        }
    }

    fn said(&mut self, line: String) {
        if self.report.said.len() < LINES && self.report.said.last() != Some(&line) {
            self.report.said.push(line);
        }
    }
}

/// An ICMP echo request, the `number`th (from 0) of its run.
fn echo(identifier: u16, number: u32, payload: u32) -> Vec<u8> {
    let [i0, i1] = identifier.to_be_bytes();
    let [s0, s1] = (number as u16).to_be_bytes();
    let mut message = vec![ECHO, 0, 0, 0, i0, i1, s0, s1];
    message.extend_from_slice(stream(u64::from(number), payload as usize));
    let sum = message.chunks(2).fold(0_u32, |sum, pair| {
        sum + u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))
    });
    // 64 KiB of 16-bit words: two folds are enough (RFC 1071).
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
    message[2..4].copy_from_slice(&checksum.to_be_bytes());
    message
}

/// What was said of a request, in the words of ping(8).
fn line(error: &libc::sock_extended_err, offender: Option<libc::sockaddr_in>) -> String {
    let from = offender.map_or(Ipv4Addr::UNSPECIFIED, |o| Ipv4Addr::from(u32::from_be(o.sin_addr.s_addr)));
    if error.ee_origin != libc::SO_EE_ORIGIN_ICMP {
        let reason = Errno::from_raw(i32::try_from(error.ee_errno).unwrap_or_default());
        return format!("local error: {}, mtu={}", reason.desc(), error.ee_info);
    }
    match (error.ee_type, error.ee_code) {
        (3, 4) => format!("from {from}: frag needed and DF set (mtu = {})", error.ee_info),
        (3, code) => format!("from {from}: destination unreachable, code {code}"),
        (11, _) => format!("from {from}: time to live exceeded"),
        (kind, code) => format!("from {from}: ICMP type {kind}, code {code}"),
    }
}

/// What was sent and what came back.
#[derive(Clone, Debug)]
pub struct PingReport {
    what: String,
    /// Echo requests sent.
    pub sent: u32,
    /// Answers received, each counted once.
    pub received: u32,
    /// Average round trip; none without an answer.
    pub rtt: Option<Duration>,
    /// The longest.
    longest: Duration,
    missing: Vec<u32>,
    said: Vec<String>,
}

impl PingReport {
    fn of(ping: &Ping) -> Self {
        Self {
            what: format!("{} bytes to {}", ping.payload + IPV4 + HEADER as u32, ping.to),
            sent: 0,
            received: 0,
            rtt: None,
            longest: Duration::ZERO,
            missing: Vec::new(),
            said: Vec::new(),
        }
    }

    /// Requests without an answer.
    pub fn lost(&self) -> u32 {
        self.sent - self.received
    }

    /// Their numbers, from 1.
    pub fn missing(&self) -> &[u32] {
        &self.missing
    }

    /// What routers and the own kernel said of requests, in the words of ping(8), a line each.
    pub fn said(&self) -> String {
        self.said.join("\n")
    }
}

impl fmt::Display for PingReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} pings lost, of {}", self.lost(), self.sent, self.what)?;
        if let Some(rtt) = self.rtt {
            write!(f, " (round trip {rtt:.1?}, longest {:.1?})", self.longest)?;
        }
        if !self.missing.is_empty() {
            write!(f, ", numbers {:?}", self.missing.get(..12).unwrap_or(&self.missing))?;
        }
        self.said.iter().try_for_each(|line| write!(f, "\n{line}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_echo_has_a_right_checksum_and_bytes_of_its_own() {
        for payload in [0, 1, 56, 65507] {
            let message = echo(7, 65_537, payload);
            assert_eq!(message.len(), HEADER + payload as usize);
            assert_eq!(message[4..8], [0, 7, 0, 1]);
            let sum = message.chunks(2).fold(0_u64, |sum, pair| {
                sum + u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]))
            });
            assert_eq!(sum % 0xffff, 0, "{payload}");
        }
        assert_ne!(echo(7, 1, 56)[8..], echo(7, 65_537, 56)[8..]);
    }
}
