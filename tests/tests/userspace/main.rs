//! The user-space tunnel on a real kernel: two namespaces, a veth pair, one tunnel each.
//!
//! Bytes are compared with a recording of flanneld 0.7.0 (`fixtures/v0.7.0/udp/underlay-h1.pcap`, three hosts pinging
//! each other, captured on the first host's underlay).

mod rig;
mod wire;

use std::{
    fs::File,
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddrV4, TcpListener, TcpStream, UdpSocket},
    os::fd::AsRawFd,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use flannel_agent::{
    domain::host_state::SourceCheck,
    host::udp::userspace::{Role, UdpGro, UserTunnel, ensure_device},
};
use flannel_common::counter::Counter;
use flannel_tests::privilege;
use libtest_mimic::{Failed, Trial};

use rig::{
    A, B, DEVICE, MTU, Namespace, PORT, Pattern, Rig, UNDERLAY, config, count, drops, eventually, start,
};
use wire::{Tap, Way, changed, one_hop_on};

const ROLES: [(&str, Role); 3] = [
    ("whole path", Role::WholePath),
    ("exceptions with GRO", Role::Exceptions { udp_gro: UdpGro::Allowed }),
    ("exceptions without GRO", Role::Exceptions { udp_gro: UdpGro::Forbidden }),
];

fn main() -> ExitCode {
    let tests: [(&str, fn() -> Result<()>); 22] = [
        ("a_datagram_crosses_and_costs_two_hops", a_datagram_crosses_and_costs_two_hops),
        ("tcp_arrives_byte_for_byte_in_every_role", tcp_arrives_byte_for_byte_in_every_role),
        ("tcp_arrives_byte_for_byte_without_underlay_offloads", tcp_without_underlay_offloads),
        ("tcp_arrives_byte_for_byte_over_a_smaller_path", tcp_over_a_smaller_path),
        ("udp_segments_arrive_as_single_datagrams", udp_segments_arrive_as_single_datagrams),
        ("a_full_packet_fits_and_a_larger_one_crosses_in_fragments", fragments_cross_one_per_datagram),
        ("a_recording_of_flanneld_is_sent_byte_for_byte", a_recording_is_sent_byte_for_byte),
        ("a_recording_of_flanneld_is_delivered_byte_for_byte", a_recording_is_delivered_byte_for_byte),
        ("odd_packets_leave_with_only_their_ttl_changed", odd_packets_leave_with_only_their_ttl_changed),
        ("checksums_left_to_us_are_right_on_the_wire", checksums_left_to_us_are_right_on_the_wire),
        ("a_ttl_that_runs_out_is_dropped_silently", a_ttl_that_runs_out_is_dropped_silently),
        ("a_spoofed_source_is_treated_as_configured", a_spoofed_source_is_treated_as_configured),
        ("only_one_whole_ipv4_packet_is_delivered", only_one_whole_ipv4_packet_is_delivered),
        ("outer_fragments_are_delivered", outer_fragments_are_delivered),
        ("an_outer_congestion_mark_reaches_the_inner_packet", congestion_marks_reach_the_inner_packet),
        ("an_unknown_destination_is_answered_on_the_device", an_unknown_destination_is_answered),
        ("a_taken_port_is_an_error_that_names_it", a_taken_port_is_an_error_that_names_it),
        ("a_restarted_tunnel_takes_the_same_device_over", a_restarted_tunnel_takes_the_same_device_over),
        ("a_deleted_device_ends_the_tunnel_with_a_reason", a_deleted_device_ends_the_tunnel),
        ("a_device_of_another_kind_is_refused_by_its_kind", a_device_of_another_kind_is_refused),
        ("a_tunnel_stops_promptly_under_load", a_tunnel_stops_promptly_under_load),
        ("peers_can_be_replaced_under_traffic", peers_can_be_replaced_under_traffic),
    ];
    let trials = tests
        .map(|(name, test)| Trial::test(name, move || test().map_err(|e| Failed::from(format!("{e:?}")))));
    privilege::run_when(privilege::require_root, trials.into())
}

