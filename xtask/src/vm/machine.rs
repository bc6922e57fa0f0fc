//! One boot: QEMU, two serial lines, and what came of it.
//!
//! On the first line the tests talk; what they say becomes counts. On the second the kernel does, and any oops, warning
//! or stall there is a failure, whatever the tests say. So is an end without a last word: a panic, a hang, a crash of the
//! emulator. Nothing is ever tried again.

use std::{
    fs::{self, File},
    io,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{folder, kernels::Fetched};
use crate::{
    progress::{Logged, Step},
    test::counts_of,
};

/// Longer than any run takes on a busy machine; a guest that hangs ends here.
const LIMIT: Duration = Duration::from_secs(1500);

/// What the tests of one binary came to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Suite {
    pub(super) name: String,
    pub(super) passed: u64,
    pub(super) failed: u64,
    /// Tests that say they need a newer kernel.
    pub(super) ignored: u64,
    /// What is wrong beyond failed tests.
    pub(super) wrong: Vec<String>,
    pub(super) output: Vec<String>,
    counted: bool,
}

/// Instructions the verifier walked in each program, as the tests print them.
pub(super) type Instructions = Vec<(String, String)>;

/// What one boot came to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Boot {
    pub(super) suites: Vec<Suite>,
    pub(super) instructions: Instructions,
    /// What is wrong with the boot as a whole.
    pub(super) wrong: Vec<String>,
    ended: bool,
}

/// Boots it and runs what the guest's `/init` says.
pub(super) fn boot(name: &str, kernel: &Fetched, guest: &Path) -> Result<Boot> {
    let step = Step::begin(&format!("kernel {name}: boot"));
    let started = Instant::now();
    let here = folder().join(name);
    let initrd = here.join("initrd.cpio");
    concatenate(&[&kernel.modules, guest], &initrd)?;
    let kernel_log = here.join("kernel.log");
    let _ = fs::remove_file(&kernel_log);

    let mut qemu = Command::new("timeout");
    qemu.arg("--signal=KILL").arg(LIMIT.as_secs().to_string()).arg("qemu-system-x86_64");
    // One thread for all virtual CPUs: with more, QEMU 7 crashes guests that patch code another CPU is running.
    qemu.args(["-accel", "tcg,thread=single", "-cpu", "max", "-smp", "2", "-m", "2048"]);
    qemu.args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio", "-serial"]);
    qemu.arg(format!("file:{}", kernel_log.display()));
    // Two cards on one hub, known to nobody but the tests.
    for (id, address) in (0..).zip(super::guest::CARDS) {
        qemu.args(["-netdev", &format!("hubport,id=hub{id},hubid=0")]);
        qemu.args(["-device", &format!("virtio-net-pci,netdev=hub{id},mac={address}")]);
    }
    qemu.arg("-kernel").arg(&kernel.image).arg("-initrd").arg(&initrd);
    qemu.args(["-append", "console=ttyS1 loglevel=6 oops=panic panic=-1"]);
    qemu.stdin(std::process::Stdio::null());

    let mut boot = Boot::default();
    let mut step = Some(step);
    let logged = Logged::run(&mut qemu, &format!("vm-{name}"), |line| {
        if line.starts_with("VM-UP")
            && let Some(step) = step.take()
        {
            step.done(&kernel.release);
        }
        boot.hear(line);
        match line.split_once(' ') {
            Some(("VM-RUN", suite)) => step = Some(Step::begin(&format!("kernel {name}: {suite}"))),
            Some(("VM-RC", _)) => {
                if let (Some(step), Some(suite)) = (step.take(), boot.suites.last()) {
                    step.done(&suite.summary());
                }
            }
            Some(("test", test)) => {
                if let Some(step) = &step {
                    step.note(test);
                }
            }
            _ => {}
        }
    })?;
    drop(step);
    let _ = fs::remove_file(&initrd);
    let log = fs::read(&kernel_log).unwrap_or_default();
    boot.judge(&String::from_utf8_lossy(&log));
    if !boot.ended {
        let why = if started.elapsed() >= LIMIT { "killed after its time was up" } else { "ended" };
        boot.wrong.push(format!(
            "the guest {why} before its last word ({}); what it said: {}; the kernel: {}",
            logged.status,
            logged.log.display(),
            kernel_log.display()
        ));
    }
    Ok(boot)
}

impl Suite {
    pub(super) fn summary(&self) -> String {
        let ignored =
            if self.ignored > 0 { format!(", {} need a newer kernel", self.ignored) } else { String::new() };
        format!("{} passed, {} failed{ignored}", self.passed, self.failed)
    }

    pub(super) fn is_good(&self) -> bool {
        self.failed == 0 && self.wrong.is_empty()
    }
}

impl Boot {
    /// A line of the tests' serial line.
    fn hear(&mut self, line: &str) {
        match line.split_once(' ') {
            Some(("VM-RUN", name)) => {
                self.suites.push(Suite { name: name.to_owned(), ..Suite::default() });
                return;
            }
            Some(("VM-RC", rest)) => {
                if let Some(suite) = self.suites.last_mut() {
                    let code = rest.rsplit(' ').next().unwrap_or_default();
                    if !suite.counted {
                        suite
                            .wrong
                            .push(format!("{} ended before its tests did (exit code {code})", suite.name));
                    } else if code != "0" && suite.failed == 0 {
                        suite.wrong.push(format!("{} ended with exit code {code}", suite.name));
                    }
                }
                return;
            }
            Some(("VM-FAILED", what)) => self.wrong.push(format!("{what} failed in the guest")),
            _ if line == "VM-END" => self.ended = true,
            _ => {}
        }
        if let Some(counted) = instructions_of(line)
            && !self.instructions.contains(&counted)
        {
            self.instructions.push(counted);
        }
        let Some(suite) = self.suites.last_mut() else { return };
        if let Some([passed, failed, ignored]) = counts_of(line) {
            (suite.passed, suite.failed, suite.ignored) = (passed, failed, ignored);
            suite.counted = true;
            if passed == 0 {
                suite.wrong.push(format!("{}: no test was run", suite.name));
            }
        } else if line.starts_with("test ")
            && line.contains(" ... ignored")
            && !line.contains("(needs Linux ")
        {
            suite.wrong.push(format!("not run, and not for want of a newer kernel: {line}"));
        }
        suite.output.push(line.to_owned());
    }

