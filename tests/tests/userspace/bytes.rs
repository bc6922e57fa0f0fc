//! One tunnel, judged by the bytes it sends and delivers.

use std::{
    fs::File,
    net::{Ipv4Addr, SocketAddrV4, TcpStream},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use flannel_agent::{
    domain::host_state::SourceCheck,
    host::udp::userspace::{Role, UdpGro},
};
use flannel_common::counter::Counter;

use crate::{
    rig::{
        self, A, B, DEVICE, Half, MTU, PORT, Rig, UNDERLAY, config, count, counts, drops, eventually,
        set_option, start,
    },
    wire::{self, Tap, Way, changed, one_hop_on},
};

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
pub(crate) fn a_recording_is_sent_byte_for_byte() -> Result<()> {
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

pub(crate) fn a_recording_is_delivered_byte_for_byte() -> Result<()> {
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
    counts(&tunnel, Counter::DecapUser, received.len() as u64)?;
    assert_eq!(drops(&tunnel), []);
    Ok(())
}

pub(crate) fn odd_packets_leave_with_only_their_ttl_changed() -> Result<()> {
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

pub(crate) fn checksums_left_to_us_are_right_on_the_wire() -> Result<()> {
    let half = Half::new(SourceCheck::Enforce)?;
    let pod = rig::udp(&half.rig.a, A.pod, 7000)?;
    let mut got = [0; 2000];
    for size in [0, 1, 100, 1444] {
        pod.send_to(&vec![5; size], (B.pod, 7001))?;
        let (length, _) = rig::receive(&half.peer, &mut got)?;
        assert_eq!(wire::transport_residue(&got[..length]), 0, "UDP of {size} bytes");
    }
    // A SYN nobody answers.
    let _ = half.rig.a.run(|| {
        TcpStream::connect_timeout(&SocketAddrV4::new(B.pod, 7002).into(), Duration::from_millis(50))
    });
    let (length, _) = rig::receive(&half.peer, &mut got)?;
    assert_eq!((got[9], wire::transport_residue(&got[..length])), (6, 0), "TCP");
    Ok(())
}

pub(crate) fn a_ttl_that_runs_out_is_dropped_silently() -> Result<()> {
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

pub(crate) fn a_spoofed_source_is_treated_as_configured() -> Result<()> {
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
            let reasons = || {
                [
                    of(Counter::SourceRefused),
                    of(Counter::DestinationRefused),
                    of(Counter::SourceObserved),
                    of(Counter::DestinationObserved),
                ]
            };
            let before = reasons();
            let delivered = half.inbound(packet)?;
            let after = reasons();
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

/// The packet that is delivered, before this end lowers its TTL, or the reason why none is.
type Verdict = Result<Vec<u8>, &'static str>;

pub(crate) fn only_one_whole_ipv4_packet_is_delivered() -> Result<()> {
    let half = Half::new(SourceCheck::Off)?;
    let good = wire::udp(B.pod, A.pod, &[7; 50]);
    let with_total = |total: u16| changed(&good, |p| p[2..4].copy_from_slice(&total.to_be_bytes()));
    let oversize = wire::udp(B.pod, A.pod, &vec![7; MTU as usize - 27]);
    let trailing = [good.as_slice(), b"tail"].concat();
    let long_tail = [good.as_slice(), &[9; 2000]].concat();
    let cases: [(&str, Vec<u8>, Verdict); 11] = [
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

pub(crate) fn outer_fragments_are_delivered() -> Result<()> {
    let half = Half::new(SourceCheck::Enforce)?;
    half.rig.b.ip(&format!("route change 10.99.0.0/24 dev {UNDERLAY} src {} mtu 600", B.node))?;
    let underlay = Tap::open(&half.rig.a, UNDERLAY)?;
    let packet = wire::udp(B.pod, A.pod, &[7; 1400]);
    assert_eq!(half.inbound(&packet)?, [one_hop_on(&packet)]);
    assert_eq!(underlay.packets(Way::In, 3, |p| p[9] == 17 && p[6] & 0x3f != 0 || p[7] != 0).len(), 3);
    Ok(())
}

pub(crate) fn congestion_marks_reach_the_inner_packet() -> Result<()> {
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

pub(crate) fn an_unknown_destination_is_answered() -> Result<()> {
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
    counts(&half.tunnel, Counter::NoPeer, 1)?;

    // Our own subnet is nobody's lease either.
    half.device.send(&wire::udp(A.pod, [10, 244, 49, 99].into(), b"self"))?;
    assert_eq!(half.device.packets(Way::In, 1, |p| p[9] == 1).len(), 1);

    // Counted but not answered: ICMP, a later fragment.
    for silent in [changed(&offender, |p| p[9] = 1), changed(&offender, |p| p[7] = 9)] {
        half.device.send(&silent)?;
    }
    counts(&half.tunnel, Counter::NoPeer, 4)?;
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
