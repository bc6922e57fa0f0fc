//! Asks how large a packet a path carries: sends what `domain/path_mtu` wants asked and hears what comes back.
//!
//! Probes leave by a UDP socket of their own with `IP_PMTUDISC_PROBE` (DF is set, the kernel's own idea of the path is not
//! asked) and `IP_RECVERR` (ICMP errors come back with the MTU they name). They go through neither `flannel0` nor the BPF
//! programs, whose datagrams may be fragmented.
//!
//! Answers come as all inner packets do, to `flannel0`. A packet socket there hears them before netfilter, where rules
//! that drop what conntrack has seen no request of would have dropped them (firewalld does). Such a socket costs every
//! packet a little, so it is open only while answers are awaited. It needs CAP_NET_RAW.

mod packet;

use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, SockaddrIn, bind, recv, recvmsg,
    sendto, setsockopt, socket, sockopt,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

use super::errno::describe_io;
use crate::domain::host_state::Tunnel;
use crate::domain::path_mtu::{Heard, Probe};
use crate::host::HostError;
use packet::Mark;

/// Answers that are later than this find nobody who listens.
const LISTEN: Duration = Duration::from_secs(4);

/// Errors read in one go; what is left wakes again.
const AT_ONCE: usize = 64;

/// One tunnel's.
pub(super) struct Prober {
    device: String,
    local: Ipv4Addr,
    port: u16,
    /// This node's address in the tunnel.
    source: Ipv4Addr,
    mark: Mark,
    out: AsyncFd<OwnedFd>,
    answers: Option<Answers>,
    /// The last failure that was said.
    complaint: Option<String>,
}

/// The packet socket on the tunnel's device.
struct Answers {
    socket: AsyncFd<OwnedFd>,
    ifindex: u32,
    until: Instant,
}

impl Prober {
    /// Opens the socket that probes leave by, in the calling thread's network namespace.
    ///
    /// # Errors
    /// The address is not ours, or no socket is to be had.
    pub(super) fn start(tunnel: &Tunnel) -> Result<Self, HostError> {
        let failed = |e: io::Error| {
            let doing = format!("open a socket to probe paths from {}", tunnel.local);
            HostError::new(doing, describe_io(&e))
        };
        let out = open_out(tunnel.local).map_err(failed)?;
        let out = watched(out, Interest::READABLE | Interest::ERROR).map_err(failed)?;
        Ok(Self {
            device: tunnel.device.clone(),
            local: tunnel.local,
            port: tunnel.port,
            source: tunnel.own_subnet.network(),
            mark: Mark { identifier: rand::random(), secret: rand::random() },
            out,
            answers: None,
            complaint: None,
        })
    }

    /// Whether it does for `tunnel` as well.
    pub(super) fn serves(&self, tunnel: &Tunnel) -> bool {
        self.device == tunnel.device
            && self.local == tunnel.local
            && self.port == tunnel.port
            && self.source == tunnel.own_subnet.network()
    }

    /// Sends a probe. That it can't be sent is said once, and is as good as no answer.
    pub(super) fn send(&mut self, probe: &Probe) {
        let sent = self.listen().and_then(|()| self.send_out(probe));
        let complaint = sent.err().map(|e| describe_io(&e));
        if let Some(reason) = complaint.as_ref().filter(|reason| self.complaint.as_ref() != Some(reason)) {
            tracing::warn!("what the path to {} carries can't be found out: {reason}", probe.node);
        }
        self.complaint = complaint;
    }

