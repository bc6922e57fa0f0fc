//! Single packets over real interfaces: what a test run cannot show. A namespace of the test's own has the tunnel device
//! `flannel0` (a TUN, whose reader is the test), the underlay `u0`, and the wire's far end `u1`, where the test listens
//! and sends.

use std::{collections::BTreeSet, thread};

use anyhow::{Context as _, Result, anyhow, ensure};
use aya::programs::{
    LinkOrder, TcAttachType, XdpMode,
    tc::{NlOptions, TcAttachOptions, TcError, qdisc_add_clsact},
};
use flannel_common::{
    counter::Counter,
    tunnel::{FIXED_SOURCE_PORT, OUTER_DF, SOURCE_CHECK_ENFORCE, SOURCE_CHECK_OBSERVE, Settings, XDP_PROBE},
};
use flannel_tests::{
    kernel::{Needs, TCX, XDP_TEST_METADATA},
    programs::{Context, Programs, verdict},
};
use libtest_mimic::Trial;
use proptest::{
    strategy::{Strategy as _, ValueTree as _},
    test_runner::TestRunner,
};

use crate::{
    packets::{
        ETHERNET, Ip, NODE, OVERHEAD, OWN, PEER, POD, PORT, REMOTE_POD, TCP, UDP, checksum, frame, peer,
        peer_subnet, settings, transport,
    },
    trial,
};

mod device;

use device::{Port, Tun, index, ip, proc_sys};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        trial("wire::a_packet_leaves_in_a_datagram_like_flanneld_s", || in_namespace(leaves)),
        trial("wire::flags_set_df_and_the_source_port", || in_namespace(flags)),
        trial("wire::a_flow_keeps_its_source_port_and_flows_spread", || in_namespace(ports)),
        trial("wire::what_has_no_peer_is_read_from_the_device", || in_namespace(no_peer)),
        trial("wire::a_super_packet_leaves_whole", || in_namespace(super_packet)),
        trial("wire::what_goes_in_at_one_end_comes_out_at_the_other", || in_namespace(round_trip)),
        trial("wire::tc_delivers_as_received_on_the_device", || in_namespace(tc_delivers)),
        trial("wire::all_tcp_and_only_tcp_takes_the_pair", || in_namespace(pair)),
        trial("wire::xdp_marks_arrive_in_tc", || in_namespace(xdp_delivers)),
        trial("wire::a_driver_without_metadata_leaves_the_frame_whole_to_tc", || in_namespace(no_metadata)),
        trial("wire::probe_marks_arrive_and_tc_decapsulates", || in_namespace(probe)),
        trial("wire::a_mark_on_a_packet_of_another_network_is_not_believed", || in_namespace(foreign_mark)),
        trial("wire::a_vlan_is_not_the_underlay", || in_namespace(vlan)),
        trial("wire::through_the_tunnel_and_back_into_it", || in_namespace(hairpin)),
    ]
}

/// The namespace, its devices and the programs of node A.
struct Wire {
    programs: Programs,
    tun: Tun,
    flannel0: Port,
    far: Port,
}

fn in_namespace(test: fn() -> Result<()>) -> Result<()> {
    let done = thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).context("unshare the network namespace")?;
        proc_sys("net/ipv6/conf/all/disable_ipv6", "1")?;
        proc_sys("net/ipv6/conf/default/disable_ipv6", "1")?;
        ip("link set lo up")?;
        ip("link add u0 address 02:00:00:00:00:01 type veth peer name u1 address 02:00:00:00:00:02")?;
        for device in ["u0", "u1"] {
            ip(&format!("link set {device} up"))?;
        }
        ip("address add 172.31.0.1/24 dev u0")?;
        ip("neighbour add 172.31.0.2 lladdr 02:00:00:00:00:02 dev u0 nud permanent")?;
        test()
    });
    done.join().map_err(|panic| match panic.downcast_ref::<String>() {
        Some(text) => anyhow!("{text}"),
        None => anyhow!("the test panicked"),
    })?
}

