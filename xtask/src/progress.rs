//! One line per step: what is being done while it is done, and how long it took when it is. Off a terminal only the
//! second is printed, so logs stay readable.

use std::{
    env,
    fs::{self, File},
    io::{BufRead as _, BufReader, IsTerminal as _, Write as _, stdout},
    path::PathBuf,
    process::{Command, ExitStatus},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};

use crate::workspace;

/// A step that has begun. Dropped without [`Step::done`] it shows as failed.
pub(crate) struct Step {
    what: String,
    started: Instant,
    live: bool,
    ended: bool,
}

impl Step {
    /// Announces a step: "start etcd".
    pub(crate) fn begin(what: &str) -> Self {
        let step = Self {
            what: what.to_owned(),
            started: Instant::now(),
            live: stdout().is_terminal(),
            ended: false,
        };
        step.note("");
        step
    }

    /// Shows where the step is, on a terminal.
    pub(crate) fn note(&self, detail: &str) {
        const WIDTH: usize = 48;
        if self.live {
            let detail: String = detail.chars().take(WIDTH).collect();
            print!("\r\x1b[2K  … {:<32} {detail}", self.what);
            let _ = stdout().flush();
        }
    }

    /// The step is done; `result` says what came of it (may be empty).
    pub(crate) fn done(mut self, result: &str) {
        self.end("✓", result);
    }

    fn end(&mut self, sign: &str, result: &str) {
        self.ended = true;
        let clear = if self.live { "\r\x1b[2K" } else { "" };
        let line =
            format!("{clear}  {sign} {:<32} {:>8}  {result}", self.what, seconds(self.started.elapsed()));
        println!("{}", line.trim_end());
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if !self.ended {
            self.end("✗", "");
        }
    }
}

/// `1.5 s`, `3 min 20 s`
pub(crate) fn seconds(time: Duration) -> String {
    let whole = time.as_secs();
    if whole < 100 {
        format!("{:.1} s", time.as_secs_f64())
    } else {
        format!("{} min {:02} s", whole / 60, whole % 60)
    }
}

/// Cargo for the workspace, free of what the outer `cargo xtask` left in the environment: cargo's own variables about
/// this package would make build scripts that watch them run again and again.
pub(crate) fn cargo() -> Command {
    const ABOUT_US: [&str; 5] =
        ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_", "CARGO_PRIMARY_"];
    const ALSO: [&str; 4] = ["RUSTC", "RUSTC_WORKSPACE_WRAPPER", "OUT_DIR", "CARGO"];
    let mut command = Command::new("cargo");
    command.current_dir(workspace());
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if ABOUT_US.iter().any(|prefix| text.starts_with(prefix)) || ALSO.contains(&text.as_ref()) {
            command.env_remove(&name);
        }
    }
    command
}

/// A command whose lines go to `target/xtask/NAME.log`, and one by one to the caller.
pub(crate) struct Logged {
    /// Where everything it printed is.
    pub(crate) log: PathBuf,
    /// How it ended.
    pub(crate) status: ExitStatus,
}

impl Logged {
    /// Runs it to its end.
    pub(crate) fn run(command: &mut Command, name: &str, mut line: impl FnMut(&str)) -> Result<Self> {
        let folder = workspace().join("target/xtask");
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        let log = folder.join(format!("{name}.log"));
        let mut file = File::create(&log).with_context(|| format!("create {}", log.display()))?;

        let (reader, writer) = std::io::pipe().context("make a pipe")?;
        let program = command.get_program().to_string_lossy().into_owned();
        command.stdout(writer.try_clone().context("share a pipe")?).stderr(writer);
        let mut child = command.spawn().with_context(|| format!("start {program}"))?;
        // The command holds both writing ends; without this the reading end would never see the end.
        command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());

        let mut reader = BufReader::new(reader);
        let mut bytes = Vec::new();
        while reader.read_until(b'\n', &mut bytes).with_context(|| format!("read what {program} prints"))? > 0
        {
            file.write_all(&bytes).with_context(|| format!("write {}", log.display()))?;
            line(String::from_utf8_lossy(&bytes).trim_end());
            bytes.clear();
        }
        let status = child.wait().with_context(|| format!("wait for {program}"))?;
        Ok(Self { log, status })
    }

    /// An error with the log's text when it failed.
    pub(crate) fn require_success(&self, what: &str) -> Result<()> {
        if self.status.success() {
            return Ok(());
        }
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        bail!("{what} ({}):\n{}\n(all of it: {})", self.status, last_lines(&text, 60), self.log.display())
    }
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines.get(lines.len().saturating_sub(count)..).unwrap_or_default().join("\n")
}

/// [`Logged::run`] of a cargo command as a step of its own, showing what is being compiled.
pub(crate) fn cargo_step(what: &str, log: &str, command: &mut Command) -> Result<()> {
    let step = Step::begin(what);
    let logged = Logged::run(command, log, |line| {
        let line = line.trim_start();
        if line.starts_with("Compiling") || line.starts_with("Checking") || line.starts_with("Downloading") {
            step.note(line);
        }
    })?;
    logged.require_success(&format!("{what} failed"))?;
    step.done("");
    Ok(())
}
