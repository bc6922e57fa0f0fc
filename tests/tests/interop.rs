//! Next to the original: recordings of flanneld 0.7.0 and 0.20.2, played back against the agent.
//!
//! The lab's addresses are those of the recordings, and leases recorded there are put into etcd first, so the agents take
//! the recorded subnets and every inner packet can be compared byte for byte.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    net::{Ipv4Addr, SocketAddrV4},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::{Context as _, Result, ensure};
use flannel_tests::{
    agent::AgentOptions,
    probe::{
        capture::{Capture, ipv4, udp_payload},
        raw::{send_datagrams, send_packets},
    },
    scenario::{run, scenario},
    topology::Lab,
};
use libtest_mimic::Trial;
use pcap_file::pcap::PcapReader;
use serde_json::Value;

const PORT: u16 = 8285;
const H1: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 11);
const H2: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 12);
const POD1: Ipv4Addr = Ipv4Addr::new(10, 244, 49, 2);

fn main() -> ExitCode {
    let mut trials = Vec::new();
    for tier in ["xdp", "tc", "tun"] {
        trials.push(Trial::test(
            format!("inner_packets_on_the_wire_equal_those_of_flanneld_0_7_over_{tier}"),
            test(tier, Lab::new(&format!("wire-{tier}")).hosts(3), wire),
        ));
        trials.push(Trial::test(
            format!("datagrams_of_flanneld_0_7_are_delivered_over_{tier}"),
            test(tier, Lab::new(&format!("from-original-{tier}")).hosts(3), from_the_original),
        ));
    }
    trials.push(scenario("leases_equal_those_of_flanneld_0_20", Lab::new("leases").hosts(3), leases));
    run(trials)
}

fn test(
    tier: &'static str,
    plan: flannel_tests::topology::Plan,
    check: fn(&mut Lab, &str) -> Result<()>,
) -> impl FnOnce() -> Result<(), libtest_mimic::Failed> + Send + 'static {
    move || {
        let mut lab = plan.build().map_err(|e| format!("{e:#}"))?;
        let result = check(&mut lab, tier);
        lab.verdict(result).map_err(|e| format!("{e:#}").into())
    }
}

fn fixture(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(path)
}

/// The recorded leases: key below `subnets/` and value.
fn recorded_leases_v2() -> Result<BTreeMap<String, String>> {
    let dump: Value = serde_json::from_slice(&fs::read(fixture("v0.7.0/udp/etcd-v2.json"))?)?;
    let mut leases = BTreeMap::new();
    collect(&dump["node"], &mut leases);
    ensure!(leases.len() == 3, "{leases:?}");
    Ok(leases)
}

fn collect(node: &Value, leases: &mut BTreeMap<String, String>) {
    if let (Some(key), Some(value)) = (node["key"].as_str(), node["value"].as_str())
        && let Some((_, key)) = key.split_once("/subnets/")
    {
        leases.insert(key.to_owned(), value.to_owned());
    }
    for child in node["nodes"].as_array().into_iter().flatten() {
        collect(child, leases);
    }
}

/// UDP payloads that the recorded host 1 sent and received.
struct Recording {
    sent: Vec<Vec<u8>>,
    to_h2: Vec<Vec<u8>>,
}

fn recording() -> Result<Recording> {
    let file = File::open(fixture("v0.7.0/udp/underlay-h1.pcap")).context("open the recording")?;
    let mut reader = PcapReader::new(file)?;
    let mut recording = Recording { sent: Vec::new(), to_h2: Vec::new() };
    while let Some(frame) = reader.next_packet() {
        let frame = frame?;
        let Some(packet) = ipv4(&frame.data) else { continue };
        let Some(inner) = udp_payload(packet, PORT) else { continue };
        if packet.get(12..16) == Some(H1.octets().as_slice()) {
            recording.sent.push(inner.to_vec());
            if packet.get(16..20) == Some(H2.octets().as_slice()) {
                recording.to_h2.push(inner.to_vec());
            }
        }
    }
    ensure!(recording.sent.len() >= 10 && recording.to_h2.len() >= 4, "too few packets recorded");
    Ok(recording)
}

