//! The tc and XDP programs of the udp backend: this list, and nothing else. What they do is in `encap.rs` and
//! `decap.rs`, every decision about bytes in `flannel_common::header`, every pointer in `packet.rs`.
//!
//! On a host this is an empty program, so that plain `cargo build`, `test` and `clippy` of the workspace need no BPF
//! tools; `cargo xtask build-ebpf` makes the object.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod decap;
#[cfg(target_arch = "bpf")]
mod encap;
#[cfg(target_arch = "bpf")]
mod maps;
#[cfg(target_arch = "bpf")]
mod packet;
#[cfg(target_arch = "bpf")]
mod shortcut;

#[cfg(not(target_arch = "bpf"))]
fn main() {}

#[cfg(target_arch = "bpf")]
mod programs {
    use aya_ebpf::{
        bindings::xdp_action::XDP_PASS,
        macros::{classifier, xdp},
        programs::{TcContext, XdpContext},
    };

    use crate::{
        decap, encap,
        packet::{Frame, Skb},
        shortcut,
    };

    /// tc egress of the tunnel device: puts inner packets into datagrams and sends them to the peer.
    #[classifier]
    fn flannel_encap(ctx: TcContext) -> i32 {
        encap::send(Skb::new(&ctx))
    }

    /// tc ingress of the underlay: delivers what XDP decapsulated, decapsulates what XDP did not see.
    #[classifier]
    fn flannel_ingress(ctx: TcContext) -> i32 {
        decap::ingress(Skb::new(&ctx))
    }

    /// tc ingress of the GRO pair's receiving end: hands merged packets to the tunnel device.
    #[classifier]
    fn flannel_gro(ctx: TcContext) -> i32 {
        decap::merged(Skb::new(&ctx))
    }

    /// tc egress of the pods' bridge: hands packets to the port of the pod they are for.
    #[classifier]
    fn flannel_bridge(ctx: TcContext) -> i32 {
        shortcut::to_port(Skb::new(&ctx))
    }

    /// Native XDP of the underlay: decapsulates before GRO, so that the kernel merges the inner TCP.
    #[xdp]
    fn flannel_decap_xdp(ctx: XdpContext) -> u32 {
        decap::xdp(Frame::new(&ctx))
    }

    /// The same for interfaces whose frames do not fit one page (Linux 5.18).
    #[xdp(frags)]
    fn flannel_decap_xdp_frags(ctx: XdpContext) -> u32 {
        decap::xdp(Frame::new(&ctx))
    }

    /// Does nothing. On Linux 5.10 a veth merges (NAPI GRO) only while an XDP program is attached to it.
    #[xdp]
    fn flannel_pass(_ctx: XdpContext) -> u32 {
        XDP_PASS
    }

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
