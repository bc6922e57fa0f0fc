//! From the underlay to the tunnel device: in XDP before GRO where the driver lets us, in
//! tc where not. The two may be changed under traffic: tc takes marked and unmarked packets.

use aya_ebpf::bindings::{
    TC_ACT_SHOT, TC_ACT_UNSPEC,
    xdp_action::{XDP_DROP, XDP_PASS},
};
use flannel_common::{
    OVERHEAD,
    counter::Counter,
    header::{
        Delivered, Delivery, ETHERNET, Ethernet, Ipv4, PROTOCOL_TCP, Received, Tunnelled, Verdict,
        decapsulate, dress,
    },
    tunnel::{DRESSED, Settings, XDP_MARK, XDP_PROBE, XDP_PROBE_MARK},
};

use crate::{
    maps::{Traffic, count, count_dropped, count_received, is_there, peer, settings},
    packet::{Frame, Skb},
};

/// Not ours: the next program decides (`TCX_NEXT`; under clsact the next filter).
const NEXT: i32 = TC_ACT_UNSPEC;

/// tc ingress of the underlay.
#[inline(always)]
pub(crate) fn ingress(mut skb: Skb) -> i32 {
    if !skb.is_ipv4() {
        return NEXT;
    }
    let settings = settings();
    match skb.metadata() {
        // Another XDP program may write metadata too: the mark alone proves nothing.
        Some(XDP_MARK) if is_for_the_network(&mut skb, settings) => {
            count(Counter::MarkSeen, skb.traffic(skb.len().wrapping_sub(ETHERNET as u32)));
            return skb.receive_on(settings.device);
        }
        Some(XDP_PROBE_MARK) => {
            count(Counter::MarkSeen, skb.traffic(skb.len().wrapping_sub(ETHERNET as u32 + OVERHEAD)));
        }
        _ => {}
    }
    decapsulate_here(skb, settings)
}

#[inline(always)]
fn is_for_the_network(skb: &mut Skb, settings: &Settings) -> bool {
    match skb.pull::<Ipv4>(ETHERNET) {
        Some(inner) => settings.is_in_network(inner.destination()),
        None => false,
    }
}

/// Decapsulation in tc.
#[inline(always)]
fn decapsulate_here(mut skb: Skb, settings: &Settings) -> i32 {
    let Some(packet) = skb.pull::<Tunnelled>(ETHERNET) else {
        return NEXT;
    };
    let verdict = decapsulate(settings, packet, peer);
    let protocol = packet.inner.protocol;
    let (length, port) = (packet.inner.total_length(), packet.outer.udp.source);
    let traffic = skb.traffic(skb.len().wrapping_sub(ETHERNET as u32 + OVERHEAD));
    let delivery = match verdict {
        Verdict::NotOurs => return NEXT,
        Verdict::HandOn(reason) => {
            count(reason, traffic);
            return NEXT;
        }
        Verdict::Drop(reason, claimed) => {
            count_dropped(reason, claimed, traffic);
            return TC_ACT_SHOT;
        }
        Verdict::Deliver(delivery) => delivery,
    };
    match skb.write::<Tunnelled>(ETHERNET) {
        Some(packet) => delivery.rewrite.apply(&mut packet.inner),
        None => return NEXT,
    }
    // The kernel's own receiver takes tunnel and marks off, where there is one for TCP; a missing one is done without.
    if settings.flags & DRESSED != 0
        && protocol == PROTOCOL_TCP
        && is_there(settings.gro_pair)
        && let Some(ethernet) = skb.read::<Ethernet>(0)
        && let Some(dress) = dress(length, port, *ethernet)
    {
        if skb.put_on(&dress).is_err() {
            count_dropped(Counter::DecapFailed, delivery.claimed, traffic);
            return TC_ACT_SHOT;
        }
        count_delivery(Counter::DecapTc, &delivery, traffic);
        return skb.send_through(settings.gro_pair);
    }
    if skb.shrink().is_err() {
        count_dropped(Counter::DecapFailed, delivery.claimed, traffic);
        return TC_ACT_SHOT;
    }
    count_delivery(Counter::DecapTc, &delivery, traffic);
    // All TCP the same way, or segments of one flow would overtake each other. Super-packets that crossed a veth
    // whole go that way too: the pair splits them and forgets the tunnel.
    if settings.gro_pair != 0 && settings.flags & DRESSED == 0 && (protocol == PROTOCOL_TCP || skb.is_gso()) {
        skb.send_through(settings.gro_pair)
    } else {
        skb.receive_on(settings.device)
    }
}

