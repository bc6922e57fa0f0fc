//! What decapsulation accepts: one function, the same order in XDP, tc and user space.
//!
//! Whatever the rules do not claim for the tunnel is left to the host's stack, and so reaches the UDP socket that the
//! agent keeps bound: outer fragments, outer options, odd lengths.

use super::{Ipv4, Outer, PROTOCOL_UDP, Rewrite, Tunnelled, VERSION_4_NO_OPTIONS, hop};
use crate::{
    OVERHEAD,
    counter::Counter,
    peer::{Peer, PeerKey},
    tunnel::{SOURCE_CHECK_ENFORCE, SOURCE_CHECK_OBSERVE, Settings},
};

/// What is to be done with a received frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing the fast path understands; goes on to the stack untouched, and with it perhaps to the socket.
    NotOurs,
    /// Ours, but the socket's business: goes on untouched and is counted.
    HandOn(Counter),
    /// Dropped and counted, also for the peer in whose subnet the source lies ([`NO_PEER`] if there is none).
    Drop(Counter, u32),
    /// Delivered as received on the tunnel device.
    Deliver(Delivery),
}

/// Instead of a [`Peer::index`]: no entry of `PEER_COUNTERS`, so that counting under it has no effect.
pub const NO_PEER: u32 = u32::MAX;

/// How an accepted packet is delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// The changed fields of the inner header.
    pub rewrite: Rewrite,
    /// [`Peer::index`] of the peer that sent it, when it came from that peer's subnet; else [`NO_PEER`]. (An `Option`
    /// would leave its payload undefined, which the verifier refuses to see moved about.)
    pub peer: u32,
    /// [`Peer::index`] of the peer in whose subnet its source lies, whoever sent it; else [`NO_PEER`].
    pub claimed: u32,
    /// What `observe` would like to have refused.
    pub observed: Option<Counter>,
}

/// What is known of the datagram an inner packet came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arrival {
    /// Outer source address, network byte order.
    pub node: u32,
    /// Outer TOS byte; 0 where it is not known.
    pub tos: u8,
}

impl Outer {
    /// Whether the header is one that encapsulation writes, to us: no options, no fragment, our address and port. Any
    /// source, any UDP checksum.
    #[inline(always)]
    #[must_use]
    pub const fn is_ours(&self, settings: &Settings) -> bool {
        self.ip.version_ihl == VERSION_4_NO_OPTIONS
            && self.ip.protocol == PROTOCOL_UDP
            && self.ip.destination() == settings.local
            && u16::from_ne_bytes(self.udp.destination) == settings.port
            && !self.ip.is_fragment()
    }
}

impl Tunnelled {
    /// Whether the datagram is exactly one inner packet, by all three headers. Refuses trailing bytes and what UDP GRO
    /// merged.
    #[inline(always)]
    #[must_use]
    pub const fn lengths_agree(&self) -> bool {
        let inner = self.inner.total_length() as u32;
        let udp = u16::from_be_bytes(self.outer.udp.length) as u32;
        inner + OVERHEAD == self.outer.ip.total_length() as u32 && inner + 8 == udp
    }
}

/// Judges a received frame by the 48 bytes behind its Ethernet header (whose type is IPv4). `peers` looks a key up in
/// `PEERS`; it is called at most once.
#[inline(always)]
pub fn decapsulate(
    settings: &Settings,
    packet: &Tunnelled,
    peers: impl FnOnce(PeerKey) -> Option<Peer>,
) -> Verdict {
    let Tunnelled { outer, inner } = packet;
    if !outer.is_ours(settings) || inner.version_ihl >> 4 != 4 {
        return Verdict::NotOurs;
    }
    if !packet.lengths_agree() || !inner.is_valid() {
        return Verdict::HandOn(Counter::LengthMismatch);
    }
    admit(settings, Arrival { node: outer.ip.source(), tos: outer.ip.tos }, inner, peers)
}

/// The rules about a whole inner packet: source and destination check, TTL, ECN. The caller has checked that it is one
/// ([`Ipv4::is_valid`], and its bytes are all there).
#[inline(always)]
pub fn admit(
    settings: &Settings,
    arrival: Arrival,
    inner: &Ipv4,
    peers: impl FnOnce(PeerKey) -> Option<Peer>,
) -> Verdict {
    let (peer, claimed) = match peers(settings.peer_key(inner.source())) {
        Some(peer) if peer.node == arrival.node => (peer.index, peer.index),
        Some(peer) => (NO_PEER, peer.index),
        None => (NO_PEER, NO_PEER),
    };
    let mut observed = None;
    if settings.flags & (SOURCE_CHECK_ENFORCE | SOURCE_CHECK_OBSERVE) != 0 {
        let enforce = settings.flags & SOURCE_CHECK_ENFORCE != 0;
        if !is_source_right(settings, arrival, inner, peer != NO_PEER) {
            if enforce {
                return Verdict::Drop(Counter::SourceRefused, claimed);
            }
            observed = Some(Counter::SourceObserved);
        } else if !is_destination_right(settings, inner) {
            if enforce {
                return Verdict::Drop(Counter::DestinationRefused, claimed);
            }
            observed = Some(Counter::DestinationObserved);
        }
    }
    match hop(inner, arrival.tos) {
        Ok(rewrite) => Verdict::Deliver(Delivery { rewrite, peer, claimed, observed }),
        Err(reason) => Verdict::Drop(reason, claimed),
    }
}