fn a_datagram_crosses_and_costs_two_hops() -> Result<()> {
    let (rig, a, b) = Rig::joined(Role::WholePath)?;
    let arrived = Tap::open(&rig.b, DEVICE)?;
    let (client, server) = (rig::udp(&rig.a, A.pod, 7000)?, rig::udp(&rig.b, B.pod, 7001)?);
    echo(&client, &server)?;
    let ttl: Vec<_> = arrived.packets(Way::In, 1, |p| p[9] == 17).iter().map(|p| p[8]).collect();
    assert_eq!(ttl, [62], "64 less one at each end");
    for (tunnel, peer) in [(&a, B), (&b, A)] {
        let traffic = tunnel.counters().peers[&peer.lease()];
        assert_eq!((traffic.tx_packets, traffic.rx_packets), (1, 1));
        assert_eq!((traffic.tx_bytes, traffic.rx_bytes), (33, 33), "bytes of inner packets");
        assert_eq!(count(tunnel, Counter::Encapsulated).packets, 1);
        assert_eq!(count(tunnel, Counter::DecapUser).packets, 1);
        assert_eq!(drops(tunnel), []);
        tunnel.is_running().map_err(|e| anyhow!(e))?;
    }
    Ok(())
}

fn echo(client: &UdpSocket, server: &UdpSocket) -> Result<()> {
    let mut buffer = [0; 100];
    client.send_to(b"hello", server.local_addr()?)?;
    let (length, from) = server.recv_from(&mut buffer).context("the request")?;
    ensure!(&buffer[..length] == b"hello");
    server.send_to(b"world", from)?;
    let (length, _) = client.recv_from(&mut buffer).context("the answer")?;
    ensure!(&buffer[..length] == b"world");
    Ok(())
}

fn tcp_arrives_byte_for_byte_in_every_role() -> Result<()> {
    let (rig, a, b) = Rig::joined(Role::WholePath)?;
    for (name, role) in ROLES {
        a.set_role(role);
        b.set_role(role);
        tcp_both_ways(&rig, 8 << 20).context(name)?;
    }
    let (sent, received) = (count(&a, Counter::Encapsulated), count(&b, Counter::DecapUser));
    ensure!(sent.packets > 3 * (8 << 20) / 1420, "{sent:?}: datagrams hold one packet each");
    assert_eq!(sent.packets, received.packets);
    assert_eq!((drops(&a), drops(&b)), (vec![], vec![]));
    Ok(())
}

fn tcp_without_underlay_offloads() -> Result<()> {
    let (rig, a, b) = Rig::joined(Role::WholePath)?;
    rig.offloads("off")?;
    tcp_both_ways(&rig, 8 << 20)?;
    assert_eq!((drops(&a), drops(&b)), (vec![], vec![]));
    Ok(())
}

/// `UDP_SEGMENT` is refused there, and the kernel fragments the datagrams.
fn tcp_over_a_smaller_path() -> Result<()> {
    let (rig, a, b) = Rig::joined(Role::WholePath)?;
    rig.a.ip(&format!("route change 10.99.0.0/24 dev {UNDERLAY} src {} mtu 1000", A.node))?;
    tcp_both_ways(&rig, 2 << 20)?;
    assert_eq!((drops(&a), drops(&b)), (vec![], vec![]));
    Ok(())
}

fn tcp_both_ways(rig: &Rig, length: usize) -> Result<()> {
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

fn udp_segments_arrive_as_single_datagrams() -> Result<()> {
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
            let length = server.recv(&mut got).with_context(|| format!("datagram {i} of round {round}"))?;
            ensure!(&got[..length] == expected, "datagram {i} of round {round}");
        }
    }
    assert_eq!(count(&a, Counter::Encapsulated).packets, 50 * AT_ONCE as u64);
    assert_eq!((drops(&a), drops(&b)), (vec![], vec![]));
    Ok(())
}

fn set_option(socket: &UdpSocket, level: i32, option: i32, value: i32) -> Result<()> {
    let length = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the value is an int of that length.
    let set =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), length) };
    ensure!(set == 0, "option {option}: {}", std::io::Error::last_os_error());
    Ok(())
}

