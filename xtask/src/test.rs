//! `cargo xtask test`: sets up, builds the eBPF object and the agent, runs every test, and prints real counts.
//!
//! A test that can't run is a failure here: `FLANNEL_REQUIRE_ROOT=1` makes the test binaries say what is missing and end
//! instead of reporting their tests as ignored, and an ignored test fails the run as well.

use std::{collections::BTreeMap, fs, path::Path, process::Command, time::Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    build_ebpf,
    progress::{Logged, Step, cargo, cargo_step, seconds},
    setup, vm,
};

/// CAP_NET_ADMIN and CAP_SYS_ADMIN, linux/capability.h
const NEEDED_CAPABILITIES: u64 = 1 << 12 | 1 << 21;

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Only tests whose name contains this
    filter: Option<String>,
    /// Afterwards those that depend on the kernel once more, on other kernels (`cargo xtask vm`)
    #[arg(long)]
    kernels: bool,
    /// Those against a real kube-apiserver too; built once, which takes minutes
    #[arg(long)]
    kube: bool,
}

/// Tests of one binary.
struct Suite {
    kind: &'static str,
    name: String,
    passed: u64,
    failed: u64,
    ignored: u64,
    /// What it printed, for the case that it fails.
    output: String,
    finished: bool,
}

/// Runs them all.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let started = Instant::now();
    require_root()?;
    setup::run()?;
    if arguments.kube {
        setup::kube::run()?;
        setup::helm::run()?;
    }
    build_ebpf::run()?;
    let features: &[&str] = if arguments.kube { &["--features", "flannel-tests/kube"] } else { &[] };
    // The tests look for it next to themselves; cargo builds no other package's binaries for a test.
    cargo_step("build the agent", "test-agent", cargo().args(["build", "--package", "flannel-agent"]))?;
    let mut compile = cargo();
    compile.args(["test", "--workspace", "--no-run"]).args(features);
    cargo_step("build the tests", "test-build", &mut compile)?;

    let mut suites: Vec<Suite> = Vec::new();
    let mut step: Option<Step> = None;
    let mut command = cargo();
    command.env("FLANNEL_REQUIRE_ROOT", "1").args(["test", "--workspace", "--no-fail-fast"]).args(features);
    if let Some(filter) = &arguments.filter {
        command.arg(filter);
    }
    let logged = Logged::run(&mut command, "test", |line| {
        if let Some(suite) = suite_of(line) {
            step = Some(Step::begin(&format!("{}: {}", suite.kind, suite.name)));
            suites.push(suite);
            return;
        }
        let Some(suite) = suites.last_mut() else { return };
        suite.output.push_str(line);
        suite.output.push('\n');
        if let Some(counts) = counts_of(line) {
            [suite.passed, suite.failed, suite.ignored] = counts;
            suite.finished = true;
            if let Some(step) = step.take() {
                let ignored =
                    if suite.ignored > 0 { format!(", {} not run", suite.ignored) } else { String::new() };
                step.done(&format!("{} passed, {} failed{ignored}", suite.passed, suite.failed));
            }
        } else if let (Some(step), Some(test)) = (&step, line.strip_prefix("test ")) {
            step.note(test);
        }
    })?;
    drop(step);
    report(&suites, &logged, started)?;
    if arguments.kernels {
        println!("\nOn other kernels:");
        vm::run(&vm::Arguments::default())?;
    }
    Ok(())
}

fn report(suites: &[Suite], logged: &Logged, started: Instant) -> Result<()> {
    let mut kinds: BTreeMap<&str, [u64; 3]> = BTreeMap::new();
    for suite in suites {
        let sum = kinds.entry(suite.kind).or_default();
        for (sum, count) in sum.iter_mut().zip([suite.passed, suite.failed, suite.ignored]) {
            *sum += count;
        }
        if suite.failed > 0 || !suite.finished {
            println!("\n── {}: {} ──\n{}", suite.kind, suite.name, suite.output.trim_end());
        }
    }
    println!();
    for (kind, [passed, failed, ignored]) in &kinds {
        let ignored = if *ignored > 0 { format!(", {ignored} not run") } else { String::new() };
        println!("  {kind:<12} {passed:>5} passed, {failed} failed{ignored}");
    }
    let total = |index: usize| kinds.values().filter_map(|counts| counts.get(index)).sum::<u64>();
    let (passed, failed, ignored) = (total(0), total(1), total(2));
    println!("{passed} passed, {failed} failed in {}", seconds(started.elapsed()));

    if let Some(broken) = suites.iter().find(|suite| !suite.finished) {
        bail!(
            "{}: {} ended before its tests did (all output: {})",
            broken.kind,
            broken.name,
            logged.log.display()
        );
    }
    ensure!(failed == 0, "{failed} tests failed (all output: {})", logged.log.display());
    ensure!(ignored == 0, "{ignored} tests were not run (why: {})", logged.log.display());
    ensure!(passed > 0, "no test was run (all output: {})", logged.log.display());
    logged.require_success("cargo test failed")
}

