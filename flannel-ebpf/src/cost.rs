//! Programs that only measure, in an object of their own that no agent loads: what a packet costs in the shipped ones when
//! everything is warm, through `BPF_PROG_TEST_RUN`.
//!
//! A test run hands a program its own result again, so each of these leaves the packet as it found it. What the kernel's
//! helpers take by themselves is measured apart: it is the limit of what any code of ours could cost.
//!
//! The `bare` ones carry traffic between two hosts with nothing but what the tunnel's packets ask for: no peers, no check, no
//! TTL, no counters. What they reach under load is the limit of what any program at these hooks could.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod decap;
#[cfg(target_arch = "bpf")]
#[expect(dead_code, reason = "this object has a part of the programs only")]
mod encap;
#[cfg(target_arch = "bpf")]
#[expect(dead_code, reason = "as above")]
mod maps;
#[cfg(target_arch = "bpf")]
mod packet;

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::{
        bindings::{
            TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC,
            xdp_action::{XDP_DROP, XDP_PASS},
        },
        helpers::{bpf_xdp_adjust_head, bpf_xdp_adjust_meta},
        macros::{classifier, xdp},
        programs::{TcContext, XdpContext},
    };
    use flannel_common::{
        OVERHEAD,
        header::{
            Datagram, ETHERNET, ETHERTYPE_IPV4, Ethernet, Ipv4, Outer, PROTOCOL_TCP, Received, Tunnelled,
            outer,
        },
        tunnel::XDP_MARK,
    };

    use crate::{
        decap, encap,
        maps::{peer, settings},
        packet::{Frame, Skb},
    };

    /// The packet was not what the measurement takes it to be.
    const WRONG: i32 = -9;

    /// Through the tunnel and back: encapsulated, then decapsulated as if it came from the peer. Not in it: the Ethernet
    /// header that encapsulation adds and nothing takes off again, and the marks of a tunnel, which would stay.
    #[classifier]
    fn cost_tc(ctx: TcContext) -> i32 {
        let Some(start) = Skb::new(&ctx).read::<Received>(0).copied() else { return WRONG };
        let Some(inner) = Skb::new(&ctx).read::<Ipv4>(0).copied() else { return WRONG };
        if encap::send_with::<{ encap::REPEATABLE }>(Skb::new(&ctx)) != TC_ACT_REDIRECT {
            return WRONG;
        }
        // A test run takes the packet's first bytes for an Ethernet header: put one there, and the rest behind it.
        let mut skb = Skb::new(&ctx);
        let Some(outer) = skb.read::<Outer>(0).copied() else { return WRONG };
        let Some(received) = skb.write::<Received>(0) else { return WRONG };
        received.ethernet = Ethernet { ethertype: ETHERTYPE_IPV4.to_be_bytes(), ..Ethernet::default() };
        received.packet.outer = outer;
        (received.packet.outer.ip.source, received.packet.outer.ip.destination) =
            (outer.ip.destination, outer.ip.source);
        received.packet.inner =
            Ipv4 { source: inner.destination, destination: settings().own_subnet.to_ne_bytes(), ..inner };
        if decap::ingress(skb) != TC_ACT_REDIRECT {
            return WRONG;
        }
        restore(&ctx, &start)
    }

    /// The room made and cut off again, and nothing else.
    #[classifier]
    fn cost_tc_room(ctx: TcContext) -> i32 {
        let Some(start) = Skb::new(&ctx).read::<Received>(0).copied() else { return WRONG };
        let mut skb = Skb::new(&ctx);
        if skb.grow_plainly().is_err() || skb.shrink().is_err() {
            return WRONG;
        }
        restore(&ctx, &start)
    }

    /// Every helper of the two programs, and nothing else: what no code could do without.
    #[classifier]
    fn cost_tc_helpers(ctx: TcContext) -> i32 {
        let Some(start) = Skb::new(&ctx).read::<Received>(0).copied() else { return WRONG };
        let Some(inner) = Skb::new(&ctx).read::<Ipv4>(0).copied() else { return WRONG };
        let key = settings().peer_key(inner.destination());
        let Some(there) = peer(key) else { return WRONG };
        let mut skb = Skb::new(&ctx);
        let hash = skb.flow_hash();
        if skb.grow_plainly().is_err() || Skb::new(&ctx).send_from(there.ifindex) != TC_ACT_REDIRECT {
            return WRONG;
        }
        let Some(back) = peer(key) else { return WRONG };
        // So that the compiler can leave none of them out.
        let never = hash == 0 && back.index != there.index;
        if never || skb.shrink().is_err() || skb.receive_on(back.ifindex) != TC_ACT_REDIRECT {
            return WRONG;
        }
        restore(&ctx, &start)
    }

    /// What the measurement takes.
    #[classifier]
    fn cost_tc_nothing(ctx: TcContext) -> i32 {
        match Skb::new(&ctx).read::<Received>(0).copied() {
            Some(start) => restore(&ctx, &start),
            None => WRONG,
        }
    }

    #[inline(always)]
    fn restore(ctx: &TcContext, start: &Received) -> i32 {
        match Skb::new(ctx).write::<Received>(0) {
            Some(place) => {
                *place = *start;
                0
            }
            None => WRONG,
        }
    }

    /// Decapsulated by XDP, and the header back.
    #[xdp]
    fn cost_xdp(ctx: XdpContext) -> u32 {
        let Some(received) = Frame::new(&ctx).read::<Received>().copied() else { return 0 };
        if decap::xdp(Frame::new(&ctx)) != XDP_PASS {
            return 0;
        }
        restore_frame(&ctx, &received)
    }

    /// The helpers that takes, those that move the frame back, and nothing else.
    #[xdp]
    fn cost_xdp_helpers(ctx: XdpContext) -> u32 {
        let Some(received) = Frame::new(&ctx).read::<Received>().copied() else { return 0 };
        let there = peer(settings().peer_key(received.packet.inner.source()));
        let mut frame = Frame::new(&ctx);
        if there.is_none() || !frame.cut(OVERHEAD) || !frame.mark(1) {
            return 0;
        }
        restore_frame(&ctx, &received)
    }

    /// Moved and moved back, twice two helpers, and nothing else.
    #[xdp]
    fn cost_xdp_room(ctx: XdpContext) -> u32 {
        let Some(received) = Frame::new(&ctx).read::<Received>().copied() else { return 0 };
        let mut frame = Frame::new(&ctx);
        if !frame.cut(OVERHEAD) || !frame.mark(1) {
            return 0;
        }
        restore_frame(&ctx, &received)
    }

    /// What the measurement takes, without the two helpers that move the frame back.
    #[xdp]
    fn cost_xdp_nothing(ctx: XdpContext) -> u32 {
        let Some(received) = Frame::new(&ctx).read::<Received>().copied() else { return 0 };
        put_back(&ctx, &received)
    }

    #[inline(always)]
    fn restore_frame(ctx: &XdpContext, received: &Received) -> u32 {
        // SAFETY: the helpers check everything themselves.
        let moved = unsafe {
            bpf_xdp_adjust_meta(ctx.ctx, size_of::<u32>() as i32)
                | bpf_xdp_adjust_head(ctx.ctx, -(OVERHEAD as i32))
        };
        if moved == 0 { put_back(ctx, received) } else { 0 }
    }

    #[inline(always)]
    fn put_back(ctx: &XdpContext, received: &Received) -> u32 {
        match Frame::new(ctx).write::<Received>() {
            Some(place) => {
                *place = *received;
                XDP_PASS
            }
            None => 0,
        }
    }

    /// tc egress of the tunnel device. `network` is the other node's address: there is but one.
    #[classifier]
    fn bare_encap(ctx: TcContext) -> i32 {
        let mut skb = Skb::new(&ctx);
        let settings = settings();
        let datagram =
            Datagram { node: settings.network, length: skb.len(), tos: 0, id: 0, hash: skb.flow_hash() };
        if skb.grow().is_err() {
            return TC_ACT_SHOT;
        }
        match skb.write::<Outer>(0) {
            Some(place) => *place = outer(settings, &datagram),
            None => return TC_ACT_SHOT,
        }
        if skb.add_ethernet().is_err() {
            return TC_ACT_SHOT;
        }
        match skb.write::<Ethernet>(0) {
            Some(ethernet) => ethernet.ethertype = ETHERTYPE_IPV4.to_be_bytes(),
            None => return TC_ACT_SHOT,
        }
        skb.send_from(settings.underlay)
    }

    /// XDP of the underlay.
    #[xdp]
    fn bare_xdp(ctx: XdpContext) -> u32 {
        let mut frame = Frame::new(&ctx);
        let Some(Received { ethernet, packet }) = frame.read::<Received>() else { return XDP_PASS };
        if !ethernet.is_ipv4() || !packet.outer.is_ours(settings()) {
            return XDP_PASS;
        }
        let ethernet = ethernet.to_words();
        if !frame.cut(OVERHEAD) || !frame.mark(XDP_MARK) {
            return XDP_DROP;
        }
        match frame.write::<Ethernet>() {
            Some(place) => place.set_words(ethernet),
            None => return XDP_DROP,
        }
        XDP_PASS
    }

    /// tc ingress of the underlay: behind [`bare_xdp`], or without it.
    #[classifier]
    fn bare_ingress(ctx: TcContext) -> i32 {
        let mut skb = Skb::new(&ctx);
        let settings = settings();
        if skb.metadata() == Some(XDP_MARK) {
            return skb.receive_on(settings.device);
        }
        let Some(packet) = skb.pull::<Tunnelled>(ETHERNET) else { return TC_ACT_UNSPEC };
        if !packet.outer.is_ours(settings) {
            return TC_ACT_UNSPEC;
        }
        let is_tcp = packet.inner.protocol == PROTOCOL_TCP;
        if skb.shrink().is_err() {
            return TC_ACT_SHOT;
        }
        if is_tcp { skb.send_through(settings.gro_pair) } else { skb.receive_on(settings.device) }
    }

    /// tc ingress of the GRO pair's receiving end.
    #[classifier]
    fn bare_gro(ctx: TcContext) -> i32 {
        decap::merged(Skb::new(&ctx))
    }

    const _: () = assert!(ETHERNET + OVERHEAD as usize + 20 == size_of::<Received>());

    /// Never called: `xtask build-ebpf` refuses an object that could panic.
    #[panic_handler]
    fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
        loop {}
    }

    /// No helper used here is reserved for GPL programs.
    #[unsafe(link_section = "license")]
    #[unsafe(no_mangle)]
    static LICENSE: [u8; 11] = *b"Apache-2.0\0";
}
