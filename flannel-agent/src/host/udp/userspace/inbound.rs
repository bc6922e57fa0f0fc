//! Socket → device.

use std::{
    io::{ErrorKind, IoSlice},
    os::fd::AsFd,
    sync::{Mutex, PoisonError, atomic::Ordering},
    time::Instant,
};

use flannel_common::{
    counter::Counter,
    header::{Arrival, NO_PEER, Verdict, admit},
    peer,
};
use nix::poll::PollFlags;

use super::{
    Progress, Shared, Wake,
    merge::Merger,
    outbound::Outbound,
    packet::{head_mut, whole},
    peers::PeerTable,
    rate_limit::RateLimit,
    segment::{Head, Segments, Transport},
    socket::{Inbox, Message},
    unfinished::{SuperPacket, Unfinished},
    vnet,
};

/// Log lines per second about packets that could not be received or delivered.
const LINES: (u32, u32) = (1, 3);
/// Pause after an error that may last, such as no memory.
const PAUSE_MS: u8 = 10;

/// Bytes received at once that are too few to be a bulk transfer: a request, an answer, an acknowledgement.
const LITTLE: usize = 4096;

/// Runs until the tunnel is stopped.
///
/// The kernel often answers within the call that delivers: the answer then waits on the device already, and sending it
/// from here saves waking the other thread. Under load that thread has the lock, and both directions work at once.
pub(super) fn run(shared: &Shared, outbound: &Mutex<Outbound>) -> Result<(), String> {
    let mut inbound = Inbound::new(shared);
    loop {
        if shared.stop.or(shared.socket.as_fd(), PollFlags::POLLIN)? == Wake::Stop {
            return Ok(());
        }
        let mut progress = Progress::More;
        while progress == Progress::More {
            if shared.stop.is_set() {
                return Ok(());
            }
            progress = inbound.step();
        }
        if inbound.inbox.bytes() <= LITTLE
            && let Ok(mut outbound) = outbound.try_lock()
        {
            outbound.step()?;
        }
    }
}

/// This direction and what it holds from one step to the next.
struct Inbound<'s> {
    shared: &'s Shared,
    inbox: Inbox,
    lines: RateLimit,
}

impl<'s> Inbound<'s> {
    fn new(shared: &'s Shared) -> Self {
        Self { shared, inbox: Inbox::new(), lines: RateLimit::new(LINES.0, LINES.1, Instant::now()) }
    }

    /// Delivers what waits on the socket, at most one call's worth.
    fn step(&mut self) -> Progress {
        let shared = self.shared;
        let (received, left) = {
            let role = shared.role.read().unwrap_or_else(PoisonError::into_inner);
            self.inbox.expect(role.udp_gro());
            let received = shared.socket.receive(&mut self.inbox);
            let left = shared.merged_left.load(Ordering::Relaxed);
            if received.as_ref().is_err_and(|e| e.kind() == ErrorKind::WouldBlock) {
                shared.merged_left.store(left.saturating_sub(1), Ordering::Relaxed);
            }
            (received, left > 0)
        };
        match received {
            Ok(()) => deliver_all(shared, &mut self.inbox, left, &mut self.lines),
            Err(e) if e.kind() == ErrorKind::WouldBlock => {}
            Err(e) if e.kind() == ErrorKind::Interrupted => return Progress::More,
            Err(e) => {
                if self.lines.allows(Instant::now()) {
                    tracing::warn!(device = shared.name, "receiving from the tunnel's socket: {e}");
                }
                shared.stop.or_after(PAUSE_MS);
            }
        }
        if self.inbox.is_full() { Progress::More } else { Progress::Idle }
    }
}

