//! The UDP socket on both threads' other side: many datagrams per system call where the kernel can.
//!
//! Options are the kernel's defaults as flanneld's are (contract §8.1): DF unless the datagram needs local
//! fragmentation, TTL 64, TOS 0, checksum computed. Both directions use one socket, so the source port is the tunnel's.

use std::{
    io::{self, IoSlice},
    net::Ipv4Addr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    thread,
    time::Duration,
};

use super::{UdpGro, device::check};
use crate::host::HostError;

/// Datagrams of one `sendmsg` with `UDP_SEGMENT` (`UDP_MAX_SEGMENTS` of kernels before 6.9), and of one `sendmmsg`.
pub(super) const BATCH: usize = 64;
/// Space for bursts; a flood of small packets is lost here first.
const BUFFER: libc::c_int = 8 << 20;

/// A bound socket and what its kernel can do.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    port: u16,
    /// `UDP_SEGMENT`, since Linux 4.18.
    segments: bool,
}

/// Datagrams to one node, each `each` consecutive pieces long.
#[derive(Clone, Copy)]
pub(super) struct Datagrams<'a> {
    pub(super) pieces: &'a [IoSlice<'a>],
    pub(super) each: usize,
    /// Bytes of every datagram but the last, which may be shorter.
    pub(super) size: usize,
}

impl Datagrams<'_> {
    pub(super) fn count(&self) -> usize {
        self.pieces.len().checked_div(self.each).unwrap_or(0)
    }

    /// Bytes of the first `count` datagrams.
    pub(super) fn bytes(&self, count: usize) -> usize {
        self.pieces.iter().take(count * self.each).map(|piece| piece.len()).sum()
    }

    /// The datagrams behind the first `count`.
    pub(super) fn skip(self, count: usize) -> Self {
        Self { pieces: self.pieces.get(count * self.each..).unwrap_or_default(), ..self }
    }
}

