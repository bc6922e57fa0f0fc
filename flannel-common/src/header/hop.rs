//! What one end of the tunnel changes in the inner header: TTL − 1 like flanneld (contract §8.1), and on the way out
//! of the tunnel the congestion mark of the outer header (RFC 6040 §4.2).

use super::{ECN_MASK, Ipv4, checksum::after_ttl_step, replace_word};
use crate::counter::Counter;

const ECT_1: u8 = 0b01;
const CE: u8 = 0b11;
const NOT_ECT: u8 = 0b00;

/// The three fields of the inner header that change; everything else stays byte for byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite {
    pub tos: u8,
    pub ttl: u8,
    /// As it stands in the packet.
    pub checksum: [u8; 2],
}

impl Rewrite {
    /// Writes the fields into the header they were computed from.
    #[inline(always)]
    pub const fn apply(self, header: &mut Ipv4) {
        header.tos = self.tos;
        header.ttl = self.ttl;
        header.checksum = self.checksum;
    }
}

/// The inner header after this end of the tunnel. `outer_tos` is the TOS byte of the datagram it came in, 0 when it is
/// about to enter the tunnel.
///
/// # Errors
/// The counter under which the packet is to be dropped: [`Counter::TtlExpired`] for TTL 0 and 1, silently as flanneld
/// does (which however lets 0 wrap to 255); [`Counter::EcnRefused`] for a congestion mark on a packet whose sender
/// can't understand it.
#[inline(always)]
pub const fn hop(inner: &Ipv4, outer_tos: u8) -> Result<Rewrite, Counter> {
    if inner.ttl <= 1 {
        return Err(Counter::TtlExpired);
    }
    let mut rewrite =
        Rewrite { tos: inner.tos, ttl: inner.ttl - 1, checksum: after_ttl_step(inner.checksum) };
    let outer = outer_tos & ECN_MASK;
    // Only an outer ECT(1) or CE can change anything: both have the low bit set.
    if outer & ECT_1 != 0 {
        match combined(inner.tos & ECN_MASK, outer) {
            None => return Err(Counter::EcnRefused),
            Some(ecn) => {
                rewrite.tos = (inner.tos & !ECN_MASK) | ecn;
                let old = u16::from_ne_bytes([inner.version_ihl, inner.tos]);
                let new = u16::from_ne_bytes([inner.version_ihl, rewrite.tos]);
                rewrite.checksum = replace_word(u16::from_ne_bytes(rewrite.checksum), old, new).to_ne_bytes();
            }
        }
    }
    Ok(rewrite)
}

/// RFC 6040 §4.2, figure 4, for an outer ECT(1) or CE; `None` is "drop".
#[inline(always)]
const fn combined(inner: u8, outer: u8) -> Option<u8> {
    match (inner, outer) {
        (NOT_ECT, CE) => None,
        (NOT_ECT, _) => Some(NOT_ECT),
        (_, CE) | (CE, _) => Some(CE),
        (_, _) => Some(ECT_1),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn header(ttl: u8, tos: u8) -> Ipv4 {
        let header = Ipv4 {
            version_ihl: 0x45,
            tos,
            total_length: [0, 84],
            ttl,
            protocol: 1,
            source: [10, 5, 68, 0],
            destination: [10, 5, 54, 1],
            ..Ipv4::default()
        };
        Ipv4 { checksum: header.computed_checksum(), ..header }
    }

    #[test]
    fn ttl_0_and_1_end_here_and_every_other_loses_one() {
        assert_eq!(hop(&header(0, 0), 0), Err(Counter::TtlExpired));
        assert_eq!(hop(&header(1, 0), 0), Err(Counter::TtlExpired));
        for ttl in 2..=255 {
            assert_eq!(hop(&header(ttl, 0), 0).map(|r| r.ttl), Ok(ttl - 1));
        }
    }

    #[test]
    fn ecn_is_combined_as_rfc_6040_figure_4_says() {
        const ECT_0: u8 = 0b10;
        for (inner, outer, after) in [
            (NOT_ECT, NOT_ECT, Some(NOT_ECT)),
            (NOT_ECT, ECT_0, Some(NOT_ECT)),
            (NOT_ECT, ECT_1, Some(NOT_ECT)),
            (NOT_ECT, CE, None),
            (ECT_0, NOT_ECT, Some(ECT_0)),
            (ECT_0, ECT_0, Some(ECT_0)),
            (ECT_0, ECT_1, Some(ECT_1)),
            (ECT_0, CE, Some(CE)),
            (ECT_1, NOT_ECT, Some(ECT_1)),
            (ECT_1, ECT_0, Some(ECT_1)),
            (ECT_1, ECT_1, Some(ECT_1)),
            (ECT_1, CE, Some(CE)),
            (CE, NOT_ECT, Some(CE)),
            (CE, ECT_0, Some(CE)),
            (CE, ECT_1, Some(CE)),
            (CE, CE, Some(CE)),
        ] {
            // The DSCP of both headers must not matter, and the inner one must stay.
            let got = hop(&header(64, 0xB8 | inner), 0x28 | outer);
            assert_eq!(
                got.map(|r| r.tos),
                after.map(|ecn| 0xB8 | ecn).ok_or(Counter::EcnRefused),
                "{inner:02b} in {outer:02b}"
            );
        }
    }

    proptest! {
        #[test]
        fn a_right_checksum_stays_right(ttl in 2_u8.., tos: u8, outer_tos: u8, source: [u8; 4], id: [u8; 2]) {
            let mut inner = Ipv4 { source, id, ..header(ttl, tos) };
            inner.checksum = inner.computed_checksum();
            if let Ok(rewrite) = hop(&inner, outer_tos) {
                rewrite.apply(&mut inner);
                prop_assert_eq!(inner.checksum, inner.computed_checksum());
            }
        }

        #[test]
        fn a_wrong_checksum_stays_wrong(error in 1_u16..0xFFFF, ttl in 2_u8.., outer_tos: u8) {
            let mut inner = header(ttl, 0b10);
            inner.checksum = replace_word(u16::from_ne_bytes(inner.checksum), 0, error).to_ne_bytes();
            if let Ok(rewrite) = hop(&inner, outer_tos) {
                rewrite.apply(&mut inner);
                prop_assert_ne!(inner.checksum, inner.computed_checksum());
            }
        }
    }
}