/// The recorded leases stand in etcd when the agents start.
fn bring_up(lab: &mut Lab, tier: &str) -> Result<()> {
    for (key, value) in recorded_leases_v2()? {
        lab.datastore().put(&format!("subnets/{key}"), &value)?;
    }
    // With the MTU told, the agents send no probes, which look otherwise than packets of pods.
    let options = AgentOptions::new()?.datapath(tier).flag("--udp-mtu=1472");
    for index in 0..2 {
        lab.host_mut(index).start_agent(&options)?;
    }
    for index in 0..2 {
        // The third host has only its lease, as written by flanneld 0.7.
        lab.host_mut(index).agent_mut()?.wait_peers(2)?;
        lab.host_mut(index).attach_pod()?;
    }
    ensure!(lab.host(0).pod()?.address == POD1, "the pod is at {}", lab.host(0).pod()?.address);
    Ok(())
}

/// A packet with another TTL and the checksum that goes with it.
fn with_ttl(packet: &[u8], ttl: u8) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if let Some(byte) = packet.get_mut(8) {
        *byte = ttl;
    }
    let sum = header_checksum(&packet);
    if let Some(bytes) = packet.get_mut(10..12) {
        bytes.copy_from_slice(&sum.to_be_bytes());
    }
    packet
}

/// RFC 1071 over a header without options, its checksum field taken as zero.
fn header_checksum(packet: &[u8]) -> u16 {
    let words = packet.get(..20).unwrap_or_default().chunks_exact(2).enumerate();
    let mut sum: u32 = words
        .filter(|(index, _)| *index != 5)
        .map(|(_, word)| u32::from(u16::from_be_bytes([word[0], word[1]])))
        .sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

fn ttl(packet: &[u8]) -> u8 {
    packet.get(8).copied().unwrap_or(0)
}

/// The packets that pod 1 sent then are sent again; what the agent puts on the wire must be what flanneld put there.
fn wire(lab: &mut Lab, tier: &str) -> Result<()> {
    bring_up(lab, tier)?;
    let recorded: Vec<Vec<u8>> = recording()?
        .sent
        .into_iter()
        .filter(|inner| inner.get(12..16) == Some(POD1.octets().as_slice()))
        .filter(|inner| inner.get(16..19) != Some([10, 99, 0].as_slice()))
        .collect();
    ensure!(recorded.len() >= 10, "only {} packets recorded", recorded.len());
    // Lowered once by routing on the node and once by the tunnel.
    let sent: Vec<Vec<u8>> = recorded.iter().map(|inner| with_ttl(inner, ttl(inner) + 2)).collect();
    // A veth passes a batch of datagrams on as it is; a wire gets them one by one.
    lab.host(0).netns().offload("eth0", "tx-udp-segmentation off")?;

    let capture = Capture::start(lab.switch(), "sw-h1")?;
    send_packets(&lab.host(0).pod()?.netns, &sent)?;
    let frames = capture.finish_with(|frames| {
        let inner = inner_of(&outer_of(frames));
        recorded.iter().all(|wanted| inner.contains(&wanted.as_slice()))
    })?;
    let outer = outer_of(&frames);
    let inner = inner_of(&outer);
    // Answers to the packets played back may be on the wire as well.
    for (number, wanted) in recorded.iter().enumerate() {
        ensure!(
            inner.contains(&wanted.as_slice()),
            "recorded packet {number} is not on the wire:\nwanted {wanted:02x?}\ngot    {inner:02x?}"
        );
    }
    for packet in outer {
        outer_header(packet, tier)?;
    }
    Ok(())
}

/// Datagrams that host 1 sent to the tunnel's port.
fn outer_of(frames: &[Vec<u8>]) -> Vec<&[u8]> {
    let packets = frames.iter().filter_map(|frame| ipv4(frame));
    let sent = packets.filter(|packet| packet.get(12..16) == Some(H1.octets().as_slice()));
    sent.filter(|packet| udp_payload(packet, PORT).is_some()).collect()
}

fn inner_of<'p>(outer: &[&'p [u8]]) -> Vec<&'p [u8]> {
    outer.iter().filter_map(|packet| udp_payload(packet, PORT)).collect()
}

