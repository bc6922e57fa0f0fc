//! The tunnel of the udp backend with nothing in its programs but what its packets ask for (`flannel-ebpf/src/cost.rs`), made
//! by hand between two hosts: what it reaches is the limit of what any program at these hooks could.

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, EbpfLoader,
    programs::{LinkOrder, SchedClassifier, TcAttachType, Xdp, XdpMode, tc::TcAttachOptions},
};
use flannel_common::tunnel::Settings;

use crate::{
    reference::{UDP_OVERHEAD, attach_pods, subnet},
    topology::{Host, Lab, NETWORK},
};

const PORT: u16 = 8285;

/// Programs that carry packets until they are dropped.
pub struct Bare {
    _programs: Vec<Ebpf>,
}

/// Who decapsulates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Receiver {
    Xdp,
    /// tc, with a GRO pair.
    Tc,
}

/// Joins the lab's two hosts.
///
/// # Errors
/// `cargo xtask build-ebpf` did not run; what the kernel refuses: TCX needs Linux 6.6.
pub fn start(lab: &mut Lab, receiver: Receiver) -> Result<Bare> {
    let mtu = lab.underlay_mtu().saturating_sub(UDP_OVERHEAD);
    let mut programs = Vec::new();
    for index in [0, 1] {
        let (host, peer) = (lab.host(index), lab.host(1 - index));
        let netns = host.netns();
        netns.ip("tuntap add dev flannel0 mode tun")?;
        netns.ip(&format!("link set flannel0 mtu {mtu} up"))?;
        netns.ip(&format!("addr add {}/32 dev flannel0", subnet(index)))?;
        netns.ip(&format!("route add {NETWORK} dev flannel0"))?;
        netns.offload("eth0", "gro on")?;
        netns.offload("eth0", "tx-udp-segmentation off")?;
        if receiver == Receiver::Tc {
            netns.ip(&format!("link add flannel0p mtu {mtu} type veth peer name flannel0g mtu {mtu}"))?;
            netns.offload("flannel0p", "tso off gso off")?;
            netns.offload("flannel0g", "gro on")?;
            for device in ["flannel0p", "flannel0g"] {
                netns.ip(&format!("link set {device} up arp off"))?;
            }
        }
        let settings = Settings {
            local: u32::from_ne_bytes(host.address().octets()),
            network: u32::from_ne_bytes(peer.address().octets()),
            underlay: netns.ifindex("eth0")?,
            device: netns.ifindex("flannel0")?,
            gro_pair: if receiver == Receiver::Tc { netns.ifindex("flannel0p")? } else { 0 },
            port: PORT.to_be(),
            ..Settings::default()
        };
        programs.push(attach(host, &settings, receiver).with_context(|| format!("on {}", host.name()))?);
    }
    attach_pods(lab, UDP_OVERHEAD)?;
    Ok(Bare { _programs: programs })
}

fn attach(host: &Host, settings: &Settings, receiver: Receiver) -> Result<Ebpf> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bpf/flannel-cost.bpf.o");
    let object = std::fs::read(path).with_context(|| format!("read {path}"))?;
    host.netns().run(|| {
        let mut programs = EbpfLoader::new()
            .btf(None)
            .override_global("SETTINGS", settings, true)
            .load(&object)
            .with_context(|| format!("load {path}"))?;
        let mut hooks = vec![
            ("bare_ingress", "eth0", TcAttachType::Ingress),
            ("bare_encap", "flannel0", TcAttachType::Egress),
        ];
        if receiver == Receiver::Tc {
            hooks.insert(0, ("bare_gro", "flannel0g", TcAttachType::Ingress));
        }
        for (name, device, side) in hooks {
            let doing = || format!("attach {name} to {device}");
            let program: &mut SchedClassifier = programs.program_mut(name).with_context(doing)?.try_into()?;
            program.load().with_context(doing)?;
            let order = TcAttachOptions::TcxOrder(LinkOrder::first());
            program.attach_with_options(device, side, order).with_context(doing)?;
        }
        if receiver == Receiver::Xdp {
            let doing = "attach bare_xdp to eth0";
            let program: &mut Xdp = programs.program_mut("bare_xdp").context(doing)?.try_into()?;
            program.load().context(doing)?;
            program.attach("eth0", XdpMode::Driver).context(doing)?;
        }
        Ok(programs)
    })
}
