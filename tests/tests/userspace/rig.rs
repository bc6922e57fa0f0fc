//! Two nodes: network namespaces joined by a veth pair, addressed like the hosts of the recording of flanneld 0.7.0.
//!
//! A namespace belongs to one thread of this process and ends with it, so nothing is left behind however a test ends.

use std::{
    any::Any,
    io,
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, UdpSocket},
    os::fd::AsRawFd,
    process::Command,
    sync::{
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use flannel_agent::{
    domain::host_state::SourceCheck,
    host::udp::userspace::{Role, UserTunnel, UserTunnelConfig, ensure_device},
};
use flannel_common::counter::{Count, Counter};
use ipnet::Ipv4Net;
use nix::{
    sched::{CloneFlags, unshare},
    unistd::gettid,
};

use crate::wire::{self, Tap, Way, one_hop_on};

pub(crate) const PORT: u16 = 8285;
pub(crate) const DEVICE: &str = "flannel0";
/// Underlay interface of both nodes.
pub(crate) const UNDERLAY: &str = "u";
pub(crate) const MTU: u32 = 1472;

pub(crate) const A: Identity = Identity {
    node: Ipv4Addr::new(10, 99, 0, 11),
    subnet: [10, 244, 49],
    pod: Ipv4Addr::new(10, 244, 49, 2),
};
pub(crate) const B: Identity = Identity {
    node: Ipv4Addr::new(10, 99, 0, 12),
    subnet: [10, 244, 100],
    pod: Ipv4Addr::new(10, 244, 100, 2),
};

/// Addresses of a node, its lease, and one address inside it that answers like a pod.
#[derive(Clone, Copy)]
pub(crate) struct Identity {
    pub(crate) node: Ipv4Addr,
    subnet: [u8; 3],
    pub(crate) pod: Ipv4Addr,
}

impl Identity {
    pub(crate) fn lease(&self) -> Ipv4Net {
        let [a, b, c] = self.subnet;
        Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, 0), 24)
    }
}

type Job = Box<dyn FnOnce() + Send>;

/// A thread in a network namespace of its own.
pub(crate) struct Namespace {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    id: i32,
}

impl Namespace {
    fn new() -> Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let (tell, told) = mpsc::channel();
        let thread = thread::spawn(move || {
            let entered = unshare(CloneFlags::CLONE_NEWNET).map(|()| gettid().as_raw());
            let failed = entered.is_err();
            if tell.send(entered).is_err() || failed {
                return;
            }
            for job in queue {
                job();
            }
        });
        let id = told.recv()?.context("a network namespace for the test")?;
        let namespace = Self { jobs: Some(jobs), thread: Some(thread), id };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// Runs `work` in the namespace. What it opens stays there; threads it starts are there too.
    pub(crate) fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let (answer, answered) = mpsc::channel::<thread::Result<T>>();
        let job: Job = Box::new(move || {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            let _ = answer.send(result);
        });
        self.jobs.as_ref().unwrap().send(job).unwrap();
        answered.recv().unwrap().unwrap_or_else(|panic: Box<dyn Any + Send>| std::panic::resume_unwind(panic))
    }

    /// Starts `work` on a new thread in the namespace.
    pub(crate) fn spawn<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        self.run(move || thread::spawn(work))
    }

    pub(crate) fn ip(&self, arguments: &str) -> Result<()> {
        self.command("ip", arguments)
    }

    /// Runs a program to its end and expects success.
    pub(crate) fn command(&self, program: &'static str, arguments: &str) -> Result<()> {
        let words: Vec<String> = arguments.split_whitespace().map(str::to_owned).collect();
        let output = self.run(move || Command::new(program).args(words).output())?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program} {arguments}: {said}");
        Ok(())
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Both nodes, each with a device `flannel0` and an address like a pod's, no tunnel running yet.
pub(crate) struct Rig {
    pub(crate) a: Namespace,
    pub(crate) b: Namespace,
}

