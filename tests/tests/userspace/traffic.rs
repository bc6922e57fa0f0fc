//! Two tunnels that carry what sockets send.

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use flannel_agent::host::udp::userspace::{Role, UdpGro};
use flannel_common::{
    counter::{Count, Counter},
    peer::PeerCount,
};

use crate::{
    rig::{
        self, A, B, DEVICE, MTU, Namespace, Pattern, Rig, UNDERLAY, count, counts, drops, eventually,
        set_option,
    },
    wire::{Tap, Way},
};

const ROLES: [(&str, Role); 3] = [
    ("whole path", Role::WholePath),
    ("exceptions with GRO", Role::Exceptions { udp_gro: UdpGro::Allowed }),
    ("exceptions without GRO", Role::Exceptions { udp_gro: UdpGro::Forbidden }),
];

pub(crate) fn a_datagram_crosses_and_costs_two_hops() -> Result<()> {
    let (rig, a, b) = Rig::joined(Role::WholePath)?;
    let arrived = Tap::open(&rig.b, DEVICE)?;
    let (client, server) = (rig::udp(&rig.a, A.pod, 7000)?, rig::udp(&rig.b, B.pod, 7001)?);
    echo(&client, &server)?;
    let ttl: Vec<_> = arrived.packets(Way::In, 1, |p| p[9] == 17).iter().map(|p| p[8]).collect();
    assert_eq!(ttl, [62], "64 less one at each end");
    for (tunnel, peer) in [(&a, B), (&b, A)] {
        // Bytes of inner packets.
        let expected =
            PeerCount { tx_packets: 1, tx_bytes: 33, rx_packets: 1, rx_bytes: 33, ..PeerCount::default() };
        eventually("the peer's traffic is counted", || {
            let tally = tunnel.counters().peers[&peer.lease()].clone();
            tally.traffic.last_seen > 0 && PeerCount { last_seen: 0, ..tally.traffic } == expected
        })?;
        for counter in [Counter::Encapsulated, Counter::DecapUser] {
            eventually("and in all", || count(tunnel, counter) == Count { packets: 1, bytes: 33 })?;
        }
        assert_eq!(drops(tunnel), []);
        tunnel.is_running().map_err(|e| anyhow!(e))?;
    }
    Ok(())
}

pub(crate) fn echo(client: &UdpSocket, server: &UdpSocket) -> Result<()> {
    let mut buffer = [0; 100];
    client.send_to(b"hello", server.local_addr()?)?;
    let (length, from) = rig::receive(server, &mut buffer).context("the request")?;
    ensure!(&buffer[..length] == b"hello");
    server.send_to(b"world", from)?;
    let (length, _) = rig::receive(client, &mut buffer).context("the answer")?;
    ensure!(&buffer[..length] == b"world");
    Ok(())
}

pub(crate) fn tcp_arrives_byte_for_byte_in_every_role() -> Result<()> {
    let (rig, a, b) = Rig::joined(Role::WholePath)?;
    for (name, role) in ROLES {
        a.set_role(role);
        b.set_role(role);
        tcp_both_ways(&rig, 8 << 20).context(name)?;
    }
    let sent = count(&a, Counter::Encapsulated);
    ensure!(sent.packets > 3 * (8 << 20) / 1420, "{sent:?}: datagrams hold one packet each");
    let received = count(&b, Counter::DecapUser);
    ensure!(received.packets > 3 * (8 << 20) / 1420, "{received:?}");
    assert_eq!((drops(&a), drops(&b)), (vec![], vec![]));
    Ok(())
}

pub(crate) fn tcp_without_underlay_offloads() -> Result<()> {
    let (rig, a, b) = Rig::joined(Role::WholePath)?;
    rig.offloads("off")?;
    tcp_both_ways(&rig, 8 << 20)?;
    assert_eq!((drops(&a), drops(&b)), (vec![], vec![]));
    Ok(())
}

/// `UDP_SEGMENT` is refused there, and the kernel fragments the datagrams.
pub(crate) fn tcp_over_a_smaller_path() -> Result<()> {
    let (rig, a, b) = Rig::joined(Role::WholePath)?;
    rig.a.ip(&format!("route change 10.99.0.0/24 dev {UNDERLAY} src {} mtu 1000", A.node))?;
    tcp_both_ways(&rig, 2 << 20)?;
    assert_eq!((drops(&a), drops(&b)), (vec![], vec![]));
    Ok(())
}

pub(crate) fn tcp_both_ways(rig: &Rig, length: usize) -> Result<()> {
    transfer((&rig.a, A.pod), (&rig.b, B.pod), length).context("a to b")?;
    transfer((&rig.b, B.pod), (&rig.a, A.pod), length).context("b to a")
}

/// Sends a pattern and compares every byte.
fn transfer(
    (from, source): (&Namespace, Ipv4Addr),
    (to, target): (&Namespace, Ipv4Addr),
    length: usize,
) -> Result<()> {
    let seed = rig::unique();
    let listener = to.run(move || TcpListener::bind(SocketAddrV4::new(target, 0)))?;
    let address = listener.local_addr()?;
    let receiver = to.spawn(move || -> Result<()> {
        let (mut stream, peer) = listener.accept()?;
        ensure!(peer.ip() == source, "connected from {peer}");
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let (mut expected, mut got) = (vec![0; 64 << 10], vec![0; 64 << 10]);
        let mut pattern = Pattern::new(seed);
        for block in 0..length / expected.len() {
            pattern.fill(&mut expected);
            stream.read_exact(&mut got).with_context(|| format!("block {block}"))?;
            ensure!(got == expected, "block {block} differs");
        }
        ensure!(stream.read(&mut got)? == 0, "more than was sent");
        Ok(())
    });
    let mut stream = from.run(move || TcpStream::connect_timeout(&address, Duration::from_secs(5)))?;
    stream.set_write_timeout(Some(Duration::from_secs(5)))?;
    let mut block = vec![0; 64 << 10];
    let mut pattern = Pattern::new(seed);
    for _ in 0..length / block.len() {
        pattern.fill(&mut block);
        stream.write_all(&block)?;
    }
    stream.shutdown(Shutdown::Write)?;
    receiver.join().map_err(|_| anyhow!("the receiver panicked"))?
}