fn fragments_cross_one_per_datagram() -> Result<()> {
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
        let length = server.recv(&mut got).with_context(|| format!("{size} bytes"))?;
        ensure!(got[..length] == payload, "{size} bytes");
        assert_eq!(count(&a, Counter::Encapsulated).packets - before, datagrams, "{size} bytes");
    }
    assert_eq!((drops(&a), drops(&b)), (vec![], vec![]));
    Ok(())
}

/// Tunnel datagrams of the recording, from the outer IPv4 header on.
fn recording() -> Result<Vec<Vec<u8>>> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/v0.7.0/udp/underlay-h1.pcap");
    let mut reader = pcap_file::pcap::PcapReader::new(File::open(path).context(path)?)?;
    let mut packets = Vec::new();
    while let Some(frame) = reader.next_packet() {
        let frame = frame?;
        if let Some((ethernet, packet)) = frame.data.split_first_chunk::<14>()
            && ethernet[12..] == [8, 0]
            && packet[9] == 17
        {
            packets.push(packet.to_vec());
        }
    }
    ensure!(packets.len() > 20, "only {} datagrams in {path}", packets.len());
    Ok(packets)
}

/// The recorded host takes part as node a: it gets the packets its pods sent, and what it puts on the wire is compared.
fn a_recording_is_sent_byte_for_byte() -> Result<()> {
    let rig = Rig::new()?;
    rig.offloads("off")?;
    rig.b.ip(&format!("addr add 10.99.0.13/24 dev {UNDERLAY}"))?;
    let tunnel = start(&rig.a, config(A, SourceCheck::Enforce, Role::WholePath))?;
    tunnel.set_peers(vec![(B.lease(), B.node), ("10.244.61.0/24".parse()?, "10.99.0.13".parse()?)]);
    let (pods, underlay) = (Tap::open(&rig.a, DEVICE)?, Tap::open(&rig.b, UNDERLAY)?);

    let sent: Vec<_> = recording()?.into_iter().filter(|p| p[12..16] == A.node.octets()).collect();
    for recorded in &sent {
        pods.send(&changed(&recorded[28..], |p| p[8] += 1))?;
        let wire = underlay.packets(Way::In, 1, |p| p[9] == 17);
        ensure!(wire.len() == 1, "nothing on the wire for {recorded:02x?}");
        let ours = &wire[0];
        assert_eq!(ours[28..], recorded[28..], "payload");
        let outer = |p: &[u8]| {
            let header = [&p[..4], &p[6..10], &p[12..20]].concat();
            (header, p[20..26].to_vec())
        };
        assert_eq!(
            outer(ours),
            outer(recorded),
            "outer header but identification and checksums, UDP ports, length"
        );
        assert_ne!(ours[26..28], [0, 0], "UDP checksum is computed");
        assert_eq!(wire::transport_residue(ours), 0, "UDP checksum");
    }
    Ok(())
}

fn a_recording_is_delivered_byte_for_byte() -> Result<()> {
    let rig = Rig::new()?;
    let tunnel = start(&rig.a, config(A, SourceCheck::Enforce, Role::WholePath))?;
    tunnel.set_peers(vec![(B.lease(), B.node)]);
    let (device, flanneld) = (Tap::open(&rig.a, DEVICE)?, rig::udp(&rig.b, B.node, PORT)?);

    let received: Vec<_> = recording()?.into_iter().filter(|p| p[12..16] == B.node.octets()).collect();
    for recorded in &received {
        flanneld.send_to(&recorded[28..], (A.node, PORT))?;
        let delivered = device.packets(Way::In, 1, |_| true);
        assert_eq!(delivered, [one_hop_on(&recorded[28..])]);
    }
    assert_eq!(count(&tunnel, Counter::DecapUser).packets, received.len() as u64);
    assert_eq!(drops(&tunnel), []);
    Ok(())
}