    /// What the kernel said.
    fn judge(&mut self, log: &str) {
        let lines: Vec<&str> = log.lines().collect();
        for (number, line) in lines.iter().enumerate() {
            if is_alarm(line) {
                let around = lines.get(number..lines.len().min(number + 12)).unwrap_or_default();
                self.wrong.push(format!("the kernel said:\n    {}", around.join("\n    ")));
                return;
            }
        }
    }

    pub(super) fn is_good(&self) -> bool {
        self.wrong.is_empty() && !self.suites.is_empty() && self.suites.iter().all(Suite::is_good)
    }
}

/// Words of an oops, a warning with a stack, a stall or a leak. Kernels also *print* the word WARNING, for example about
/// mitigations that are off; a stack names the place with `at`.
fn is_alarm(line: &str) -> bool {
    const WORDS: [&str; 9] = [
        "BUG: ",
        "Oops",
        "Kernel panic",
        "general protection fault",
        "soft lockup",
        "hung task",
        "blocked for more than",
        "detected stall",
        "self-detected",
    ];
    WORDS.iter().any(|word| line.contains(word))
        || line.split_once("WARNING: ").is_some_and(|(_, rest)| rest.contains(" at "))
        || line.contains("unregister_netdevice: waiting for")
}

/// `flannel_encap, flags 2: 394 instructions verified, 230 loaded` → flannel_encap, 394
fn instructions_of(line: &str) -> Option<(String, String)> {
    let (program, rest) = line.split_once(", flags 2: ")?;
    let (count, _) = rest.split_once(" instructions verified")?;
    Some((program.to_owned(), count.to_owned()))
}

fn concatenate(parts: &[&Path], whole: &Path) -> Result<()> {
    let mut target = File::create(whole).with_context(|| format!("create {}", whole.display()))?;
    for part in parts {
        let mut source = File::open(part).with_context(|| format!("open {}", part.display()))?;
        io::copy(&mut source, &mut target).with_context(|| format!("copy {}", part.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(text: &str) -> Boot {
        let mut boot = Boot::default();
        text.lines().for_each(|line| boot.hear(line));
        boot
    }

    const GOOD: &str = "VM-UP 9.1\nVM-RUN ebpf\nflannel_encap, flags 2: 394 instructions verified, 230 loaded\n\
                        test a ... ok\ntest b ... ignored (needs Linux 6.6: TCX)\n\
                        test result: ok. 1 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out\nVM-RC ebpf 0\nVM-END";

    #[test]
    fn a_whole_run_is_counted() {
        let boot = heard(GOOD);
        assert!(boot.is_good() && boot.ended, "{boot:?}");
        assert_eq!(boot.suites[0].summary(), "1 passed, 0 failed, 1 need a newer kernel");
        assert_eq!(boot.instructions, [("flannel_encap".to_owned(), "394".to_owned())]);
    }

    #[test]
    fn what_is_missing_is_a_failure() {
        let no_end = heard(GOOD.trim_end_matches("VM-END"));
        assert!(!no_end.ended);
        let no_result = heard("VM-RUN ebpf\ntest a ... ok\nVM-RC ebpf 139");
        assert_eq!(no_result.suites[0].wrong, ["ebpf ended before its tests did (exit code 139)"]);
        let silent_skip = heard(&GOOD.replace("needs Linux 6.6: TCX", "not root"));
        assert!(!silent_skip.is_good());
        let nothing = heard(&GOOD.replace("1 passed", "0 passed"));
        assert!(!nothing.is_good());
        assert!(!Boot::default().is_good());
        assert!(!heard(&GOOD.replace("VM-UP", "VM-FAILED modprobe\nVM-UP")).is_good());
    }

    #[test]
    fn the_kernel_s_alarms_are_failures_and_its_advice_is_not() {
        for alarm in [
            "[   12.3] WARNING: CPU: 0 PID: 11 at net/core/dev.c:12 skb_warn_bad_offload+0xd0/0xe0",
            "[   12.3] WARNING: net/core/dev.c:12 at skb_warn_bad_offload+0xd0/0xe0, CPU#0: ping/11",
            "[   12.3] BUG: unable to handle page fault for address: 0000",
            "[   12.3] watchdog: BUG: soft lockup - CPU#1 stuck for 22s!",
            "[   12.3] rcu: INFO: rcu_preempt self-detected stall on CPU",
            "[   12.3] Kernel panic - not syncing: Fatal exception",
        ] {
            let mut boot = heard(GOOD);
            boot.judge(&format!("[    0.0] Linux\n{alarm}\n[   12.4] more"));
            assert!(!boot.is_good(), "{alarm}");
        }
        let mut boot = heard(GOOD);
        boot.judge("[    0.1] Spectre V2 : WARNING: Unprivileged eBPF is enabled with eIBRS on, data leaks possible\n");
        assert!(boot.is_good());
    }
}
