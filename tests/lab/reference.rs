//! Overlays made by hand with `ip`, to compare with: routes to the other node (what the host-gw backend makes), and the
//! kernel's vxlan (what the vxlan backend makes). Both write the `subnet.env` of a node agent, so pods are attached as ever.

use std::{fs, net::Ipv4Addr};

use anyhow::{Context as _, Result, ensure};

use crate::topology::{Host, Lab, NETWORK};

/// Outer Ethernet, IPv4, UDP and vxlan header.
const VXLAN_OVERHEAD: u32 = 50;
/// Outer IPv4 and UDP header.
pub const UDP_OVERHEAD: u32 = 28;

/// A route on each host to the other's pods.
///
/// # Errors
/// What the kernel refuses.
pub fn host_gw(lab: &mut Lab) -> Result<()> {
    require_two(lab)?;
    for (index, peer) in [(0, 1), (1, 0)] {
        let (subnet, node) = (subnet(peer), lab.host(peer).address());
        lab.host(index).netns().ip(&format!("route add {subnet}/24 via {node} dev eth0"))?;
    }
    attach_pods(lab, 0)
}

/// A vxlan device on each host, with the other's forwarding entry, neighbour and route.
///
/// # Errors
/// No vxlan in this kernel, or what it refuses.
pub fn vxlan(lab: &mut Lab) -> Result<()> {
    require_two(lab)?;
    let mtu = lab.underlay_mtu().saturating_sub(VXLAN_OVERHEAD);
    for index in [0, 1] {
        let host = lab.host(index);
        host.netns().ip(&format!(
            "link add flannel.1 mtu {mtu} type vxlan id 1 dev eth0 local {} dstport 8472 nolearning",
            host.address()
        ))?;
        host.netns().ip(&format!("addr add {}/32 dev flannel.1", subnet(index)))?;
        host.netns().ip("link set flannel.1 up")?;
    }
    for (index, peer) in [(0, 1), (1, 0)] {
        let (gateway, node) = (subnet(peer), lab.host(peer).address());
        let mac = lab.host(peer).netns().mac("flannel.1")?;
        let host = lab.host(index).netns();
        host.ip(&format!("neigh replace {gateway} lladdr {mac} dev flannel.1 nud permanent"))?;
        host.output(&format!("bridge fdb replace {mac} dev flannel.1 dst {node} self permanent"))?;
        host.ip(&format!("route add {gateway}/24 via {gateway} dev flannel.1 onlink"))?;
    }
    attach_pods(lab, VXLAN_OVERHEAD)
}

/// Base address of the subnet of a host, by index.
pub fn subnet(index: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 244, u8::try_from(index).unwrap_or(0).saturating_add(1), 0)
}

/// A pod on each host, with an MTU that leaves room for `overhead` bytes.
///
/// # Errors
/// What the kernel refuses.
pub fn attach_pods(lab: &mut Lab, overhead: u32) -> Result<()> {
    let mtu = lab.underlay_mtu().saturating_sub(overhead);
    for index in [0, 1] {
        publish(lab.host(index), index, mtu)?;
        lab.host_mut(index).attach_pod()?;
    }
    Ok(())
}

/// The `subnet.env` of the host with this index, as a node agent writes it.
///
/// # Errors
/// The file can't be written.
pub fn publish(host: &Host, index: usize, mtu: u32) -> Result<()> {
    let gateway = Ipv4Addr::from(u32::from(subnet(index)) + 1);
    let path = host.files().subnet_env();
    let text = format!(
        "FLANNEL_NETWORK={NETWORK}\nFLANNEL_SUBNET={gateway}/24\nFLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=false\n"
    );
    fs::write(&path, text).with_context(|| format!("write {}", path.display()))
}

fn require_two(lab: &Lab) -> Result<()> {
    ensure!(lab.hosts().len() == 2, "an overlay by hand joins 2 hosts, not {}", lab.hosts().len());
    Ok(())
}
