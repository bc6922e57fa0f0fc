//! What agents left of a tunnel, found without knowing how it was configured: by the pins, by the names of our programs
//! and by the names of the devices.
//!
//! A tunnel that runs is none of this module's business; whoever removes remains makes sure first that nobody uses them.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use super::programs::{
    self, ALONE, BRIDGE, ENCAP, GRO, Hook, INGRESS, LinkPin, Order, PinFolder, Side, inspect,
};
use super::{gro_pair, ladder};
use crate::host::HostError;
use crate::host::netlink::{LinkInfo, Netlink};

/// What is left of the tunnel on one device; the device itself is another thing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TunnelRemains {
    pub device: String,
    bpffs: PathBuf,
    parts: Vec<String>,
    filters: Vec<Filter>,
}

/// A classifier of ours on a clsact qdisc (kernels before 6.6).
#[derive(Clone, Debug, PartialEq, Eq)]
struct Filter {
    program: &'static str,
    device: String,
    ifindex: u32,
    side: Side,
    handle: u32,
}

impl Filter {
    fn hook(&self) -> Hook<'_> {
        let pin = if self.program == ENCAP { LinkPin::Encap } else { LinkPin::Ingress };
        let Self { device, ifindex, side, handle, .. } = self;
        Hook { device, ifindex: *ifindex, side: *side, order: Order::First, pin, handle: *handle }
    }
}

impl fmt::Display for Filter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tc filter {} on {} {}", self.program, self.device, self.side.word())
    }
}

/// One part per line, no newline at the end.
impl fmt::Display for TunnelRemains {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.parts.join("\n"))
    }
}

/// Everything left of tunnels in this network namespace and below `bpffs`. `links` are the devices there are.
///
/// # Errors
/// A pin that may not be read.
pub async fn find(
    netlink: &Netlink,
    bpffs: &Path,
    links: &[LinkInfo],
) -> Result<Vec<TunnelRemains>, HostError> {
    let mut devices: BTreeSet<String> = PinFolder::devices(bpffs).into_iter().collect();
    devices.extend(links.iter().filter(|link| is_tunnel_device(link)).map(|link| link.name.clone()));
    devices.extend(links.iter().filter_map(|link| pair_of(link, links)));
    devices.extend(gro_pair::rooms()?.into_iter().filter(|name| is_tunnel_name(name)));
    // Filters on an underlay bear no tunnel's name: they go with the first.
    let mut filters = find_filters(links);
    let mut all = Vec::new();
    for device in devices {
        let pins = PinFolder::new(bpffs, &device);
        let mut parts = Vec::new();
        let (pinned_links, pinned_maps) = pins.pins();
        for pin in pinned_links {
            parts.push(format!("link {}{}", pin.display(), attachment(&pin, links)));
        }
        parts.extend(filters.iter().map(ToString::to_string));
        parts.extend(pins.changed().iter().map(|(of, feature, to)| {
            format!("offload {} of {of}: back to {}", feature.name(), to.opposite().word())
        }));
        parts.extend(pinned_maps.iter().map(|pin| format!("map {}", pin.display())));
        parts.extend(gro_pair::remains(netlink, &device).await?);
        if !parts.is_empty() || pins.exists() {
            if parts.is_empty() {
                parts.push(format!("folder of pins for {device}"));
            }
            let filters = std::mem::take(&mut filters);
            all.push(TunnelRemains { device, bpffs: bpffs.to_owned(), parts, filters });
        }
    }
    if !filters.is_empty() {
        let parts = filters.iter().map(ToString::to_string).collect();
        all.push(TunnelRemains { device: "flannel0".to_owned(), bpffs: bpffs.to_owned(), parts, filters });
    }
    Ok(all)
}

impl TunnelRemains {
    /// Takes it all away: what carries packets first. What is gone by then is a success.
    ///
    /// # Errors
    /// The first thing that could not be removed; the rest was.
    pub async fn remove(&self, netlink: &Netlink) -> Result<(), HostError> {
        let mut result = Ok(());
        for filter in &self.filters {
            let detached = programs::detach_clsact(filter.program, &filter.hook());
            result = result.and(detached.map_err(HostError::from));
        }
        result.and(ladder::clear(netlink, &PinFolder::new(&self.bpffs, &self.device), &self.device).await)
    }
}