/// Native XDP of the underlay. What it does not decapsulate it leaves whole, and uncounted, to tc.
#[inline(always)]
pub(crate) fn xdp(mut frame: Frame) -> u32 {
    let Some(Received { ethernet, packet }) = frame.read::<Received>() else {
        return XDP_PASS;
    };
    if !ethernet.is_ipv4() {
        return XDP_PASS;
    }
    let settings = settings();
    let probing = settings.flags & XDP_PROBE != 0;
    let verdict = decapsulate(settings, packet, peer);
    let traffic = Traffic { packets: 1, bytes: u32::from(packet.inner.total_length()) };
    let delivery = match verdict {
        Verdict::NotOurs | Verdict::HandOn(_) => return XDP_PASS,
        Verdict::Drop(..) if probing => return XDP_PASS,
        Verdict::Drop(reason, claimed) => {
            count_dropped(reason, claimed, traffic);
            return XDP_DROP;
        }
        // tc would not believe the mark.
        Verdict::Deliver(_) if !settings.is_in_network(packet.inner.destination()) => return XDP_PASS,
        Verdict::Deliver(delivery) => delivery,
    };
    if probing {
        count(if frame.mark(XDP_PROBE_MARK) { Counter::MarkSent } else { Counter::NoMetadata }, traffic);
        return XDP_PASS;
    }
    match strip(&mut frame, &delivery) {
        Stripped::Marked => {
            count_delivery(Counter::DecapXdp, &delivery, traffic);
            XDP_PASS
        }
        Stripped::Untouched => {
            count(Counter::NoMetadata, traffic);
            XDP_PASS
        }
        Stripped::Broken => {
            count_dropped(Counter::DecapFailed, delivery.claimed, traffic);
            XDP_DROP
        }
    }
}

/// What has become of a frame.
enum Stripped {
    Marked,
    /// The driver keeps no metadata.
    Untouched,
    Broken,
}

/// Moves the Ethernet header over the outer one, and puts the mark in front.
///
/// The mark comes last: one that is there already is moved along by the kernel, and a `memmove` over so short a way takes
/// longer than the rest of the program (2 % of the CPU time of a TCP stream). Metadata of another program has to be moved;
/// it would be moved over the header that is cut off, so there the mark comes first, while nothing is lost if it is refused.
#[inline(always)]
fn strip(frame: &mut Frame, delivery: &Delivery) -> Stripped {
    let Some(ethernet) = frame.read::<Ethernet>().map(Ethernet::to_words) else { return Stripped::Broken };
    if frame.has_metadata() {
        if !frame.mark(XDP_MARK) {
            return Stripped::Untouched;
        }
        if !frame.cut(OVERHEAD) {
            return Stripped::Broken;
        }
    } else {
        if !frame.cut(OVERHEAD) {
            return Stripped::Broken;
        }
        if !frame.mark(XDP_MARK) {
            return if frame.uncut(OVERHEAD) { Stripped::Untouched } else { Stripped::Broken };
        }
    }
    let Some(delivered) = frame.write::<Delivered>() else { return Stripped::Broken };
    delivery.rewrite.apply(&mut delivered.inner);
    delivered.ethernet.set_words(ethernet);
    Stripped::Marked
}

#[inline(always)]
fn count_delivery(counter: Counter, delivery: &Delivery, traffic: Traffic) {
    count(counter, traffic);
    if let Some(reason) = delivery.observed {
        count_dropped(reason, delivery.claimed, traffic);
    }
    count_received(delivery.peer, traffic);
}

/// tc ingress of `flannel0g` or `flannel0v`: what comes through the pair or the receiver is ours, but for the IPv6 chatter
/// of an interface that is up.
#[inline(always)]
pub(crate) fn merged(skb: Skb) -> i32 {
    if skb.is_ipv4() { skb.receive_on(settings().device) } else { NEXT }
}