impl Rig {
    pub(crate) fn new() -> Result<Self> {
        let rig = Self { a: Namespace::new()?, b: Namespace::new()? };
        let peer = rig.b.id;
        rig.a.ip(&format!("link add {UNDERLAY} type veth peer name {UNDERLAY} netns {peer}"))?;
        for (node, identity) in [(&rig.a, A), (&rig.b, B)] {
            node.ip(&format!("addr add {}/24 dev {UNDERLAY}", identity.node))?;
            node.ip(&format!("link set {UNDERLAY} up"))?;
            node.ip(&format!("addr add {}/32 dev lo", identity.pod))?;
            node.run(|| ensure_device(DEVICE))?;
            node.ip(&format!("addr add {}/32 dev {DEVICE}", identity.lease().network()))?;
            node.ip(&format!("link set {DEVICE} mtu {MTU} up"))?;
            node.ip(&format!("route add 10.244.0.0/16 dev {DEVICE} src {}", identity.pod))?;
        }
        rig.settle_underlay()?;
        Ok(rig)
    }

    /// Waits until the veth pair carries packets both ways and the nodes know each other's link-layer address.
    fn settle_underlay(&self) -> Result<()> {
        let (a, b) = (udp(&self.a, A.node, 9)?, udp(&self.b, B.node, 9)?);
        let passes = |from: &UdpSocket, to: &UdpSocket| {
            let sent = to.local_addr().and_then(|address| from.send_to(b"probe", address));
            sent.is_ok() && to.recv(&mut [0; 10]).is_ok()
        };
        for socket in [&a, &b] {
            socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        }
        eventually("the underlay carries packets", || passes(&a, &b) && passes(&b, &a))
    }

    /// The same with a tunnel on each node that knows the other.
    pub(crate) fn joined(role: Role) -> Result<(Self, UserTunnel, UserTunnel)> {
        let rig = Self::new()?;
        let a = start(&rig.a, config(A, SourceCheck::Enforce, role))?;
        let b = start(&rig.b, config(B, SourceCheck::Enforce, role))?;
        a.set_peers(vec![(B.lease(), B.node)]);
        b.set_peers(vec![(A.lease(), A.node)]);
        Ok((rig, a, b))
    }

    /// Every offload of both underlay interfaces. Off, what crosses is what a wire would carry, with its checksums.
    pub(crate) fn offloads(&self, state: &str) -> Result<()> {
        for node in [&self.a, &self.b] {
            let features = ["tx", "tso", "gso", "gro", "sg"].map(|f| format!("{f} {state}")).join(" ");
            node.command("ethtool", &format!("-K {UNDERLAY} {features}"))?;
        }
        Ok(())
    }
}

pub(crate) fn config(identity: Identity, source_check: SourceCheck, role: Role) -> UserTunnelConfig {
    UserTunnelConfig {
        device: DEVICE.to_owned(),
        local: identity.node,
        port: PORT,
        mtu: MTU,
        network: Ipv4Net::new_assert(Ipv4Addr::new(10, 244, 0, 0), 16),
        own_subnet: identity.lease(),
        source_check,
        role,
    }
}

pub(crate) fn start(node: &Namespace, config: UserTunnelConfig) -> Result<UserTunnel> {
    let tunnel = node.run(|| UserTunnel::start(config))?;
    settle_device(node)?;
    Ok(tunnel)
}

/// Waits until the device's queue takes packets. It got a carrier by the tunnel's start, but the kernel acts on that in
/// the background and drops packets until then.
fn settle_device(node: &Namespace) -> Result<()> {
    let (sender, observer) = (Tap::open(node, DEVICE)?, Tap::open(node, DEVICE)?);
    // A tunnel takes no notice of IPv6.
    let probe = [0x60; 40];
    eventually("the device takes packets", || {
        sender.send(&probe).is_ok() && observer.has_seen(Way::Out, &probe)
    })
}

pub(crate) fn count(tunnel: &UserTunnel, counter: Counter) -> Count {
    tunnel.counters().counts[counter as usize]
}