impl Socket {
    /// # Errors
    /// The address is not ours, or the port is taken: named, with what to do.
    pub(super) fn bind(local: Ipv4Addr, port: u16) -> Result<Self, HostError> {
        let failed = |reason: String| HostError { doing: format!("listen on udp {local}:{port}"), reason };
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
        // SAFETY: plain socket creation.
        let fd = check(unsafe { libc::socket(libc::AF_INET, kind, 0) }).map_err(|e| failed(e.to_string()))?;
        // SAFETY: the descriptor was just created and is owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        bind(&fd, local, port).map_err(|e| failed(bind_reason(&e, local, port)))?;

        let socket = Self { segments: has_option(&fd, libc::SOL_UDP, libc::UDP_SEGMENT), fd, port };
        for (force, plain) in
            [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)]
        {
            // Without CAP_NET_ADMIN over the namespace's owner the kernel's limit is what we get.
            if socket.set(libc::SOL_SOCKET, force, BUFFER).is_err() {
                socket
                    .set(libc::SOL_SOCKET, plain, BUFFER)
                    .map_err(|e| failed(format!("buffer size: {e}")))?;
            }
        }
        socket
            .set(libc::IPPROTO_IP, libc::IP_RECVTOS, 1)
            .map_err(|e| failed(format!("ask for the TOS byte of datagrams: {e}")))?;
        Ok(socket)
    }

    /// Lets the kernel merge received datagrams, or not. A kernel before 5.0 can't, which is no error.
    pub(super) fn set_gro(&self, gro: UdpGro) -> io::Result<()> {
        let on = match gro {
            UdpGro::Allowed => 1,
            UdpGro::Forbidden => 0,
        };
        match self.set(libc::SOL_UDP, libc::UDP_GRO, on) {
            Err(e) if e.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(()),
            other => other,
        }
    }

    fn set(&self, level: libc::c_int, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
        let length = size_of::<libc::c_int>() as libc::socklen_t;
        // SAFETY: the option's value is one int of that length.
        check(unsafe {
            libc::setsockopt(self.fd.as_raw_fd(), level, option, (&raw const value).cast(), length)
        })
        .map(drop)
    }

    /// Sends datagrams to `node`, at most [`BATCH`]. Returns how many the kernel took, and the error that stopped it.
    /// Never blocks: a full buffer is `WouldBlock`.
    pub(super) fn send(&self, node: Ipv4Addr, datagrams: Datagrams<'_>) -> (usize, Option<io::Error>) {
        let count = datagrams.count();
        if count > 1 && self.segments {
            match self.send_segments(node, datagrams) {
                Ok(()) => return (count, None),
                // The path's MTU is smaller than a datagram, or the interface can't checksum (before Linux 6.11):
                // one by one the kernel fragments or checksums itself.
                Err(e)
                    if matches!(
                        e.raw_os_error(),
                        Some(libc::EINVAL | libc::EMSGSIZE | libc::EIO | libc::EOPNOTSUPP)
                    ) => {}
                Err(e) => return (0, Some(e)),
            }
        }
        self.send_singly(node, datagrams)
    }

    /// One `sendmsg` that the kernel, or the interface, cuts into datagrams.
    fn send_segments(&self, node: Ipv4Addr, datagrams: Datagrams<'_>) -> io::Result<()> {
        let size = u16::try_from(datagrams.size).map_err(|_| io::Error::from_raw_os_error(libc::EMSGSIZE))?;
        let mut address = sockaddr(node, self.port);
        let mut control = Control::EMPTY;
        let mut message = message(&mut address, datagrams.pieces);
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: CMSG_SPACE and CMSG_LEN only compute sizes.
        let (space, length) = unsafe { (libc::CMSG_SPACE(2), libc::CMSG_LEN(2)) };
        message.msg_controllen = space as _;
        // SAFETY: `msg_control` points at `control`, which is aligned for cmsghdr and larger than CMSG_SPACE(2), so
        // the first header and its two bytes of data lie within it.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_UDP;
            (*header).cmsg_type = libc::UDP_SEGMENT;
            (*header).cmsg_len = length as _;
            libc::CMSG_DATA(header).cast::<u16>().write_unaligned(size);
        }
        loop {
            // SAFETY: `message` points at `address`, the pieces and `control`, all alive and of the lengths it says.
            let sent = unsafe { libc::sendmsg(self.fd.as_raw_fd(), &raw const message, SEND_FLAGS) };
            match sent {
                0.. => return Ok(()),
                _ => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e => return Err(e),
                },
            }
        }
    }

    fn send_singly(&self, node: Ipv4Addr, datagrams: Datagrams<'_>) -> (usize, Option<io::Error>) {
        let mut address = sockaddr(node, self.port);
        // SAFETY: all zeroes is a valid mmsghdr.
        let mut messages: [libc::mmsghdr; BATCH] = unsafe { std::mem::zeroed() };
        let mut count = 0;
        for (slot, pieces) in messages.iter_mut().zip(datagrams.pieces.chunks_exact(datagrams.each.max(1))) {
            slot.msg_hdr = message(&mut address, pieces);
            count += 1;
        }
        let mut done = 0;
        while let Some(rest) = messages.get_mut(done..count).filter(|rest| !rest.is_empty()) {
            let length = rest.len() as libc::c_uint;
            // SAFETY: `rest` holds `length` messages that point at `address` and the pieces, all alive.
            let sent =
                unsafe { libc::sendmmsg(self.fd.as_raw_fd(), rest.as_mut_ptr(), length, SEND_FLAGS as _) };
            match usize::try_from(sent) {
                Ok(sent) => done += sent,
                Err(_) => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => {}
                    e => return (done, Some(e)),
                },
            }
        }
        (done, None)
    }

    /// Receives what is there, without waiting. `WouldBlock` when that is nothing.
    pub(super) fn receive(&self, inbox: &mut Inbox) -> io::Result<()> {
        inbox.received = 0;
        for (slot, buffer) in inbox.slots.iter_mut().zip(inbox.buffers.chunks_exact_mut(SLOT_STRIDE)) {
            slot.pieces = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: SLOT }];
        }
        let Some(slots) = inbox.slots.get_mut(..inbox.depth) else { return Ok(()) };
        for (header, slot) in inbox.headers.iter_mut().zip(slots) {
            let header = &mut header.msg_hdr;
            header.msg_name = (&raw mut slot.address).cast();
            header.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
            header.msg_iov = slot.pieces.as_mut_ptr();
            header.msg_iovlen = slot.pieces.len() as _;
            header.msg_control = slot.control.0.as_mut_ptr().cast();
            header.msg_controllen = size_of::<Control>() as _;
            header.msg_flags = 0;
        }
        let depth = inbox.depth as libc::c_uint;
        // SAFETY: the first `depth` headers point at an address, a buffer and control space of the lengths they say,
        // all owned by `inbox`, which is borrowed for the whole call.
        let received = check(unsafe {
            libc::recvmmsg(
                self.fd.as_raw_fd(),
                inbox.headers.as_mut_ptr(),
                depth,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        })?;
        inbox.received = received.unsigned_abs() as usize;
        Ok(())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

const SEND_FLAGS: libc::c_int = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;

/// Largest aggregate the kernel hands over.
const SLOT: usize = 65536;
/// Slots don't start at the same offset modulo 64 KiB, or their first bytes would compete for the same cache lines.
const SLOT_STRIDE: usize = SLOT + 2048 + 64;
const SLOTS: usize = 32;
/// With `UDP_GRO` one message is up to 64 datagrams: fewer slots keep the data in the cache.
const SLOTS_MERGED: usize = 4;

/// Space for the control messages of one datagram, aligned for them.
#[repr(C, align(8))]
struct Control([u8; 64]);

impl Control {
    const EMPTY: Self = Self([0; 64]);
}

struct Slot {
    address: libc::sockaddr_in,
    pieces: [libc::iovec; 1],
    control: Control,
}

/// Buffers for one receive call. Memory is touched only as far as datagrams reach.
pub(super) struct Inbox {
    buffers: Vec<u8>,
    slots: Vec<Slot>,
    headers: Vec<libc::mmsghdr>,
    depth: usize,
    received: usize,
}

/// One message: a datagram, or several of one sender with `size` bytes each (the last may be shorter).
pub(super) struct Message<'a> {
    pub(super) bytes: &'a mut [u8],
    pub(super) size: usize,
    pub(super) node: Ipv4Addr,
    /// TOS byte of the outer header.
    pub(super) tos: u8,
}

