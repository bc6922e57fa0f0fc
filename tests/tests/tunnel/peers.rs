//! Peers in the map, in the user-space path and in the report.

use std::net::Ipv4Addr;

use anyhow::{Context as _, Result, ensure};
use flannel_agent::domain::host_state::{Datapath, HostItem, TunnelPeer};
use flannel_agent::host::udp::PeerReport;

use crate::rig::{Node, Rig, peer};

const FAR: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);

fn reported(node: &Node, subnet: &str) -> Result<PeerReport> {
    let report = node.report()?;
    report.peers.into_iter().find(|peer| peer.subnet.to_string() == subnet).with_context(|| subnet.to_owned())
}

fn is_observed(node: &Node, peer: &TunnelPeer) -> Result<bool> {
    Ok(node.observe()?.contains(&HostItem::TunnelPeer(peer.clone())))
}

pub(crate) fn ways() -> Result<()> {
    let rig = Rig::new()?;
    rig.a.up(Datapath::Ebpf)?;
    let far = peer("10.244.7.0/24", FAR);
    rig.a.ip("route add 192.0.2.0/24 via 172.31.0.2")?;
    rig.a.put_peers(vec![far.clone()])?.remove(0).map_err(anyhow::Error::msg)?;
    ensure!(is_observed(&rig.a, &far)?);
    // Another gateway on the same wire is the kernel's business, another interface is ours.
    rig.a.ip("route replace 192.0.2.0/24 via 172.31.0.9")?;
    ensure!(is_observed(&rig.a, &far)?);

    rig.a.ip("link add other0 type veth peer name other1")?;
    rig.a.ip("link set other0 up")?;
    rig.a.ip("route replace 192.0.2.0/24 dev other0")?;
    ensure!(!is_observed(&rig.a, &far)?, "the entry is out of date");
    ensure!(is_observed(&rig.a, &rig.a.other())?, "the other is not");
    rig.a.put_peers(vec![far.clone()])?.remove(0).map_err(anyhow::Error::msg)?;
    ensure!(is_observed(&rig.a, &far)?);

    rig.a.ip("route del 192.0.2.0/24")?;
    ensure!(!is_observed(&rig.a, &far)?, "there is no way to it any more");
    Ok(())
}

pub(crate) fn refused() -> Result<()> {
    let rig = Rig::new()?;
    rig.a.start_agent();
    let early = rig.a.put_peers(vec![rig.a.other()])?.remove(0).err().context("no tunnel, and yet a peer")?;
    ensure!(
        early == "put peer 10.244.2.0/24 at 172.31.0.2 dev flannel0: the tunnel on flannel0 is not up",
        "{early}"
    );
    rig.a.put(rig.a.tunnel(Datapath::Ebpf))?;
    let results = rig.a.put_peers(vec![
        peer("10.244.3.0/25", Ipv4Addr::new(172, 31, 0, 3)),
        peer("10.244.4.0/24", FAR),
        peer("10.244.5.0/24", Ipv4Addr::new(10, 244, 9, 9)),
        rig.a.other(),
    ])?;
    let words = ["leases of one size, and ours is a /24", "192.0.2.7", "leads through the tunnel itself"];
    for (result, words) in results.iter().zip(words) {
        let error = result.as_ref().err().with_context(|| format!("accepted: {words}"))?;
        ensure!(error.contains(words), "{error}");
    }
    ensure!(results[3].is_ok(), "{results:?}");
    ensure!(rig.a.observe()?.len() == 2, "{:?}", rig.a.observe()?);

    // The kernel routes each datagram of the tun tier by itself, and its table knows any prefix.
    rig.a.put(rig.a.tunnel(Datapath::Tun))?;
    let results = rig.a.put_peers(vec![peer("10.244.3.0/25", Ipv4Addr::new(172, 31, 0, 3))])?;
    ensure!(results == [Ok(())], "{results:?}");
    Ok(())
}

pub(crate) fn places() -> Result<()> {
    let rig = Rig::new()?;
    rig.up(Datapath::Ebpf)?;
    rig.talks()?;
    let before = reported(&rig.a, "10.244.2.0/24")?;
    ensure!(before.tx_packets > 0);

    // Moved, by a new agent: the same subnet, the same counts.
    rig.a.up(Datapath::Ebpf)?;
    let moved = peer("10.244.2.0/24", Ipv4Addr::new(172, 31, 0, 9));
    rig.a.put_peers(vec![moved.clone()])?.remove(0).map_err(anyhow::Error::msg)?;
    let after = reported(&rig.a, "10.244.2.0/24")?;
    ensure!((after.node, after.tx_packets) == (moved.node, before.tx_packets), "{after:?}");
    ensure!(is_observed(&rig.a, &moved)? && !is_observed(&rig.a, &rig.a.other())?);

    // Its place is the next newcomer's, which starts at zero.
    let gone = moved.clone();
    rig.a
        .run(move |inside| inside.with(async |tunnels| tunnels.remove_peers(&[gone.clone(), gone]).await))?
        .into_iter()
        .collect::<Result<Vec<()>, _>>()?;
    ensure!(!is_observed(&rig.a, &moved)?);
    rig.a.put_peers(vec![peer("10.244.8.0/24", Ipv4Addr::new(172, 31, 0, 2))])?;
    let newcomer = reported(&rig.a, "10.244.8.0/24")?;
    ensure!((newcomer.tx_packets, newcomer.rx_packets) == (0, 0), "{newcomer:?}");
    Ok(())
}
