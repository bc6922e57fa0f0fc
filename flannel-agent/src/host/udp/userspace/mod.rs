//! The tunnel in user space: a TUN device on one side, a UDP socket on the other, one thread per direction.
//!
//! It is the whole data path where BPF is not to be had, and the exception path under the BPF programs, which leave
//! outer fragments, IP options, odd lengths and unknown destinations to it. What it puts on the wire and delivers is
//! flanneld's (contract §8.1): a datagram holds exactly one inner IPv4 packet, TTL falls by one at each end, unknown
//! destinations are answered with ICMP net-unreachable.
//!
//! It is not flanneld's speed, because most of its time went into one system call per packet. The device hands over TCP
//! packets of up to 64 KiB; `segment.rs` cuts them, `socket.rs` sends the pieces with one call (`UDP_SEGMENT`), receives
//! merged datagrams (`UDP_GRO`), and `merge.rs` gives the kernel large TCP packets again. A kernel that lacks one of
//! these is detected, and that step is done packet by packet.
//!
//! Two threads give throughput, one thread would give latency: a packet that answers what was just delivered, such as
//! an echo reply, would not wait for another thread to wake up. So the thread that delivers little looks at the other
//! direction right afterwards (`inbound.rs`).
//!
//! Everything that looks into packets is pure and tested by tables and properties; `device.rs` and `socket.rs` are the
//! only files that talk to the kernel. All content of packets is untrusted. Counters are those of
//! `flannel_common::counter`, so that all tiers can be added up.
//!
//! ```text
//! flannel0 ─ read ─► checksum · peer? · TTL−1 · cut ─► sendmsg ─► wire           outbound.rs
//! flannel0 ◄ writev ─ merge ◄ TTL−1 · source check · lengths ◄─ recvmmsg ─ wire  inbound.rs
//! ```
//!
//! Over a virtual underlay, packets of kernel senders arrive with unfinished checksums and uncut; `unfinished.rs` says
//! why and what is done about it.

mod device;
mod inbound;
mod merge;
mod outbound;
mod packet;
mod peers;
mod rate_limit;
mod segment;
mod socket;
mod tally;
mod unfinished;
mod unreachable;
mod vnet;

use std::{
    collections::BTreeMap,
    io,
    net::Ipv4Addr,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering},
    },
    thread::{self, JoinHandle},
};

use arc_swap::ArcSwap;
use flannel_common::{
    counter::{Count, Counter},
    peer::PeerCount,
    tunnel::{SOURCE_CHECK_ENFORCE, SOURCE_CHECK_OBSERVE, Settings},
};
use ipnet::Ipv4Net;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::eventfd::{EfdFlags, EventFd},
};

use device::Queue;
pub use device::ensure_device;
use outbound::Outbound;
use peers::PeerTable;
pub(in crate::host::udp) use peers::monotonic_now;
use socket::Socket;
use tally::Tally;

use super::checksum;
use crate::{domain::host_state::SourceCheck, host::HostError};

/// One more than the last look that finds the socket empty: another CPU may just be putting a merged one there.
const EMPTY_LOOKS: u8 = 2;

/// One tunnel.
#[derive(Clone, Debug)]
pub struct UserTunnelConfig {
    /// The TUN device, made by [`ensure_device`].
    pub device: String,
    /// Address of the underlay interface: datagrams leave from and arrive at it.
    pub local: Ipv4Addr,
    /// UDP port of every node.
    pub port: u16,
    /// MTU of the device in bytes; larger inner packets are not delivered.
    pub mtu: u32,
    /// The overlay network.
    pub network: Ipv4Net,
    /// The subnet leased to this node. Its base address is the device's.
    pub own_subnet: Ipv4Net,
    pub source_check: SourceCheck,
    pub role: Role,
}

/// What the tunnel is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Every packet passes here.
    WholePath,
    /// Only what the BPF programs leave. Packets without a peer were counted by them and are not counted again here.
    Exceptions { udp_gro: UdpGro },
}

/// May the kernel merge datagrams before the socket? It then merges those with a UDP checksum before tc sees them, so
/// tc decapsulation would get none of the traffic of user-space peers. XDP is earlier and not affected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UdpGro {
    Allowed,
    Forbidden,
}

impl Role {
    fn udp_gro(self) -> UdpGro {
        match self {
            Self::WholePath => UdpGro::Allowed,
            Self::Exceptions { udp_gro } => udp_gro,
        }
    }
}