/// The source lies in the subnet leased by the sending node, or it is that node's own address: a pod that talks to a
/// remote host unmasqueraded gets its answers through the tunnel. (Any host may so send as itself;
/// it could as well route to our pods through this node.) Never one of ours, and nothing that no host may have as source.
#[inline(always)]
const fn is_source_right(settings: &Settings, arrival: Arrival, inner: &Ipv4, leased: bool) -> bool {
    let source = inner.source();
    (leased || source == arrival.node)
        && settings.peer_key(source) != settings.own_subnet
        && source != settings.local
        && is_unicast(inner.source)
}

/// The destination lies in our subnet, and is nothing the host itself trusts more than a pod.
#[inline(always)]
const fn is_destination_right(settings: &Settings, inner: &Ipv4) -> bool {
    let destination = inner.destination();
    settings.peer_key(destination) == settings.own_subnet
        && destination != settings.local
        && is_unicast(inner.destination)
}

/// Neither "this network" (0/8), loopback (127/8), multicast (224/4) nor reserved (240/4, with broadcast): RFC 6890.
#[inline(always)]
const fn is_unicast(address: [u8; 4]) -> bool {
    address[0] != 0 && address[0] != 127 && address[0] < 224
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::header::{Datagram, Udp, outer::outer};

    const OWN: [u8; 4] = [172, 31, 0, 1];
    const NODE: [u8; 4] = [172, 31, 0, 2];
    const STRANGER: [u8; 4] = [172, 31, 0, 9];
    const POD: [u8; 4] = [10, 244, 1, 5];
    const REMOTE_POD: [u8; 4] = [10, 244, 2, 7];
    const PEER: Peer = Peer { node: u32::from_ne_bytes(NODE), ifindex: 2, index: 41 };

    fn settings(flags: u16) -> Settings {
        Settings {
            local: u32::from_ne_bytes(OWN),
            network: u32::from_ne_bytes([10, 244, 0, 0]),
            network_mask: u32::from_ne_bytes([255, 255, 0, 0]),
            subnet_mask: u32::from_ne_bytes([255, 255, 255, 0]),
            own_subnet: u32::from_ne_bytes([10, 244, 1, 0]),
            port: 8285_u16.to_be(),
            flags,
            ..Settings::default()
        }
    }

    fn peers(key: PeerKey) -> Option<Peer> {
        (key == u32::from_ne_bytes([10, 244, 2, 0])).then_some(PEER)
    }

    fn packet() -> Tunnelled {
        let inner = Ipv4 {
            version_ihl: 0x45,
            total_length: [0, 100],
            ttl: 64,
            protocol: 6,
            source: REMOTE_POD,
            destination: POD,
            ..Ipv4::default()
        };
        let peer = Settings { local: u32::from_ne_bytes(NODE), ..settings(0) };
        let datagram = Datagram { node: u32::from_ne_bytes(OWN), length: 100, tos: 0, id: 7, hash: 9 };
        Tunnelled {
            outer: outer(&peer, &datagram),
            inner: Ipv4 { checksum: inner.computed_checksum(), ..inner },
        }
    }

    #[test]
    fn a_peers_packet_is_delivered_and_counted_for_it() {
        let Verdict::Deliver(delivery) = decapsulate(&settings(SOURCE_CHECK_ENFORCE), &packet(), peers)
        else {
            panic!("not delivered")
        };
        assert_eq!((delivery.peer, delivery.observed, delivery.rewrite.ttl), (41, None, 63));
    }

    #[test]
    fn what_encapsulation_does_not_write_is_left_to_the_stack() {
        type Change = fn(&mut Tunnelled);
        let changes: [(&str, Change); 12] = [
            ("outer options", |p| p.outer.ip.version_ihl = 0x46),
            ("outer version 6", |p| p.outer.ip.version_ihl = 0x65),
            ("TCP", |p| p.outer.ip.protocol = 6),
            ("another node's address", |p| p.outer.ip.destination = STRANGER),
            ("another port", |p| p.outer.udp.destination = 8286_u16.to_be_bytes()),
            ("first fragment", |p| p.outer.ip.fragment = [0x20, 0]),
            ("middle fragment", |p| p.outer.ip.fragment = [0x20, 0xB9]),
            ("last fragment", |p| p.outer.ip.fragment = [0, 0xB9]),
            ("inner IPv6", |p| p.inner.version_ihl = 0x60),
            ("inner version 0", |p| p.inner.version_ihl = 0x05),
            ("inner version 3", |p| p.inner.version_ihl = 0x35),
            ("inner version 5", |p| p.inner.version_ihl = 0x55),
        ];
        for (what, change) in changes {
            let mut packet = packet();
            change(&mut packet);
            assert_eq!(decapsulate(&settings(0), &packet, peers), Verdict::NotOurs, "{what}");
        }
    }

    #[test]
    fn lengths_that_disagree_are_the_sockets_business() {
        type Change = fn(&mut Tunnelled);
        let changes: [(&str, Change); 6] = [
            ("trailing bytes", |p| {
                p.outer.ip.total_length = 132_u16.to_be_bytes();
                p.outer.udp.length = 112_u16.to_be_bytes();
            }),
            ("inner longer than the datagram", |p| p.inner.total_length = [0, 101]),
            ("udp length too small", |p| p.outer.udp.length = [0, 107]),
            ("udp length zero", |p| p.outer.udp.length = [0, 0]),
            ("inner header longer than the packet", |p| {
                p.inner.version_ihl = 0x4F;
                p.inner.total_length = [0, 59];
                p.outer.ip.total_length = [0, 87];
                p.outer.udp.length = [0, 67];
            }),
            ("inner header shorter than a header", |p| p.inner.version_ihl = 0x44),
        ];
        for (what, change) in changes {
            let mut packet = packet();
            change(&mut packet);
            assert_eq!(
                decapsulate(&settings(0), &packet, peers),
                Verdict::HandOn(Counter::LengthMismatch),
                "{what}"
            );
        }
    }

    #[test]
    fn the_source_check_knows_a_nodes_pods_and_its_own_address() {
        const RIGHT: Option<Counter> = None;
        const SOURCE: Option<Counter> = Some(Counter::SourceObserved);
        const DESTINATION: Option<Counter> = Some(Counter::DestinationObserved);
        for (what, outer_source, source, destination, objection) in [
            ("peer's pod", NODE, REMOTE_POD, POD, RIGHT),
            ("peer's tunnel device", NODE, [10, 244, 2, 0], POD, RIGHT),
            ("peer's host address", NODE, NODE, POD, RIGHT),
            ("our tunnel device", NODE, REMOTE_POD, [10, 244, 1, 0], RIGHT),
            ("unknown node, peer's pod", STRANGER, REMOTE_POD, POD, SOURCE),
            ("known node, nobody's subnet", NODE, [10, 244, 3, 7], POD, SOURCE),
            ("known node, outside the network", NODE, [8, 8, 8, 8], POD, SOURCE),
            ("another node's host address", NODE, STRANGER, POD, SOURCE),
            ("our own subnet", NODE, [10, 244, 1, 9], POD, SOURCE),
            ("our own subnet, outer too", [10, 244, 1, 9], [10, 244, 1, 9], POD, SOURCE),
            ("our underlay address, outer too", OWN, OWN, POD, SOURCE),
            ("loopback, outer too", [127, 0, 0, 1], [127, 0, 0, 1], POD, SOURCE),
            ("multicast, outer too", [224, 0, 0, 1], [224, 0, 0, 1], POD, SOURCE),
            ("broadcast, outer too", [255; 4], [255; 4], POD, SOURCE),
            ("unspecified, outer too", [0; 4], [0; 4], POD, SOURCE),
            ("to another subnet", NODE, REMOTE_POD, [10, 244, 3, 1], DESTINATION),
            ("to the sender's subnet", NODE, REMOTE_POD, REMOTE_POD, DESTINATION),
            ("to our underlay address", NODE, REMOTE_POD, OWN, DESTINATION),
            ("to loopback", NODE, REMOTE_POD, [127, 0, 0, 1], DESTINATION),
            ("to multicast", NODE, REMOTE_POD, [224, 0, 0, 1], DESTINATION),
            ("to the outside", NODE, REMOTE_POD, [8, 8, 8, 8], DESTINATION),
            ("both wrong: the source counts", STRANGER, REMOTE_POD, OWN, SOURCE),
        ] {
            let mut packet = packet();
            packet.outer.ip.source = outer_source;
            packet.inner.source = source;
            packet.inner.destination = destination;
            let judge = |flags| decapsulate(&settings(flags), &packet, peers);
            let claimed = if source[..3] == REMOTE_POD[..3] { PEER.index } else { NO_PEER };
            let refused = |reason| Verdict::Drop(reason, claimed);
            let observed = |verdict| match verdict {
                Verdict::Deliver(delivery) => delivery.observed,
                other => panic!("{what}: {other:?}"),
            };
            assert_eq!(observed(judge(0)), None, "{what}, off");
            assert_eq!(observed(judge(SOURCE_CHECK_OBSERVE)), objection, "{what}, observe");
            match objection {
                None => assert_eq!(observed(judge(SOURCE_CHECK_ENFORCE)), None, "{what}, enforce"),
                Some(Counter::SourceObserved) => {
                    assert_eq!(judge(SOURCE_CHECK_ENFORCE), refused(Counter::SourceRefused), "{what}");
                }
                Some(_) => {
                    assert_eq!(judge(SOURCE_CHECK_ENFORCE), refused(Counter::DestinationRefused), "{what}");
                }
            }
        }
    }

    #[test]
    fn a_network_that_holds_the_underlay_does_not_open_it() {
        // A misconfiguration: our node's address lies in our own subnet.
        let settings =
            Settings { own_subnet: u32::from_ne_bytes([172, 31, 0, 0]), ..settings(SOURCE_CHECK_ENFORCE) };
        let mut packet = packet();
        packet.inner.destination = OWN;
        assert_eq!(
            decapsulate(&settings, &packet, peers),
            Verdict::Drop(Counter::DestinationRefused, PEER.index)
        );
    }

    #[test]
    fn only_a_sender_that_leases_the_source_is_counted_as_peer() {
        let mut packet = packet();
        packet.outer.ip.source = STRANGER;
        let Verdict::Deliver(delivery) = decapsulate(&settings(0), &packet, peers) else {
            panic!("not delivered")
        };
        assert_eq!((delivery.peer, delivery.claimed), (NO_PEER, PEER.index));
    }

    #[test]
    fn an_unknown_sender_is_refused_before_its_ttl_is_looked_at() {
        let mut packet = packet();
        packet.outer.ip.source = STRANGER;
        packet.inner.ttl = 1;
        let judge = |flags| decapsulate(&settings(flags), &packet, peers);
        assert_eq!(judge(SOURCE_CHECK_ENFORCE), Verdict::Drop(Counter::SourceRefused, PEER.index));
        assert_eq!(judge(SOURCE_CHECK_OBSERVE), Verdict::Drop(Counter::TtlExpired, PEER.index));
    }

    proptest! {
        #[test]
        fn what_one_node_encapsulates_the_other_accepts(
            length in 20_u16..=65507, tos: u8, id: u16, hash: u32, ttl in 3_u8.., last: u8, remote: u8,
        ) {
            let inner = Ipv4 {
                version_ihl: 0x45, tos, total_length: length.to_be_bytes(), ttl, protocol: 17,
                source: [10, 244, 2, remote], destination: [10, 244, 1, last], ..Ipv4::default()
            };
            let mut inner = Ipv4 { checksum: inner.computed_checksum(), ..inner };
            hop(&inner, 0).unwrap().apply(&mut inner);
            let sender = Settings { local: u32::from_ne_bytes(NODE), ..settings(0) };
            let datagram = Datagram { node: u32::from_ne_bytes(OWN), length: length.into(), tos, id, hash };
            let packet = Tunnelled { outer: outer(&sender, &datagram), inner };
            match decapsulate(&settings(SOURCE_CHECK_ENFORCE), &packet, peers) {
                Verdict::Deliver(delivery) => {
                    delivery.rewrite.apply(&mut inner);
                    prop_assert_eq!((inner.ttl, inner.tos), (ttl - 2, tos));
                    prop_assert_eq!(inner.checksum, inner.computed_checksum());
                }
                other => prop_assert!(false, "{other:?}"),
            }
        }

        #[test]
        fn no_48_bytes_are_delivered_that_are_not_one_whole_packet(bytes in prop::array::uniform32(any::<u8>()), more in prop::array::uniform16(any::<u8>())) {
            let mut all = [0; 48];
            all[..32].copy_from_slice(&bytes);
            all[32..].copy_from_slice(&more);
            let mut packet: Tunnelled = bytemuck::cast(all);
            // Random bytes never get past the first rule: help them half of the way.
            packet.outer.ip.version_ihl = 0x45;
            packet.outer.ip.protocol = PROTOCOL_UDP;
            packet.outer.ip.destination = OWN;
            packet.outer.udp = Udp { destination: 8285_u16.to_be_bytes(), ..packet.outer.udp };
            if let Verdict::Deliver(_) = decapsulate(&settings(0), &packet, peers) {
                prop_assert!(packet.inner.is_valid() && packet.lengths_agree() && !packet.outer.ip.is_fragment());
            }
        }
    }
}