impl Inbox {
    pub(super) fn new() -> Self {
        // SAFETY: all zeroes is a valid sockaddr_in, iovec (null, 0) and mmsghdr (nothing).
        let slot = || unsafe {
            Slot { address: std::mem::zeroed(), pieces: std::mem::zeroed(), control: Control::EMPTY }
        };
        // SAFETY: as above.
        let header = || unsafe { std::mem::zeroed() };
        Self {
            buffers: vec![0; SLOTS * SLOT_STRIDE],
            slots: (0..SLOTS).map(|_| slot()).collect(),
            headers: (0..SLOTS).map(|_| header()).collect(),
            depth: SLOTS,
            received: 0,
        }
    }

    /// Tunes the number of messages per call. Right or wrong, nothing is lost: every slot holds the largest aggregate.
    pub(super) fn expect(&mut self, gro: UdpGro) {
        self.depth = match gro {
            UdpGro::Allowed => SLOTS_MERGED,
            UdpGro::Forbidden => SLOTS,
        };
    }

    /// More may be waiting.
    pub(super) fn is_full(&self) -> bool {
        self.received == self.depth
    }

    /// Bytes of the last [`Socket::receive`].
    pub(super) fn bytes(&self) -> usize {
        self.headers.iter().take(self.received).map(|header| header.msg_len as usize).sum()
    }