/// A node with a tunnel, and a plain socket in the peer's place.
struct Half {
    rig: Rig,
    tunnel: UserTunnel,
    /// On the device: its packets are the tunnel's input, what it captures was delivered.
    device: Tap,
    /// The peer's socket.
    peer: UdpSocket,
}

impl Half {
    fn new(check: SourceCheck) -> Result<Self> {
        let rig = Rig::new()?;
        let tunnel = start(&rig.a, config(A, check, Role::WholePath))?;
        tunnel.set_peers(vec![(B.lease(), B.node)]);
        let device = Tap::open(&rig.a, DEVICE)?;
        let peer = rig::udp(&rig.b, B.node, PORT)?;
        peer.set_read_timeout(Some(Duration::from_millis(200)))?;
        Ok(Self { rig, tunnel, device, peer })
    }

    /// What the peer gets for a packet that is routed to the device.
    fn outbound(&self, packet: &[u8]) -> Result<Option<Vec<u8>>> {
        self.device.send(packet)?;
        let mut got = vec![0; 70_000];
        match self.peer.recv_from(&mut got) {
            Ok((length, from)) => {
                ensure!(from == SocketAddrV4::new(A.node, PORT).into(), "from {from}");
                got.truncate(length);
                Ok(Some(got))
            }
            Err(_) => Ok(None),
        }
    }

    /// What is delivered for a datagram from the peer. A marker sent behind it says when to stop waiting.
    fn inbound(&self, datagram: &[u8]) -> Result<Vec<Vec<u8>>> {
        let marker = wire::udp(B.pod, A.pod, format!("marker {}", rig::unique()).as_bytes());
        self.peer.send_to(datagram, (A.node, PORT))?;
        self.peer.send_to(&marker, (A.node, PORT))?;
        let marker = one_hop_on(&marker);
        // Not to be mistaken for the answers of the host, which go out.
        let mut delivered = self.device.packets(Way::In, 2, |_| true);
        if delivered.first() != Some(&marker) {
            ensure!(delivered.pop() == Some(marker), "marker lost");
        }
        Ok(delivered.into_iter().filter(|p| !p[28..].starts_with(b"marker")).collect())
    }
}

fn odd_packets_leave_with_only_their_ttl_changed() -> Result<()> {
    let half = Half::new(SourceCheck::Enforce)?;
    let plain = wire::udp(A.pod, B.pod, &[7; 100]);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("plain", plain.clone()),
        ("odd length", wire::udp(A.pod, B.pod, &[7; 101])),
        ("full MTU", wire::udp(A.pod, B.pod, &vec![7; MTU as usize - 28])),
        ("no DF", changed(&plain, |p| p[6] = 0)),
        ("DSCP", changed(&plain, |p| p[1] = 0xb8)),
        ("ECT(0)", changed(&plain, |p| p[1] = 2)),
        ("TTL 2", changed(&plain, |p| p[8] = 2)),
        ("TTL 255", changed(&plain, |p| p[8] = 255)),
        ("protocol 253", changed(&plain, |p| p[9] = 253)),
        ("first fragment", changed(&plain, |p| p[6] = 0x20)),
        ("last fragment", changed(&plain, |p| (p[6], p[7]) = (0, 100))),
        (
            "router alert",
            changed(&plain, |p| {
                p.splice(20..20, [0x94, 4, 0, 0]);
                p[0] = 0x46;
                let total = (p.len() as u16).to_be_bytes();
                p[2..4].copy_from_slice(&total);
            }),
        ),
        (
            "bare header",
            changed(&plain, |p| {
                p.truncate(20);
                p[3] = 20;
            }),
        ),
        // The checksum 0xFEFF turns into 0x0000 when the TTL falls.
        ("checksum 0xFEFF", with_checksum_feff(&plain)),
    ];
    for (name, packet) in cases {
        let expected = if name == "checksum 0xFEFF" {
            let mut expected = packet.clone();
            expected[8] -= 1;
            expected[10..12].copy_from_slice(&[0, 0]);
            expected
        } else {
            one_hop_on(&packet)
        };
        assert_eq!(half.outbound(&packet)?, Some(expected), "{name}");
    }
    assert_eq!(drops(&half.tunnel), []);
    Ok(())
}

