//! Samples, and what is said about them: medians, ranges, and medians of the ratios within a round.

use std::collections::BTreeMap;

/// What is measured of a variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Metric {
    /// One TCP stream, Gbit/s.
    Tcp1,
    /// Four TCP streams together, Gbit/s.
    Tcp4,
    /// Segments sent again per GB of one stream.
    Retransmits,
    /// CPU seconds of the whole machine per GB of one stream.
    CpuPerGb,
    /// UDP datagrams of 64 bytes received, thousands per second.
    Udp64,
    /// TCP requests answered, thousands per second.
    Requests,
    /// Half of them took no longer, µs.
    RoundTrip,
    /// 99 of 100 took no longer, µs.
    RoundTrip99,
}

impl Metric {
    pub(super) const ALL: [Self; 8] = [
        Self::Tcp1,
        Self::Tcp4,
        Self::Retransmits,
        Self::CpuPerGb,
        Self::Udp64,
        Self::Requests,
        Self::RoundTrip,
        Self::RoundTrip99,
    ];

    /// With its unit, for programs.
    pub(super) const fn key(self) -> &'static str {
        match self {
            Self::Tcp1 => "tcp_1_stream_gbit_per_s",
            Self::Tcp4 => "tcp_4_streams_gbit_per_s",
            Self::Retransmits => "tcp_1_stream_retransmits_per_gb",
            Self::CpuPerGb => "tcp_1_stream_cpu_s_per_gb",
            Self::Udp64 => "udp_64_bytes_received_k_per_s",
            Self::Requests => "tcp_requests_k_per_s",
            Self::RoundTrip => "tcp_round_trip_p50_us",
            Self::RoundTrip99 => "tcp_round_trip_p99_us",
        }
    }

    /// With its unit, for people.
    pub(super) const fn title(self) -> &'static str {
        match self {
            Self::Tcp1 => "TCP, 1 stream, Gbit/s",
            Self::Tcp4 => "TCP, 4 streams, Gbit/s",
            Self::Retransmits => "retransmits per GB",
            Self::CpuPerGb => "CPU s per GB",
            Self::Udp64 => "UDP 64 B, k/s",
            Self::Requests => "TCP requests, k/s",
            Self::RoundTrip => "RTT p50, µs",
            Self::RoundTrip99 => "RTT p99, µs",
        }
    }
}

/// Figures of one variant, one per round.
pub(super) type Samples = BTreeMap<Metric, Vec<f64>>;

/// A median and what it lies between.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Summary {
    pub(super) median: f64,
    pub(super) least: f64,
    pub(super) most: f64,
}

impl Summary {
    /// Nothing without a sample.
    pub(super) fn of(samples: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = samples.into_iter().filter(|sample| sample.is_finite()).collect();
        sorted.sort_unstable_by(f64::total_cmp);
        let (least, most) = (*sorted.first()?, *sorted.last()?);
        let upper = *sorted.get(sorted.len() / 2)?;
        let lower = *sorted.get((sorted.len() - 1) / 2)?;
        Some(Self { median: f64::midpoint(lower, upper), least, most })
    }

    /// Of the ratios of samples taken in the same round.
    pub(super) fn of_ratios(samples: &[f64], reference: &[f64]) -> Option<Self> {
        Self::of(
            samples
                .iter()
                .zip(reference)
                .filter(|(_, below)| **below > 0.0)
                .map(|(above, below)| above / below),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_of_ratios_is_not_a_ratio_of_medians() {
        // A machine that was twice as fast in the second round.
        let (ours, theirs) = ([1.0, 2.0, 1.0], [2.0, 4.0, 1.0]);
        let ratios = Summary::of_ratios(&ours, &theirs).unwrap();
        assert_eq!((ratios.median, ratios.least, ratios.most), (0.5, 0.5, 1.0));
    }

    #[test]
    fn an_even_number_of_samples_has_a_median_between_two() {
        assert_eq!(Summary::of([4.0, 1.0, 3.0, 2.0]).map(|s| s.median), Some(2.5));
        assert_eq!(Summary::of([]), None);
        assert_eq!(Summary::of_ratios(&[1.0], &[0.0]), None);
    }
}
