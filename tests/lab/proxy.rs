//! The tunnel as it was first built: a TUN device and a UDP socket, one read and one send per packet, one thread. It
//! stands for the original `flanneld` where speed is compared: same wire format, same system calls per packet, nothing
//! gathered and nothing offloaded.

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddrV4, UdpSocket},
    os::fd::{AsFd as _, AsRawFd as _},
    os::unix::fs::OpenOptionsExt as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
};

use anyhow::{Context as _, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::{
    agent::AgentOptions,
    namespace::Namespace,
    probe::load::forward_in_real_time,
    reference::{UDP_OVERHEAD, attach_pods, publish, subnet},
    topology::{Lab, NETWORK},
};

const DEVICE: &str = "flannel0";
const PORT: u16 = 8285;
/// How long a stop may take to be noticed, milliseconds.
const LOOK: u8 = 200;

/// A proxy on each of two hosts; they end with this value.
#[derive(Debug)]
pub struct Proxies {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Proxies {
    /// Starts them and attaches a pod to each host.
    ///
    /// # Errors
    /// No TUN device, or what the kernel refuses.
    pub fn start(lab: &mut Lab) -> Result<Self> {
        let mut proxies = Self { stop: Arc::default(), threads: Vec::new() };
        for (index, peer) in [(0, 1), (1, 0)] {
            proxies.on(lab, index, subnet(peer))?;
        }
        attach_pods(lab, UDP_OVERHEAD)?;
        Ok(proxies)
    }

    /// A node that still runs the original beside one with an agent: takes a lease for the second host, starts an agent
    /// on the first, then the proxy, and attaches a pod to each. Two hosts.
    ///
    /// # Errors
    /// As [`Self::start`], and what the agent does not get ready for.
    pub fn beside_an_agent(lab: &mut Lab, options: &AgentOptions) -> Result<Self> {
        let node = lab.host(1).address();
        let value = format!(r#"{{"PublicIP":"{node}","PublicIPv6":null}}"#);
        lab.datastore().put(&format!("subnets/{}-24", subnet(1)), &value)?;
        lab.host_mut(0).start_agent(options)?.wait_peers(1)?;
        let mut proxies = Self { stop: Arc::default(), threads: Vec::new() };
        let remote = lab.host(0).agent()?.subnet_env()?.base();
        proxies.on(lab, 1, remote)?;
        publish(lab.host(1), 1, lab.underlay_mtu().saturating_sub(UDP_OVERHEAD))?;
        for index in [0, 1] {
            lab.host_mut(index).attach_pod()?;
        }
        Ok(proxies)
    }

    /// One on the host with this index; `remote` is the other host's subnet.
    fn on(&mut self, lab: &Lab, index: usize, remote: Ipv4Addr) -> Result<()> {
        let (host, peer) = (lab.host(index), lab.host(1 - index));
        let remote = Remote { subnet: remote, node: SocketAddrV4::new(peer.address(), PORT) };
        let mtu = lab.underlay_mtu().saturating_sub(UDP_OVERHEAD);
        let tun = host.netns().run(open_tun).with_context(|| format!("on {}", host.name()))?;
        host.netns().ip(&format!("link set {DEVICE} mtu {mtu} up"))?;
        host.netns().ip(&format!("addr add {}/32 dev {DEVICE}", subnet(index)))?;
        host.netns().ip(&format!("route add {NETWORK} dev {DEVICE}"))?;
        let address = SocketAddrV4::new(host.address(), PORT);
        let socket =
            host.netns().run(|| UdpSocket::bind(address).with_context(|| format!("bind UDP {address}")))?;
        socket.set_nonblocking(true).context("set the socket non-blocking")?;
        self.run(host.netns(), tun, socket, remote);
        Ok(())
    }

    fn run(&mut self, namespace: &Arc<Namespace>, tun: File, socket: UdpSocket, remote: Remote) {
        let stop = Arc::clone(&self.stop);
        self.threads.push(namespace.spawn(move || {
            forward_in_real_time()?;
            forward(tun, &socket, &remote, &stop)
        }));
    }
}

impl Drop for Proxies {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if let Ok(Err(e)) = thread.join() {
                eprintln!("the proxy ended: {e:#}");
            }
        }
    }
}

/// The only route.
struct Remote {
    subnet: Ipv4Addr,
    node: SocketAddrV4,
}

fn open_tun() -> Result<File> {
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .context("open /dev/net/tun (is the module `tun` loaded?)")?;
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (place, byte) in request.ifr_name.iter_mut().zip(DEVICE.bytes()) {
        *place = byte.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: `request` is an initialised ifreq that outlives the call.
    if unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } != 0 {
        return Err(std::io::Error::last_os_error()).with_context(|| format!("make TUN device {DEVICE}"));
    }
    Ok(tun)
}

fn forward(mut tun: File, socket: &UdpSocket, remote: &Remote, stop: &AtomicBool) -> Result<()> {
    let mut buffer = vec![0; 65536];
    while !stop.load(Ordering::Relaxed) {
        let mut both =
            [PollFd::new(tun.as_fd(), PollFlags::POLLIN), PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        poll(&mut both, PollTimeout::from(LOOK)).context("poll")?;
        loop {
            let sent = tun_to_udp(&mut tun, socket, remote, &mut buffer)?;
            let delivered = udp_to_tun(&mut tun, socket, &mut buffer)?;
            if !sent && !delivered {
                break;
            }
        }
    }
    Ok(())
}

/// One packet, if there is one.
fn tun_to_udp(tun: &mut File, socket: &UdpSocket, remote: &Remote, buffer: &mut [u8]) -> Result<bool> {
    let length = match tun.read(buffer) {
        Ok(length) => length,
        Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
        Err(e) => return Err(e).context("read from the TUN device"),
    };
    let Some(packet) = buffer.get_mut(..length) else { bail!("{length} bytes read") };
    let ours = packet.get(16..19).is_some_and(|destination| destination == &remote.subnet.octets()[..3]);
    if ours && take_a_hop(packet) {
        match socket.send_to(packet, remote.node) {
            Err(e) if !is_passing(&e) => return Err(e).context("send a datagram"),
            _ => {}
        }
    }
    Ok(true)
}

/// One packet, if there is one.
fn udp_to_tun(tun: &mut File, socket: &UdpSocket, buffer: &mut [u8]) -> Result<bool> {
    let length = match socket.recv(buffer) {
        Ok(length) => length,
        Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(false),
        Err(e) if is_passing(&e) => return Ok(true),
        Err(e) => return Err(e).context("receive a datagram"),
    };
    let Some(packet) = buffer.get_mut(..length) else { bail!("{length} bytes received") };
    if take_a_hop(packet) {
        loop {
            match tun.write(packet) {
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                // Not an IP packet: not ours to judge.
                Ok(_) | Err(_) => break,
            }
        }
    }
    Ok(true)
}

/// Full queues, and answers of ICMP to datagrams sent before.
fn is_passing(error: &std::io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ECONNREFUSED | libc::EHOSTUNREACH)
    )
}

/// TTL one less, and the header checksum with it (RFC 1624); false when the packet's life ends here.
fn take_a_hop(packet: &mut [u8]) -> bool {
    let Some([ttl, _, high, low]) = packet.get_mut(8..12) else { return false };
    *ttl = ttl.wrapping_sub(1);
    if *ttl == 0 {
        return false;
    }
    let sum = u32::from(u16::from_be_bytes([*high, *low])) + 0x100;
    let sum = (sum & 0xffff) + (sum >> 16);
    [*high, *low] = u16::try_from(sum).unwrap_or_default().to_be_bytes();
    true
}