/// A packet whose header checksum is 0xFEFF: the identification is chosen for it.
fn with_checksum_feff(packet: &[u8]) -> Vec<u8> {
    (0..=u16::MAX)
        .map(|id| changed(packet, |p| p[4..6].copy_from_slice(&id.to_be_bytes())))
        .find(|p| p[10..12] == [0xfe, 0xff])
        .unwrap()
}

fn checksums_left_to_us_are_right_on_the_wire() -> Result<()> {
    let half = Half::new(SourceCheck::Enforce)?;
    let pod = rig::udp(&half.rig.a, A.pod, 7000)?;
    let mut got = [0; 2000];
    for size in [0, 1, 100, 1444] {
        pod.send_to(&vec![5; size], (B.pod, 7001))?;
        let (length, _) = half.peer.recv_from(&mut got)?;
        assert_eq!(wire::transport_residue(&got[..length]), 0, "UDP of {size} bytes");
    }
    // A SYN nobody answers.
    let _ = half.rig.a.run(|| {
        TcpStream::connect_timeout(&SocketAddrV4::new(B.pod, 7002).into(), Duration::from_millis(50))
    });
    let (length, _) = half.peer.recv_from(&mut got)?;
    assert_eq!((got[9], wire::transport_residue(&got[..length])), (6, 0), "TCP");
    Ok(())
}

fn a_ttl_that_runs_out_is_dropped_silently() -> Result<()> {
    let half = Half::new(SourceCheck::Enforce)?;
    let (out, inn) = (wire::udp(A.pod, B.pod, b"out"), wire::udp(B.pod, A.pod, b"in"));
    for ttl in [0, 1] {
        assert_eq!(half.outbound(&changed(&out, |p| p[8] = ttl))?, None, "out with TTL {ttl}");
        assert_eq!(half.inbound(&changed(&inn, |p| p[8] = ttl))?, Vec::<Vec<u8>>::new(), "in with TTL {ttl}");
    }
    assert_eq!(drops(&half.tunnel), [("ttl_expired", 4)]);
    assert_eq!(half.device.packets(Way::In, 1, |p| p[9] == 1), Vec::<Vec<u8>>::new(), "no ICMP");
    Ok(())
}

fn a_spoofed_source_is_treated_as_configured() -> Result<()> {
    let own = wire::udp(B.pod, A.pod, b"own");
    let cases = [
        ("own lease", own.clone(), None),
        ("the sending node itself", wire::udp(B.node, A.pod, b"host"), None),
        ("nobody's lease", wire::udp([10, 244, 61, 2].into(), A.pod, b"foreign"), Some("source")),
        ("our lease", wire::udp([10, 244, 49, 9].into(), A.pod, b"ours"), Some("source")),
        ("another node", wire::udp([10, 99, 0, 13].into(), A.pod, b"node"), Some("source")),
        ("to another lease", wire::udp(B.pod, [10, 244, 61, 2].into(), b"elsewhere"), Some("destination")),
        ("to our node", wire::udp(B.pod, A.node, b"underlay"), Some("destination")),
    ];
    for (mode, check) in
        [("enforce", SourceCheck::Enforce), ("observe", SourceCheck::Observe), ("off", SourceCheck::Off)]
    {
        let half = Half::new(check)?;
        for (name, packet, wrong) in &cases {
            let of = |counter| count(&half.tunnel, counter).packets;
            let counts = || {
                [
                    of(Counter::SourceRefused),
                    of(Counter::DestinationRefused),
                    of(Counter::SourceObserved),
                    of(Counter::DestinationObserved),
                ]
            };
            let before = counts();
            let delivered = half.inbound(packet)?;
            let after = counts();
            let grown: Vec<usize> = (0..4).filter(|i| after[*i] > before[*i]).collect();
            let expected: &[usize] = match (check, wrong) {
                (SourceCheck::Off, _) | (_, None) => &[],
                (SourceCheck::Enforce, Some("source")) => &[0],
                (SourceCheck::Enforce, Some(_)) => &[1],
                (SourceCheck::Observe, Some("source")) => &[2],
                (SourceCheck::Observe, Some(_)) => &[3],
            };
            assert_eq!(grown, expected, "{mode}, {name}");
            let refused = check == SourceCheck::Enforce && wrong.is_some();
            let expected = if refused { vec![] } else { vec![one_hop_on(packet)] };
            assert_eq!(delivered, expected, "{mode}, {name}");
        }
    }
    Ok(())
}

