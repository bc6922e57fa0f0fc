//! The Internet checksum (RFC 1071) over slices of any length.
//!
//! The shared header code works on fixed-size headers, as the verifier wants it; payloads of 64 KiB need this one.
//! Words are added as the machine reads them: the one's complement sum doesn't care about byte order as long as the
//! result is written back the same way (RFC 1071 §2 B).

/// A running one's complement sum. Can't overflow: every step adds less than 2³³, and packets are below 64 KiB.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sum(u64);

impl Sum {
    /// Adds `bytes`. They must start at an even offset of the covered data, so only the last piece may be odd.
    pub(super) fn bytes(self, bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<8>();
        let mut sum = self.0;
        for word in words {
            let word = u64::from_ne_bytes(*word);
            sum += (word & 0xffff_ffff) + (word >> 32);
        }
        if !rest.is_empty() {
            let mut word = [0; 8];
            for (to, from) in word.iter_mut().zip(rest) {
                *to = *from;
            }
            let word = u64::from_ne_bytes(word);
            sum += (word & 0xffff_ffff) + (word >> 32);
        }
        Self(sum)
    }

    /// Adds a number that stands in the covered data in network byte order.
    pub(super) fn word(self, word: u16) -> Self {
        Self(self.0 + u64::from(word.to_be()))
    }

    /// The sum itself in network byte order: what a packet with `NEEDS_CSUM` carries for its pseudo header, and
    /// all ones over data that contains its correct checksum.
    pub(super) fn folded(self) -> [u8; 2] {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (sum as u16).to_ne_bytes()
    }

    /// The checksum: complement of the sum, in network byte order.
    pub(super) fn checksum(self) -> [u8; 2] {
        let [high, low] = self.folded();
        [!high, !low]
    }

    /// The same as UDP writes it: zero would mean "no checksum" (RFC 768). TCP accepts both forms of zero.
    pub(super) fn nonzero_checksum(self) -> [u8; 2] {
        match self.checksum() {
            [0, 0] => [0xff, 0xff],
            checksum => checksum,
        }
    }

    /// The covered data includes its checksum, and that checksum is right.
    pub(super) fn is_valid(self) -> bool {
        self.folded() == [0xff, 0xff]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// RFC 1071 §4.1, word by word.
    fn by_the_book(bytes: &[u8]) -> [u8; 2] {
        let mut sum = 0u32;
        for pair in bytes.chunks(2) {
            let low = pair.get(1).copied().unwrap_or(0);
            sum += u32::from(u16::from_be_bytes([pair[0], low]));
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        (!(sum as u16)).to_be_bytes()
    }

    proptest! {
        #[test]
        fn any_bytes_sum_as_in_rfc_1071(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
            prop_assert_eq!(Sum::default().bytes(&bytes).checksum(), by_the_book(&bytes));
        }

        #[test]
        fn pieces_at_even_offsets_sum_like_the_whole(
            bytes in proptest::collection::vec(any::<u8>(), 2..3000), at in 0usize..1500,
        ) {
            let (first, second) = bytes.split_at((at * 2).min(bytes.len() & !1));
            let pieces = Sum::default().bytes(first).bytes(second).checksum();
            prop_assert_eq!(pieces, by_the_book(&bytes));
        }
    }

    #[test]
    fn data_with_its_own_checksum_is_valid() {
        let header =
            [0x45, 0, 0, 0x54, 0x20, 0x58, 0x40, 0, 0x3f, 1, 0x8d, 0x46, 10, 5, 0x44, 0, 10, 5, 0x36, 1];
        assert!(Sum::default().bytes(&header).is_valid());
        assert_eq!(Sum::default().bytes(&header[..10]).bytes(&header[12..]).checksum(), [0x8d, 0x46]);
    }

    #[test]
    fn a_word_adds_as_its_bytes_would() {
        assert_eq!(Sum::default().word(0x1234).folded(), Sum::default().bytes(&[0x12, 0x34]).folded());
    }

    #[test]
    fn udp_never_writes_a_zero_checksum() {
        let sum = Sum::default().word(0xffff);
        assert_eq!(sum.checksum(), [0, 0]);
        assert_eq!(sum.nonzero_checksum(), [0xff, 0xff]);
    }
}