    /// The messages of the last [`Socket::receive`].
    pub(super) fn messages(&mut self) -> impl Iterator<Item = Message<'_>> {
        let buffers = self.buffers.chunks_exact_mut(SLOT_STRIDE);
        let headers = self.headers.iter().zip(&self.slots).take(self.received);
        headers.zip(buffers).filter_map(|((header, slot), buffer)| {
            let length = usize::try_from(header.msg_len).ok()?;
            let (size, tos) = control_values(&header.msg_hdr);
            Some(Message {
                bytes: buffer.get_mut(..length)?,
                size: size.unwrap_or(length),
                node: Ipv4Addr::from(u32::from_be(slot.address.sin_addr.s_addr)),
                tos,
            })
        })
    }
}

/// Size of each merged datagram (`UDP_GRO`) and TOS byte (`IP_TOS`) out of a received message's control data.
fn control_values(header: &libc::msghdr) -> (Option<usize>, u8) {
    let (mut size, mut tos) = (None, 0);
    // SAFETY: the kernel filled `msg_control` up to `msg_controllen`; the macros stay within that.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !next.is_null() {
        // SAFETY: not null, so it points at a whole cmsghdr within the control data, with its data behind it.
        let (message, data) = unsafe { (&*next, libc::CMSG_DATA(next)) };
        match (message.cmsg_level, message.cmsg_type) {
            (libc::SOL_UDP, libc::UDP_GRO) => {
                // SAFETY: the kernel puts an int there (`udp_cmsg_recv`).
                let value = unsafe { data.cast::<libc::c_int>().read_unaligned() };
                size = usize::try_from(value).ok().filter(|size| *size > 0);
            }
            (libc::IPPROTO_IP, libc::IP_TOS) => {
                // SAFETY: the kernel puts one byte there (`ip_cmsg_recv_tos`).
                tos = unsafe { data.read() };
            }
            _ => {}
        }
        // SAFETY: `next` came from the same header.
        next = unsafe { libc::CMSG_NXTHDR(header, next) };
    }
    (size, tos)
}

fn sockaddr(address: Ipv4Addr, port: u16) -> libc::sockaddr_in {
    libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: port.to_be(),
        sin_addr: libc::in_addr { s_addr: u32::from(address).to_be() },
        sin_zero: [0; 8],
    }
}

/// A message to `address`. Valid as long as both arguments are: the pointers carry no lifetime.
fn message(address: &mut libc::sockaddr_in, pieces: &[IoSlice<'_>]) -> libc::msghdr {
    // SAFETY: all zeroes is a valid msghdr.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = std::ptr::from_mut(address).cast();
    message.msg_namelen = size_of::<libc::sockaddr_in>() as libc::socklen_t;
    // IoSlice has the layout of iovec (std guarantees it), and sendmsg does not write through it.
    message.msg_iov = pieces.as_ptr().cast_mut().cast();
    message.msg_iovlen = pieces.len() as _;
    message
}

/// Tries again for half a second: a child that this process is just starting holds a copy of the tunnel's former
/// socket until it calls `exec`.
fn bind(fd: &OwnedFd, local: Ipv4Addr, port: u16) -> io::Result<()> {
    let address = sockaddr(local, port);
    let length = size_of::<libc::sockaddr_in>() as libc::socklen_t;
    let mut attempts = 0;
    loop {
        // SAFETY: `address` is a sockaddr_in and `length` its size.
        let bound = check(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) });
        match bound {
            Err(e) if e.raw_os_error() == Some(libc::EADDRINUSE) && attempts < 50 => {
                attempts += 1;
                thread::sleep(Duration::from_millis(10));
            }
            other => return other.map(drop),
        }
    }
}

fn has_option(fd: &OwnedFd, level: libc::c_int, option: libc::c_int) -> bool {
    let mut value: libc::c_int = 0;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: value and length are valid for writing and `length` is the value's size.
    check(unsafe {
        libc::getsockopt(fd.as_raw_fd(), level, option, (&raw mut value).cast(), &raw mut length)
    })
    .is_ok()
}

