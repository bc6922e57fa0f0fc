//! Numbers and times as people read them.

/// "950 B", "1.5 KiB", "3.2 GiB".
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut size = count as f64 / 1024.0;
    let mut units = UNITS.iter();
    let mut unit = units.next();
    while size >= 1023.95
        && let Some(next) = units.next()
    {
        size /= 1024.0;
        unit = Some(next);
    }
    format!("{size:.1} {}", unit.unwrap_or(&""))
}

/// "1234", "56.8k", "12.3M".
pub(super) fn count(count: u64) -> String {
    match count {
        0..10_000 => count.to_string(),
        10_000..999_950 => format!("{:.1}k", count as f64 / 1e3),
        _ => format!("{:.1}M", count as f64 / 1e6),
    }
}

/// "12 s", "3 min 20 s", "5 h 2 min", "3 d 4 h".
pub(super) fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, _, _) => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

/// "never", "now", "12 s ago".
pub(super) fn ago(millis: Option<u64>) -> String {
    match millis {
        None => "never".to_owned(),
        Some(0..1000) => "now".to_owned(),
        Some(millis) => format!("{} ago", duration(millis / 1000)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_have_a_unit_and_few_digits() {
        for (count, wanted) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (1_048_575, "1.0 MiB"),
            (3_435_973_837, "3.2 GiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(bytes(count), wanted);
        }
    }

    #[test]
    fn counts_are_exact_while_they_are_short() {
        for (number, wanted) in [
            (0, "0"),
            (9999, "9999"),
            (10_000, "10.0k"),
            (999_949, "999.9k"),
            (999_950, "1.0M"),
            (12_345_678, "12.3M"),
        ] {
            assert_eq!(count(number), wanted);
        }
    }

    #[test]
    fn times_have_the_two_largest_units() {
        for (seconds, wanted) in
            [(0, "0 s"), (59, "59 s"), (200, "3 min 20 s"), (18_150, "5 h 2 min"), (273_600, "3 d 4 h")]
        {
            assert_eq!(duration(seconds), wanted);
        }
        assert_eq!([ago(None), ago(Some(999)), ago(Some(12_345))], ["never", "now", "12 s ago"]);
    }
}
