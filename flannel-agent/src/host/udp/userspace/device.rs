//! The TUN device the tunnel reads from and writes to (`Documentation/networking/tuntap.rst`).
//!
//! It is persistent: it, its address, its routes and the programs pinned on it outlive the agent. The kernel ties its
//! flags to the device and refuses a queue with others, so there is exactly one set of them, here.

use std::{
    fs::{File, OpenOptions},
    io::{self, IoSlice, Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    os::unix::fs::OpenOptionsExt,
};

use super::vnet;
use crate::host::HostError;

const CONTROL: &str = "/dev/net/tun";
const FLAGS: libc::c_int = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
const SEGMENTATION: libc::c_uint = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6;
/// Since Linux 6.2.
const UDP_SEGMENTATION: libc::c_uint = libc::TUN_F_USO4 | libc::TUN_F_USO6;
const ETHTOOL_GDRVINFO: u32 = 3;

/// One queue of a TUN device, in non-blocking mode. Dropping it detaches it from the device, where merely closing it would
/// not do: a child this process is just starting holds a copy until it calls `exec`, and the kernel would go on putting
/// packets there.
#[derive(Debug)]
pub(super) struct Queue(File);

impl Queue {
    /// One packet with its virtio header.
    pub(super) fn read(&self, space: &mut [u8]) -> io::Result<usize> {
        (&self.0).read(space)
    }

    /// One packet, in pieces, behind its virtio header.
    pub(super) fn write(&self, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        (&self.0).write_vectored(pieces).map(drop)
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: all zeroes is a valid ifreq.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = libc::IFF_DETACH_QUEUE as libc::c_short;
        // A deleted device, the only way this fails, has no queues.
        // SAFETY: `request` is an initialised ifreq that outlives the call.
        let _ = unsafe { libc::ioctl(self.0.as_raw_fd(), libc::TUNSETQUEUE, &raw mut request) };
    }
}

/// Creates the device, persistent, or takes over one that has our flags. Its state (up, MTU, addresses) is not touched.
///
/// A second call beside a running tunnel is harmless: the queue it opens exists for microseconds, and only packets the
/// kernel puts there in that time are lost.
///
/// Its queue stays TUN's own of 500 packets, which is flanneld's too (contract §8.1): what comes in 100 ms at 5,000 a
/// second, should the agent get no time. Beside four busy loops on two CPUs it lost none of 40,000 a second, so 1,000 to
/// 4,000 had nothing to mend. A longer one holds more memory that no socket is charged for, up to 64 KiB a packet
/// (`skb_orphan` in `tun_net_xmit`).
///
/// # Errors
/// No `/dev/net/tun`, no CAP_NET_ADMIN, a name the kernel would not take, or a device of that name which is something
/// else; the text says which and what to do.
pub fn ensure_device(name: &str) -> Result<(), HostError> {
    let queue = open_queue(name)?;
    // SAFETY: TUNSETPERSIST takes its argument by value.
    check(unsafe { libc::ioctl(queue.0.as_raw_fd(), libc::TUNSETPERSIST, 1) })
        .map_err(|e| failed(name, format!("make it persistent: {e}")))?;
    Ok(())
}

/// Opens a queue of the device, with every offload this kernel's TUN has. Creates the device when it does not exist; it
/// then vanishes with the queue.
pub(super) fn open_queue(name: &str) -> Result<Queue, HostError> {
    let mut request = request(name)?;
    let queue = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(CONTROL)
        .map_err(|e| failed(name, open_reason(&e)))?;
    request.ifr_ifru.ifru_flags = FLAGS as libc::c_short;
    // SAFETY: `request` is an initialised ifreq that outlives the call.
    check(unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
        .map_err(|e| failed(name, attach_reason(name, &e)))?;

    let length = vnet::LEN as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    check(unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const length) })
        .map_err(|e| failed(name, format!("set a virtio header of {length} bytes: {e}")))?;
    set_offloads(&queue)
        .map_err(|e| failed(name, format!("switch checksum and segmentation offload on: {e}")))?;
    Ok(Queue(queue))
}

fn set_offloads(queue: &File) -> io::Result<()> {
    let set = |offloads: libc::c_uint| {
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        check(unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) })
    };
    match set(SEGMENTATION | UDP_SEGMENTATION) {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => set(SEGMENTATION),
        other => other,
    }
    .map(drop)
}

