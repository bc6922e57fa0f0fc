//! Device → socket.
//!
//! Packets are sent in the order they were read. Small packets to one node that are already waiting, and of one length,
//! leave with one system call; nothing waits for packets that are not there yet.
//!
//! Fragments leave one by one. On a virtual underlay several datagrams of one call arrive as one, which a peer that
//! decapsulates in the kernel takes the long way through its socket, while a single one takes the short way: pieces of
//! one packet would overtake each other, and reassembly gives up on a packet when 64 other fragments came in between
//! (`ipfrag_max_dist`, ip-sysctl).

use std::{
    io::{self, ErrorKind, IoSlice},
    net::Ipv4Addr,
    ops::Range,
    os::fd::AsFd,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};

use flannel_common::{counter::Counter, header::hop};
use nix::poll::PollFlags;

use super::{
    Progress, Role, Shared, Wake,
    packet::{finish_checksum, head_mut, ip_version, whole},
    peers::Traffic,
    rate_limit::RateLimit,
    segment::{DATAGRAM_MAX, Head, Segments, Transport},
    socket::{BATCH, Datagrams},
    unreachable::net_unreachable,
    vnet::{self, Offload},
};

/// Largest packet with its virtio header.
const READ_MAX: usize = vnet::LEN + 65536;
/// Room for a full batch of small packets and one large packet behind it.
const ARENA: usize = 2 * READ_MAX;
/// Answers per second to packets nobody leases the destination of; flanneld had no limit, but nobody needs more.
const ANSWERS: (u32, u32) = (100, 100);
/// Log lines per second about packets that could not be sent.
const LINES: (u32, u32) = (1, 3);

/// Runs until the tunnel is stopped.
pub(super) fn run(shared: &Shared, outbound: &Mutex<Outbound>) -> Result<(), String> {
    loop {
        let wake = shared.stop.or(shared.device.as_fd(), PollFlags::POLLIN)?;
        let mut progress = Progress::More;
        while progress == Progress::More {
            if shared.stop.is_set() {
                return Ok(());
            }
            progress = outbound.lock().unwrap_or_else(PoisonError::into_inner).step()?;
        }
        if wake == Wake::Error {
            return Err(format!("device {} was deleted", shared.name));
        }
    }
}

/// This direction and what it holds from one step to the next.
pub(super) struct Outbound {
    shared: Arc<Shared>,
    /// Packets as they were read, each behind its virtio header.
    arena: Vec<u8>,
    filled: usize,
    batch: Batch,
    heads: Vec<Head>,
    answers: RateLimit,
    sender: Sender,
}

/// Packets in the arena that leave together: all but the last are `size` bytes long.
struct Batch {
    to: Option<(Ipv4Addr, Arc<Traffic>)>,
    packets: Vec<Range<usize>>,
    size: usize,
    total: usize,
}

impl Batch {
    fn takes(&self, node: Ipv4Addr, traffic: &Arc<Traffic>, length: usize) -> bool {
        self.to.as_ref().is_some_and(|(to, of)| *to == node && Arc::ptr_eq(of, traffic))
            && length <= self.size
            && self.packets.len() < BATCH
            && self.total + length <= DATAGRAM_MAX
    }
}

