//! From the tunnel device to the peer. Runs after netfilter, on whole GSO packets.

use aya_ebpf::bindings::{TC_ACT_OK, TC_ACT_SHOT};
use flannel_common::{
    counter::Counter,
    header::{Datagram, ETHERTYPE_IPV4, Ethernet, Ipv4, Outer, hop, outer},
    tunnel::Settings,
};

use crate::{
    maps::{Sent, count, count_dropped, peer, settings},
    packet::{NoRoom, Skb},
};

/// Sends the packet to the node that leases its destination. What the map does not know goes on to the device's
/// reader, which answers it as flanneld does.
#[inline(always)]
pub(crate) fn send(skb: Skb) -> i32 {
    send_with::<AS_SENT>(skb)
}

/// Encapsulation as it is.
pub(crate) const AS_SENT: bool = false;
/// Without what can't be done again and again to one packet: the Ethernet header, the marks. For measuring.
pub(crate) const REPEATABLE: bool = true;

#[inline(always)]
pub(crate) fn send_with<const MANNER: bool>(mut skb: Skb) -> i32 {
    if !skb.is_ipv4() {
        return TC_ACT_OK;
    }
    let settings = settings();
    let traffic = skb.traffic(skb.len());
    let Some(inner) = skb.pull::<Ipv4>(0) else {
        return TC_ACT_OK;
    };
    let inner = *inner;
    let Some(peer) = peer(settings.peer_key(inner.destination())) else {
        count(Counter::NoPeer, traffic);
        return TC_ACT_OK;
    };
    // The agent gives no index that can't be.
    let Some(sent) = Sent::to(peer.index) else { return TC_ACT_OK };
    match encapsulate::<MANNER>(&mut skb, settings, &inner, (peer.node, sent.next_id())) {
        Ok(()) => {
            count(Counter::Encapsulated, traffic);
            sent.count(traffic);
            skb.send_from(peer.ifindex)
        }
        Err(reason) => {
            count_dropped(reason, peer.index, traffic);
            TC_ACT_SHOT
        }
    }
}

/// Everything that changes bytes, towards a node and under an identification. An error is the reason to drop the packet.
#[inline(always)]
fn encapsulate<const MANNER: bool>(
    skb: &mut Skb,
    settings: &Settings,
    inner: &Ipv4,
    (node, id): (u32, u16),
) -> Result<(), Counter> {
    let rewrite = hop(inner, 0)?;
    // Length and hash must be those of the inner packet: both change with the outer header in front.
    let datagram = Datagram { node, length: skb.len(), tos: inner.tos, id, hash: skb.flow_hash() };
    rewrite.apply(skb.write::<Ipv4>(0).ok_or(Counter::EncapFailed)?);
    match MANNER {
        REPEATABLE => skb.grow_plainly().map_err(|_| Counter::EncapFailed)?,
        AS_SENT => make_room(skb)?,
    }
    *skb.write::<Outer>(0).ok_or(Counter::EncapFailed)? = outer(settings, &datagram);
    if MANNER == REPEATABLE {
        return Ok(());
    }
    skb.add_ethernet().map_err(|_| Counter::EncapFailed)?;
    skb.write::<Ethernet>(0).ok_or(Counter::EncapFailed)?.ethertype = ETHERTYPE_IPV4.to_be_bytes();
    Ok(())
}

/// A packet that came through the tunnel and leaves through it again (a NodePort hairpin) may still be marked as
/// encapsulated. A single packet can do without the marks; a GSO packet could not be split behind two of them.
#[inline(always)]
fn make_room(skb: &mut Skb) -> Result<(), Counter> {
    match skb.grow() {
        Ok(()) => Ok(()),
        Err(NoRoom::AlreadyEncapsulated) if skb.is_gso() => Err(Counter::EncapStaleGso),
        Err(NoRoom::AlreadyEncapsulated) => {
            skb.grow_plainly().map_err(|_| Counter::EncapFailed)?;
            count(Counter::EncapRetried, skb.traffic(skb.len()));
            Ok(())
        }
        Err(NoRoom::Other) => Err(Counter::EncapFailed),
    }
}