/// A TUN made as the agent makes it, under a name it gives: `flannel` and a number.
#[must_use]
pub fn is_tunnel_device(link: &LinkInfo) -> bool {
    let as_made = link.tun.is_some_and(|tun| tun.persistent && tun.multi_queue && tun.vnet_header);
    as_made && is_tunnel_name(&link.name)
}

fn is_tunnel_name(name: &str) -> bool {
    name.strip_prefix("flannel").is_some_and(|number| {
        !number.is_empty() && number.len() <= 4 && number.bytes().all(|byte| byte.is_ascii_digit())
    })
}

/// The tunnel device whose GRO pair's sending end this is; both ends must be there.
fn pair_of(link: &LinkInfo, links: &[LinkInfo]) -> Option<String> {
    let is = |link: &LinkInfo, kind: &str| link.kind.as_deref() == Some(kind);
    [('p', 'g', "veth"), ('d', 'v', "vxlan")].into_iter().find_map(|(sender, receiver, kind)| {
        let device = link.name.strip_suffix(sender).filter(|name| is_tunnel_name(name))?;
        let other = format!("{device}{receiver}");
        let paired = is(link, "veth") && links.iter().any(|link| link.name == other && is(link, kind));
        paired.then(|| device.to_owned())
    })
}

/// Our filters, on whatever device. A qdisc that can't be asked holds none of ours.
fn find_filters(links: &[LinkInfo]) -> Vec<Filter> {
    let ours =
        [(ENCAP, Side::Egress), (INGRESS, Side::Ingress), (GRO, Side::Ingress), (BRIDGE, Side::Egress)];
    let mut filters = Vec::new();
    for link in links {
        for (program, side) in ours {
            let (device, ifindex) = (link.name.clone(), link.index);
            let any = Filter { program, device, ifindex, side, handle: ALONE };
            let handles = programs::clsact_handles(program, &any.hook());
            filters.extend(handles.into_iter().map(|handle| Filter { handle, ..any.clone() }));
        }
    }
    filters
}

/// ", program 12 on eth0", or why it is on nothing.
fn attachment(pin: &Path, links: &[LinkInfo]) -> String {
    match inspect::pinned_link(pin) {
        Ok(Some(link)) => match links.iter().find(|device| device.index == link.ifindex) {
            Some(device) => format!(", program {} on {}", link.program, device.name),
            None => format!(", program {}, on no device of this network namespace", link.program),
        },
        Ok(None) => String::new(),
        Err(e) => format!(", which can't be read: {e}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::netlink::TunInfo;

    fn link(name: &str, kind: &str, tun: Option<TunInfo>) -> LinkInfo {
        LinkInfo {
            name: name.to_owned(),
            index: 7,
            mtu: 1472,
            up: true,
            carrier: false,
            kind: Some(kind.to_owned()),
            tun,
            xdp: None,
        }
    }

    #[test]
    fn a_tunnel_device_is_told_by_its_name_and_how_it_was_made() {
        let made = TunInfo { persistent: true, multi_queue: true, vnet_header: true };
        let flanneld = TunInfo { persistent: false, multi_queue: false, vnet_header: false };
        for (name, kind, tun, ours) in [
            ("flannel0", "tun", Some(made), true),
            ("flannel17", "tun", Some(made), true),
            ("flannel0", "tun", Some(flanneld), false),
            ("flannel.1", "vxlan", None, false),
            ("flannel", "tun", Some(made), false),
            ("flannel0x", "tun", Some(made), false),
            ("tun0", "tun", Some(made), false),
        ] {
            assert_eq!(is_tunnel_device(&link(name, kind, tun)), ours, "{name} {kind} {tun:?}");
        }
    }

    #[test]
    fn a_gro_pair_is_two_veth_ends_named_after_a_tunnel() {
        let pair = [link("flannel0p", "veth", None), link("flannel0g", "veth", None)];
        assert_eq!(pair_of(&pair[0], &pair), Some("flannel0".to_owned()));
        assert_eq!(pair_of(&pair[1], &pair), None);
        assert_eq!(pair_of(&pair[0], &pair[..1]), None);
        let room = [link("flannel0d", "veth", None), link("flannel0v", "vxlan", None)];
        assert_eq!(pair_of(&room[0], &room), Some("flannel0".to_owned()));
        assert_eq!(pair_of(&room[1], &room), None);
        assert_eq!(pair_of(&room[0], &room[..1]), None);
        let foreign = [link("flannel0p", "bridge", None), link("flannel0g", "veth", None)];
        assert_eq!(pair_of(&foreign[0], &foreign), None);
    }
}
