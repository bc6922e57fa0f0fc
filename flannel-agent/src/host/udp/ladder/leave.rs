//! Off the host again.

use std::path::Path;

use crate::domain::host_state::Tunnel;
use crate::host::HostError;
use crate::host::netlink::Netlink;
use crate::host::udp::filters;
use crate::host::udp::gro_pair;
use crate::host::udp::programs::{ALONE, BRIDGE, ENCAP, LinkPin, PinFolder, Side};
use crate::host::udp::underlay;

/// Takes the kernel's part of the tunnel away, whoever put it there: links, then maps, then the pair. That nothing is
/// there is a success.
///
/// # Errors
/// What could not be removed; the rest was.
pub(in crate::host::udp) async fn tear_down(
    netlink: &Netlink,
    bpffs: &Path,
    tunnel: &Tunnel,
) -> Result<(), HostError> {
    let pins = PinFolder::new(bpffs, &tunnel.device);
    let mut result: Result<(), HostError> = Ok(());
    for bridge in netlink.bridges().await? {
        let left = filters::leave(BRIDGE, &bridge.name, (Side::Egress, LinkPin::Bridge, ALONE));
        result = result.and(left.map_err(HostError::from));
    }
    let encap = filters::leave(ENCAP, &tunnel.device, (Side::Egress, LinkPin::Encap, ALONE));
    for left in [encap, filters::leave_underlay(tunnel)] {
        result = result.and(left.map_err(HostError::from));
    }
    result.and(clear(netlink, &pins, &tunnel.device).await)
}

/// The part of [`tear_down`] that the pins and names tell: offloads of the underlay back, links, maps, the pair.
///
/// # Errors
/// What could not be removed; the rest was.
pub(in crate::host::udp) async fn clear(
    netlink: &Netlink,
    pins: &PinFolder,
    device: &str,
) -> Result<(), HostError> {
    underlay::restore(pins);
    let result = pins.remove_all().map_err(HostError::from);
    result.and(gro_pair::remove(netlink, device).await)
}