/// `left`: datagrams that the kernel merged, and no longer says so, may be among them.
fn deliver_all(shared: &Shared, inbox: &mut Inbox, left: bool, lines: &mut RateLimit) {
    let peers = shared.peers.load();
    let mut merger = Merger::new();
    let mut write = |pieces: &[IoSlice<'_>]| write(shared, pieces, lines);
    for Message { bytes, size, node, tos } in inbox.messages() {
        if bytes.is_empty() {
            shared.inbound.add(Counter::Malformed, 1, 0);
            continue;
        }
        let arrival = Arrival { node: u32::from_ne_bytes(node.octets()), tos };
        let size = if left && size == bytes.len() { first_of(bytes) } else { size };
        // One datagram, or several; or one whose content is to be cut to that size, and the kernel says both alike.
        let content = if size < bytes.len() { datagrams_in(bytes, size) } else { None };
        let size = if content.is_some() { bytes.len() } else { size };
        for datagram in bytes.chunks_mut(size.max(1)) {
            match accept(shared, datagram, arrival, &peers, content) {
                None => {}
                Some((packet, None)) => merger.push(packet, &mut write),
                Some((packet, Some(large))) => deliver_large(shared, packet, &large, &mut merger, &mut write),
            }
        }
    }
    merger.flush(&mut write);
}

/// Length of the first of several datagrams, which the others have too: each holds one packet.
fn first_of(bytes: &[u8]) -> usize {
    whole(bytes).map_or(bytes.len(), |(first, _)| usize::from(first.total_length()))
}

/// What the datagram is when it is one inner UDP packet that another kernel left to be cut.
fn datagrams_in(datagram: &[u8], size: usize) -> Option<SuperPacket> {
    Unfinished::of(datagram)?.datagrams_of(size)
}

/// TCP goes to the device as it is. UDP is cut here, which works on kernels whose devices don't take it whole (before
/// 6.2), and is rare.
fn deliver_large<'p>(
    shared: &Shared,
    packet: &'p [u8],
    large: &SuperPacket,
    merger: &mut Merger<'p>,
    write: &mut impl FnMut(&[IoSlice<'_>]),
) {
    if large.transport == Transport::Tcp {
        return merger.pass(large.virtio_header(), &[packet], write);
    }
    let Some(mut datagrams) = Segments::of(packet, Transport::Udp, large.size) else {
        return shared.inbound.add(Counter::Malformed, 1, packet.len());
    };
    let mut head = Head::EMPTY;
    while let Some(payload) = datagrams.next_into(&mut head) {
        merger.pass(vnet::PLAIN, &[head.as_slice(), payload], write);
    }
}

/// The packet to deliver, changed as this end of the tunnel has to, and what it is when it is more than one; or `None`,
/// counted.
///
/// Bytes behind the inner packet are cut off, as the kernel would do with what flanneld writes. A packet above the
/// device's MTU is dropped, where flanneld delivered its beginning (contract T7), unless it is one that another kernel
/// left to be cut: `content`, or a TCP packet that looks like it.
fn accept<'p>(
    shared: &Shared,
    datagram: &'p mut [u8],
    arrival: Arrival,
    peers: &PeerTable,
    content: Option<SuperPacket>,
) -> Option<(&'p [u8], Option<SuperPacket>)> {
    let drop = |reason, bytes| {
        shared.inbound.add(reason, 1, bytes);
        None
    };
    let Some(inner) = whole(datagram).map(|(ip, _)| *ip) else {
        return drop(Counter::Malformed, datagram.len());
    };
    let (total, mtu) = (usize::from(inner.total_length()), shared.mtu());
    let large = match content {
        None if total > mtu => datagram.get(..total).and_then(Unfinished::of).and_then(|p| p.above(mtu)),
        other => other,
    };
    if large.map_or(total, |large| large.packet_len()) > mtu {
        return drop(Counter::Oversize, total);
    }
    let packets = large.map_or(1, |large| large.count(total));
    let mut sender = None;
    let verdict = admit(&shared.settings, arrival, &inner, |_| {
        let peer = peers.lookup(inner.source.into())?;
        sender = Some(peer);
        let node = u32::from_ne_bytes(peer.node.octets());
        Some(peer::Peer { node, ifindex: 0, index: 0 })
    });
    let delivery = match verdict {
        Verdict::Deliver(delivery) => delivery,
        Verdict::Drop(reason, _) => {
            shared.inbound.add(reason, packets, total);
            if let Some(claimed) = sender {
                claimed.traffic.dropped(reason, packets as u64);
            }
            return None;
        }
        Verdict::NotOurs | Verdict::HandOn(_) => return drop(Counter::Malformed, total),
    };
    if let Some(reason) = delivery.observed {
        shared.inbound.add(reason, packets, total);
        if let Some(claimed) = sender {
            claimed.traffic.dropped(reason, packets as u64);
        }
    }
    if let Some(sender) = sender.filter(|_| delivery.peer != NO_PEER) {
        sender.traffic.received(packets as u64, total as u64);
    }
    delivery.rewrite.apply(head_mut(datagram)?);
    Some((datagram.get(..total)?, large))
}

/// Writes one packet, or several merged into one, behind its virtio header.
fn write(shared: &Shared, pieces: &[IoSlice<'_>], lines: &mut RateLimit) {
    let bytes = pieces.iter().skip(1).map(|piece| piece.len()).sum();
    let packets = pieces.first().map_or(1, |header| vnet::packets(header, bytes));
    let counter = loop {
        match shared.device.write(pieces) {
            Ok(()) => break Counter::DecapUser,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                match shared.stop.or(shared.device.as_fd(), PollFlags::POLLOUT) {
                    Ok(Wake::Ready) => {}
                    Ok(Wake::Stop | Wake::Error) | Err(_) => break Counter::SendFailed,
                }
            }
            Err(e) => {
                if lines.allows(Instant::now()) {
                    tracing::warn!(device = shared.name, "delivering to the device: {e}; is it up?");
                }
                break Counter::SendFailed;
            }
        }
    };
    shared.inbound.add(counter, packets, bytes);
}
