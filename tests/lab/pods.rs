//! What must pass between two pods, whatever carries it.

use std::net::SocketAddrV4;

use crate::{
    probe::{ping::Ping, tcp::TcpPath, udp::Datagrams},
    topology::{Host, Lab},
};
use anyhow::{Context as _, Result, ensure};

pub const PORT: u16 = 5001;

/// `h1/xdp → h2/tc`, for messages.
pub fn way(from: &Host, to: &Host) -> String {
    let tier = |host: &Host| host.status().map_or_else(|_| "?".to_owned(), |s| s.tier().to_owned());
    format!("pod of {}/{} → pod of {}/{}", from.name(), tier(from), to.name(), tier(to))
}

/// Runs `check` for every ordered pair of hosts.
pub fn all_pairs(lab: &Lab, check: impl Fn(&Host, &Host) -> Result<()>) -> Result<()> {
    for from in lab.hosts() {
        for to in lab.hosts().iter().filter(|to| to.address() != from.address()) {
            check(from, to).with_context(|| way(from, to))?;
        }
    }
    Ok(())
}

/// The pods' addresses and namespaces as a TCP path.
pub fn tcp(from: &Host, to: &Host) -> Result<TcpPath> {
    let (client, server) = (from.pod()?, to.pod()?);
    Ok(TcpPath::new(&client.netns, &server.netns, SocketAddrV4::new(server.address, PORT)))
}

/// Small pings, packets of exactly the MTU with DF, and one byte more, which the kernel must refuse and name the MTU.
pub fn pings(from: &Host, to: &Host) -> Result<()> {
    let (pod, target) = (from.pod()?, to.pod()?.address);
    let mtu = from.agent()?.subnet_env()?.mtu;
    let small = Ping::new(&pod.netns, target).run()?;
    ensure!(small.lost() == 0, "{small}");
    let full = Ping::new(&pod.netns, target).packet(mtu).dont_fragment().run()?;
    ensure!(full.lost() == 0, "packets of {mtu} bytes with DF: {full}");
    let over = Ping::new(&pod.netns, target).packet(mtu + 1).dont_fragment().count(1).run()?;
    ensure!(
        over.received == 0 && over.said().contains(&mtu.to_string()),
        "packets of {} bytes: {over}",
        mtu + 1
    );
    // Fragmented by the sender into inner fragments, one per datagram.
    let fragments = Ping::new(&pod.netns, target).packet(3000).run()?;
    ensure!(fragments.lost() == 0, "packets of 3000 bytes without DF: {fragments}");
    Ok(())
}

/// A TCP stream, every byte compared.
pub fn stream(from: &Host, to: &Host, bytes: u64) -> Result<()> {
    tcp(from, to)?.transfer(bytes).map(drop)
}

/// UDP datagrams: small, of full MTU, larger (inner fragments), and GSO batches as QUIC sends them.
pub fn datagrams(from: &Host, to: &Host) -> Result<()> {
    let loads = [
        Datagrams { count: 100, size: 64, batch: 1 },
        Datagrams { count: 100, size: 1444, batch: 1 },
        Datagrams { count: 50, size: 4000, batch: 1 },
        Datagrams { count: 1000, size: 1200, batch: 20 },
    ];
    let target = SocketAddrV4::new(to.pod()?.address, PORT);
    for load in loads {
        let delivered = load.send(&from.pod()?.netns, &to.pod()?.netns, target)?;
        ensure!(delivered.whole == load.count && delivered.damaged == 0, "{load:?}: {delivered:?}");
    }
    Ok(())
}

/// No agent refused, lost or mistrusted a packet.
pub fn nothing_refused(lab: &Lab) -> Result<()> {
    const BAD: [&str; 11] = [
        "encap_stale_gso",
        "encap_failed",
        "ttl_expired",
        "decap_failed",
        "malformed",
        "source_refused",
        "source_observed",
        "destination_refused",
        "destination_observed",
        "ecn_refused",
        "send_failed",
    ];
    for host in lab.hosts() {
        let status = host.status()?;
        for name in BAD {
            ensure!(status.counted(name) == 0, "{} counted {} × {name}", host.name(), status.counted(name));
        }
    }
    Ok(())
}
