//! Does the agent come to rest? One that repairs a thing over and over, because a repair does not help or is not
//! remembered, carries packets and answers every question well; only its log and the CPU tell.

use std::collections::HashMap;

/// Seconds.
const WINDOW: f64 = 10.0;

/// How often one run of an agent may say the same within [`WINDOW`]. A test that breaks one thing a few times is below.
const OFTEN: usize = 8;

/// What an agent said too often, in words: a repair, a warning or an error of the same text.
pub(crate) fn unrest(log: &str) -> Option<String> {
    let mut said: HashMap<&str, Vec<f64>> = HashMap::new();
    for line in log.lines() {
        let Some((time, text)) = line.split_once(' ') else { continue };
        let text = text.trim_start();
        if text.contains(" starts") && text.contains("flannel-agent v") {
            said.clear();
        }
        let matters =
            text.contains("needs repair: ") || text.starts_with("WARN") || text.starts_with("ERROR");
        let Some(second) = second_of_day(time).filter(|_| matters) else { continue };
        let times = said.entry(text).or_default();
        times.push(second);
        // At midnight the clock goes back, and nothing is reported.
        let recent = times.iter().filter(|earlier| (0.0..=WINDOW).contains(&(second - **earlier))).count();
        if recent > OFTEN {
            return Some(format!("said {recent} times within {WINDOW} s, the last time at {time}: {text}"));
        }
    }
    None
}

/// Of `2026-11-26T21:05:36.198863Z`.
fn second_of_day(time: &str) -> Option<f64> {
    let (_, clock) = time.strip_suffix('Z')?.split_once('T')?;
    clock.split(':').try_fold(0.0, |sum, part| Some(sum * 60.0 + part.parse::<f64>().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(lines: usize, every: f64, text: &str) -> String {
        (0..lines).map(|line| format!("2026-11-26T21:05:{:09.6}Z  {text}\n", line as f64 * every)).collect()
    }

    #[test]
    fn a_repair_that_is_made_for_ever_is_found() {
        let text = "INFO tunnel on flannel0 needs repair: super-packets stay whole on eth0 by now";
        let found = unrest(&log(9, 0.2, text)).unwrap();
        assert!(
            found.starts_with("said 9 times within 10 s, the last time at 2026-11-26T21:05:01.6"),
            "{found}"
        );
        assert!(found.ends_with(text), "{found}");
        assert!(unrest(&log(30, 0.2, " WARN the same again")).is_some());
    }

    #[test]
    fn what_is_said_seldom_or_by_one_agent_after_another_is_fine() {
        let text = "INFO tunnel on flannel0 needs repair: cni0 may be passed by now";
        assert_eq!(unrest(&log(8, 0.2, text)), None);
        assert_eq!(unrest(&log(30, 1.5, text)), None);
        assert_eq!(unrest(&log(30, 0.1, "INFO peers changed peers=1 before=0")), None);
        let run =
            format!("2026-11-26T21:05:00.000000Z  INFO flannel-agent v0.1.0 starts\n{}", log(5, 0.2, text));
        assert_eq!(unrest(&run.repeat(3)), None);
    }
}