/// Counters at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CounterSnapshot {
    /// By index of [`Counter`](flannel_common::counter::Counter).
    pub counts: Vec<Count>,
    pub peers: BTreeMap<Ipv4Net, PeerTally>,
}

/// What was exchanged with one peer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerTally {
    pub traffic: PeerCount,
    /// Packets, by reason; those that are not zero.
    pub drops: BTreeMap<Counter, u64>,
}

/// A running tunnel. Dropping it ends its threads and closes the socket; the device stays.
#[derive(Debug)]
pub struct UserTunnel {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl UserTunnel {
    /// Opens the device and the socket in the calling thread's network namespace, and starts without peers.
    ///
    /// # Errors
    /// The device is missing or of another kind, the address is not ours, the port is taken.
    pub fn start(config: UserTunnelConfig) -> Result<Self, HostError> {
        let failed = |reason: String| HostError {
            doing: format!("start the user-space tunnel on {}", config.device),
            reason,
        };
        if !device::exists(&config.device)? {
            return Err(failed("the device does not exist".to_owned()));
        }
        let device = device::open_queue(&config.device)?;
        let socket = Socket::bind(config.local, config.port)?;
        socket.set_gro(config.role.udp_gro()).map_err(|e| failed(format!("set UDP_GRO: {e}")))?;
        let shared = Arc::new(Shared {
            name: config.device.clone(),
            device,
            socket,
            settings: settings(&config),
            mtu: AtomicU32::new(config.mtu),
            address: config.own_subnet.network(),
            peers: ArcSwap::default(),
            role: RwLock::new(config.role),
            merged_left: AtomicU8::new(0),
            outbound: Tally::new(),
            inbound: Tally::new(),
            stop: Stop::new().map_err(|e| failed(format!("create an eventfd: {e}")))?,
            failure: Mutex::new(None),
        });

        // Dropped on an early return, so that a first thread doesn't outlive a failed second one.
        let mut tunnel = Self { shared: Arc::clone(&shared), threads: Vec::with_capacity(2) };
        let outbound = Arc::new(Mutex::new(Outbound::new(Arc::clone(&shared))));
        for (name, run) in [("tun-to-udp", outbound::run as Direction), ("udp-to-tun", inbound::run)] {
            let (shared, outbound) = (Arc::clone(&shared), Arc::clone(&outbound));
            let thread = thread::Builder::new()
                .name(name.to_owned())
                .spawn(move || {
                    if let Err(reason) = run(&shared, &outbound) {
                        shared.fail(reason);
                    }
                })
                .map_err(|e| failed(format!("start thread {name}: {e}")))?;
            tunnel.threads.push(thread);
        }
        Ok(tunnel)
    }

    /// Replaces all peers at once. A subnet that stays keeps its counters.
    pub fn set_peers(&self, peers: Vec<(Ipv4Net, Ipv4Addr)>) {
        let table = PeerTable::new(peers, &self.shared.peers.load());
        self.shared.peers.store(Arc::new(table));
    }

    /// The device's MTU is another one now.
    pub fn set_mtu(&self, mtu: u32) {
        self.shared.mtu.store(mtu, Ordering::Relaxed);
    }

    /// Takes effect before it returns: with [`UdpGro::Forbidden`] no datagram is merged from now on.
    pub fn set_role(&self, role: Role) {
        let mut current = self.shared.role.write().unwrap_or_else(PoisonError::into_inner);
        if let Err(e) = self.shared.socket.set_gro(role.udp_gro()) {
            tracing::warn!(device = self.shared.name, "setting UDP_GRO of the tunnel's socket: {e}");
        }
        if current.udp_gro() == UdpGro::Allowed {
            self.shared.merged_left.store(EMPTY_LOOKS, Ordering::Relaxed);
        }
        *current = role;
    }

    pub fn counters(&self) -> CounterSnapshot {
        let both = self.shared.outbound.counts().zip(self.shared.inbound.counts());
        let counts =
            both.map(|(a, b)| Count { packets: a.packets + b.packets, bytes: a.bytes + b.bytes }).collect();
        CounterSnapshot { counts, peers: self.shared.peers.load().counts() }
    }

    /// Packets sent to the peer with this subnet; 0 where there is none.
    pub fn sent(&self, subnet: Ipv4Net) -> u64 {
        self.shared.peers.load().sent(subnet)
    }

