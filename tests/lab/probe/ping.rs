//! `ping` from a namespace, and what it counted.

use std::{
    collections::BTreeSet,
    fmt,
    io::{self, Read as _},
    net::Ipv4Addr,
    process::{Child, Stdio},
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::namespace::Namespace;

/// A ping to be.
#[derive(Clone, Debug)]
pub struct Ping {
    from: Arc<Namespace>,
    to: Ipv4Addr,
    count: u32,
    interval: Duration,
    payload: u32,
    dont_fragment: bool,
    options: Vec<String>,
}

impl Ping {
    /// Three echo requests of 56 bytes, 20 ms apart.
    pub fn new(from: &Arc<Namespace>, to: Ipv4Addr) -> Self {
        Self {
            from: Arc::clone(from),
            to,
            count: 3,
            interval: Duration::from_millis(20),
            payload: 56,
            dont_fragment: false,
            options: Vec::new(),
        }
    }

    /// How many.
    #[must_use]
    pub fn count(mut self, count: u32) -> Self {
        self.count = count;
        self
    }

    /// Time between two.
    #[must_use]
    pub fn interval(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// Size of the whole IPv4 packet, bytes (28 and more).
    #[must_use]
    pub fn packet(mut self, bytes: u32) -> Self {
        self.payload = bytes.saturating_sub(28);
        self
    }

    /// Sets DF and lets the kernel apply the path MTU it knows (`ping -M do`).
    #[must_use]
    pub fn dont_fragment(mut self) -> Self {
        self.dont_fragment = true;
        self
    }

    /// One more option of `ping`.
    #[must_use]
    pub fn option(mut self, option: &str) -> Self {
        self.options.push(option.to_owned());
        self
    }

    /// Sends them all and waits a second for the last answer (longer where the machine is slow, [`crate::SLOWER`]).
    ///
    /// # Errors
    /// `ping` can't be started or prints no statistics. Lost pings are no error: see [`PingReport::lost`].
    pub fn run(&self) -> Result<PingReport> {
        self.start()?.wait()
    }

    /// Starts it and returns at once; started with this thread, it ends with it.
    ///
    /// # Errors
    /// `ping` can't be started.
    pub fn start(&self) -> Result<RunningPing> {
        let mut process = self
            .from
            .command("ping")
            .args([
                "-n",
                "-W",
                &crate::slower().to_string(),
                "-c",
                &self.count.to_string(),
                "-s",
                &self.payload.to_string(),
            ])
            .args(["-i", &format!("{:.3}", self.interval.as_secs_f64())])
            .args(["-M", if self.dont_fragment { "do" } else { "dont" }])
            .args(&self.options)
            .arg(self.to.to_string())
            .env("LC_ALL", "C")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start `ping` (Debian and Ubuntu: package iputils-ping)")?;
        // Long runs print more than a pipe holds.
        let mut output = process.stdout.take().context("ping's output")?;
        let mut errors = process.stderr.take().context("ping's errors")?;
        let reader = thread::spawn(move || {
            let (mut text, mut wrong) = (String::new(), String::new());
            output.read_to_string(&mut text)?;
            errors.read_to_string(&mut wrong)?;
            Ok(text + &wrong)
        });
        Ok(RunningPing { process, reader: Some(reader), interval: self.interval })
    }
}

/// A `ping` at work.
#[derive(Debug)]
pub struct RunningPing {
    process: Child,
    reader: Option<JoinHandle<io::Result<String>>>,
    interval: Duration,
}

impl RunningPing {
    /// Ends it now and returns what it counted.
    ///
    /// # Errors
    /// It prints no statistics.
    pub fn stop(self) -> Result<PingReport> {
        let pid = i32::try_from(self.process.id()).context("ping's pid")?;
        kill(Pid::from_raw(pid), Signal::SIGINT).context("interrupt ping")?;
        self.wait()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It prints no statistics.
    pub fn wait(mut self) -> Result<PingReport> {
        self.process.wait().context("wait for ping")?;
        let reader = self.reader.take().context("ping's output was read already")?;
        let text = reader.join().map_err(|_| anyhow!("the reader of ping's output panicked"))?;
        PingReport::parse(&text.context("read ping's output")?, self.interval)
    }
}

impl Drop for RunningPing {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What `ping` counted.
#[derive(Clone, Debug)]
pub struct PingReport {
    /// Echo requests sent.
    pub sent: u32,
    /// Answers received.
    pub received: u32,
    /// Average round trip; none without an answer.
    pub rtt: Option<Duration>,
    /// Requests whose answer may still have been on its way when ping was interrupted: the last ones, as many as are sent
    /// within the longest round trip, and one.
    in_flight: u32,
    /// Numbers of the requests without an answer, but for those.
    missing: Vec<u32>,
    /// All it printed but the answers.
    pub text: String,
}

impl PingReport {
    fn parse(text: &str, interval: Duration) -> Result<Self> {
        let is_answer = |line: &&str| line.contains("bytes from");
        let (answers, rest): (Vec<&str>, Vec<&str>) = text.lines().partition(is_answer);
        let rest = rest.join("\n");
        let summary = rest
            .lines()
            .find(|line| line.contains("packets transmitted"))
            .with_context(|| format!("ping printed no statistics:\n{rest}"))?;
        let number = |word: &str| {
            summary
                .split(',')
                .find(|part| part.contains(word))
                .and_then(|part| part.split_whitespace().next()?.parse::<u32>().ok())
                .with_context(|| format!("ping's statistics have no `{word}`: {summary}"))
        };
        let round_trip = |index: usize| {
            rest.lines()
                .find_map(|line| line.strip_prefix("rtt min/avg/max/mdev = "))
                .and_then(|values| values.split('/').nth(index)?.parse::<f64>().ok())
                .map(|milliseconds| Duration::from_secs_f64(milliseconds / 1000.0))
        };
        let (sent, received) = (number("transmitted")?, number("received")?);
        ensure!(received <= sent, "more answers than requests:\n{rest}");
        let within = round_trip(2).unwrap_or_default().as_secs_f64() / interval.as_secs_f64().max(1e-3);
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few, and positive")]
        let unanswered_at_most = 1 + within as u32;

        let mut missing = missing(&answers, sent);
        let mut in_flight = 0;
        while in_flight < unanswered_at_most && missing.last() == Some(&(sent - in_flight)) {
            missing.pop();
            in_flight += 1;
        }
        Ok(Self { sent, received, rtt: round_trip(1), in_flight, missing, text: rest })
    }

    /// Requests without an answer.
    pub fn lost(&self) -> u32 {
        self.sent - self.received
    }

    /// Requests without an answer, of one that was interrupted: those that may still have been on their way don't count.
    pub fn lost_on_the_way(&self) -> u32 {
        self.lost().saturating_sub(self.in_flight)
    }

    /// Numbers of the requests that were [lost on the way](Self::lost_on_the_way).
    pub fn missing(&self) -> &[u32] {
        &self.missing
    }
}

/// Requests without an answer, from 1. The number in an answer has 16 bits.
fn missing(answers: &[&str], sent: u32) -> Vec<u32> {
    let (mut seen, mut last) = (BTreeSet::new(), 1_i64);
    for line in answers {
        let number =
            line.split_once("icmp_seq=").and_then(|(_, rest)| rest.split(' ').next()?.parse::<i64>().ok());
        let Some(number) = number.filter(|_| !line.contains("DUP")) else { continue };
        // The one nearest to the one before.
        last += i64::from((number - last) as i16);
        seen.insert(last);
    }
    (1..=sent).filter(|number| !seen.contains(&i64::from(*number))).collect()
}

impl fmt::Display for PingReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} pings lost", self.lost(), self.sent)?;
        if !self.missing.is_empty() {
            write!(f, ", numbers {:?}", &self.missing[..self.missing.len().min(12)])?;
        }
        write!(f, "\n{}", self.text.trim_end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(answered: impl Iterator<Item = u32>, sent: u32) -> PingReport {
        let mut received = 0;
        let mut text: String = answered
            .map(|n| {
                received += 1;
                format!("64 bytes from 10.0.0.1: icmp_seq={} ttl=62 time=0.2 ms\n", n & 0xffff)
            })
            .collect();
        text += &format!(
            "{sent} packets transmitted, {received} received, 0% packet loss, time 9ms\n\
             rtt min/avg/max/mdev = 0.100/0.200/2.500/0.001 ms\n"
        );
        PingReport::parse(&text, Duration::from_millis(1)).unwrap()
    }

    #[test]
    fn a_hole_is_a_loss_and_the_last_ones_may_be_on_their_way() {
        let report = run((1..=98).filter(|n| *n != 7), 100);
        assert_eq!((report.lost(), report.lost_on_the_way(), report.missing()), (3, 1, [7].as_slice()));
        assert_eq!(run(1..=100, 100).lost_on_the_way(), 0);
        // More than can be sent in the longest round trip.
        assert_eq!(run(1..=90, 100).lost_on_the_way(), 7);
    }

    #[test]
    fn numbers_begin_again_after_65535() {
        let report = run((1..=140_000).filter(|n| *n != 70_000), 140_000);
        assert_eq!((report.lost_on_the_way(), report.missing()), (1, [70_000].as_slice()));
    }
}