/// A device of that name exists in the calling thread's network namespace.
pub(super) fn exists(name: &str) -> Result<bool, HostError> {
    let request = request(name)?;
    // SAFETY: `ifr_name` is NUL-terminated: `request` leaves its last byte zero.
    Ok(unsafe { libc::if_nametoindex(request.ifr_name.as_ptr()) } != 0)
}

/// An ifreq with nothing but the name.
fn request(name: &str) -> Result<libc::ifreq, HostError> {
    let allowed = !matches!(name, "" | "." | "..")
        && name.len() < libc::IFNAMSIZ
        && name.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b'%'));
    if !allowed {
        let reason = "an interface name is 1 to 15 printable characters without '/', ':', '%' and spaces";
        return Err(failed(name, reason.to_owned()));
    }
    // SAFETY: all zeroes is a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn open_reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::ENOENT) => {
            format!(
                "{CONTROL} does not exist; `modprobe tun`, in a container also `mknod {CONTROL} c 10 200`"
            )
        }
        Some(libc::ENODEV | libc::ENXIO) => {
            format!("{CONTROL} is there but the kernel has no tun driver ({error}); `modprobe tun`")
        }
        Some(libc::EPERM | libc::EACCES) => format!(
            "opening {CONTROL}: {error}; the process, or the container's device rules, must allow character device 10:200"
        ),
        _ => format!("opening {CONTROL}: {error}"),
    }
}

fn attach_reason(name: &str, error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM) => format!("{error}; the process needs CAP_NET_ADMIN"),
        Some(libc::EINVAL) => match existing_kind(name) {
            Some(kind) => format!("{name} exists but is {kind}; remove it with `ip link delete {name}`"),
            None => format!("{error}; this kernel's tun driver lacks a virtio header or several queues"),
        },
        Some(libc::EBUSY) => format!(
            "{error}; another process holds {name} with a single queue, such as a running flanneld: stop it first"
        ),
        _ => error.to_string(),
    }
}

/// What the existing device is, when that explains why no queue can be had.
fn existing_kind(name: &str) -> Option<String> {
    /// `struct ethtool_drvinfo`; the kernel writes all 196 bytes.
    #[repr(C)]
    struct DriverInfo {
        command: u32,
        driver: [u8; 32],
        version: [u8; 32],
        firmware: [u8; 32],
        bus: [u8; 32],
        rest: [u8; 64],
    }
    let mut info = DriverInfo {
        command: ETHTOOL_GDRVINFO,
        driver: [0; 32],
        version: [0; 32],
        firmware: [0; 32],
        bus: [0; 32],
        rest: [0; 64],
    };
    let mut request = request(name).ok()?;
    if !exists(name).ok()? {
        return None;
    }
    request.ifr_ifru.ifru_data = (&raw mut info).cast();
    // SAFETY: plain socket creation.
    let socket =
        check(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) }).ok()?;
    // SAFETY: the descriptor was just created and is owned by nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: `ifru_data` points at an ethtool_drvinfo of full size, and both live until the call returns.
    let known = check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCETHTOOL, &raw mut request) });
    let text = |bytes: &[u8]| {
        let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
    };
    Some(match (known, text(&info.driver).as_str(), text(&info.bus).as_str()) {
        (Ok(_), "tun", "tun") => {
            "a TUN device without IFF_MULTI_QUEUE, as flanneld or `ip tuntap` make it".to_owned()
        }
        (Ok(_), "tun", _) => "a TAP device, not a TUN device".to_owned(),
        (Ok(_), driver, _) if !driver.is_empty() => format!("a {driver} device, not a TUN device"),
        _ => "not a TUN device".to_owned(),
    })
}

pub(super) fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn failed(name: &str, reason: String) -> HostError {
    HostError { doing: format!("open TUN device {name:?}"), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_the_kernel_would_change_or_refuse_is_refused_here() {
        for name in ["", ".", "..", "flannel%d", "a/b", "eth0:1", "two words", "sixteen-is-a-lot", "naïve"] {
            let error = ensure_device(name).unwrap_err().to_string();
            assert!(error.contains(&format!("{name:?}")), "{error}");
            assert!(error.contains("1 to 15"), "{error}");
        }
    }
}
