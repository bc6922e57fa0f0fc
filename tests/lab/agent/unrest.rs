//! An agent that never comes to rest says the same thing over and over. Packets may flow and every assertion hold
//! meanwhile, so nothing but its log tells; each test on a lab is judged by it, and each that runs parts of the agent in a
//! thread of its own ([`at_rest`]).

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Result, ensure};

/// How often one agent may say one thing within [`WITHIN`]. A repair that a test makes necessary again and again, once a
/// second at most, stays below; the agent itself makes ten at once before it slows down.
const OFTEN: usize = 8;

/// Seconds, on a machine that tests are written for.
const WITHIN: f64 = 10.0;

/// An agent's first line. What another one said before it, on the same host, is not its repetition.
const BEGINS: (&str, &str) = ("flannel-agent ", " starts");

/// A line that one agent said too often.
#[derive(Clone, Debug, PartialEq)]
pub struct Repetition {
    /// Without the time.
    pub line: String,
    pub times: usize,
    /// Seconds from the first to the last.
    pub within: f64,
}

impl fmt::Display for Repetition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} times in {:.1} s: {}", self.times, self.within, self.line)
    }
}

/// What agents said too often in a log, on a machine that is `slower` by so many times.
#[must_use]
pub fn repetitions(log: &str, slower: u32) -> Vec<Repetition> {
    let window = WITHIN * f64::from(slower);
    let (mut said, mut found) = (BTreeMap::<&str, Vec<f64>>::new(), Vec::new());
    for (time, line) in log.lines().filter_map(at) {
        if line.contains(BEGINS.0) && line.ends_with(BEGINS.1) {
            found.extend(too_often(&said, window));
            said.clear();
        }
        said.entry(line).or_default().push(time);
    }
    found.extend(too_often(&said, window));
    found
}

/// The log of what a test ran says nothing too often.
///
/// # Errors
/// It does: with the lines, how often each, and within which time.
pub fn at_rest(log: &str) -> Result<()> {
    let found = repetitions(log, crate::slower());
    let lines: Vec<String> = found.iter().map(ToString::to_string).collect();
    ensure!(lines.is_empty(), "what the test ran did not come to rest:\n{}", lines.join("\n"));
    Ok(())
}

/// The whole row of those lines of which some [`OFTEN`] and one more fit in the window.
fn too_often(said: &BTreeMap<&str, Vec<f64>>, window: f64) -> Vec<Repetition> {
    let since = |first: f64, last: f64| (last - first).rem_euclid(DAY);
    let row = |(line, times): (&&str, &Vec<f64>)| {
        let close = |times: &[f64]| matches!(times, [first, .., last] if since(*first, *last) <= window);
        let (first, last) = (times.first()?, times.last()?);
        times.windows(OFTEN + 1).any(close).then(|| Repetition {
            line: (*line).to_owned(),
            times: times.len(),
            within: since(*first, *last),
        })
    };
    said.iter().filter_map(row).collect()
}

const DAY: f64 = 86_400.0;

/// Second of the day and the rest of a line, from its level on: `2026-11-26T21:26:23.182945Z  INFO tunnel on …`. `None` for
/// what is no line of an agent's log.
fn at(line: &str) -> Option<(f64, &str)> {
    let (time, rest) = line.split_once("Z ")?;
    let (_, time) = time.split_once('T')?;
    let mut seconds = 0.0;
    for (part, worth) in time.splitn(3, ':').zip([3600.0, 60.0, 1.0]) {
        seconds += part.parse::<f64>().ok()? * worth;
    }
    let rest = rest.trim_start();
    ["INFO ", "WARN ", "ERROR "].iter().any(|level| rest.starts_with(level)).then_some((seconds, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPAIR: &str = "INFO tunnel on flannel0 needs repair: super-packets stay whole on eth0 by now";

    /// `line` every so many milliseconds from 23:59:55 on.
    fn log(lines: usize, each: usize, line: &str) -> String {
        (0..lines)
            .map(|number| {
                let time = (86_395_000 + number * each) % 86_400_000;
                let (second, millisecond) = (time / 1000, time % 1000);
                let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
                format!("2026-11-26T{hour:02}:{minute:02}:{second:02}.{millisecond:03}000Z  {line}\n")
            })
            .collect()
    }

    #[test]
    fn a_repair_made_for_ever_is_found_over_midnight_too_with_its_number_and_time() {
        let log = log(40, 250, REPAIR);
        let found = repetitions(&log, 1);
        assert_eq!(found, [Repetition { line: REPAIR.to_owned(), times: 40, within: 9.75 }], "{log}");
        assert_eq!(found[0].to_string(), format!("40 times in 9.8 s: {REPAIR}"));
    }

    #[test]
    fn a_row_that_gets_slower_is_found_by_its_dense_part() {
        let log = log(9, 1000, REPAIR) + &log(3, 30_000, REPAIR);
        assert_eq!(repetitions(&log, 1).len(), 1);
    }

    #[test]
    fn what_is_said_now_and_then_or_by_one_agent_after_the_other_or_never_alike_is_none() {
        assert_eq!(repetitions(&log(8, 1, REPAIR), 1), []);
        assert_eq!(repetitions(&log(60, 1500, REPAIR), 1), []);
        let one = log(1, 0, "INFO flannel-agent 0.1.0 starts") + &log(1, 0, REPAIR);
        assert_eq!(repetitions(&one.repeat(20), 1), []);
        let different: String = (0..20).map(|number| log(1, 0, &format!("WARN peer {number}"))).collect();
        assert_eq!(repetitions(&different, 1), []);
        assert_eq!(repetitions(&"at index 3\n".repeat(20), 1), []);
    }

    #[test]
    fn a_log_without_rest_is_an_error_that_says_so() {
        assert!(at_rest(&log(8, 1, REPAIR)).is_ok());
        let error = at_rest(&log(60, 1, REPAIR)).unwrap_err().to_string();
        assert!(error.contains("60 times in 0.1 s: INFO tunnel on flannel0 needs repair"), "{error}");
    }

    #[test]
    fn a_slower_machine_takes_longer_for_the_same() {
        let log = log(20, 5000, REPAIR);
        assert_eq!((repetitions(&log, 1).len(), repetitions(&log, 10).len()), (0, 1));
    }
}
