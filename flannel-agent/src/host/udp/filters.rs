//! Our filters on clsact (kernels before 6.6) where no pin says that they are there: they outlive the agent, and stay on
//! a device that the tunnel has left.

use super::errno::Refusal;
use super::programs::{self, ALONE, ENCAP, Hook, INGRESS, LinkPin, Order, Side};
use crate::domain::host_state::Tunnel;

/// Whether an earlier agent's filter makes packets leave by the tunnel.
pub(super) fn carry(tunnel: &Tunnel) -> bool {
    let device = tunnel.device.as_str();
    nix::net::if_::if_nametoindex(device).is_ok_and(|ifindex| {
        let hook = Hook {
            device,
            ifindex,
            side: Side::Egress,
            order: Order::First,
            pin: LinkPin::Encap,
            handle: ALONE,
        };
        programs::has_clsact(ENCAP, &hook)
    })
}

/// Takes our filters of that name off every device.
///
/// # Errors
/// Missing permission.
pub(super) fn sweep(name: &'static str, side: Side, pin: LinkPin) -> Result<(), Refusal> {
    let devices = nix::net::if_::if_nameindex()
        .map_err(|e| Refusal::from_io(format!("look for {name} on all devices"), &e.into()))?;
    for device in devices.iter().filter_map(|device| device.name().to_str().ok()) {
        leave(name, device, (side, pin, ALONE))?;
    }
    Ok(())
}

/// Takes what is not a link, and so did not move along, off the former underlay.
///
/// # Errors
/// Missing permission.
pub(super) fn leave_underlay(tunnel: &Tunnel) -> Result<(), Refusal> {
    let handle = programs::handle_of(&tunnel.device);
    leave(INGRESS, &tunnel.underlay, (Side::Ingress, LinkPin::Ingress, handle))
}

/// Takes our filter of that name off a device. One that is gone took its filters with it.
///
/// # Errors
/// Missing permission.
pub(super) fn leave(
    name: &'static str,
    device: &str,
    (side, pin, handle): (Side, LinkPin, u32),
) -> Result<(), Refusal> {
    match nix::net::if_::if_nametoindex(device) {
        Ok(ifindex) => {
            programs::detach_clsact(name, &Hook { device, ifindex, side, order: Order::First, pin, handle })
        }
        Err(_) => Ok(()),
    }
}
