//! Datagrams that carry their number and checked bytes, singly or as GSO batches.

use std::{
    collections::HashSet,
    io::ErrorKind,
    net::{SocketAddrV4, UdpSocket},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{setsockopt, sockopt};

use super::{patiently, stream};
use crate::namespace::Namespace;

/// How long the receiver waits after the last datagram.
const SILENCE: Duration = Duration::from_millis(700);
/// Datagrams on the way at most.
const WINDOW: u32 = 60;
/// Datagrams that take longer are taken for lost.
const LATE: Duration = Duration::from_millis(100);

/// A load of datagrams.
#[derive(Clone, Copy, Debug)]
pub struct Datagrams {
    /// How many.
    pub count: u32,
    /// UDP payload of each, bytes (4 to 65507).
    pub size: usize,
    /// Given to the kernel this many at a time with `UDP_SEGMENT` (see udp(7)); 1 sends them singly.
    pub batch: usize,
}

/// What became of them.
#[derive(Clone, Copy, Debug)]
pub struct Delivered {
    /// Different datagrams that arrived, every byte right.
    pub whole: u32,
    /// Arrived, but short, long or with a wrong byte.
    pub damaged: u32,
}

impl Datagrams {
    /// Sends them from one namespace to an address in the other and counts what arrives.
    ///
    /// # Errors
    /// Sockets can't be made, or sending fails (as with EMSGSIZE). Loss is no error.
    pub fn send(
        &self,
        from: &Arc<Namespace>,
        to: &Arc<Namespace>,
        address: SocketAddrV4,
    ) -> Result<Delivered> {
        ensure!((4..=65507).contains(&self.size), "datagrams of {} bytes can't be sent", self.size);
        let receiver = to
            .run(|| patiently(|| UdpSocket::bind(address)).with_context(|| format!("bind UDP {address}")))
            .with_context(|| format!("UDP receiver in {}", to.name()))?;
        setsockopt(&receiver, sockopt::RcvBufForce, &(16 << 20)).context("enlarge the receive buffer")?;
        receiver.set_read_timeout(Some(SILENCE)).context("set a time limit")?;
        let load = *self;
        let arrived = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&arrived);
        let counting = std::thread::spawn(move || load.receive(&receiver, &count));
        from.run(|| self.transmit(address, &arrived))
            .with_context(|| format!("UDP sender in {}", from.name()))?;
        counting.join().map_err(|_| anyhow::anyhow!("the receiving thread panicked"))?
    }

    fn transmit(&self, to: SocketAddrV4, arrived: &AtomicU32) -> Result<()> {
        let socket = UdpSocket::bind(("0.0.0.0", 0)).context("bind the sender")?;
        socket.connect(to).with_context(|| format!("connect UDP to {to}"))?;
        let batch = self.batch.max(1);
        if batch > 1 {
            let size = i32::try_from(self.size).context("segment size")?;
            setsockopt(&socket, sockopt::UdpGsoSegment, &size).context("set UDP_SEGMENT")?;
        }
        let numbers: Vec<u32> = (0..self.count).collect();
        let mut sent = 0u32;
        for numbers in numbers.chunks(batch) {
            // What is tested is the path, not the length of its queues: on a busy machine the receiver may get its turn late.
            let waiting = Instant::now();
            while sent.saturating_sub(arrived.load(Ordering::Relaxed)) > WINDOW && waiting.elapsed() < LATE {
                sleep(Duration::from_micros(200));
            }
            sent += u32::try_from(numbers.len()).context("batch")?;
            let bytes: Vec<u8> = numbers.iter().flat_map(|number| self.datagram(*number)).collect();
            socket
                .send(&bytes)
                .with_context(|| format!("send {} datagrams of {} bytes", numbers.len(), self.size))?;
        }
        Ok(())
    }

    fn datagram(&self, number: u32) -> Vec<u8> {
        let mut bytes = number.to_be_bytes().to_vec();
        bytes.extend_from_slice(stream(u64::from(number) * 7919, self.size - 4));
        bytes
    }

    fn receive(&self, socket: &UdpSocket, arrived: &AtomicU32) -> Result<Delivered> {
        let (mut seen, mut damaged) = (HashSet::new(), 0);
        let mut buffer = vec![0; 1 << 16];
        while seen.len() < self.count as usize {
            let length = match socket.recv(&mut buffer) {
                Ok(length) => length,
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => break,
                Err(e) => return Err(e).context("receive a datagram"),
            };
            arrived.fetch_add(1, Ordering::Relaxed);
            let datagram = buffer.get(..length).unwrap_or_default();
            match datagram.first_chunk::<4>().map(|head| u32::from_be_bytes(*head)) {
                Some(number) if number < self.count && datagram == self.datagram(number) => {
                    seen.insert(number);
                }
                _ => damaged += 1,
            }
        }
        Ok(Delivered { whole: u32::try_from(seen.len()).context("count")?, damaged })
    }
}