/// Waits until so many packets are counted: a packet can be seen elsewhere before its own thread has counted it.
pub(crate) fn counts(tunnel: &UserTunnel, counter: Counter, packets: u64) -> Result<()> {
    eventually(&format!("{packets} packets are counted as {}", counter.name()), || {
        count(tunnel, counter).packets == packets
    })
    .with_context(|| format!("{:?}", count(tunnel, counter)))
}

/// Counts every reason a packet was not delivered.
pub(crate) fn drops(tunnel: &UserTunnel) -> Vec<(&'static str, u64)> {
    let counts = tunnel.counters().counts;
    Counter::ALL
        .iter()
        .zip(counts)
        .filter(|(counter, count)| counter.is_drop() && count.packets > 0)
        .map(|(counter, count)| (counter.name(), count.packets))
        .collect()
}

/// A UDP socket in a node, waiting at most two seconds.
pub(crate) fn udp(node: &Namespace, address: Ipv4Addr, port: u16) -> Result<UdpSocket> {
    let socket = node.run(move || UdpSocket::bind(SocketAddrV4::new(address, port)))?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    Ok(socket)
}

pub(crate) fn set_option(socket: &UdpSocket, level: i32, option: i32, value: i32) -> Result<()> {
    let length = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the value is an int of that length.
    let set =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), length) };
    ensure!(set == 0, "option {option}: {}", io::Error::last_os_error());
    Ok(())
}

/// A node with a tunnel, and a plain socket in the peer's place.
pub(crate) struct Half {
    pub(crate) rig: Rig,
    pub(crate) tunnel: UserTunnel,
    /// On the device: its packets are the tunnel's input, what it captures was delivered.
    pub(crate) device: Tap,
    /// The peer's socket.
    pub(crate) peer: UdpSocket,
    /// Takes what is delivered, so that the host does not answer with ICMP.
    _pod: UdpSocket,
}

impl Half {
    pub(crate) fn new(check: SourceCheck) -> Result<Self> {
        let rig = Rig::new()?;
        let tunnel = start(&rig.a, config(A, check, Role::WholePath))?;
        tunnel.set_peers(vec![(B.lease(), B.node)]);
        let device = Tap::open(&rig.a, DEVICE)?;
        let peer = udp(&rig.b, B.node, PORT)?;
        peer.set_read_timeout(Some(Duration::from_millis(200)))?;
        let _pod = udp(&rig.a, A.pod, 40001)?;
        Ok(Self { rig, tunnel, device, peer, _pod })
    }

    /// What the peer gets for a packet that is routed to the device.
    pub(crate) fn outbound(&self, packet: &[u8]) -> Result<Option<Vec<u8>>> {
        self.device.send(packet)?;
        let mut got = vec![0; 70_000];
        match receive(&self.peer, &mut got) {
            Ok((length, from)) => {
                ensure!(from == SocketAddrV4::new(A.node, PORT).into(), "from {from}");
                got.truncate(length);
                Ok(Some(got))
            }
            Err(_) => Ok(None),
        }
    }

    /// What is delivered for a datagram from the peer. A marker sent behind it says when to stop waiting.
    pub(crate) fn inbound(&self, datagram: &[u8]) -> Result<Vec<Vec<u8>>> {
        let marker = wire::udp(B.pod, A.pod, format!("marker {}", unique()).as_bytes());
        self.peer.send_to(datagram, (A.node, PORT))?;
        self.peer.send_to(&marker, (A.node, PORT))?;
        self.device.until(Way::In, &one_hop_on(&marker))
    }
}

/// One datagram and its sender. With a timeout set the kernel does not resume an interrupted call by itself.
pub(crate) fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
    loop {
        match socket.recv_from(buffer) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Looks again until `condition` holds. The kernel alone may take a second to act on a carrier (net/core/link_watch.c), and
/// threads of a busy machine wait for their turn.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        if Instant::now() > deadline {
            return Err(anyhow!("not within ten seconds: {what}"));
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Bytes that differ at every offset and from seed to seed, so that a lost, doubled or moved piece shows.
pub(crate) struct Pattern(u64);

impl Pattern {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

/// A fresh number for seeds and ports, different in each test of this process.
pub(crate) fn unique() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}