fn only_one_whole_ipv4_packet_is_delivered() -> Result<()> {
    let half = Half::new(SourceCheck::Off)?;
    let good = wire::udp(B.pod, A.pod, &[7; 50]);
    let with_total = |total: u16| changed(&good, |p| p[2..4].copy_from_slice(&total.to_be_bytes()));
    let oversize = wire::udp(B.pod, A.pod, &vec![7; MTU as usize - 27]);
    let trailing = [good.as_slice(), b"tail"].concat();
    let long_tail = [good.as_slice(), &[9; 2000]].concat();
    let cases: Vec<(&str, Vec<u8>, Result<Vec<u8>, &str>)> = vec![
        ("good", good.clone(), Ok(good.clone())),
        ("trailing bytes", trailing, Ok(good.clone())),
        ("more trailing bytes than the MTU", long_tail, Ok(good.clone())),
        ("empty", vec![], Err("malformed")),
        ("19 bytes", good[..19].to_vec(), Err("malformed")),
        ("header only in part", changed(&good, |p| p[0] = 0x4f)[..40].to_vec(), Err("malformed")),
        ("longer than the datagram", with_total(79), Err("malformed")),
        ("shorter than its header", with_total(19), Err("malformed")),
        ("IPv6", changed(&good, |p| p[0] = 0x60), Err("malformed")),
        ("version 0", vec![0; 60], Err("malformed")),
        ("one byte above the MTU", oversize, Err("oversize")),
    ];
    for (name, datagram, expected) in cases {
        let before = drops(&half.tunnel).into_iter().collect::<std::collections::BTreeMap<_, _>>();
        let delivered = half.inbound(&datagram)?;
        let grown: Vec<_> = drops(&half.tunnel)
            .into_iter()
            .filter(|(reason, count)| before.get(reason).copied().unwrap_or(0) < *count)
            .map(|(reason, _)| reason)
            .collect();
        match expected {
            Ok(packet) => {
                assert_eq!(delivered, [one_hop_on(&packet)], "{name}");
                assert!(grown.is_empty(), "{name}: {grown:?}");
            }
            Err(reason) => {
                assert_eq!(delivered, Vec::<Vec<u8>>::new(), "{name}");
                assert_eq!(grown, [reason], "{name}");
            }
        }
    }
    Ok(())
}

fn outer_fragments_are_delivered() -> Result<()> {
    let half = Half::new(SourceCheck::Enforce)?;
    half.rig.b.ip(&format!("route change 10.99.0.0/24 dev {UNDERLAY} src {} mtu 600", B.node))?;
    let underlay = Tap::open(&half.rig.a, UNDERLAY)?;
    let packet = wire::udp(B.pod, A.pod, &[7; 1400]);
    assert_eq!(half.inbound(&packet)?, [one_hop_on(&packet)]);
    assert_eq!(underlay.packets(Way::In, 3, |p| p[9] == 17 && p[6] & 0x3f != 0 || p[7] != 0).len(), 3);
    Ok(())
}

fn congestion_marks_reach_the_inner_packet() -> Result<()> {
    let half = Half::new(SourceCheck::Enforce)?;
    let packet = wire::udp(B.pod, A.pod, b"marked");
    for (inner, outer, expected) in [
        (0, 0, Some(0)),
        (2, 0, Some(2)),
        (2, 3, Some(3)),
        (1, 3, Some(3)),
        (0xb8 | 2, 3, Some(0xb8 | 3)),
        (0, 3, None),
    ] {
        let packet = changed(&packet, |p| p[1] = inner);
        set_option(&half.peer, libc::IPPROTO_IP, libc::IP_TOS, outer)?;
        half.peer.send_to(&packet, (A.node, PORT))?;
        let delivered = half.device.packets(Way::In, usize::from(expected.is_some()), |_| true);
        let expected: Vec<_> =
            expected.map(|tos| changed(&one_hop_on(&packet), |p| p[1] = tos)).into_iter().collect();
        assert_eq!(delivered, expected, "inner {inner:#04x}, outer {outer:#04x}");
    }
    eventually("the refused mark is counted", || drops(&half.tunnel) == [("ecn_refused", 1)])
}