    fn send_out(&self, probe: &Probe) -> io::Result<()> {
        let size = u16::try_from(probe.size).unwrap_or(u16::MAX);
        let packet = self.mark.request(self.source, probe.subnet.network(), (size, probe.number));
        let to = SockaddrIn::from(SocketAddrV4::new(probe.node, self.port));
        let send = || sendto(self.out.as_raw_fd(), &packet, &to, MsgFlags::MSG_DONTWAIT).map(drop);
        // The first one may bring an earlier probe's error, which the error queue has too.
        match send().or_else(|_| send()) {
            // Too large for this host's own way there: the error queue names the MTU. A full buffer is a lost probe.
            Ok(()) | Err(nix::errno::Errno::EMSGSIZE | nix::errno::Errno::EAGAIN) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Hears answers for a while from now on.
    fn listen(&mut self) -> io::Result<()> {
        let until = Instant::now() + LISTEN;
        let ifindex = nix::net::if_::if_nametoindex(self.device.as_str())?;
        match &mut self.answers {
            Some(answers) if answers.ifindex == ifindex => answers.until = until,
            _ => {
                let socket = watched(open_answers(ifindex, self.mark)?, Interest::READABLE)?;
                self.answers = Some(Answers { socket, ifindex, until });
            }
        }
        Ok(())
    }

    /// Returns with what came back. Cancel-safe; never returns while nothing comes.
    pub(super) async fn heard(&mut self) -> Vec<Heard> {
        loop {
            let until = self.answers.as_ref().map(|answers| answers.until);
            let heard = tokio::select! {
                heard = answers(self.answers.as_ref().map(|answers| &answers.socket), self.mark) => heard,
                heard = errors(&self.out) => heard,
                () = sleep_until(until) => {
                    self.answers = None;
                    continue;
                }
            };
            match heard {
                Ok(heard) if heard.is_empty() => {}
                Ok(heard) => return heard,
                Err(e) => {
                    // The device is gone, or was taken down; the next probe opens another socket.
                    tracing::debug!("hearing answers to probes on {}: {e}", self.device);
                    self.answers = None;
                }
            }
        }
    }
}

fn watched(socket: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor for as long as it lives, which is as long as the AsyncFd.
    unsafe { AsyncFd::register_with_interest(socket, interest) }.map_err(io::Error::from)
}

async fn sleep_until(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}

async fn answers(socket: Option<&AsyncFd<OwnedFd>>, mark: Mark) -> io::Result<Vec<Heard>> {
    let Some(socket) = socket else { return std::future::pending().await };
    let mut guard = socket.readable().await?;
    let mut heard = Vec::new();
    for _ in 0..AT_ONCE {
        let mut bytes = [0; 128];
        match recv(socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT) {
            Ok(length) => {
                let answer = mark.answer(bytes.get(..length).unwrap_or_default());
                heard.extend(answer.map(|(number, from)| Heard::Answer { number, from }));
            }
            Err(nix::errno::Errno::EAGAIN) => {
                guard.clear_ready();
                break;
            }
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(heard)
}

/// ICMP errors about probes. What else comes to this socket, nobody has asked for.
async fn errors(socket: &AsyncFd<OwnedFd>) -> io::Result<Vec<Heard>> {
    let mut guard = socket.ready(Interest::READABLE | Interest::ERROR).await?;
    let mut heard = Vec::new();
    let mut unasked = [0; 1];
    while recv(socket.as_raw_fd(), &mut unasked, MsgFlags::MSG_DONTWAIT).is_ok() {}
    for _ in 0..AT_ONCE {
        match read_error(socket) {
            Ok(error) => heard.extend(error),
            Err(nix::errno::Errno::EINTR) => {}
            Err(_) => {
                guard.clear_ready();
                break;
            }
        }
    }
    Ok(heard)
}

/// The next entry of the error queue; `None` when it is of another kind.
fn read_error(socket: &AsyncFd<OwnedFd>) -> Result<Option<Heard>, nix::errno::Errno> {
    let mut bytes = [0; 1];
    let mut pieces = [IoSliceMut::new(&mut bytes)];
    let mut control = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in);
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<SockaddrIn>(socket.as_raw_fd(), &mut pieces, Some(&mut control), flags)?;
    let node = message.address.map(|address| address.ip());
    let error = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4RecvErr(error, offender) => Some((error, offender)),
        _ => None,
    });
    let Some((node, (error, offender))) = node.zip(error) else { return Ok(None) };
    if error.ee_errno != libc::EMSGSIZE.cast_unsigned() {
        return Ok(None);
    }
    let by = (error.ee_origin == libc::SO_EE_ORIGIN_ICMP).then_some(offender).flatten();
    let by = by.map(|by| Ipv4Addr::from(u32::from_be(by.sin_addr.s_addr)));
    // 0: a router from before RFC 1191.
    Ok(Some(Heard::TooBig { node, mtu: Some(error.ee_info).filter(|mtu| *mtu != 0), by }))
}

fn open_out(local: Ipv4Addr) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Inet, SockType::Datagram, flags, None)?;
    setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
    set(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, &libc::IP_PMTUDISC_PROBE)?;
    bind(socket.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(local, 0)))?;
    Ok(socket)
}

fn open_answers(ifindex: u32, mark: Mark) -> io::Result<OwnedFd> {
    const ETH_P_IP: u16 = 0x0800;
    // SAFETY: plain socket creation. Protocol 0 receives nothing before it is bound.
    let fd = unsafe {
        libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0)
    };
    if fd < 0 {
        let error = io::Error::last_os_error();
        return Err(match error.raw_os_error() {
            Some(libc::EPERM) => io::Error::other("operation not permitted: needs CAP_NET_RAW"),
            _ => error,
        });
    }
    // SAFETY: the descriptor was just created and is owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut filter = mark.filter();
    let length = u16::try_from(filter.len()).unwrap_or(0);
    // The kernel copies the program; `filter` outlives the call.
    let program = libc::sock_fprog { len: length, filter: filter.as_mut_ptr() };
    set(&socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)?;
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: ETH_P_IP.to_be(),
        sll_ifindex: i32::try_from(ifindex).unwrap_or(0),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the address is an initialised sockaddr_ll, and its length is that of one.
    let bound = unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as u32)
    };
    if bound < 0 { Err(io::Error::last_os_error()) } else { Ok(socket) }
}

fn set<T>(socket: &OwnedFd, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: the value is a reference to a T of that length, which is what the two options used here take.
    let result = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, option, std::ptr::from_ref(value).cast(), length)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
