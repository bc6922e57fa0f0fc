//! Packet sockets and a TUN device: the two ends at which the test touches packets.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::fd::{AsRawFd, FromRawFd as _, OwnedFd},
    os::unix::fs::OpenOptionsExt as _,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};

/// How long a packet may take over the wire.
const PATIENCE_MS: libc::c_int = 2000;
/// How long to wait before believing that nothing comes.
const GRACE: Duration = Duration::from_millis(100);
/// `struct virtio_net_hdr`, in front of every packet this socket sends.
const VNET_HEADER: usize = 10;

pub(super) fn ip(arguments: &str) -> Result<()> {
    let done =
        Command::new("ip").args(arguments.split_whitespace()).output().context("start ip (iproute2)")?;
    ensure!(done.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&done.stderr).trim());
    Ok(())
}

/// Writes a sysctl of the calling thread's namespace.
pub(super) fn proc_sys(name: &str, value: &str) -> Result<()> {
    std::fs::write(format!("/proc/sys/{name}"), value).with_context(|| format!("sysctl {name} = {value}"))
}

pub(super) fn index(device: &str) -> Result<u32> {
    nix::net::if_::if_nametoindex(device).with_context(|| format!("interface {device}"))
}

/// A TUN or TAP device without header; the packets nobody took are read here.
pub(super) struct Tun {
    file: File,
}

impl Tun {
    pub(super) fn open(name: &str) -> Result<Self> {
        Self::open_as(libc::IFF_TUN, name)
    }

    /// With Ethernet headers.
    pub(super) fn open_tap(name: &str) -> Result<Self> {
        Self::open_as(libc::IFF_TAP, name)
    }

    fn open_as(kind: libc::c_int, name: &str) -> Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .context("open /dev/net/tun")?;
        // SAFETY: all zeros is a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = (kind | libc::IFF_NO_PI) as i16;
        // SAFETY: TUNSETIFF takes a pointer to an ifreq.
        let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        ensure!(done == 0, "TUNSETIFF {name}: {}", io::Error::last_os_error());
        Ok(Self { file })
    }

    /// Has the device receive a packet.
    pub(super) fn write(&mut self, packet: &[u8]) -> Result<()> {
        self.file.write_all(packet).context("write to the device")
    }

    /// The next packet, if one comes in time.
    pub(super) fn read(&mut self) -> Result<Option<Vec<u8>>> {
        if !readable(&self.file)? {
            return Ok(None);
        }
        let mut packet = vec![0; 65536];
        let length = self.file.read(&mut packet)?;
        packet.truncate(length);
        Ok(Some(packet))
    }
}

/// A packet socket on one device: sees what the device receives, sends out of it.
pub(super) struct Port {
    socket: OwnedFd,
}

