//! From the node's bridge to a pod's port, without the bridge.
//!
//! A super-packet that crossed a veth underlay whole still carries the marks of the tunnel it came through, and no helper
//! takes them off. A bridge has no tunnel offloads, so transmitting on it splits every such packet in software and
//! computes each checksum; the pod's veth takes it whole. This program runs where the bridge would begin: the kernel has
//! routed the packet and written the pod's MAC address, only the port is still to be found.

use flannel_common::{
    header::{ETHERNET, Ethernet, Ipv4},
    pod::PodKey,
};

use crate::{
    maps::{pod_port, settings},
    packet::Skb,
};

/// Not a pod of ours, or nothing is known of it: the bridge decides.
const NEXT: i32 = aya_ebpf::bindings::TC_ACT_UNSPEC;

/// tc egress of the bridge.
#[inline(always)]
pub(crate) fn to_port(mut skb: Skb) -> i32 {
    if !skb.is_ipv4() {
        return NEXT;
    }
    let Some(inner) = skb.pull::<Ipv4>(ETHERNET) else { return NEXT };
    // Whoever claims a MAC address on the bridge gets what the bridge would give it for our own subnet, and nothing else.
    let settings = settings();
    if settings.peer_key(inner.destination()) != settings.own_subnet {
        return NEXT;
    }
    let Some(ethernet) = skb.read::<Ethernet>(0) else { return NEXT };
    match pod_port(PodKey::new(ethernet.destination)) {
        Some(port) => skb.send_through(port),
        None => NEXT,
    }
}
