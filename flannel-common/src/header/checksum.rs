//! The Internet checksum (RFC 1071) and its incremental update (RFC 1624).
//!
//! Everything works on 16-bit words loaded in the machine's own order: one's complement sums do not care as long as
//! all words are loaded and the result is stored the same way (RFC 1071 §2 B), which saves every byte swap.

/// Folds a sum of 16-bit words into the checksum field's value. Right for sums of up to 65,536 words.
#[inline(always)]
#[must_use]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xFFFF) + (sum >> 16);
    let sum = (sum & 0xFFFF) + (sum >> 16);
    !(sum as u16)
}

/// The checksum after one word under it changed from `old` to `new` (RFC 1624, equation 3). All three and the result
/// in one byte order, whichever it is.
#[inline(always)]
#[must_use]
pub const fn replace_word(checksum: u16, old: u16, new: u16) -> u16 {
    fold(!checksum as u32 + !old as u32 + new as u32)
}

/// The checksum after TTL was lowered by one: the TTL is the high byte of its word, so the sum fell by 0x0100 and the
/// checksum rises by it, with end-around carry. 0xFEFF becomes 0x0000, as in flanneld and in the kernel's
/// `ip_decrease_ttl`. Argument and result as they stand in the packet.
#[inline(always)]
#[must_use]
pub(super) const fn after_ttl_step(checksum: [u8; 2]) -> [u8; 2] {
    let sum = u16::from_ne_bytes(checksum) as u32 + 0x0100_u16.to_be() as u32;
    ((sum + (sum >= 0xFFFF) as u32) as u16).to_ne_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_ttl_step_carries_around_and_turns_feff_into_zero() {
        for (before, after) in [
            (0x0000_u16, 0x0100_u16),
            (0x8C46, 0x8D46),
            (0xFDFF, 0xFEFF),
            (0xFEFE, 0xFFFE),
            (0xFEFF, 0x0000),
            (0xFF00, 0x0001),
            (0xFFFF, 0x0100),
        ] {
            assert_eq!(u16::from_be_bytes(after_ttl_step(before.to_be_bytes())), after, "{before:#06x}");
        }
    }

    proptest! {
        #[test]
        fn replacing_a_word_equals_summing_anew(mut words in prop::array::uniform9(any::<u16>()), at in 0_usize..9, new: u16) {
            let sum = |words: &[u16]| fold(words.iter().map(|w| u32::from(*w)).sum());
            // An all-zero header has two spellings of zero; a real one starts with 0x45.
            words[(at + 1) % 9] |= 0x4500;
            let before = sum(&words);
            let old = words[at];
            words[at] = new;
            prop_assert_eq!(replace_word(before, old, new), sum(&words));
        }
    }
}
