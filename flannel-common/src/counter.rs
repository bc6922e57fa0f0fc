//! Why packets were sent, delivered, refused: one enum, one per-CPU array (`COUNTERS`), the same for every tier.

use bytemuck::{Pod, Zeroable};

/// Value of `COUNTERS`, one per CPU. A GSO packet counts as many packets as it has segments. Bytes are those of inner
/// packets, or of the whole frame where no inner packet was recognised; a GSO packet's headers count once.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Count {
    pub packets: u64,
    pub bytes: u64,
}

#[cfg(feature = "user")]
// SAFETY: repr(C), no padding, every bit pattern is valid (bytemuck checks all three).
unsafe impl aya::Pod for Count {}

macro_rules! counters {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $drop:literal;)*) => {
        /// What happened to a packet. The number is the index into `COUNTERS`.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Counter { $($(#[$doc])* $variant,)* }

        impl Counter {
            /// In index order.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Name in `status` and metrics.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// Packets counted here were not delivered.
            pub const fn is_drop(self) -> bool {
                match self { $(Self::$variant => $drop,)* }
            }
        }
    };
}

counters! {
    /// Encapsulated and sent to a peer.
    Encapsulated = "encapsulated", false;
    /// No peer leases the destination; handed to the user-space path, which answers as flanneld does.
    NoPeer = "no_peer", false;
    /// Left through the tunnel although it came through it with tunnel state still on the packet; sent all the same.
    EncapRetried = "encap_retried", false;
    /// As above but a GSO packet that can't be split any more.
    EncapStaleGso = "encap_stale_gso", true;
    /// A helper refused to make room for the outer header.
    EncapFailed = "encap_failed", true;
    /// Inner TTL ran out on the way in or out (the original drops silently).
    TtlExpired = "ttl_expired", true;
    /// Decapsulated by XDP.
    DecapXdp = "decap_xdp", false;
    /// Marked by XDP but left whole (`XDP_PROBE`); to be compared with `MarkSeen`.
    MarkSent = "mark_sent", false;
    /// XDP's mark was seen by tc ingress.
    MarkSeen = "mark_seen", false;
    /// XDP could not write metadata; the packet took the tc way untouched.
    NoMetadata = "no_metadata", false;
    /// Decapsulated by tc.
    DecapTc = "decap_tc", false;
    /// Decapsulated in user space.
    DecapUser = "decap_user", false;
    /// A helper refused to strip the outer header.
    DecapFailed = "decap_failed", true;
    /// Lengths disagree; left to the user-space path.
    LengthMismatch = "length_mismatch", false;
    /// Not one whole IPv4 packet in the datagram (user space).
    Malformed = "malformed", true;
    /// Inner source is not leased by the outer source; dropped (`enforce`).
    SourceRefused = "source_refused", true;
    /// The same, delivered (`observe`).
    SourceObserved = "source_observed", false;
    /// Inner destination is not in our subnet; dropped (`enforce`).
    DestinationRefused = "destination_refused", true;
    /// The same, delivered (`observe`).
    DestinationObserved = "destination_observed", false;
    /// Outer header says "congestion experienced", inner packet can't carry it (RFC 6040 §4.2).
    EcnRefused = "ecn_refused", true;
    /// The socket or the device did not take the packet (user space).
    SendFailed = "send_failed", true;
    /// Inner packet larger than the device's MTU (user space; flanneld delivered its beginning).
    Oversize = "oversize", true;
}

/// Entries of `COUNTERS`: room for more reasons without a new layout.
pub const MAX_COUNTERS: u32 = 32;
const _: () = assert!(Counter::ALL.len() <= MAX_COUNTERS as usize);