impl Wire {
    fn new(change: impl FnOnce(&mut Settings)) -> Result<Self> {
        let tun = Tun::open("flannel0")?;
        ip("link set flannel0 mtu 1472 up")?;
        let mut settings = Settings { underlay: index("u0")?, device: index("flannel0")?, ..settings(0) };
        change(&mut settings);
        let mut programs = Programs::load(&settings)?;
        programs.add_peer(peer_subnet(), peer(index("u0")?))?;
        Ok(Self { programs, tun, flannel0: Port::open("flannel0")?, far: Port::open("u1")? })
    }

    fn attach(&mut self, program: &str, device: &str, direction: TcAttachType) -> Result<()> {
        attach(&mut self.programs, program, device, direction)
    }

    fn sending(change: impl FnOnce(&mut Settings)) -> Result<Self> {
        let mut wire = Self::new(change)?;
        wire.attach("flannel_encap", "flannel0", TcAttachType::Egress)?;
        Ok(wire)
    }

    fn receiving(change: impl FnOnce(&mut Settings)) -> Result<Self> {
        let mut wire = Self::new(change)?;
        wire.attach("flannel_ingress", "u0", TcAttachType::Ingress)?;
        Ok(wire)
    }

    /// Sends an inner packet out of flannel0; returns the frame that leaves the node.
    fn send(&mut self, inner: &Ip) -> Result<Vec<u8>> {
        self.flannel0.send(&inner.bytes())?;
        self.far.receive()?.with_context(|| format!("nothing left the node: {:?}", self.programs.counted()))
    }

    fn counted(&self) -> Result<Vec<(Counter, u64)>> {
        Ok(self.programs.counted()?.into_iter().map(|(counter, count)| (counter, count.packets)).collect())
    }
}

fn attach(programs: &mut Programs, program: &str, device: &str, direction: TcAttachType) -> Result<()> {
    let options = if TCX.met() {
        TcAttachOptions::TcxOrder(LinkOrder::first())
    } else {
        match qdisc_add_clsact(device) {
            Err(TcError::NetlinkError(e)) if e.raw_os_error() == Some(libc::EEXIST) => {}
            result => result.with_context(|| format!("add clsact to {device}"))?,
        }
        TcAttachOptions::Netlink(NlOptions::default())
    };
    programs
        .classifier(program)?
        .attach_with_options(device, direction, options)
        .with_context(|| format!("attach {program} to {device}"))?;
    Ok(())
}

fn outgoing() -> Ip {
    Ip { source: POD, destination: REMOTE_POD, ..Ip::default() }
}

/// Checks everything about a datagram but the identification and the source port, which it returns.
fn check_datagram(frame: &[u8], inner: &Ip, flags: u16) -> Result<u16> {
    let sent = Ip { ttl: inner.ttl - 1, ..inner.clone() }.bytes();
    ensure!(frame.len() == ETHERNET + OVERHEAD + sent.len(), "{} bytes", frame.len());
    let (link, rest) = frame.split_at(ETHERNET);
    ensure!(link == [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0], "Ethernet header {link:02x?}");
    let (outer, rest) = rest.split_at(20);
    let mut want = vec![0x45, inner.tos & 3];
    want.extend(((OVERHEAD + sent.len()) as u16).to_be_bytes());
    want.extend(&outer[4..6]);
    want.extend([if flags & OUTER_DF == 0 { 0 } else { 0x40 }, 0, 64, UDP]);
    want.extend(&outer[10..12]);
    want.extend(OWN);
    want.extend(NODE);
    ensure!(outer == want, "outer header\n  {outer:02x?} instead of\n  {want:02x?}");
    ensure!(checksum(outer) == 0, "outer checksum: {outer:02x?}");
    let (udp, payload) = rest.split_at(8);
    let length = (sent.len() as u16 + 8).to_be_bytes();
    ensure!(udp[2..] == [0x20, 0x5D, length[0], length[1], 0, 0], "UDP header {udp:02x?}");
    ensure!(payload == sent, "inner packet\n  {payload:02x?} instead of\n  {sent:02x?}");
    Ok(u16::from_be_bytes([udp[0], udp[1]]))
}

