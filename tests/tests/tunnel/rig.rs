//! Two nodes and what one does to them. A node is a thread: its network namespace, its tokio runtime and its `Tunnels`
//! live and end there.

use std::any::Any;
use std::future::Future;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{OnceLock, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use flannel_agent::domain::host_state::{Datapath, HostItem, SourceCheck, Tunnel, TunnelOptions, TunnelPeer};
use flannel_agent::host::netlink::Netlink;
use flannel_agent::host::udp::userspace::ensure_device;
use flannel_agent::host::udp::{TunnelReport, Tunnels};
use flannel_common::LAYOUT_VERSION;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::gettid;

pub(crate) const DEVICE: &str = "flannel0";
pub(crate) const UNDERLAY: &str = "eth0";
const PORT: u16 = 8285;
/// No step takes this long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

static BPFFS: OnceLock<PathBuf> = OnceLock::new();
static NODES: AtomicU32 = AtomicU32::new(0);

pub(crate) fn set_bpffs(path: &Path) {
    BPFFS.get_or_init(|| path.to_path_buf());
}

/// What lives on a node's thread.
pub(crate) struct Inside {
    runtime: tokio::runtime::Runtime,
    pub(crate) tunnels: Option<Tunnels>,
    bpffs: PathBuf,
}

impl Inside {
    /// A new agent: nothing known, pins as they are.
    fn start(&mut self) {
        let bpffs = self.bpffs.clone();
        // The old one holds the port.
        self.tunnels = None;
        self.tunnels =
            Some(self.block_on(async move { Tunnels::new(Netlink::new().unwrap(), bpffs) }).unwrap());
    }

    fn block_on<T>(&self, work: impl Future<Output = T>) -> Result<T> {
        let timed = async { tokio::time::timeout(PATIENCE, work).await };
        self.runtime.block_on(timed).map_err(|_| anyhow!("a step took over {PATIENCE:?}"))
    }

    /// Runs what needs the tunnels and the runtime.
    pub(crate) fn with<T>(&mut self, work: impl AsyncFnOnce(&mut Tunnels) -> T) -> Result<T> {
        let mut tunnels = self.tunnels.take().context("no agent runs")?;
        let result = self.block_on(async { work(&mut tunnels).await });
        self.tunnels = Some(tunnels);
        result
    }
}

type Job = Box<dyn FnOnce(&mut Inside) + Send>;

pub(crate) struct Node {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    pub(crate) id: i32,
    /// 1 or 2: last number of its underlay address, third of its subnet.
    pub(crate) number: u8,
    pub(crate) bpffs: PathBuf,
}

impl Node {
    fn new(number: u8) -> Result<Self> {
        let unique = NODES.fetch_add(1, Ordering::Relaxed);
        let bpffs = BPFFS.get().context("no bpffs")?.join(format!("node{unique}"));
        let (jobs, queue) = mpsc::channel::<Job>();
        let (tell, told) = mpsc::channel();
        let pins = bpffs.clone();
        let thread = thread::spawn(move || {
            let entered = unshare(CloneFlags::CLONE_NEWNET).map(|()| gettid().as_raw());
            let failed = entered.is_err();
            if tell.send(entered).is_err() || failed {
                return;
            }
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let mut inside = Inside { runtime, tunnels: None, bpffs: pins };
            for job in queue {
                job(&mut inside);
            }
        });
        let id = told.recv()?.context("a network namespace for the test")?;
        let node = Self { jobs: Some(jobs), thread: Some(thread), id, number, bpffs };
        node.ip("link set lo up")?;
        for key in ["all", "default"] {
            node.sysctl(&format!("net/ipv6/conf/{key}/disable_ipv6"), "1")?;
            node.sysctl(&format!("net/ipv4/conf/{key}/rp_filter"), "1")?;
        }
        Ok(node)
    }

    pub(crate) fn run<T: Send + 'static>(&self, work: impl FnOnce(&mut Inside) -> T + Send + 'static) -> T {
        let (answer, answered) = mpsc::channel::<thread::Result<T>>();
        let job: Job = Box::new(move |inside| {
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(inside)));
            let _ = answer.send(result);
        });
        self.jobs.as_ref().unwrap().send(job).unwrap();
        answered.recv().unwrap().unwrap_or_else(|panic: Box<dyn Any + Send>| std::panic::resume_unwind(panic))
    }

    pub(crate) fn ip(&self, arguments: &str) -> Result<String> {
        self.command("ip", arguments)
    }

    /// Runs a program to its end and expects success.
    pub(crate) fn command(&self, program: &'static str, arguments: &str) -> Result<String> {
        let words: Vec<String> = arguments.split_whitespace().map(str::to_owned).collect();
        let output = self.run(move |_| Command::new(program).args(words).output())?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{program} {arguments}: {said}");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    pub(crate) fn sysctl(&self, key: &str, value: &'static str) -> Result<()> {
        let path = format!("/proc/sys/{key}");
        let text = path.clone();
        self.run(move |_| std::fs::write(path, value)).with_context(|| text)
    }

    pub(crate) fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(172, 31, 0, self.number)
    }

    pub(crate) fn pod(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 244, self.number, 2)
    }

    /// Tunnel device, pod address and route, as the agent's other items would make them.
    pub(crate) fn make_device(&self) -> Result<()> {
        let number = self.number;
        self.run(|_| ensure_device(DEVICE))?;
        self.ip(&format!("link set {DEVICE} mtu 1472 up"))?;
        self.ip(&format!("address replace 10.244.{number}.0/32 dev {DEVICE}"))?;
        self.ip(&format!("route replace 10.244.0.0/16 dev {DEVICE}")).map(drop)
    }

    pub(crate) fn tunnel(&self, datapath: Datapath) -> Tunnel {
        Tunnel {
            device: DEVICE.to_owned(),
            underlay: UNDERLAY.to_owned(),
            local: self.address(),
            port: PORT,
            network: "10.244.0.0/16".parse().unwrap(),
            own_subnet: format!("10.244.{}.0/24", self.number).parse().unwrap(),
            mtu: 1472,
            options: TunnelOptions {
                datapath,
                source_check: SourceCheck::Enforce,
                ..TunnelOptions::default()
            },
        }
    }

    /// The other node as peer.
    pub(crate) fn other(&self) -> TunnelPeer {
        let other = 3 - self.number;
        peer(&format!("10.244.{other}.0/24"), Ipv4Addr::new(172, 31, 0, other))
    }

    pub(crate) fn start_agent(&self) {
        self.run(Inside::start);
    }

    /// The agent ends, however it ends.
    pub(crate) fn end_agent(&self) {
        self.run(|inside| inside.tunnels = None);
    }

    /// `Err` holds the tunnel's own answer.
    pub(crate) fn try_put(&self, tunnel: Tunnel) -> Result<(), String> {
        let result = self.run(move |inside| inside.with(async |tunnels| tunnels.put(&tunnel).await));
        result.map_err(|e| format!("{e:#}"))?.map_err(|e| e.to_string())
    }

    pub(crate) fn put(&self, tunnel: Tunnel) -> Result<()> {
        self.try_put(tunnel).map_err(|e| anyhow!(e))
    }

    pub(crate) fn put_peers(&self, peers: Vec<TunnelPeer>) -> Result<Vec<Result<(), String>>> {
        let results = self.run(move |inside| inside.with(async |tunnels| tunnels.put_peers(&peers).await))?;
        Ok(results.into_iter().map(|result| result.map_err(|e| e.to_string())).collect())
    }

    pub(crate) fn remove_peers(&self, peers: Vec<TunnelPeer>) -> Result<()> {
        let results =
            self.run(move |inside| inside.with(async |tunnels| tunnels.remove_peers(&peers).await))?;
        results.into_iter().try_for_each(|result| result.map_err(|e| anyhow!(e.to_string())))
    }

    /// A new agent with this datapath and the other node as peer.
    pub(crate) fn up(&self, datapath: Datapath) -> Result<()> {
        self.start_agent();
        self.put(self.tunnel(datapath))?;
        for result in self.put_peers(vec![self.other()])? {
            result.map_err(|e| anyhow!(e))?;
        }
        Ok(())
    }

    pub(crate) fn remove(&self, datapath: Datapath) -> Result<()> {
        let tunnel = self.tunnel(datapath);
        self.run(move |inside| inside.with(async |tunnels| tunnels.remove(&tunnel).await))??;
        Ok(())
    }

    pub(crate) fn observe(&self) -> Result<Vec<HostItem>> {
        self.run(|inside| inside.with(async |tunnels| tunnels.observe().await))
    }

    /// Whether the tunnel is observed to be in place.
    pub(crate) fn is_in_place(&self) -> Result<bool> {
        Ok(self.observe()?.iter().any(|item| matches!(item, HostItem::Tunnel(_))))
    }

    /// Waits until something is reported to need another look; how long that took.
    pub(crate) fn disturbed_within(&self, limit: Duration) -> Result<Duration> {
        let start = Instant::now();
        self.run(move |inside| {
            inside.with(async |tunnels| tokio::time::timeout(limit, tunnels.news()).await)
        })?
        .map_err(|_| anyhow!("nothing was reported within {limit:?}"))?;
        Ok(start.elapsed())
    }

    pub(crate) fn report(&self) -> Result<TunnelReport> {
        let reports = self.run(|inside| inside.with(async |tunnels| tunnels.reports()))?;
        reports.into_iter().next().context("no tunnel is up")
    }

    pub(crate) fn tier(&self) -> Result<&'static str> {
        Ok(self.report()?.tier.name())
    }

    /// Until the tier is this one and in place. On kernels where XDP's marks are proven first (veth before 6.1), that takes
    /// packets and the next look.
    pub(crate) fn settles_on(&self, datapath: Datapath, tier: &str) -> Result<()> {
        let start = Instant::now();
        while self.tier()? != tier || !self.is_in_place()? {
            ensure!(start.elapsed() < Duration::from_secs(10), "not {tier}: {:?}", self.report()?);
            if self.is_in_place()? {
                thread::sleep(Duration::from_millis(50));
            } else {
                self.put(self.tunnel(datapath))?;
            }
        }
        Ok(())
    }

    pub(crate) fn count(&self, name: &str) -> Result<u64> {
        Ok(self.report()?.counters.get(name).map_or(0, |tally| tally.packets))
    }

    pub(crate) fn pins(&self) -> PathBuf {
        self.bpffs.join(format!("flannel/flannel0/v{LAYOUT_VERSION}"))
    }

    pub(crate) fn has_link(&self, device: &str) -> bool {
        self.ip(&format!("link show dev {device}")).is_ok()
    }

    /// As `ethtool -k` says it.
    pub(crate) fn offload(&self, device: &str, name: &str) -> Result<String> {
        let text = self.command("ethtool", &format!("-k {device}"))?;
        let line = text.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(": "));
        Ok(line.with_context(|| format!("{device} has no offload {name}"))?.to_owned())
    }

    /// A socket of the pod.
    pub(crate) fn pod_socket(&self, port: u16) -> Result<UdpSocket> {
        let address = SocketAddrV4::new(self.pod(), port);
        let socket = self.run(move |_| UdpSocket::bind(address)).context("bind the pod's socket")?;
        let size: libc::c_int = 16 << 20;
        // SAFETY: SO_RCVBUFFORCE reads one int.
        let done = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVBUFFORCE,
                (&raw const size).cast(),
                size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        ensure!(done == 0, "SO_RCVBUFFORCE: {}", std::io::Error::last_os_error());
        Ok(socket)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send(Box::new(|inside| inside.tunnels = None));
        }
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub(crate) fn peer(subnet: &str, node: Ipv4Addr) -> TunnelPeer {
    TunnelPeer { device: DEVICE.into(), subnet: subnet.parse().unwrap(), node }
}

