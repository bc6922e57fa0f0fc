//! `ping` from a namespace, and what it counted.

use std::{
    fmt,
    io::Read as _,
    net::Ipv4Addr,
    process::{Child, Stdio},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
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

    /// Sends them all and waits a second for the last answer.
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
        // Quiet, it keeps even errors to itself; in long runs nobody would empty the pipe.
        let quiet = if self.count > 100 { "-q" } else { "-n" };
        let process = self
            .from
            .command("ping")
            .args(["-n", quiet, "-W", "1", "-c", &self.count.to_string(), "-s", &self.payload.to_string()])
            .args(["-i", &format!("{:.3}", self.interval.as_secs_f64())])
            .args(["-M", if self.dont_fragment { "do" } else { "dont" }])
            .args(&self.options)
            .arg(self.to.to_string())
            .env("LC_ALL", "C")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start `ping` (Debian and Ubuntu: package iputils-ping)")?;
        Ok(RunningPing { process })
    }
}

/// A `ping` at work.
#[derive(Debug)]
pub struct RunningPing {
    process: Child,
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
        let mut text = String::new();
        if let Some(output) = &mut self.process.stdout {
            output.read_to_string(&mut text).context("read ping's output")?;
        }
        if let Some(output) = &mut self.process.stderr {
            output.read_to_string(&mut text).context("read ping's output")?;
        }
        self.process.wait().context("wait for ping")?;
        PingReport::parse(&text)
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
    /// All it printed.
    pub text: String,
}

impl PingReport {
    fn parse(text: &str) -> Result<Self> {
        let summary = text
            .lines()
            .find(|line| line.contains("packets transmitted"))
            .with_context(|| format!("ping printed no statistics:\n{text}"))?;
        let number = |word: &str| {
            summary
                .split(',')
                .find(|part| part.contains(word))
                .and_then(|part| part.split_whitespace().next()?.parse::<u32>().ok())
                .with_context(|| format!("ping's statistics have no `{word}`: {summary}"))
        };
        let rtt = text
            .lines()
            .find_map(|line| line.strip_prefix("rtt min/avg/max/mdev = "))
            .and_then(|values| values.split('/').nth(1)?.parse::<f64>().ok())
            .map(|milliseconds| Duration::from_secs_f64(milliseconds / 1000.0));
        let report =
            Self { sent: number("transmitted")?, received: number("received")?, rtt, text: text.to_owned() };
        ensure!(report.received <= report.sent, "more answers than requests:\n{text}");
        Ok(report)
    }

    /// Requests without an answer.
    pub fn lost(&self) -> u32 {
        self.sent - self.received
    }
}

impl fmt::Display for PingReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} pings lost\n{}", self.lost(), self.sent, self.text.trim_end())
    }
}