fn leaves() -> Result<()> {
    let mut wire = Wire::sending(|_| {})?;
    let rows = [
        ("UDP", outgoing()),
        ("TCP", Ip { protocol: TCP, ..outgoing() }),
        ("ICMP", Ip { protocol: 1, ..outgoing() }),
        ("bare header", Ip { protocol: 253, payload: Vec::new(), ..outgoing() }),
        ("odd length", Ip { payload: transport(31), ..outgoing() }),
        ("full MTU", Ip { payload: transport(1452), ..outgoing() }),
        ("no DF", Ip { fragment: 0, ..outgoing() }),
        ("first fragment", Ip { fragment: 0x2000, ..outgoing() }),
        ("middle fragment", Ip { fragment: 0x20B9, ..outgoing() }),
        ("last fragment", Ip { fragment: 0x00B9, ..outgoing() }),
        ("router alert", Ip { options: vec![0x94, 4, 0, 0], ..outgoing() }),
        ("60 bytes of header", Ip { options: vec![1; 40], ..outgoing() }),
        ("TTL 2", Ip { ttl: 2, ..outgoing() }),
        ("TTL 255", Ip { ttl: 255, ..outgoing() }),
        ("DSCP", Ip { tos: 0xB8, ..outgoing() }),
        ("ECT(0)", Ip { tos: 2, ..outgoing() }),
        ("ECT(1)", Ip { tos: 1, ..outgoing() }),
        ("CE", Ip { tos: 3, ..outgoing() }),
        (
            "a datagram of another tunnel",
            Ip { payload: crate::packets::udp(1, PORT, &Ip::default().bytes()), ..outgoing() },
        ),
    ];
    let mut bytes = 0;
    for (what, inner) in &rows {
        let frame = wire.send(inner).context(*what)?;
        let port = check_datagram(&frame, inner, 0).context(*what)?;
        ensure!(port >= 0xC000, "{what}: source port {port}");
        bytes += inner.bytes().len() as u64;
    }
    let packets = rows.len() as u64;
    ensure!(wire.counted()? == [(Counter::Encapsulated, packets)], "{:?}", wire.counted()?);
    let count = wire.programs.peer_count(PEER)?;
    ensure!((count.tx_packets, count.tx_bytes) == (packets, bytes), "{count:?}");
    Ok(())
}

fn flags() -> Result<()> {
    let mut wire = Wire::sending(|settings| settings.flags = FIXED_SOURCE_PORT | OUTER_DF)?;
    let frame = wire.send(&outgoing())?;
    let port = check_datagram(&frame, &outgoing(), OUTER_DF)?;
    ensure!(port == PORT, "source port {port}");
    Ok(())
}

fn ports() -> Result<()> {
    let mut wire = Wire::sending(|_| {})?;
    let mut ports = BTreeSet::new();
    for flow in 0..64_u8 {
        let mut inner = outgoing();
        inner.payload[1] = flow;
        let first = check_datagram(&wire.send(&inner)?, &inner, 0)?;
        inner.payload[19] ^= 0xFF;
        inner.id += 1;
        let second = check_datagram(&wire.send(&inner)?, &inner, 0)?;
        ensure!(first == second, "flow {flow} had ports {first} and {second}");
        ports.insert(first);
    }
    ensure!(ports.len() > 48, "64 flows share {} ports", ports.len());
    Ok(())
}

fn no_peer() -> Result<()> {
    let mut wire = Wire::sending(|_| {})?;
    let lost = Ip { destination: [10, 244, 9, 9], ..outgoing() }.bytes();
    wire.flannel0.send(&lost)?;
    ensure!(wire.tun.read()? == Some(lost), "not read as it was sent");
    ensure!(wire.counted()? == [(Counter::NoPeer, 1)], "{:?}", wire.counted()?);
    wire.programs.clear_counters()?;
    for length in 1..20 {
        let cut = outgoing().bytes()[..length].to_vec();
        wire.flannel0.send(&cut)?;
        ensure!(wire.tun.read()? == Some(cut), "{length} bytes: not read as they were sent");
    }
    ensure!(wire.counted()?.is_empty(), "{:?}", wire.counted()?);
    Ok(())
}

