//! What tunnels do while no agent runs: read from the pins, and from the settings that the attached programs carry in
//! them. Changes nothing.
//!
//! What only an agent knows is missing: its own counts (the user-space path's), how path MTUs were found out, and why
//! this tier was taken.

use std::net::Ipv4Addr;
use std::path::Path;

use aya::maps::{Array, Map, MapData, MapInfo};
use aya::programs::loaded_programs;
use flannel_common::tunnel::Settings;
use ipnet::{IpNet, Ipv4Net};
use serde::Serialize;

use super::gro_pair;
use super::ladder::Tier;
use super::maps::{OpenMaps, from_wire};
use super::programs::{self, ALONE, ENCAP, Hook, INGRESS, LinkPin, Order, PinFolder, Side, inspect};
use super::report::{Ledger, TunnelReport};
use crate::host::HostError;
use crate::host::netlink::{LinkInfo, Netlink, ROUTE_PROTOCOL, RouteEntry};

/// Of the data section with the programs' settings, and nothing but these.
const SETTINGS_MAP: &str = ".rodata";

/// One tunnel that carries packets by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct UnattendedTunnel {
    pub network: Ipv4Net,
    /// Our own.
    pub subnet: Ipv4Net,
    /// Our address on the underlay.
    pub address: Ipv4Addr,
    /// MTU of the tunnel's device, in bytes.
    pub mtu: u32,
    #[serde(flatten)]
    pub report: TunnelReport,
}

/// Every tunnel that is pinned below `bpffs`, or why it can't be told what it does.
///
/// # Errors
/// The kernel does not answer.
pub async fn find(
    netlink: &Netlink,
    bpffs: &Path,
) -> Result<Vec<Result<UnattendedTunnel, HostError>>, HostError> {
    let links = netlink.links().await?;
    let routes = netlink.routes(Some(ROUTE_PROTOCOL)).await?;
    let mut tunnels = Vec::new();
    for device in PinFolder::devices(bpffs) {
        let ground = Ground { pins: PinFolder::new(bpffs, &device), links: &links, routes: &routes };
        let has_pair = gro_pair::exists(netlink, &device).await?;
        let tunnel = ground.tunnel(&device).map(|mut tunnel| {
            if tunnel.report.tier == Tier::Tc && has_pair {
                tunnel.report.tier = Tier::TcGro;
            }
            tunnel
        });
        tunnels.push(tunnel);
    }
    Ok(tunnels)
}

/// What there is.
struct Ground<'a> {
    pins: PinFolder,
    links: &'a [LinkInfo],
    routes: &'a [RouteEntry],
}

impl Ground<'_> {
    fn tunnel(&self, device: &str) -> Result<UnattendedTunnel, HostError> {
        let failed = |reason: String| HostError::new(format!("read the tunnel on {device}"), reason);
        let link = self
            .links
            .iter()
            .find(|link| link.name == device)
            .ok_or_else(|| failed("there is no such device in this network namespace".to_owned()))?;
        let encap = self.attached(LinkPin::Encap).or_else(|| {
            let hook = Hook {
                device,
                ifindex: link.index,
                side: Side::Egress,
                order: Order::First,
                pin: LinkPin::Encap,
                handle: ALONE,
            };
            Some(Attached { program: programs::clsact_program(ENCAP, &hook)?, ifindex: link.index })
        });
        let encap =
            encap.ok_or_else(|| failed(format!("{ENCAP} is not attached to it: it carries nothing")))?;
        let settings = settings_of(encap.program).map_err(failed)?;
        let underlay = self.links.iter().find(|link| link.index == settings.underlay).ok_or_else(|| {
            failed(format!("its underlay, interface {}, is gone: it carries nothing", settings.underlay))
        })?;
        let (tier, reason) = self.tier(device, underlay).map_err(failed)?;
        let net = |address: u32, mask: u32| {
            Ipv4Net::with_netmask(from_wire(address), from_wire(mask))
                .map_err(|e| failed(format!("the settings of {ENCAP}: {e}")))
        };
        let subnet = net(settings.own_subnet, settings.subnet_mask)?;
        let maps = OpenMaps::pinned(&self.pins)?;
        let nodes = maps.entries()?;
        let peers = nodes.into_iter().filter_map(|(base, peer)| {
            Some((Ipv4Net::new(base, subnet.prefix_len()).ok()?, from_wire(peer.node)))
        });
        let ledger = Ledger { kernel: Some(&maps), user: None };
        let mut report = TunnelReport {
            device: device.to_owned(),
            underlay: underlay.name.clone(),
            tier,
            reason,
            counters: ledger.counters(),
            peers: ledger.peers(peers),
        };
        for peer in &mut report.peers {
            let to_it = |route: &&RouteEntry| {
                route.destination == IpNet::V4(peer.subnet) && route.ifindex == Some(link.index)
            };
            if let Some(mtu) = self.routes.iter().find(to_it).and_then(|route| route.mtu) {
                peer.path_mtu = Some(mtu);
                peer.path_mtu_reason = Some("the route to it says so".to_owned());
            }
        }
        Ok(UnattendedTunnel {
            network: net(settings.network, settings.network_mask)?,
            subnet,
            address: from_wire(settings.local),
            mtu: link.mtu,
            report,
        })
    }

    /// Who receives.
    fn tier(&self, device: &str, underlay: &LinkInfo) -> Result<(Tier, String), String> {
        if self.attached(LinkPin::Xdp).is_some_and(|at| at.ifindex == underlay.index) {
            return Ok((Tier::Xdp, "pinned and attached".to_owned()));
        }
        let hook = Hook {
            device: &underlay.name,
            ifindex: underlay.index,
            side: Side::Ingress,
            order: Order::First,
            pin: LinkPin::Ingress,
            handle: programs::handle_of(device),
        };
        let linked = self.attached(LinkPin::Ingress).is_some_and(|at| at.ifindex == underlay.index);
        if linked || programs::has_clsact(INGRESS, &hook) {
            return Ok((Tier::Tc, "attached".to_owned()));
        }
        Err(format!("neither XDP nor {INGRESS} is attached to {}: it receives nothing", underlay.name))
    }

    /// By a pinned link whose interface still exists.
    fn attached(&self, pin: LinkPin) -> Option<Attached> {
        let link = inspect::pinned_link(&self.pins.link(pin)).ok().flatten()?;
        (link.ifindex != 0).then_some(Attached { program: link.program, ifindex: link.ifindex })
    }
}

struct Attached {
    program: u32,
    ifindex: u32,
}

/// The settings that a loaded program was built with.
fn settings_of(program: u32) -> Result<Settings, String> {
    let failed =
        |reason: String| format!("the settings of program {program}: {reason}; it takes CAP_SYS_ADMIN");
    let info = loaded_programs()
        .flatten()
        .find(|info| info.id() == program)
        .ok_or_else(|| failed("no such program can be seen".to_owned()))?;
    let maps = info.map_ids().map_err(|e| failed(e.to_string()))?.unwrap_or_default();
    let wanted = |id: &u32| {
        MapInfo::from_id(*id).is_ok_and(|map| {
            map.name_as_str() == Some(SETTINGS_MAP) && map.value_size() as usize == size_of::<Settings>()
        })
    };
    let id = maps
        .into_iter()
        .find(wanted)
        .ok_or_else(|| format!("the settings of program {program} have another layout than this agent's"))?;
    let map = MapData::from_id(id)
        .and_then(Map::from_map_data)
        .and_then(Array::<_, Settings>::try_from)
        .map_err(|e| failed(e.to_string()))?;
    map.get(&0, 0).map_err(|e| failed(e.to_string()))
}