impl Port {
    pub(super) fn open(device: &str) -> Result<Self> {
        let all = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: no pointers.
        let raw =
            unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(all)) };
        ensure!(raw >= 0, "packet socket: {}", io::Error::last_os_error());
        // SAFETY: a fresh descriptor that nobody else owns.
        let socket = unsafe { OwnedFd::from_raw_fd(raw) };
        let on: libc::c_int = 1;
        // SAFETY: the option is an int, as long as we say.
        let done = unsafe {
            libc::setsockopt(
                raw,
                libc::SOL_PACKET,
                libc::PACKET_VNET_HDR,
                (&raw const on).cast(),
                size_of_val(&on) as libc::socklen_t,
            )
        };
        ensure!(done == 0, "PACKET_VNET_HDR: {}", io::Error::last_os_error());
        // SAFETY: all zeros is a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = all;
        address.sll_ifindex = index(device)?.cast_signed();
        // SAFETY: the address is as long as we say.
        let done =
            unsafe { libc::bind(raw, (&raw const address).cast(), size_of_val(&address) as libc::socklen_t) };
        ensure!(done == 0, "bind to {device}: {}", io::Error::last_os_error());
        Ok(Self { socket })
    }

    pub(super) fn send(&mut self, packet: &[u8]) -> Result<()> {
        self.send_behind([0; VNET_HEADER], packet)
    }

    /// An IPv4 packet without options that holds TCP without options, to be cut into segments of `size` bytes.
    pub(super) fn send_tcp_super_packet(&mut self, packet: &[u8], size: u16) -> Result<()> {
        let mut header = [0; VNET_HEADER];
        header[0] = 1; // VIRTIO_NET_HDR_F_NEEDS_CSUM
        header[1] = 1; // VIRTIO_NET_HDR_GSO_TCPV4
        // Length of the headers, segment size, where the checksum starts and where in there it goes.
        for (at, value) in [(2, 40), (4, size), (6, 20), (8, 16)] {
            header[at..at + 2].copy_from_slice(&u16::to_ne_bytes(value));
        }
        self.send_behind(header, packet)
    }

    fn send_behind(&mut self, header: [u8; VNET_HEADER], packet: &[u8]) -> Result<()> {
        let bytes = [&header[..], packet].concat();
        // The device may have no Ethernet header to tell the protocol: the socket does.
        let protocol = (libc::ETH_P_IP as u16).to_be();
        // SAFETY: all zeros is a valid sockaddr_ll.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        let mut length = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the address is as long as we say.
        let done =
            unsafe { libc::getsockname(self.socket.as_raw_fd(), (&raw mut address).cast(), &raw mut length) };
        ensure!(done == 0, "getsockname: {}", io::Error::last_os_error());
        address.sll_protocol = protocol;
        // SAFETY: bytes and address are as long as we say.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                bytes.as_ptr().cast(),
                bytes.len(),
                0,
                (&raw const address).cast(),
                size_of_val(&address) as libc::socklen_t,
            )
        };
        ensure!(sent == bytes.len() as isize, "send {} bytes: {}", bytes.len(), io::Error::last_os_error());
        Ok(())
    }

    /// The next packet the device received, if one comes in time.
    pub(super) fn receive(&mut self) -> Result<Option<Vec<u8>>> {
        while readable(&self.socket)? {
            if let Some(packet) = self.next()? {
                return Ok(Some(packet));
            }
        }
        Ok(None)
    }

    /// A packet the device received already; gives it a moment.
    pub(super) fn received_at_once(&mut self) -> Result<Option<Vec<u8>>> {
        thread::sleep(GRACE);
        loop {
            match self.next() {
                Ok(Some(packet)) => return Ok(Some(packet)),
                Ok(None) => {}
                Err(e)
                    if e.downcast_ref::<io::Error>()
                        .is_some_and(|e| e.kind() == io::ErrorKind::WouldBlock) =>
                {
                    return Ok(None);
                }
                Err(e) => return Err(e),
            }
        }
    }

    /// The next packet of the queue; `None` for one the device sent.
    fn next(&mut self) -> Result<Option<Vec<u8>>> {
        let mut packet = vec![0; 70_000];
        // SAFETY: all zeros is a valid sockaddr_ll.
        let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        let mut length = size_of_val(&from) as libc::socklen_t;
        // SAFETY: packet and address are as long as we say.
        let got = unsafe {
            libc::recvfrom(
                self.socket.as_raw_fd(),
                packet.as_mut_ptr().cast(),
                packet.len(),
                libc::MSG_DONTWAIT,
                (&raw mut from).cast(),
                &raw mut length,
            )
        };
        if got < 0 {
            return Err(io::Error::last_os_error().into());
        }
        packet.truncate(got as usize);
        packet.drain(..VNET_HEADER.min(packet.len()));
        Ok((from.sll_pkttype != libc::PACKET_OUTGOING).then_some(packet))
    }
}

fn readable(fd: &impl AsRawFd) -> Result<bool> {
    let mut wanted = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, as we say.
    let ready = unsafe { libc::poll(&raw mut wanted, 1, PATIENCE_MS) };
    ensure!(ready >= 0, "poll: {}", io::Error::last_os_error());
    Ok(ready > 0)
}