fn tcp_super_packet() -> Ip {
    let mut payload =
        vec![0x9C, 0x40, 0x00, 0x50, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xFF, 0xFF, 0, 0, 0, 0];
    payload.extend((0..14_000).map(|i| i as u8));
    Ip { protocol: TCP, payload, ..outgoing() }
}

fn super_packet() -> Result<()> {
    let mut wire = Wire::sending(|_| {})?;
    let inner = tcp_super_packet();
    wire.flannel0.send_tcp_super_packet(&inner.bytes(), 1400)?;
    let frame = wire.far.receive()?.context("nothing left the node")?;
    // The transport checksum is left to the wire's end, so it is not compared.
    let mut seen = frame.clone();
    seen[ETHERNET + OVERHEAD + 36..][..2].fill(0);
    check_datagram(&seen, &inner, 0)?;
    Ok(())
}

fn round_trip() -> Result<()> {
    let mut wire = Wire::sending(|_| {})?;
    let mut remote = Programs::load(&Settings {
        local: u32::from_ne_bytes(NODE),
        own_subnet: u32::from_ne_bytes([10, 244, 2, 0]),
        ..settings(SOURCE_CHECK_ENFORCE)
    })?;
    let us = flannel_common::peer::Peer { node: u32::from_ne_bytes(OWN), ..peer(2) };
    remote.add_peer([10, 244, 1, 0].into(), us)?;
    let inner = (
        proptest::arbitrary::any::<(u8, u8, u8, u8, u16, u16)>(),
        3_u8..,
        0_usize..=10,
        proptest::collection::vec(proptest::arbitrary::any::<u8>(), 0..1400),
    )
        .prop_map(|((from, to, protocol, tos, id, fragment), ttl, words, payload)| Ip {
            source: [10, 244, 1, from],
            destination: [10, 244, 2, to],
            protocol,
            tos,
            ttl,
            id,
            fragment,
            options: vec![1; 4 * words],
            payload,
        });
    let mut runner = TestRunner::deterministic();
    for _ in 0..256 {
        let inner = inner.new_tree(&mut runner).map_err(|e| anyhow!("{e}"))?.current();
        let frame = wire.send(&inner).with_context(|| format!("{inner:?}"))?;
        let want = Ip { ttl: inner.ttl - 2, ..inner.clone() }.bytes();
        let mark = if XDP_TEST_METADATA.met() { 4 } else { 0 };
        for (program, verdict, front) in
            [("flannel_ingress", verdict::TC_REDIRECT, 0), ("flannel_decap_xdp", verdict::XDP_PASS, mark)]
        {
            let outcome = remote.run(program, &frame, Context::Plain)?;
            ensure!(outcome.verdict == verdict, "{program}: {:?} for {inner:?}", outcome.counted);
            ensure!(outcome.packet[front + ETHERNET..] == want, "{program}: {inner:?}");
        }
    }
    Ok(())
}

/// What flannel0 received, or an error with the counters.
fn delivered(wire: &mut Wire) -> Result<Vec<u8>> {
    wire.flannel0
        .receive()?
        .with_context(|| format!("nothing received on flannel0: {:?}", wire.programs.counted()))
}

fn lowered(inner: &Ip) -> Vec<u8> {
    Ip { ttl: inner.ttl - 1, ..inner.clone() }.bytes()
}

/// A frame from the far end, addressed to the underlay's MAC address.
fn incoming(inner: &Ip) -> Vec<u8> {
    frame(inner)
}

fn tc_delivers() -> Result<()> {
    let mut wire = Wire::receiving(|_| {})?;
    for protocol in [TCP, UDP] {
        let inner = Ip { protocol, ..Ip::default() };
        wire.far.send(&incoming(&inner))?;
        ensure!(delivered(&mut wire)? == lowered(&inner), "protocol {protocol}");
    }
    ensure!(wire.counted()? == [(Counter::DecapTc, 2)], "{:?}", wire.counted()?);
    Ok(())
}