fn bind_reason(error: &io::Error, local: Ipv4Addr, port: u16) -> String {
    match error.raw_os_error() {
        Some(libc::EADDRINUSE) => format!(
            "port {port} of {local} is taken (EADDRINUSE), perhaps by a running flanneld or agent \
             (`ss -ulnp 'sport = :{port}'` shows it): stop it, or give every node another Backend.Port"
        ),
        Some(libc::EADDRNOTAVAIL) => {
            format!("no interface of this host has the address {local} (EADDRNOTAVAIL)")
        }
        Some(libc::EACCES) => format!("{error}; ports below 1024 need CAP_NET_BIND_SERVICE"),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of one port on two addresses. Which ones are free on both is known once both are bound.
    fn pair() -> (Socket, Socket) {
        let loopback = |last| Ipv4Addr::new(127, 0, 0, last);
        let mut tries = (0..50).filter_map(|_| {
            let first = Socket::bind(loopback(1), 0).unwrap();
            let port = local_port(&first);
            Some((Socket { port, ..first }, Socket::bind(loopback(2), port).ok()?))
        });
        tries.next().unwrap()
    }

    fn local_port(socket: &Socket) -> u16 {
        let clone = std::net::UdpSocket::from(socket.fd.try_clone().unwrap());
        clone.local_addr().unwrap().port()
    }

    fn receive_all(socket: &Socket, inbox: &mut Inbox, count: usize) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        for _ in 0..1000 {
            match socket.receive(inbox) {
                Ok(()) => {
                    for message in inbox.messages() {
                        assert_eq!(message.node, Ipv4Addr::new(127, 0, 0, 1));
                        all.extend(message.bytes.chunks(message.size).map(<[u8]>::to_vec));
                    }
                }
                Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
            }
            if all.len() >= count {
                break;
            }
            thread::sleep(Duration::from_millis(1));
        }
        all
    }

    #[test]
    fn datagrams_arrive_one_by_one_however_they_are_sent_and_received() {
        for (segments, gro) in [
            (true, UdpGro::Forbidden),
            (true, UdpGro::Allowed),
            (false, UdpGro::Forbidden),
            (false, UdpGro::Allowed),
        ] {
            let (sender, receiver) = pair();
            let sender = Socket { segments: segments && sender.segments, ..sender };
            receiver.set_gro(gro).unwrap();
            let mut inbox = Inbox::new();
            inbox.expect(gro);
            let datagrams: Vec<Vec<u8>> =
                (0..BATCH).map(|i| vec![i as u8; if i + 1 == BATCH { 10 } else { 500 }]).collect();
            let pieces: Vec<IoSlice<'_>> = datagrams
                .iter()
                .flat_map(|d| {
                    let (head, rest) = d.split_at(4);
                    [IoSlice::new(head), IoSlice::new(rest)]
                })
                .collect();
            let sent =
                sender.send(Ipv4Addr::new(127, 0, 0, 2), Datagrams { pieces: &pieces, each: 2, size: 500 });
            assert!(matches!(sent, (BATCH, None)), "{sent:?}");
            assert_eq!(receive_all(&receiver, &mut inbox, BATCH), datagrams, "{segments} {gro:?}");
        }
    }

    #[test]
    fn a_taken_port_is_named_with_what_to_do() {
        let (first, _second) = pair();
        let error = Socket::bind(Ipv4Addr::new(127, 0, 0, 1), first.port).unwrap_err().to_string();
        for part in [format!("127.0.0.1:{}", first.port).as_str(), "EADDRINUSE", "Backend.Port"] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn an_address_of_another_host_is_named() {
        let error = Socket::bind(Ipv4Addr::new(192, 0, 2, 1), 8285).unwrap_err().to_string();
        assert!(error.contains("192.0.2.1:8285") && error.contains("EADDRNOTAVAIL"), "{error}");
    }
}
