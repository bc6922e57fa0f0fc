//! The room: a network namespace that holds nothing but the kernel's own tunnel receiver.
//!
//! Nodes joined by veth hand each other super-packets whole, and those arrive with the marks of the tunnel on them. No BPF
//! helper takes the marks off, and a bridge splits every packet that has them in software (0.65 × the rate of plain
//! routing). The receive path of the kernel's tunnel devices does take them off (`iptunnel_pull_offloads`,
//! include/net/ip_tunnels.h). So `flannel_ingress` exchanges the outer header of TCP for vxlan's
//! ([`flannel_common::header::dress`]) and sends the packet through the door `<device>d` into the room; vxlan's socket in
//! there receives it, and it comes out of `<device>v` on the host, clean, whole and merged by GRO.
//!
//! Why a namespace: vxlan's socket would be open to the network and its packets would meet the host's firewall a second
//! time, as input on a port nobody has allowed. In the room there are no rules, and nobody but the door comes in.
//!
//! The room is kept by a mount of its own (`/run/flannel/<device>.<namespace>.room`), so that packets still come through
//! while no agent runs. Where the mount goes with the agent, as in a container, the door goes too; the programs see that
//! and do without.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use flannel_common::header::{DRESS_DESTINATION, DRESS_GROWTH, DRESS_MAC, DRESS_PORT, DRESS_VNI};
use ipnet::{IpNet, Ipv4Net};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

use super::{End, GroPair, disable_ipv6};
use crate::domain::host_state::{Address, Sysctl};
use crate::host::netlink::{Netlink, VethEnd, Vxlan};
use crate::host::udp::errno::describe_io;
use crate::host::{HostError, sysctl};

/// Where rooms are mounted.
const FOLDER: &str = "/run/flannel";
/// The inner end of the door.
const INSIDE: &str = "door";
const OWN_NAMESPACE: &str = "/proc/thread-self/ns/net";

struct Names {
    door: String,
    receiver: String,
    path: PathBuf,
}

fn names(device: &str) -> Result<Names, HostError> {
    let path = Path::new(FOLDER).join(format!("{device}{}", ending()?));
    Ok(Names { door: format!("{device}d"), receiver: format!("{device}v"), path })
}

/// What the names of all rooms of this host end in.
fn ending() -> Result<String, HostError> {
    let own = fs::metadata(OWN_NAMESPACE)
        .map_err(|e| HostError::new(format!("look at {OWN_NAMESPACE}"), describe_io(&e)))?;
    Ok(format!(".{}.room", own.ino()))
}

/// A dressed packet is longer than the datagram it came in, which is as long as the underlay allows.
const fn door_mtu(mtu: u32) -> u32 {
    mtu + flannel_common::OVERHEAD + DRESS_GROWTH
}

/// Makes the room of `device` with door and receiver, or anew when something is missing.
///
/// # Errors
/// Missing CAP_SYS_ADMIN (mount and namespace) or CAP_NET_ADMIN, no vxlan in this kernel, a device of that name which is
/// something else.
pub(super) async fn ensure(netlink: &Netlink, device: &str, mtu: u32) -> Result<GroPair, HostError> {
    let doing = || format!("make the room of {device}");
    if let Ok(pair) = find(netlink, device, mtu).await {
        return Ok(pair);
    }
    let names = names(device)?;
    for (name, kind) in [(&names.door, "veth"), (&names.receiver, "vxlan")] {
        if let Some(link) = netlink.link(name).await?
            && link.kind.as_deref() != Some(kind)
        {
            let kind = link.kind.unwrap_or_else(|| "network card".to_owned());
            return Err(HostError::new(doing(), format!("{name} exists and is a {kind}, not ours")));
        }
    }
    remove(netlink, device).await?;
    let made = build(netlink, &names, mtu).await;
    let found = match made {
        Ok(()) => find(netlink, device, mtu).await.map_err(|reason| HostError::new(doing(), reason)),
        Err(e) => Err(e),
    };
    if found.is_err() {
        remove(netlink, device).await?;
    }
    found
}

