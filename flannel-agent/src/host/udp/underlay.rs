//! What the tunnel asks of the interface that carries its datagrams.
//!
//! Settings of a network card are the operator's; the agent never changes one to make XDP fit. A *veth* underlay (the
//! node is a container) is the exception, because its defaults break or slow what works everywhere else:
//!
//! * `gro` is off on a veth, so decapsulating before GRO would gain nothing;
//! * inner UDP super-packets cross a veth whole, and a peer that decapsulates in tc can't split them any more (the
//!   stale tunnel state makes the kernel take the inner UDP header for the tunnel's), so `tx-udp-segmentation` goes off.
//!
//! Each change is noted beside the pins and undone when the tunnel is removed.

use super::ethtool::{Ethtool, Feature, Switch};
use super::programs::PinFolder;
use crate::host::HostError;

/// Kinds of software device on which native XDP is not even tried: the packets there come from, or through, another
/// device that would be the right place.
///
/// # Errors
/// Why XDP is skipped.
pub fn may_have_native_xdp(device: &str, kind: Option<&str>) -> Result<(), String> {
    match kind {
        None | Some("veth") => Ok(()),
        Some(kind) => {
            let article = if kind.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
            Err(format!("{device} is {article} {kind}, native XDP needs a network card or a veth"))
        }
    }
}

/// Brings the offloads of `device` to `wanted`, and undoes earlier changes that are no longer wanted.
///
/// # Errors
/// An offload that could not be switched; the others were.
pub fn tune(pins: &PinFolder, device: &str, wanted: &[(Feature, Switch)]) -> Result<(), HostError> {
    let ethtool = Ethtool::open()?;
    let mut result = Ok(());
    for (of, feature, to) in pins.changed() {
        if of != device || !wanted.contains(&(feature, to)) {
            undo(&ethtool, pins, &of, (feature, to));
        }
    }
    for (feature, to) in wanted {
        let outcome = match ethtool.is_on(device, *feature) {
            Ok(is_on) if is_on == (*to == Switch::On) => Ok(()),
            // The note first: a change without a note would never be undone.
            Ok(_) => pins
                .note_changed(device, *feature, *to)
                .map_err(HostError::from)
                .and_then(|()| ethtool.set(device, *feature, *to))
                .inspect_err(|_| pins.forget_changed(device, *feature, *to)),
            Err(e) => Err(e),
        };
        result = result.and(outcome);
    }
    result
}

/// Undoes every noted change. A device that is gone took its change with it.
pub fn restore(pins: &PinFolder) {
    let Ok(ethtool) = Ethtool::open() else { return };
    for (device, feature, to) in pins.changed() {
        undo(&ethtool, pins, &device, (feature, to));
    }
}

fn undo(ethtool: &Ethtool, pins: &PinFolder, device: &str, (feature, to): (Feature, Switch)) {
    if let Err(e) = ethtool.set(device, feature, to.opposite()) {
        tracing::debug!("undoing {} {} of {device}: {e}", feature.name(), to.word());
    }
    pins.forget_changed(device, feature, to);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xdp_is_skipped_on_stacked_devices_with_their_kind_as_the_reason() {
        assert_eq!(may_have_native_xdp("eth0", None), Ok(()));
        assert_eq!(may_have_native_xdp("eth0", Some("veth")), Ok(()));
        for kind in ["vlan", "macvlan", "bond", "team", "tun", "bridge"] {
            let reason = may_have_native_xdp("eth0", Some(kind)).unwrap_err();
            assert!(reason.starts_with(&format!("eth0 is a {kind}, ")), "{reason}");
        }
        assert!(may_have_native_xdp("eth0", Some("ipvlan")).unwrap_err().starts_with("eth0 is an ipvlan"));
    }
}