/// What receivers, routers and firewalls see of us (the original differs in id, DF, source port and checksum only).
fn outer_header(packet: &[u8], tier: &str) -> Result<()> {
    let (ip, udp) = packet.split_at_checked(20).context("a short packet")?;
    let word = |bytes: &[u8], at: usize| bytes.get(at..at + 2).map(|b| u16::from_be_bytes([b[0], b[1]]));
    ensure!(ip.first() == Some(&0x45), "version and header length: {ip:02x?}");
    ensure!(ip.get(1) == Some(&0), "TOS: {ip:02x?}");
    ensure!(word(ip, 2).map(usize::from) == Some(packet.len()), "total length: {ip:02x?}");
    ensure!(ip.get(8) == Some(&64), "TTL: {ip:02x?}");
    ensure!(word(ip, 10) == Some(header_checksum(ip)), "header checksum: {ip:02x?}");
    ensure!(word(udp, 2) == Some(PORT), "destination port: {udp:02x?}");
    ensure!(word(udp, 4).map(usize::from) == Some(udp.len()), "UDP length: {udp:02x?}");
    if tier != "tun" {
        ensure!(ip.get(6..8) == Some([0, 0].as_slice()), "DF or fragment: {ip:02x?}");
        ensure!(word(udp, 0).is_some_and(|port| port >= 0xC000), "source port: {udp:02x?}");
        ensure!(word(udp, 6) == Some(0), "UDP checksum: {udp:02x?}");
    }
    Ok(())
}

/// Host 1 is an original now: no agent, only a socket on its port. Its datagrams reach pod 2, whole ones by the tier's own
/// way, odd ones by the exception path.
fn from_the_original(lab: &mut Lab, tier: &str) -> Result<()> {
    bring_up(lab, tier)?;
    lab.host_mut(0).agent_mut()?.crash()?;
    let original = lab.host(0).netns();
    // What the dead agent left: its tunnel must not answer in the original's place.
    original.ip("link del flannel0")?;
    let recorded = recording()?.to_h2;
    let recorded: Vec<Vec<u8>> =
        recorded.into_iter().filter(|i| i.get(16..20) == Some([10, 244, 100, 2].as_slice())).collect();
    ensure!(recorded.len() >= 4, "only {} packets recorded", recorded.len());

    let (source, target) = (SocketAddrV4::new(H1, PORT), SocketAddrV4::new(H2, PORT));
    let pod = &lab.host(1).pod()?.netns;
    let from_pod = |frames: &[Vec<u8>]| -> Vec<Vec<u8>> {
        let packets = frames.iter().filter_map(|frame| ipv4(frame));
        let of_pod = packets.filter(|packet| packet.get(12..16) == Some(POD1.octets().as_slice()));
        of_pod.map(<[u8]>::to_vec).collect()
    };
    // What comes of them, from when so many packets have.
    let delivered = |payloads: &[Vec<u8>], packets: usize| -> Result<Vec<Vec<u8>>> {
        let capture = Capture::start(pod, "eth0")?;
        send_datagrams(original, source, target, payloads)?;
        let frames = capture.finish_with(|frames| from_pod(frames).len() >= packets)?;
        Ok(from_pod(&frames))
    };
    // Lowered once by the tunnel and once by routing.
    let wanted: Vec<Vec<u8>> = recorded.iter().map(|inner| with_ttl(inner, ttl(inner) - 2)).collect();

    let got = delivered(&recorded, wanted.len())?;
    ensure!(got == wanted, "whole datagrams:\nwanted {wanted:02x?}\ngot    {got:02x?}");

    let longer: Vec<Vec<u8>> = recorded.iter().map(|inner| [inner.as_slice(), b"tail"].concat()).collect();
    let got = delivered(&longer, wanted.len())?;
    let as_far: Vec<&[u8]> = got.iter().zip(&wanted).map(|(g, w)| g.get(..w.len()).unwrap_or(g)).collect();
    ensure!(as_far == wanted, "four bytes behind the packet:\nwanted {wanted:02x?}\ngot    {got:02x?}");

    // Cut on the way: only the socket sees the whole datagram again.
    original.ip("link set eth0 mtu 576")?;
    let large: Vec<Vec<u8>> = recorded.iter().map(|inner| enlarged(inner, 1400)).collect();
    let wanted: Vec<Vec<u8>> = large.iter().map(|inner| with_ttl(inner, ttl(inner) - 2)).collect();
    let got = delivered(&large, wanted.len())?;
    ensure!(got == wanted, "outer fragments: {} of {} delivered whole", got.len(), wanted.len());

    // A whole one comes last: when it is there, those before it were judged.
    let mut short: Vec<Vec<u8>> = recorded.iter().map(|inner| inner[..inner.len() - 10].to_vec()).collect();
    short.extend(recorded.first().cloned());
    let mut got = delivered(&short, 1)?;
    let last = got.pop().context("the whole packet is not delivered")?;
    ensure!(last.len() >= 84, "the last packet is {last:02x?}");
    ensure!(
        got.iter().all(|packet| packet.len() < 84),
        "a truncated packet arrived as a whole one: {got:02x?}"
    );
    Ok(())
}