async fn build(netlink: &Netlink, names: &Names, mtu: u32) -> Result<(), HostError> {
    let room = Room::make(&names.path)?;
    let host = File::open(OWN_NAMESPACE)
        .map_err(|e| HostError::new(format!("open {OWN_NAMESPACE}"), describe_io(&e)))?;
    let mtu = door_mtu(mtu);
    let inside = VethEnd { name: INSIDE, address: Some(DRESS_MAC), namespace: Some(room.descriptor()) };
    netlink.create_veth_to(&names.door, &inside, mtu).await?;
    let address = Address { device: INSIDE.to_owned(), net: room_address() };
    for result in room.netlink.put_addresses(&[&address]).await {
        result?;
    }
    room.netlink.set_up(INSIDE).await?;
    let receiver = Vxlan {
        name: &names.receiver,
        id: DRESS_VNI,
        port: DRESS_PORT,
        address: DRESS_MAC,
        mtu,
        namespace: host.as_raw_fd(),
    };
    // Made in the room: there its socket stays. Seen on the host: there its packets arrive.
    room.netlink.create_vxlan(&receiver).await?;
    for name in [&names.door, &names.receiver] {
        disable_ipv6(name)?;
        netlink.set_no_arp(name).await?;
        netlink.set_up(name).await?;
    }
    Ok(())
}

fn room_address() -> IpNet {
    IpNet::V4(Ipv4Net::from(Ipv4Addr::from(DRESS_DESTINATION)))
}

/// The room's door and receiver, when all of it is there.
///
/// # Errors
/// What is missing or wrong.
pub(super) async fn find(netlink: &Netlink, device: &str, mtu: u32) -> Result<GroPair, String> {
    let names = names(device).map_err(|e| e.to_string())?;
    let mut ends = Vec::with_capacity(2);
    for (name, kind) in [(&names.door, "veth"), (&names.receiver, "vxlan")] {
        let link = netlink.link(name).await.map_err(|e| e.to_string())?;
        let link = link.ok_or_else(|| format!("{name} is missing"))?;
        if link.kind.as_deref() != Some(kind) {
            return Err(format!("{name} is not a {kind}"));
        }
        if !link.up {
            return Err(format!("{name} is down"));
        }
        ends.push((link.mtu, End { name: link.name, ifindex: link.index }));
    }
    let Ok([(door_has, sender), (_, receiver)]) = <[(u32, End); 2]>::try_from(ends) else {
        return Err("one end is missing".to_owned());
    };
    if door_has != door_mtu(mtu) {
        return Err(format!("{} has mtu {door_has}, not {}", names.door, door_mtu(mtu)));
    }
    let room = Room::open(&names.path).map_err(|e| e.to_string())?;
    let inside = room.netlink.link(INSIDE).await.map_err(|e| e.to_string())?;
    let inside = inside.filter(|link| link.up).ok_or_else(|| format!("{} leads nowhere", names.door))?;
    let addresses = room.netlink.addresses().await.map_err(|e| e.to_string())?;
    if !addresses.iter().any(|entry| entry.ifindex == inside.index && entry.net == room_address()) {
        return Err(format!("{} has no address in the room", names.door));
    }
    Ok(GroPair { sender, receiver, dressed: true })
}

/// Whether a part of the room is there, in whatever shape.
///
/// # Errors
/// The kernel does not answer.
pub(super) async fn exists(netlink: &Netlink, device: &str) -> Result<bool, HostError> {
    let names = names(device)?;
    for (name, kind) in [(&names.door, "veth"), (&names.receiver, "vxlan")] {
        if netlink.link(name).await?.is_some_and(|link| link.kind.as_deref() == Some(kind)) {
            return Ok(true);
        }
    }
    Ok(is_mounted(&names.path))
}

/// What there is of the room, in a line.
///
/// # Errors
/// The kernel does not answer.
pub(super) async fn remains(netlink: &Netlink, device: &str) -> Result<Option<String>, HostError> {
    let Names { door, receiver, path } = names(device)?;
    for (name, kind) in [(&door, "veth"), (&receiver, "vxlan")] {
        if netlink.link(name).await?.is_some_and(|link| link.kind.as_deref() == Some(kind)) {
            let line =
                format!("link device {door} type veth and {receiver} type vxlan, with their namespace");
            return Ok(Some(line));
        }
    }
    Ok(path.exists().then(|| format!("room {}", path.display())))
}