/// Both nodes, their devices up, no agent yet.
pub(crate) struct Rig {
    pub(crate) a: Node,
    pub(crate) b: Node,
}

impl Rig {
    pub(crate) fn new() -> Result<Self> {
        Self::with_mtu(1500)
    }

    pub(crate) fn with_mtu(mtu: u32) -> Result<Self> {
        let rig = Self { a: Node::new(1)?, b: Node::new(2)? };
        rig.join(mtu)?;
        for node in [&rig.a, &rig.b] {
            node.make_device()?;
            node.ip(&format!("address add {}/32 dev lo", node.pod()))?;
        }
        Ok(rig)
    }

    /// Lays the wire, both ends addressed and up.
    pub(crate) fn join(&self, mtu: u32) -> Result<()> {
        let far = format!("{UNDERLAY} mtu {mtu} netns {}", self.b.id);
        self.a.ip(&format!("link add {UNDERLAY} mtu {mtu} type veth peer name {far}"))?;
        for node in [&self.a, &self.b] {
            node.ip(&format!("address add {}/24 dev {UNDERLAY}", node.address()))?;
            node.ip(&format!("link set {UNDERLAY} up"))?;
        }
        Ok(())
    }

    pub(crate) fn up(&self, datapath: Datapath) -> Result<()> {
        self.a.up(datapath)?;
        self.b.up(datapath)
    }

    /// A datagram from pod to pod and back.
    pub(crate) fn talks(&self) -> Result<()> {
        let mut buffer = [0; 2000];
        for size in [1, 1444] {
            // New sockets: what was sent again while ARP took its time may still arrive, more than once.
            let (from, to) = (self.a.pod_socket(0)?, self.b.pod_socket(0)?);
            for (sender, receiver) in [(&from, &to), (&to, &from)] {
                receiver.set_read_timeout(Some(Duration::from_millis(300)))?;
                let mut attempts = 0;
                loop {
                    sender.send_to(&vec![7; size], receiver.local_addr()?)?;
                    match receiver.recv(&mut buffer) {
                        Ok(length) => {
                            ensure!(length == size, "{length} of {size} bytes arrived");
                            break;
                        }
                        // The first packets may still be waiting for ARP.
                        Err(e)
                            if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
                                && attempts < 10 =>
                        {
                            attempts += 1;
                        }
                        Err(e) => return Err(e).with_context(|| format!("{size} bytes from pod to pod")),
                    }
                }
            }
        }
        Ok(())
    }
}