fn pair() -> Result<()> {
    ip("link add flannel0p mtu 1472 type veth peer name flannel0g mtu 1472")?;
    for device in ["flannel0p", "flannel0g"] {
        ip(&format!("link set {device} arp off up"))?;
    }
    let gro_pair = index("flannel0p")?;
    let mut wire = Wire::receiving(|settings| settings.gro_pair = gro_pair)?;
    wire.attach("flannel_gro", "flannel0g", TcAttachType::Ingress)?;
    let mut between = Port::open("flannel0g")?;
    for (protocol, by_pair) in [(TCP, true), (UDP, false), (1, false), (253, false)] {
        let inner = Ip { protocol, ..Ip::default() };
        wire.far.send(&incoming(&inner))?;
        ensure!(delivered(&mut wire)? == lowered(&inner), "protocol {protocol}");
        let seen = if by_pair { between.receive()?.is_some() } else { between.received_at_once()?.is_some() };
        ensure!(seen == by_pair, "protocol {protocol} through the pair: {seen}");
    }
    // By protocol only: a small segment must not overtake a large one.
    for length in [20, 21, 700, 1452] {
        let inner = Ip { protocol: TCP, payload: transport(length), ..Ip::default() };
        wire.far.send(&incoming(&inner))?;
        ensure!(delivered(&mut wire)? == lowered(&inner), "{length} bytes of TCP");
        ensure!(between.receive()?.is_some(), "{length} bytes of TCP not through the pair");
    }
    Ok(())
}

fn attach_xdp(programs: &mut Programs, device: &str) -> Result<()> {
    programs
        .xdp("flannel_decap_xdp")?
        .attach(device, XdpMode::Driver)
        .with_context(|| format!("attach native XDP to {device}"))?;
    Ok(())
}

fn xdp_delivers() -> Result<()> {
    let mut wire = Wire::receiving(|settings| settings.flags = SOURCE_CHECK_ENFORCE)?;
    attach_xdp(&mut wire.programs, "u0")?;
    for protocol in [TCP, UDP] {
        let inner = Ip { protocol, ..Ip::default() };
        wire.far.send(&incoming(&inner))?;
        ensure!(delivered(&mut wire)? == lowered(&inner), "protocol {protocol}");
    }
    let want = [(Counter::DecapXdp, 2), (Counter::MarkSent, 0), (Counter::MarkSeen, 2)];
    let want: Vec<_> = want.into_iter().filter(|(_, packets)| *packets != 0).collect();
    ensure!(wire.counted()? == want, "{:?}", wire.counted()?);
    let seen = wire.programs.counted()?.get(&Counter::MarkSeen).map(|count| count.bytes);
    ensure!(seen == Some(80), "{seen:?} bytes marked");
    Ok(())
}

/// A TAP device has native XDP, but metadata only since Linux 6.15.
fn no_metadata() -> Result<()> {
    let mut wire = Wire::new(|_| {})?;
    let mut tap = Tun::open_tap("tap0")?;
    ip("link set tap0 up")?;
    wire.attach("flannel_ingress", "tap0", TcAttachType::Ingress)?;
    attach_xdp(&mut wire.programs, "tap0")?;
    let inner = Ip::default();
    tap.write(&incoming(&inner))?;
    ensure!(delivered(&mut wire)? == lowered(&inner), "delivered otherwise");
    let want = match (Needs { major: 6, minor: 15, what: "metadata on TAP" }).met() {
        true => [(Counter::DecapXdp, 1), (Counter::MarkSeen, 1)],
        false => [(Counter::DecapTc, 1), (Counter::NoMetadata, 1)],
    };
    let counted = wire.counted()?;
    ensure!(counted.len() == 2 && want.iter().all(|count| counted.contains(count)), "{counted:?}");
    Ok(())
}

fn probe() -> Result<()> {
    let mut wire = Wire::receiving(|settings| settings.flags = XDP_PROBE)?;
    attach_xdp(&mut wire.programs, "u0")?;
    let inner = Ip::default();
    wire.far.send(&incoming(&inner))?;
    ensure!(delivered(&mut wire)? == lowered(&inner), "not decapsulated by tc");
    let want = [(Counter::MarkSent, 1), (Counter::MarkSeen, 1), (Counter::DecapTc, 1)];
    ensure!(wire.counted()? == want, "{:?}", wire.counted()?);
    Ok(())
}