/// The devices that have a room, or the file for one: where the mount went with a container, it stays.
///
/// # Errors
/// The kernel does not tell in which namespace we are.
pub(super) fn devices() -> Result<Vec<String>, HostError> {
    let ending = ending()?;
    let entries = fs::read_dir(FOLDER).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    Ok(names.filter_map(|name| name.strip_suffix(&ending).map(str::to_owned)).collect())
}

fn is_mounted(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| is_namespace(&file))
}

fn is_namespace(file: &File) -> bool {
    fstatfs(file).is_ok_and(|about| about.filesystem_type() == NSFS_MAGIC)
}

/// Deletes door, receiver and room; gone already is a success. Devices of these names of other kinds are left alone.
///
/// # Errors
/// Missing CAP_NET_ADMIN, or CAP_SYS_ADMIN for a room that is mounted.
pub(super) async fn remove(netlink: &Netlink, device: &str) -> Result<(), HostError> {
    let names = names(device)?;
    for (name, kind) in [(&names.receiver, "vxlan"), (&names.door, "veth")] {
        if netlink.link(name).await?.is_some_and(|link| link.kind.as_deref() == Some(kind)) {
            netlink.delete_link(name).await?;
        }
    }
    if is_mounted(&names.path) {
        umount2(&names.path, MntFlags::MNT_DETACH)
            .map_err(|e| HostError::new(format!("unmount {}", names.path.display()), e.to_string()))?;
    }
    // An empty file that stays is no harm.
    let _ = fs::remove_file(&names.path);
    Ok(())
}

/// The namespace, entered: a connection to its devices.
struct Room {
    namespace: File,
    netlink: Netlink,
}

impl Room {
    /// Makes it and mounts it at `path`.
    fn make(path: &Path) -> Result<Self, HostError> {
        let failed =
            |what: &str, reason: String| HostError::new(format!("{what} {}", path.display()), reason);
        fs::create_dir_all(FOLDER)
            .map_err(|e| HostError::new(format!("create {FOLDER}"), describe_io(&e)))?;
        File::create(path).map_err(|e| failed("create", describe_io(&e)))?;
        on_a_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|e| failed("make the namespace of", e.to_string()))?;
            // Packets of every peer come in by the one door, and IPv6 has no business here.
            for (key, value) in [
                ("net/ipv4/conf/all/rp_filter", "0"),
                ("net/ipv4/conf/default/rp_filter", "0"),
                ("net/ipv6/conf/all/disable_ipv6", "1"),
                ("net/ipv6/conf/default/disable_ipv6", "1"),
            ] {
                let written = sysctl::write(&Sysctl { key: key.to_owned(), value: value.to_owned() });
                if key.starts_with("net/ipv4") {
                    written?;
                }
            }
            let none = None::<&str>;
            mount(Some(OWN_NAMESPACE), path, none, MsFlags::MS_BIND, none)
                .map_err(|e| failed("mount", e.to_string()))?;
            let namespace = File::open(OWN_NAMESPACE).map_err(|e| failed("open", describe_io(&e)))?;
            Ok(Self { namespace, netlink: Netlink::new()? })
        })
    }

    /// Opens the one that is mounted at `path`.
    fn open(path: &Path) -> Result<Self, HostError> {
        let failed = |reason: String| HostError::new(format!("open the room {}", path.display()), reason);
        let namespace = File::open(path).map_err(|e| failed(describe_io(&e)))?;
        if !is_namespace(&namespace) {
            return Err(failed("no namespace is mounted there".to_owned()));
        }
        on_a_thread(|| {
            setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(|e| failed(e.to_string()))?;
            Netlink::new()
        })
        .map(|netlink| Self { namespace, netlink })
    }

    fn descriptor(&self) -> RawFd {
        self.namespace.as_raw_fd()
    }
}

/// Namespaces are a thread's: one of its own changes it, and ends.
fn on_a_thread<T: Send>(work: impl FnOnce() -> Result<T, HostError> + Send) -> Result<T, HostError> {
    let runtime = tokio::runtime::Handle::try_current()
        .map_err(|e| HostError::new("enter a network namespace", e.to_string()))?;
    std::thread::scope(|scope| {
        let work = || {
            let _entered = runtime.enter();
            work()
        };
        scope.spawn(work).join().unwrap_or_else(|_| {
            Err(HostError::new("enter a network namespace", "the thread that does it ended early"))
        })
    })
}