pub(crate) fn udp_segments_arrive_as_single_datagrams() -> Result<()> {
    const SIZE: usize = 1200;
    const AT_ONCE: usize = 20;
    let (rig, a, b) = Rig::joined(Role::WholePath)?;
    let (client, server) = (rig::udp(&rig.a, A.pod, 7000)?, rig::udp(&rig.b, B.pod, 7001)?);
    set_option(&client, libc::SOL_UDP, libc::UDP_SEGMENT, SIZE as i32)?;
    let (mut sent, mut got) = (vec![0; SIZE * AT_ONCE - 100], vec![0; 2000]);
    let (mut sender, mut receiver) = (Pattern::new(1), Pattern::new(1));
    for round in 0..50 {
        sender.fill(&mut sent);
        client.send_to(&sent, server.local_addr()?)?;
        receiver.fill(&mut sent);
        for (i, expected) in sent.chunks(SIZE).enumerate() {
            let (length, _) =
                rig::receive(&server, &mut got).with_context(|| format!("datagram {i} of round {round}"))?;
            ensure!(&got[..length] == expected, "datagram {i} of round {round}");
        }
    }
    counts(&a, Counter::Encapsulated, 50 * AT_ONCE as u64)?;
    assert_eq!((drops(&a), drops(&b)), (vec![], vec![]));
    Ok(())
}

/// Datagrams that were merged before the kernel was told to merge no more wait on the socket without their size.
pub(crate) fn datagrams_survive_that_merging_ends_while_they_wait() -> Result<()> {
    const SIZE: usize = 200;
    const AT_ONCE: usize = 20;
    const ROUNDS: usize = 400;
    let (rig, _a, b) = Rig::joined(Role::WholePath)?;
    let (client, server) = (rig::udp(&rig.a, A.pod, 7000)?, rig::udp(&rig.b, B.pod, 7001)?);
    set_option(&client, libc::SOL_UDP, libc::UDP_SEGMENT, SIZE as i32)?;
    let target = server.local_addr()?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for role in ROLES.map(|(_, role)| role) {
                    b.set_role(role);
                }
            }
        });
        let exchange = || -> Result<()> {
            let (mut sent, mut got) = (vec![0; SIZE * AT_ONCE], vec![0; 2000]);
            for round in 0..ROUNDS {
                Pattern::new(round as u64).fill(&mut sent);
                client.send_to(&sent, target)?;
                for (i, expected) in sent.chunks(SIZE).enumerate() {
                    let received = rig::receive(&server, &mut got);
                    let (length, _) = received.with_context(|| format!("datagram {i} of round {round}"))?;
                    ensure!(&got[..length] == expected, "datagram {i} of round {round}");
                }
            }
            Ok(())
        };
        let result = exchange();
        stop.store(true, Ordering::Relaxed);
        result
    })?;
    assert_eq!(drops(&b), vec![]);
    Ok(())
}

pub(crate) fn fragments_cross_one_per_datagram() -> Result<()> {
    let (rig, a, b) = Rig::joined(Role::WholePath)?;
    let (client, server) = (rig::udp(&rig.a, A.pod, 7000)?, rig::udp(&rig.b, B.pod, 7001)?);
    // Fragments, so DF off as a sender of large datagrams has it.
    set_option(&client, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)?;
    let mut got = vec![0; 70_000];
    let full = MTU as usize - 28;
    for (size, datagrams) in [(full, 1), (full + 1, 2), (3000, 3), (65_000, 45)] {
        let before = count(&a, Counter::Encapsulated).packets;
        let mut payload = vec![0; size];
        Pattern::new(size as u64).fill(&mut payload);
        client.send_to(&payload, server.local_addr()?)?;
        let (length, _) = rig::receive(&server, &mut got).with_context(|| format!("{size} bytes"))?;
        ensure!(got[..length] == payload, "{size} bytes");
        counts(&a, Counter::Encapsulated, before + datagrams).with_context(|| format!("{size} bytes"))?;
    }
    assert_eq!((drops(&a), drops(&b)), (vec![], vec![]));
    Ok(())
}

pub(crate) fn peers_can_be_replaced_under_traffic() -> Result<()> {
    let (rig, a, b) = Rig::joined(Role::WholePath)?;
    let (client, server) = (rig::udp(&rig.a, A.pod, 7000)?, rig::udp(&rig.b, B.pod, 7001)?);
    echo(&client, &server)?;
    a.set_peers(vec![]);
    client.send_to(b"lost", server.local_addr()?)?;
    counts(&a, Counter::NoPeer, 1)?;
    assert!(a.counters().peers.is_empty());
    let mut many: Vec<_> =
        (0..200u8).map(|i| (format!("10.244.{i}.0/24").parse().unwrap(), B.node)).collect();
    many.retain(|(subnet, _)| *subnet != A.lease());
    a.set_peers(many);
    echo(&client, &server)?;
    eventually("traffic counts from anew", || a.counters().peers[&B.lease()].traffic.tx_packets == 1)?;
    counts(&b, Counter::DecapUser, 2)?;
    Ok(())
}