/// The packet with zeros behind it up to `length` bytes in all; its own checksums other than the header's are not kept.
fn enlarged(inner: &[u8], length: u16) -> Vec<u8> {
    let mut packet = inner.to_vec();
    packet.resize(usize::from(length), 0);
    if let Some(bytes) = packet.get_mut(2..4) {
        bytes.copy_from_slice(&length.to_be_bytes());
    }
    with_ttl(&packet, ttl(inner))
}

/// Same hosts, same configuration: our values must be those that flanneld 0.20.2 wrote, and our keys of the same form.
fn leases(lab: &mut Lab) -> Result<()> {
    let dump: Value = serde_json::from_slice(&fs::read(fixture("v0.20.2/udp/etcd-v3.json"))?)?;
    let recorded: Vec<(&str, &str)> = dump
        .as_array()
        .context("the dump is no list")?
        .iter()
        .filter_map(|entry| Some((entry["key"].as_str()?, entry["value"].as_str()?)))
        .collect();
    let config = recorded.iter().find(|(key, _)| key.ends_with("/config")).context("no configuration")?.1;
    lab.datastore().put_config(config)?;
    lab.bring_up(&["auto"; 3])?;

    let mut theirs: Vec<&str> =
        recorded.iter().filter(|(key, _)| key.contains("/subnets/")).map(|(_, value)| *value).collect();
    let ours = lab.datastore().leases()?;
    let mut values: Vec<&str> = ours.iter().map(|(_, value)| value.as_str()).collect();
    theirs.sort_unstable();
    values.sort_unstable();
    ensure!(values == theirs, "ours {values:?}, theirs {theirs:?}");
    for (key, _) in &ours {
        let (address, length) = key.rsplit_once('-').with_context(|| format!("key {key}"))?;
        let address: Ipv4Addr = address.parse().with_context(|| format!("key {key}"))?;
        ensure!(
            length == "24" && address.octets()[3] == 0 && address.octets()[..2] == [10, 244],
            "key {key}"
        );
    }
    lab.ping_all_pairs(2)
}