fn an_unknown_destination_is_answered() -> Result<()> {
    let half = Half::new(SourceCheck::Enforce)?;
    let stranger = Ipv4Addr::new(10, 244, 77, 1);
    let offender = wire::udp(A.pod, stranger, &[7; 100]);
    half.device.send(&offender)?;
    let answers = half.device.packets(Way::In, 1, |p| p[9] == 1);
    ensure!(answers.len() == 1, "no answer");
    let expected_header = changed(
        &[&[0x45, 0, 0, 56, 0, 0, 0, 0, 8, 1, 0, 0][..], &A.lease().network().octets(), &A.pod.octets()]
            .concat(),
        |_| {},
    );
    assert_eq!(answers[0][..20], expected_header);
    assert_eq!(answers[0][20..22], [3, 0], "net unreachable");
    assert_eq!(answers[0][28..], offender[..28], "the offender's header and 8 bytes, its TTL untouched");
    assert_eq!(count(&half.tunnel, Counter::NoPeer).packets, 1);

    // Our own subnet is nobody's lease either.
    half.device.send(&wire::udp(A.pod, [10, 244, 49, 99].into(), b"self"))?;
    assert_eq!(half.device.packets(Way::In, 1, |p| p[9] == 1).len(), 1);

    // Counted but not answered: ICMP, a later fragment; and a large TCP packet is answered as one segment.
    for silent in [changed(&offender, |p| p[9] = 1), changed(&offender, |p| p[7] = 9)] {
        half.device.send(&silent)?;
    }
    eventually("both are counted", || count(&half.tunnel, Counter::NoPeer).packets == 4)?;
    assert_eq!(half.device.packets(Way::In, 1, |p| p[9] == 1), Vec::<Vec<u8>>::new());

    // Under the programs they were counted there.
    half.tunnel.set_role(Role::Exceptions { udp_gro: UdpGro::Allowed });
    half.device.send(&offender)?;
    assert_eq!(half.device.packets(Way::In, 1, |p| p[9] == 1).len(), 1);
    assert_eq!(count(&half.tunnel, Counter::NoPeer).packets, 4);

    // A flood is answered only in part.
    for _ in 0..1000 {
        half.device.send(&offender)?;
    }
    let answers = half.device.packets(Way::In, 1000, |p| p[9] == 1).len();
    ensure!((1..=300).contains(&answers), "{answers} answers");
    Ok(())
}

fn a_taken_port_is_an_error_that_names_it() -> Result<()> {
    let rig = Rig::new()?;
    let _first = start(&rig.a, config(A, SourceCheck::Enforce, Role::WholePath))?;
    let Err(error) = start(&rig.a, config(A, SourceCheck::Enforce, Role::WholePath)) else {
        return Err(anyhow!("a second tunnel on the same port"));
    };
    let error = error.to_string();
    for part in ["10.99.0.11:8285", "EADDRINUSE", "stop it"] {
        ensure!(error.contains(part), "{error}");
    }
    Ok(())
}

fn a_restarted_tunnel_takes_the_same_device_over() -> Result<()> {
    let (rig, a, _b) = Rig::joined(Role::WholePath)?;
    let (client, server) = (rig::udp(&rig.a, A.pod, 7000)?, rig::udp(&rig.b, B.pod, 7001)?);
    echo(&client, &server)?;
    let index = || rig.a.run(|| nix::net::if_::if_nametoindex(DEVICE));
    let before = index()?;
    drop(a);
    assert_eq!(index()?, before, "the device stays");
    rig.a.run(|| ensure_device(DEVICE))?;
    assert_eq!(index()?, before, "and is taken over");
    let a = start(&rig.a, config(A, SourceCheck::Enforce, Role::WholePath))?;
    a.set_peers(vec![(B.lease(), B.node)]);
    echo(&client, &server)?;
    // Beside a running tunnel it changes nothing.
    rig.a.run(|| ensure_device(DEVICE))?;
    echo(&client, &server)?;
    tcp_both_ways(&rig, 1 << 20)
}