    /// # Errors
    /// Why the tunnel no longer carries packets, for instance that its device was deleted. It stays that way: start a
    /// new one.
    pub fn is_running(&self) -> Result<(), String> {
        let failure = self.shared.failure.lock().unwrap_or_else(PoisonError::into_inner);
        match &*failure {
            Some(reason) => Err(reason.clone()),
            None => match self.threads.iter().find(|thread| thread.is_finished()) {
                Some(thread) => {
                    let name = thread.thread().name().unwrap_or_default();
                    Err(format!("thread {name} of {} ended unexpectedly", self.shared.name))
                }
                None => Ok(()),
            },
        }
    }
}

impl Drop for UserTunnel {
    fn drop(&mut self) {
        self.shared.stop.set();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!(device = self.shared.name, "a thread of the user-space tunnel panicked");
            }
        }
    }
}

/// One thread's work: until the tunnel is stopped, or the reason why it can't go on.
type Direction = fn(&Shared, &Mutex<Outbound>) -> Result<(), String>;

/// Whether a step ended because there was nothing left to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    More,
    Idle,
}

/// What both threads and the owner use.
#[derive(Debug)]
struct Shared {
    name: String,
    device: Queue,
    socket: Socket,
    settings: Settings,
    mtu: AtomicU32,
    /// The device's address.
    address: Ipv4Addr,
    peers: ArcSwap<PeerTable>,
    /// Read while the socket is, written while its options change.
    role: RwLock<Role>,
    /// Merged datagrams may wait on the socket although nothing is merged any more: until it was found empty this often.
    /// The kernel then hands them over as one, and does not say of what size they are (`udp_recvmsg`, net/ipv4/udp.c).
    merged_left: AtomicU8,
    outbound: Tally,
    inbound: Tally,
    stop: Stop,
    failure: Mutex<Option<String>>,
}

impl Shared {
    fn mtu(&self) -> usize {
        usize::try_from(self.mtu.load(Ordering::Relaxed)).unwrap_or(usize::MAX)
    }

    fn role(&self) -> Role {
        *self.role.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first reason counts; the other thread ends too.
    fn fail(&self, reason: String) {
        tracing::error!(device = self.name, "user-space tunnel stopped: {reason}");
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(reason);
        self.stop.set();
    }
}

/// The wish to end, which also ends any waiting.
#[derive(Debug)]
struct Stop {
    wanted: AtomicBool,
    event: EventFd,
}

/// Why waiting ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wake {
    Stop,
    Ready,
    /// An error is pending on the descriptor.
    Error,
}

impl Stop {
    fn new() -> io::Result<Self> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self { wanted: AtomicBool::new(false), event })
    }

    fn set(&self) {
        self.wanted.store(true, Ordering::Relaxed);
        // Never read, so it stays readable; a counter that is full is readable too.
        let _ = self.event.write(1);
    }

    fn is_set(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    /// Waits for `events` on `fd`.
    fn or(&self, fd: BorrowedFd<'_>, events: PollFlags) -> Result<Wake, String> {
        let mut fds = [PollFd::new(fd, events), PollFd::new(self.event.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) => {}
                Err(e) => return Err(format!("waiting for packets: {e}")),
                Ok(_) => break,
            }
        }
        let [fd, event] = fds.map(|fd| fd.revents().unwrap_or(PollFlags::POLLERR));
        Ok(if !event.is_empty() {
            Wake::Stop
        } else if fd.intersects(PollFlags::POLLERR | PollFlags::POLLNVAL | PollFlags::POLLHUP) {
            Wake::Error
        } else {
            Wake::Ready
        })
    }

    /// Sleeps, but not into the end.
    fn or_after(&self, milliseconds: u8) {
        let mut fds = [PollFd::new(self.event.as_fd(), PollFlags::POLLIN)];
        // Whatever ends the pause early is seen at the next wait.
        let _ = poll(&mut fds, PollTimeout::from(milliseconds));
    }
}

/// The rules of the BPF programs, for the functions shared with them.
fn settings(config: &UserTunnelConfig) -> Settings {
    let in_packet = |address: Ipv4Addr| u32::from_ne_bytes(address.octets());
    Settings {
        local: in_packet(config.local),
        network: in_packet(config.network.network()),
        network_mask: in_packet(config.network.netmask()),
        subnet_mask: in_packet(config.own_subnet.netmask()),
        own_subnet: in_packet(config.own_subnet.network()),
        port: config.port.to_be(),
        flags: match config.source_check {
            SourceCheck::Enforce => SOURCE_CHECK_ENFORCE,
            SourceCheck::Observe => SOURCE_CHECK_OBSERVE,
            SourceCheck::Off => 0,
        },
        ..Settings::default()
    }
}