fn foreign_mark() -> Result<()> {
    let mut wire = Wire::receiving(|_| {})?;
    // Someone else's program with our magic, for another network.
    let mut other = Programs::load(&Settings {
        network: u32::from_ne_bytes([10, 99, 0, 0]),
        own_subnet: u32::from_ne_bytes([10, 99, 1, 0]),
        ..settings(SOURCE_CHECK_OBSERVE)
    })?;
    attach_xdp(&mut other, "u0")?;
    wire.far.send(&incoming(&Ip { destination: [10, 99, 1, 1], ..Ip::default() }))?;
    ensure!(wire.flannel0.received_at_once()?.is_none(), "delivered to flannel0");
    ensure!(wire.counted()?.is_empty(), "{:?}", wire.counted()?);
    ensure!(other.counted()?.contains_key(&Counter::DecapXdp), "{:?}", other.counted()?);
    Ok(())
}

fn vlan() -> Result<()> {
    let mut wire = Wire::receiving(|_| {})?;
    let plain = incoming(&Ip::default());
    let tagged = [&plain[..12], &[0x81, 0x00, 0x00, 0x05], &plain[12..]].concat();
    wire.far.send(&tagged)?;
    ensure!(wire.flannel0.received_at_once()?.is_none(), "delivered to flannel0");
    ensure!(wire.counted()?.is_empty(), "{:?}", wire.counted()?);
    wire.far.send(&plain)?;
    ensure!(wire.flannel0.receive()?.is_some(), "the untagged one is not delivered");
    Ok(())
}

/// A packet that came through the tunnel and is sent into it again, as a NodePort hairpin does. Node B lives in the same
/// namespace, on the wire's far end.
fn hairpin() -> Result<()> {
    let mut wire = Wire::sending(|_| {})?;
    let _tun = Tun::open("flannel1")?;
    ip("link set flannel1 mtu 1472 up")?;
    for (name, value) in [("ip_forward", "1"), ("conf/all/rp_filter", "0"), ("conf/flannel1/rp_filter", "0")]
    {
        proc_sys(&format!("net/ipv4/{name}"), value)?;
    }
    ip("route add 10.244.2.0/24 dev flannel1")?;
    ip("neighbour add 172.31.0.1 lladdr 02:00:00:00:00:01 dev u1 nud permanent")?;
    let mut b = Programs::load(&Settings {
        local: u32::from_ne_bytes(NODE),
        own_subnet: u32::from_ne_bytes([10, 244, 2, 0]),
        device: index("flannel1")?,
        underlay: index("u1")?,
        ..settings(0)
    })?;
    let back = flannel_common::peer::Peer { node: u32::from_ne_bytes(OWN), ..peer(index("u1")?) };
    b.add_peer(peer_subnet(), back)?;
    attach(&mut b, "flannel_ingress", "u1", TcAttachType::Ingress)?;
    attach(&mut b, "flannel_encap", "flannel1", TcAttachType::Egress)?;
    let mut near = Port::open("u0")?;

    let inner = Ip { protocol: UDP, ..outgoing() };
    wire.flannel0.send(&inner.bytes())?;
    let frame = near.receive()?.with_context(|| format!("nothing came back: {:?}", b.counted()))?;
    // A, B, the routing on B, B again: four hops.
    ensure!(
        frame[ETHERNET + OVERHEAD..] == Ip { ttl: 60, ..inner }.bytes(),
        "inner packet changed: {frame:02x?}"
    );
    let counted: Vec<_> = b.counted()?.into_keys().collect();
    ensure!(counted == [Counter::Encapsulated, Counter::EncapRetried, Counter::DecapTc], "{counted:?}");

    b.clear_counters()?;
    wire.flannel0.send_tcp_super_packet(&tcp_super_packet().bytes(), 1400)?;
    ensure!(near.received_at_once()?.is_none(), "a super-packet with stale tunnel state was sent");
    let counted: Vec<_> = b.counted()?.into_keys().collect();
    ensure!(counted == [Counter::EncapStaleGso, Counter::DecapTc], "{counted:?}");
    Ok(())
}