fn a_deleted_device_ends_the_tunnel() -> Result<()> {
    let half = Half::new(SourceCheck::Enforce)?;
    half.tunnel.is_running().map_err(|e| anyhow!(e))?;
    half.rig.a.ip(&format!("link delete {DEVICE}"))?;
    eventually("the tunnel says so", || half.tunnel.is_running().is_err())?;
    let reason = half.tunnel.is_running().err().unwrap_or_default();
    ensure!(reason.contains("flannel0") && reason.contains("deleted"), "{reason}");

    let Err(error) = start(&half.rig.a, config(A, SourceCheck::Enforce, Role::WholePath)) else {
        return Err(anyhow!("started without a device"));
    };
    ensure!(error.to_string().contains("flannel0: the device does not exist"), "{error}");
    Ok(())
}

fn a_device_of_another_kind_is_refused() -> Result<()> {
    let rig = Rig::new()?;
    for (create, kind) in [
        ("tuntap add other mode tun", "a TUN device without IFF_MULTI_QUEUE"),
        ("tuntap add other mode tap multi_queue", "a TAP device"),
        ("link add other type bridge", "a bridge device"),
        ("link add other type veth peer name end", "a veth device"),
    ] {
        rig.a.ip(create)?;
        let Err(error) = rig.a.run(|| ensure_device("other")) else {
            return Err(anyhow!("{create}: taken over"));
        };
        let error = error.to_string();
        ensure!(error.contains(kind) && error.contains("ip link delete other"), "{create}: {error}");
        rig.a.ip("link delete other")?;
    }
    Ok(())
}

fn a_tunnel_stops_promptly_under_load() -> Result<()> {
    let (rig, a, b) = Rig::joined(Role::WholePath)?;
    let deadline = Instant::now() + Duration::from_millis(700);
    let floods: Vec<_> = [(&rig.a, A, B), (&rig.b, B, A)]
        .into_iter()
        .map(|(node, own, peer)| {
            let socket = rig::udp(node, own.pod, 7000)?;
            Ok(thread::spawn(move || {
                while Instant::now() < deadline {
                    let _ = socket.send_to(&[7; 64], (peer.pod, 9));
                }
            }))
        })
        .collect::<Result<_>>()?;
    thread::sleep(Duration::from_millis(200));
    let begin = Instant::now();
    drop((a, b));
    let took = begin.elapsed();
    for flood in floods {
        flood.join().map_err(|_| anyhow!("the flood panicked"))?;
    }
    ensure!(took < Duration::from_millis(300), "took {took:?}");
    Ok(())
}

fn peers_can_be_replaced_under_traffic() -> Result<()> {
    let (rig, a, b) = Rig::joined(Role::WholePath)?;
    let (client, server) = (rig::udp(&rig.a, A.pod, 7000)?, rig::udp(&rig.b, B.pod, 7001)?);
    echo(&client, &server)?;
    a.set_peers(vec![]);
    client.send_to(b"lost", server.local_addr()?)?;
    eventually("the packet finds no peer", || count(&a, Counter::NoPeer).packets == 1)?;
    assert!(a.counters().peers.is_empty());
    let mut many: Vec<_> =
        (0..200u8).map(|i| (format!("10.244.{i}.0/24").parse().unwrap(), B.node)).collect();
    many.retain(|(subnet, _)| *subnet != A.lease());
    a.set_peers(many);
    echo(&client, &server)?;
    assert_eq!(a.counters().peers[&B.lease()].tx_packets, 1, "counts from anew");
    assert_eq!(count(&b, Counter::DecapUser).packets, 2);
    Ok(())
}
