//! The GRO pair: two devices that merge decapsulated TCP where XDP can't be used.
//!
//! | where packets | pair | |
//! |---|---|---|
//! | have been split (network cards) | `<device>p`, `<device>g` | a veth pair |
//! | stay whole (nodes joined by veth) | `<device>d`, `<device>v` | the way through the [`room`] |
//!
//! tc runs after the kernel's GRO, which merges no datagrams of an unknown UDP port; without merging, the receiving
//! node forwards every segment by itself (0.6 × the rate, 1.8 × the CPU of plain routing). `flannel_ingress` sends
//! decapsulated TCP into `<device>p`; it comes out of `<device>g` through NAPI, merged, and `flannel_gro` hands it to
//! the tunnel device. No address, no ARP, no IPv6: nothing else ever uses the pair.
//!
//! veth merges only what comes from a sender *without* TSO (drivers/net/veth.c, `veth_skb_is_eligible_for_gro`), and
//! with GSO on the sender would not split a super-packet that has to be split once. Both are switched off and read
//! back; a pair that would merge nothing is refused.

mod room;

use std::fs;
use std::io;

use super::ethtool::{Ethtool, Feature, Switch};
use crate::host::HostError;
use crate::host::netlink::Netlink;

/// A pair that is up. What is sent into `sender` comes out of `receiver`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroPair {
    pub sender: End,
    pub receiver: End,
    /// It is the way through the room, and packets must be dressed for it.
    pub dressed: bool,
}

/// What a pair is for.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The tunnel device.
    pub device: &'a str,
    /// Its MTU.
    pub mtu: u32,
    /// Super-packets arrive whole ([`stays_whole`]).
    pub whole: bool,
}

/// Whether peers' super-packets cross this underlay whole: it is a veth that does not split its own. (An XDP program at
/// the other end makes it split, and so does whoever switches the offload off to have packets as on a wire.)
#[must_use]
pub fn stays_whole(underlay: &str, kind: Option<&str>) -> bool {
    kind == Some("veth")
        && Ethtool::open().is_ok_and(|ethtool| ethtool.is_on(underlay, Feature::Tso).unwrap_or(false))
}

/// One end of the pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    pub name: String,
    pub ifindex: u32,
}

/// What must be so, besides the links themselves.
fn offloads(names: &Names) -> [(&str, Feature, Switch); 3] {
    [
        (&names.sender, Feature::Tso, Switch::Off),
        (&names.sender, Feature::Gso, Switch::Off),
        (&names.receiver, Feature::Gro, Switch::On),
    ]
}

struct Names {
    sender: String,
    receiver: String,
}

/// Named after the tunnel device, so that each tunnel has its own.
fn names(device: &str) -> Names {
    Names { sender: format!("{device}p"), receiver: format!("{device}g") }
}

/// Makes the pair, or brings the one that is there into shape. Where the room can't be had, the veth pair has to do.
///
/// # Errors
/// A device of that name which is something else, no veth in this kernel, a name too long, missing CAP_NET_ADMIN.
pub async fn ensure(netlink: &Netlink, wanted: &Wanted<'_>) -> Result<GroPair, HostError> {
    if wanted.whole {
        match room::ensure(netlink, wanted.device, wanted.mtu).await {
            Ok(pair) => return Ok(pair),
            Err(e) => tracing::debug!("{e}; super-packets will be split and merged again"),
        }
    }
    ensure_veth(netlink, wanted.device, wanted.mtu).await
}

async fn ensure_veth(netlink: &Netlink, device: &str, mtu: u32) -> Result<GroPair, HostError> {
    if let Ok(pair) = find_veth(netlink, device, mtu).await {
        return Ok(pair);
    }
    let names = names(device);
    let mut present = 0;
    for name in [&names.sender, &names.receiver] {
        if let Some(link) = netlink.link(name).await? {
            if link.kind.as_deref() != Some("veth") {
                let kind = link.kind.unwrap_or_else(|| "network card".to_owned());
                return Err(HostError::new(
                    format!("make the GRO pair of {device}"),
                    format!("{name} exists and is a {kind}, not ours"),
                ));
            }
            present += 1;
        }
    }
    if present == 1 {
        // Ends come and go together, so this one belongs to another pair.
        netlink.delete_link(&names.sender).await?;
        netlink.delete_link(&names.receiver).await?;
        present = 0;
    }
    if present == 0 {
        netlink.create_veth(&names.sender, &names.receiver, mtu).await?;
    }
    let ethtool = Ethtool::open()?;
    for name in [&names.sender, &names.receiver] {
        disable_ipv6(name)?;
        netlink.set_no_arp(name).await?;
        netlink.set_mtu(name, mtu).await?;
    }
    for (name, feature, wanted) in offloads(&names) {
        ethtool.set(name, feature, wanted)?;
    }
    for name in [&names.sender, &names.receiver] {
        netlink.set_up(name).await?;
    }
    find_veth(netlink, device, mtu)
        .await
        .map_err(|reason| HostError::new(format!("make the GRO pair of {device}"), reason))
}