/// `     Running unittests src/lib.rs (target/debug/deps/flannel_agent-0123)`, `   Doc-tests flannel_agent`
fn suite_of(line: &str) -> Option<Suite> {
    let line = line.trim_start();
    let (kind, name) = if let Some(crate_name) = line.strip_prefix("Doc-tests ") {
        ("examples", crate_name.to_owned())
    } else {
        let (source, binary) = line.strip_prefix("Running ")?.strip_suffix(')')?.split_once(" (")?;
        let stem = Path::new(binary).file_name()?.to_string_lossy().into_owned();
        let stem = stem.rsplit_once('-').map_or(stem.clone(), |(name, _)| name.to_owned());
        if let Some(source) = source.strip_prefix("unittests ") {
            let part = if source == "src/main.rs" { " (program)" } else { "" };
            ("units", format!("{stem}{part}"))
        } else {
            ("hosts", stem)
        }
    };
    let kind = if kind == "hosts" && name == "ebpf" { "programs" } else { kind };
    Some(Suite { kind, name, passed: 0, failed: 0, ignored: 0, output: String::new(), finished: false })
}

/// `test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; …` → passed, failed, ignored
pub(crate) fn counts_of(line: &str) -> Option<[u64; 3]> {
    let counts = line.strip_prefix("test result: ")?;
    let number = |word: &str| {
        let part = counts.split(['.', ';']).find(|part| part.trim().ends_with(word))?;
        part.split_whitespace().next()?.parse().ok()
    };
    Some([number("passed")?, number("failed")?, number("ignored")?])
}

fn require_root() -> Result<()> {
    ensure!(
        may_make_networks()?,
        "the tests build hosts out of network namespaces and load eBPF programs: run as root \
         (`sudo -E env PATH=$PATH cargo xtask test`).\n\
         What needs no root: `cargo test -p flannel-agent -p flannel-common -p xtask`"
    );
    if !Path::new("/dev/net/tun").exists() {
        // Loads the module where there is one; the node is what counts.
        let _ = Command::new("modprobe").arg("tun").output();
    }
    ensure!(
        Path::new("/dev/net/tun").exists(),
        "/dev/net/tun is missing, and with it every udp data path: `modprobe tun`, or in a container pass the device \
         in (--device /dev/net/tun)"
    );
    Ok(())
}

/// True with the capabilities that network namespaces and devices need.
pub(crate) fn may_make_networks() -> Result<bool> {
    let status = fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .context("/proc/self/status has no CapEff")?;
    Ok(effective & NEEDED_CAPABILITIES == NEEDED_CAPABILITIES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suites_are_told_apart_by_what_cargo_prints() {
        let cases = [
            (
                "     Running unittests src/lib.rs (target/debug/deps/flannel_agent-0123abcd)",
                "units",
                "flannel_agent",
            ),
            ("     Running tests/ebpf.rs (target/debug/deps/ebpf-0123abcd)", "programs", "ebpf"),
            ("     Running tests/backends/main.rs (target/debug/deps/backends-01)", "hosts", "backends"),
            ("   Doc-tests flannel_common", "examples", "flannel_common"),
        ];
        for (line, kind, name) in cases {
            let suite = suite_of(line).expect(line);
            assert_eq!((suite.kind, suite.name.as_str()), (kind, name), "{line}");
        }
        assert!(suite_of("test it_is_Running (fast)").is_none());
    }

    #[test]
    fn counts_come_from_the_result_line() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.84s";
        assert_eq!(counts_of(line), Some([12, 3, 1]));
        assert_eq!(counts_of("test result_is_printed ... ok"), None);
    }
}