impl Outbound {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let now = Instant::now();
        Self {
            shared: Arc::clone(&shared),
            arena: vec![0; ARENA],
            filled: 0,
            batch: Batch { to: None, packets: Vec::with_capacity(BATCH), size: 0, total: 0 },
            heads: vec![Head::EMPTY; BATCH],
            answers: RateLimit::new(ANSWERS.0, ANSWERS.1, now),
            sender: Sender { shared, lines: RateLimit::new(LINES.0, LINES.1, now) },
        }
    }

    /// Sends what waits on the device, at most one batch. An error means that the device is gone.
    pub(super) fn step(&mut self) -> Result<Progress, String> {
        let mut progress = Progress::More;
        for _ in 0..BATCH {
            if self.batch.packets.is_empty() {
                self.filled = 0;
            }
            let Some(space) = self.arena.get_mut(self.filled..self.filled + READ_MAX) else { break };
            match self.shared.device.read(space) {
                Ok(length) => self.take(length)?,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => {
                    progress = Progress::Idle;
                    break;
                }
                Err(e) => {
                    return Err(format!("reading from device {}: {e}; was it deleted?", self.shared.name));
                }
            }
        }
        self.flush()?;
        Ok(progress)
    }

    /// Judges the packet of `length` bytes that was read behind what the arena holds.
    fn take(&mut self, length: usize) -> Result<(), String> {
        let shared = Arc::clone(&self.shared);
        let count = |counter, bytes| shared.outbound.add(counter, 1, bytes);
        let (start, end) = (self.filled + vnet::LEN, self.filled + length);
        let read = self.arena.get_mut(self.filled..end).unwrap_or_default();
        let Some((header, packet)) = read.split_first_chunk_mut::<{ vnet::LEN }>() else {
            count(Counter::Malformed, length);
            return Ok(());
        };
        // Neighbour discovery and the like: a TUN device gets an IPv6 link-local address by itself.
        if ip_version(packet) == Some(6) {
            return Ok(());
        }
        let offload = Offload::of(*header);
        let finished = match offload {
            Offload::Checksum { start, offset } => finish_checksum(packet, start, offset),
            Offload::Unknown => false,
            Offload::None | Offload::Tcp { .. } | Offload::Udp { .. } => true,
        };
        let inner = whole(packet).map(|(ip, _)| *ip);
        let Some(inner) = inner.filter(|_| finished) else {
            count(Counter::Malformed, packet.len());
            return Ok(());
        };
        let total = usize::from(inner.total_length());

        let peers = shared.peers.load();
        let Some(peer) = peers.lookup(inner.destination.into()) else {
            let packet = start..start + total;
            self.answer(packet, offload);
            return Ok(());
        };
        match (hop(&inner, 0), head_mut(packet)) {
            (Ok(rewrite), Some(header)) => rewrite.apply(header),
            (Err(reason), _) => {
                count(reason, total);
                peer.traffic.dropped(reason, 1);
                return Ok(());
            }
            (Ok(_), None) => return Ok(()),
        }
        let range = start..start + total;
        match offload {
            Offload::Tcp { size } => {
                self.flush()?;
                self.send_segments(peer.node, &peer.traffic, (range, Transport::Tcp, size))
            }
            Offload::Udp { size } => {
                self.flush()?;
                self.send_segments(peer.node, &peer.traffic, (range, Transport::Udp, size))
            }
            Offload::None | Offload::Checksum { .. } | Offload::Unknown => {
                self.filled = end;
                let alone = inner.is_fragment();
                if alone {
                    self.flush()?;
                }
                self.queue(peer.node, &peer.traffic, range)?;
                if alone { self.flush() } else { Ok(()) }
            }
        }
    }

    fn queue(&mut self, node: Ipv4Addr, traffic: &Arc<Traffic>, packet: Range<usize>) -> Result<(), String> {
        let length = packet.len();
        if !self.batch.takes(node, traffic, length) {
            self.flush()?;
            self.batch.to = Some((node, Arc::clone(traffic)));
            self.batch.size = length;
            self.batch.total = 0;
        }
        self.batch.total += length;
        self.batch.packets.push(packet);
        // Only the last datagram of a call may be shorter.
        if length < self.batch.size { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<(), String> {
        let Some((node, traffic)) = self.batch.to.take() else { return Ok(()) };
        let mut pieces = [IoSlice::new(&[]); BATCH];
        for (piece, packet) in pieces.iter_mut().zip(&self.batch.packets) {
            *piece = IoSlice::new(self.arena.get(packet.clone()).unwrap_or_default());
        }
        let pieces = pieces.get(..self.batch.packets.len()).unwrap_or_default();
        let sent = self.sender.send(node, &traffic, Datagrams { pieces, each: 1, size: self.batch.size });
        self.batch.packets.clear();
        sent
    }

    /// Cuts a packet of the arena and sends the pieces.
    fn send_segments(
        &mut self,
        node: Ipv4Addr,
        traffic: &Traffic,
        (packet, transport, size): (Range<usize>, Transport, u16),
    ) -> Result<(), String> {
        let packet = self.arena.get(packet).unwrap_or_default();
        let Some(mut segments) = Segments::of(packet, transport, size) else {
            self.shared.outbound.add(Counter::Malformed, 1, packet.len());
            return Ok(());
        };
        let size = segments.segment_len();
        let at_once = DATAGRAM_MAX.checked_div(size).unwrap_or(1).clamp(1, BATCH);
        loop {
            let mut payloads: [&[u8]; BATCH] = [&[]; BATCH];
            let mut count = 0;
            for (head, slot) in self.heads.iter_mut().zip(&mut payloads).take(at_once) {
                let Some(payload) = segments.next_into(head) else { break };
                *slot = payload;
                count += 1;
            }
            if count == 0 {
                return Ok(());
            }
            let mut pieces = [IoSlice::new(&[]); 2 * BATCH];
            let segments = self.heads.iter().zip(payloads).take(count);
            let parts = segments.flat_map(|(head, payload)| [head.as_slice(), payload]);
            let mut used = 0;
            for (piece, part) in pieces.iter_mut().zip(parts) {
                *piece = IoSlice::new(part);
                used += 1;
            }
            let pieces = pieces.get(..used).unwrap_or_default();
            self.sender.send(node, traffic, Datagrams { pieces, each: 2, size })?;
        }
    }

    /// A packet nobody leases the destination of: counted, and answered when an answer is due.
    fn answer(&mut self, packet: Range<usize>, offload: Offload) {
        let packet = self.arena.get(packet).unwrap_or_default();
        let mut head = Head::EMPTY;
        // A large packet is answered as its first segment, which is what flanneld would have read.
        let segments = match offload {
            Offload::Tcp { size } => Segments::of(packet, Transport::Tcp, size),
            Offload::Udp { size } => Segments::of(packet, Transport::Udp, size),
            Offload::None | Offload::Checksum { .. } | Offload::Unknown => None,
        };
        let (packets, offender) = match segments {
            Some(mut segments) => {
                let count = segments.count();
                segments.next_into(&mut head);
                (count, head.as_slice())
            }
            None => (1, packet),
        };
        if self.shared.role() == Role::WholePath {
            self.shared.outbound.add(Counter::NoPeer, packets, packet.len());
        }
        let Some(answer) = net_unreachable(self.shared.address, offender) else { return };
        if !self.answers.allows(Instant::now()) {
            return;
        }
        let pieces = [IoSlice::new(&vnet::PLAIN), IoSlice::new(&answer)];
        if self.shared.device.write(&pieces).is_err() {
            self.shared.outbound.add(Counter::SendFailed, 1, answer.len());
        }
    }
}

/// The socket, and the accounting of what it took.
struct Sender {
    shared: Arc<Shared>,
    lines: RateLimit,
}

impl Sender {
    /// Sends at most [`BATCH`] datagrams, waiting for room in the socket's buffer.
    fn send(&mut self, node: Ipv4Addr, traffic: &Traffic, datagrams: Datagrams<'_>) -> Result<(), String> {
        let mut rest = datagrams;
        loop {
            let (sent, error) = self.shared.socket.send(node, rest);
            let bytes = rest.bytes(sent);
            self.shared.outbound.add(Counter::Encapsulated, sent, bytes);
            traffic.sent(sent as u64, bytes as u64);
            rest = rest.skip(sent);
            match error {
                None => return Ok(()),
                Some(e) if e.kind() == ErrorKind::WouldBlock => {
                    if self.shared.stop.or(self.shared.socket.as_fd(), PollFlags::POLLOUT)? == Wake::Stop {
                        return Ok(());
                    }
                }
                Some(e) => {
                    self.shared.outbound.add(Counter::SendFailed, rest.count(), rest.bytes(rest.count()));
                    self.complain(node, &e);
                    return Ok(());
                }
            }
        }
    }

    fn complain(&mut self, node: Ipv4Addr, error: &io::Error) {
        if self.lines.allows(Instant::now()) {
            tracing::warn!(device = self.shared.name, %node, "sending to a peer: {error}");
        }
    }
}