/// The pair, when it is there and in shape: the better one that there is.
///
/// # Errors
/// What is missing or wrong.
pub async fn find(netlink: &Netlink, wanted: &Wanted<'_>) -> Result<GroPair, String> {
    if !wanted.whole {
        return find_veth(netlink, wanted.device, wanted.mtu).await;
    }
    match room::find(netlink, wanted.device, wanted.mtu).await {
        Ok(pair) => Ok(pair),
        Err(why) => find_veth(netlink, wanted.device, wanted.mtu).await.map_err(|_| why),
    }
}

async fn find_veth(netlink: &Netlink, device: &str, mtu: u32) -> Result<GroPair, String> {
    let names = names(device);
    let mut ends = Vec::with_capacity(2);
    for name in [&names.sender, &names.receiver] {
        let link = netlink.link(name).await.map_err(|e| e.to_string())?;
        let link = link.ok_or_else(|| format!("{name} is missing"))?;
        if link.kind.as_deref() != Some("veth") {
            return Err(format!("{name} is not a veth"));
        }
        if !link.up {
            return Err(format!("{name} is down"));
        }
        if link.mtu != mtu {
            return Err(format!("{name} has mtu {}, not {mtu}", link.mtu));
        }
        ends.push(End { name: link.name, ifindex: link.index });
    }
    let ethtool = Ethtool::open().map_err(|e| e.to_string())?;
    for (name, feature, wanted) in offloads(&names) {
        let is_on = ethtool.is_on(name, feature).map_err(|e| e.to_string())?;
        if is_on != (wanted == Switch::On) {
            return Err(format!("{} of {name} is not {}", feature.name(), wanted.word()));
        }
    }
    match <[End; 2]>::try_from(ends) {
        Ok([sender, receiver]) => Ok(GroPair { sender, receiver, dressed: false }),
        Err(_) => Err("one end is missing".to_owned()),
    }
}

/// Whether an end of the pair is there, in whatever shape.
///
/// # Errors
/// The kernel does not answer.
pub async fn exists(netlink: &Netlink, device: &str) -> Result<bool, HostError> {
    Ok(veth_exists(netlink, device).await? || room::exists(netlink, device).await?)
}

async fn veth_exists(netlink: &Netlink, device: &str) -> Result<bool, HostError> {
    let names = names(device);
    for name in [names.sender, names.receiver] {
        if netlink.link(&name).await?.is_some_and(|link| link.kind.as_deref() == Some("veth")) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What there is of pairs, a line each.
///
/// # Errors
/// The kernel does not answer.
pub async fn remains(netlink: &Netlink, device: &str) -> Result<Vec<String>, HostError> {
    let mut lines = Vec::new();
    if veth_exists(netlink, device).await? {
        lines.push(format!("link device {device}p and {device}g type veth"));
    }
    lines.extend(room::remains(netlink, device).await?);
    Ok(lines)
}

/// The devices that have a room of this host, or what is left of one.
///
/// # Errors
/// The kernel does not tell in which namespace we are.
pub fn rooms() -> Result<Vec<String>, HostError> {
    room::devices()
}

/// Deletes the pairs that are not this one.
///
/// # Errors
/// Missing CAP_NET_ADMIN.
pub async fn remove_all_but(netlink: &Netlink, device: &str, pair: &GroPair) -> Result<(), HostError> {
    match pair.dressed {
        true => remove_veth(netlink, device).await,
        false => room::remove(netlink, device).await,
    }
}

/// Deletes the pairs; gone already is a success. Devices of these names of other kinds are left alone.
///
/// # Errors
/// Missing CAP_NET_ADMIN.
pub async fn remove(netlink: &Netlink, device: &str) -> Result<(), HostError> {
    let room = room::remove(netlink, device).await;
    remove_veth(netlink, device).await.and(room)
}

async fn remove_veth(netlink: &Netlink, device: &str) -> Result<(), HostError> {
    let names = names(device);
    for name in [names.sender, names.receiver] {
        if netlink.link(&name).await?.is_some_and(|link| link.kind.as_deref() == Some("veth")) {
            netlink.delete_link(&name).await?;
        }
    }
    Ok(())
}

/// Before the device is up, or it gets an address and sends router solicitations into the pair.
fn disable_ipv6(device: &str) -> Result<(), HostError> {
    let path = format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6");
    match fs::write(&path, "1") {
        // A kernel without IPv6 has nothing to switch off.
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(HostError::new(format!("write 1 to {path}"), super::errno::describe_io(&e))),
        Ok(()) => Ok(()),
    }
}
