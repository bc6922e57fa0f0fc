//! Everything agents have put on this host and left there on purpose, for traffic to flow on without them.
//!
//! Told by the same marks as in `host/linux.rs`, but without a configuration: routes by their protocol number, devices
//! by name and make, tunnels by their pins. In doubt a thing is not ours. The host's own settings (sysctls) and
//! subnet.env, which container runtimes read, are no leftovers.

use std::fmt;
use std::path::Path;

use super::HostError;
use super::netlink::{LinkInfo, Netlink, ROUTE_PROTOCOL};
use super::udp::remains::{self, TunnelRemains};
use crate::domain::host_state::{HostItem, Route};

/// One thing that can be taken away. In the order of removal: what leads packets somewhere goes before what they are
/// led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Leftover {
    Route(Route),
    Tunnel(TunnelRemains),
    Device {
        name: String,
        /// A process holds it open: an agent runs.
        in_use: bool,
    },
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Route(route) => HostItem::Route(route.clone()).fmt(f),
            Self::Tunnel(tunnel) => tunnel.fmt(f),
            Self::Device { name, .. } => write!(f, "link device {name} type tun"),
        }
    }
}

impl Leftover {
    /// The device of an agent that runs: what is removed under it, it puts back.
    #[must_use]
    pub fn in_use(&self) -> Option<&str> {
        match self {
            Self::Device { name, in_use: true } => Some(name),
            _ => None,
        }
    }

    /// Takes it away; that it is gone already is a success.
    ///
    /// # Errors
    /// What the kernel said.
    pub async fn remove(&self, netlink: &Netlink) -> Result<(), HostError> {
        match self {
            Self::Route(route) => netlink.remove_routes(&[route]).await.pop().unwrap_or(Ok(())),
            Self::Tunnel(tunnel) => tunnel.remove(netlink).await,
            Self::Device { name, .. } => netlink.delete_link(name).await,
        }
    }
}

/// What there is, in the order of removal. Changes nothing.
///
/// # Errors
/// The kernel does not answer.
pub async fn find(netlink: &Netlink, bpffs: &Path) -> Result<Vec<Leftover>, HostError> {
    let links = netlink.links().await?;
    let mut found = routes(netlink, &links).await?;
    found.extend(remains::find(netlink, bpffs, &links).await?.into_iter().map(Leftover::Tunnel));
    found.extend(
        links
            .iter()
            .filter(|link| remains::is_tunnel_device(link))
            .map(|link| Leftover::Device { name: link.name.clone(), in_use: link.carrier }),
    );
    Ok(found)
}

/// The routes of our protocol and shape.
///
/// # Errors
/// The kernel does not answer.
pub async fn routes(netlink: &Netlink, links: &[LinkInfo]) -> Result<Vec<Leftover>, HostError> {
    let routes = netlink.routes(Some(ROUTE_PROTOCOL)).await?;
    Ok(routes
        .into_iter()
        .filter(|route| route.unicast && route.plain && route.has_default_metric())
        .filter_map(|route| {
            let device = links.iter().find(|link| Some(link.index) == route.ifindex)?.name.as_str().into();
            Some(Leftover::Route(Route {
                destination: route.destination,
                via: route.via,
                device,
                onlink: route.onlink,
                source: route.source,
                mtu: route.mtu,
            }))
        })
        .collect())
}
