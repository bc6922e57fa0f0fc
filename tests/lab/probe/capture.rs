//! Frames on a device, as packet(7) sockets see them.
//!
//! A packet socket sees received frames after native XDP and before tc ingress. To see what was on the wire, capture on
//! the switch's port, not on the host's `eth0`.

use std::{
    ffi::CString,
    mem::size_of,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{JoinHandle, sleep, spawn},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::{
    errno::Errno,
    net::if_::if_nametoindex,
    sys::{
        socket::{MsgFlags, recv, setsockopt, sockopt},
        time::{TimeVal, TimeValLike as _},
    },
};

use crate::namespace::Namespace;

/// More than any test looks at: a bound, not a goal.
const MOST_FRAMES: usize = 100_000;

/// A capture at work.
#[derive(Debug)]
pub struct Capture {
    stop: Arc<AtomicBool>,
    frames: Arc<Mutex<Vec<Vec<u8>>>>,
    reader: JoinHandle<Result<()>>,
}

impl Capture {
    /// Captures on `device` of a namespace from now on.
    ///
    /// # Errors
    /// No such device, or not permitted (CAP_NET_RAW).
    pub fn start(namespace: &Arc<Namespace>, device: &str) -> Result<Self> {
        let socket = namespace
            .run(|| packet_socket(device))
            .with_context(|| format!("capture on {device} in {}", namespace.name()))?;
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let frames = Arc::<Mutex<Vec<Vec<u8>>>>::default();
        let kept = Arc::clone(&frames);
        let reader = spawn(move || read_frames(&socket, &flag, &kept));
        Ok(Self { stop, frames, reader })
    }

    /// [`Self::finish`], but not before what is there is enough, or nobody can expect more to come.
    ///
    /// # Errors
    /// As there. That it never was enough is no error: the frames are returned all the same.
    pub fn finish_with(self, enough: impl Fn(&[Vec<u8>]) -> bool) -> Result<Vec<Vec<u8>>> {
        let limit = Duration::from_secs(5) * crate::slower();
        let started = Instant::now();
        while !enough(&self.frames.lock().unwrap_or_else(PoisonError::into_inner))
            && started.elapsed() < limit
            && !self.reader.is_finished()
        {
            sleep(Duration::from_millis(10));
        }
        self.finish()
    }

    /// Stops it; Ethernet frames (IP packets on a TUN device) in order of arrival, in both directions.
    ///
    /// # Errors
    /// The device went, or more came than a test looks at.
    pub fn finish(self) -> Result<Vec<Vec<u8>>> {
        // What was sent before this call has passed the device, but may still wait in the socket: the reader stops at
        // the first silence after the flag.
        self.stop.store(true, Ordering::Relaxed);
        self.reader.join().map_err(|_| anyhow!("the capturing thread panicked"))??;
        Ok(std::mem::take(&mut *self.frames.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

fn read_frames(socket: &OwnedFd, stop: &AtomicBool, frames: &Mutex<Vec<Vec<u8>>>) -> Result<()> {
    let mut buffer = vec![0; 1 << 17];
    loop {
        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(length) => {
                let mut frames = frames.lock().unwrap_or_else(PoisonError::into_inner);
                ensure!(frames.len() < MOST_FRAMES, "more than {MOST_FRAMES} frames");
                frames.push(buffer.get(..length).unwrap_or_default().to_vec());
            }
            Err(Errno::EAGAIN | Errno::EINTR) if stop.load(Ordering::Relaxed) => return Ok(()),
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Err(e) => return Err(e).context("read a frame"),
        }
    }
}

fn packet_socket(device: &str) -> Result<OwnedFd> {
    let name = CString::new(device).context("device name")?;
    let index = if_nametoindex(name.as_c_str()).with_context(|| format!("find device {device}"))?;
    #[expect(clippy::cast_possible_truncation, reason = "ETH_P_ALL is 3")]
    let every_protocol = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: no memory is passed.
    let fd = unsafe {
        libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(every_protocol))
    };
    let fd = Errno::result(fd).context("make a packet socket")?;
    // SAFETY: the descriptor is new and nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: all-zero is a valid sockaddr_ll: integers only.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).context("AF_PACKET")?;
    address.sll_protocol = every_protocol;
    address.sll_ifindex = i32::try_from(index).context("interface index")?;
    let length = u32::try_from(size_of::<libc::sockaddr_ll>()).context("address length")?;
    // SAFETY: the pointer is to a live sockaddr_ll and the length is its size.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    Errno::result(bound).with_context(|| format!("bind a packet socket to {device}"))?;
    setsockopt(&socket, sockopt::RcvBufForce, &(32 << 20)).context("enlarge the capture's buffer")?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::milliseconds(100)).context("set a time limit")?;
    Ok(socket)
}

/// The IPv4 packet in an untagged Ethernet frame.
pub fn ipv4(frame: &[u8]) -> Option<&[u8]> {
    (frame.get(12..14)? == [0x08, 0x00]).then(|| frame.get(14..)).flatten()
}

/// The payload of an unfragmented UDP datagram to `port`, out of an IPv4 packet.
pub fn udp_payload(packet: &[u8], port: u16) -> Option<&[u8]> {
    let header = usize::from(packet.first()? & 0x0f) * 4;
    let udp = packet.get(header..)?;
    let whole = packet.get(6..8)?;
    let unfragmented = (whole.first()? & 0x3f) == 0 && *whole.last()? == 0;
    if *packet.get(9)? != 17 || !unfragmented || udp.get(2..4)? != port.to_be_bytes() {
        return None;
    }
    let length = usize::from(u16::from_be_bytes(*udp.get(4..6)?.first_chunk()?));
    udp.get(8..length)
}
