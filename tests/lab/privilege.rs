//! The gate in front of every test that needs root: a test that can't run here is *ignored with the reason*, never
//! passed, and under `FLANNEL_REQUIRE_ROOT=1` (set by `cargo xtask test` and `.ci/run`) the binary ends with 1 before
//! its first test instead.
//!
//! A test binary is `harness = false` and its `main` is one line:
//!
//! ```no_run
//! fn main() -> std::process::ExitCode {
//!     flannel_tests::privilege::run(vec![libtest_mimic::Trial::test("a_sentence", || Ok(()))])
//! }
//! ```

use std::{path::Path, process::ExitCode};

use aya::programs::ProgramType;
use flannel_agent::host::udp::object;
use libtest_mimic::{Arguments, Completion, Trial};
use nix::{
    mount::{MsFlags, mount},
    unistd::geteuid,
};

use crate::namespace::private_mounts;

/// Set to `1`: what is missing is a failure, not a reason to ignore.
pub const REQUIRE_ROOT: &str = "FLANNEL_REQUIRE_ROOT";

/// Names of tests, or what they begin with, separated by commas: only those are run. One that fits none is a failure, so
/// that a test which is renamed does not vanish from a list.
pub const ONLY: &str = "FLANNEL_ONLY";

/// What tests of the kernel data path need: root, the eBPF object, and a kernel that lets us load XDP programs.
///
/// # Errors
/// The first thing that is missing, in one sentence with its remedy.
pub fn require() -> Result<(), String> {
    require_root()?;
    if !object::is_built() {
        return Err("the eBPF object was not built into this binary; run `cargo xtask build-ebpf`".to_owned());
    }
    match aya::sys::is_program_supported(ProgramType::Xdp) {
        Ok(true) => Ok(()),
        Ok(false) => Err("this kernel has no XDP programs".to_owned()),
        Err(e) => {
            let e = anyhow::Error::new(e);
            Err(format!(
                "no XDP program can be loaded ({e:#}): CAP_BPF, CAP_NET_ADMIN or CAP_PERFMON is missing"
            ))
        }
    }
}

/// What tests with network namespaces, but without eBPF, need.
///
/// # Errors
/// "not root", with what to do about it.
pub fn require_root() -> Result<(), String> {
    if geteuid().is_root() {
        Ok(())
    } else {
        Err("not root; run as root, or set CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER='sudo -E'".to_owned())
    }
}

/// [`run_when`] everything of [`require`] is there.
pub fn run(trials: Vec<Trial>) -> ExitCode {
    run_when(require, trials)
}

/// Runs the trials as `cargo test` asks for them, or reports each as ignored with the reason `ready` gives.
/// With [`REQUIRE_ROOT`] set to `1` that reason is printed and no test is run (exit code 1).
pub fn run_when(ready: fn() -> Result<(), String>, trials: Vec<Trial>) -> ExitCode {
    run_with(Arguments::from_args(), ready, trials)
}

/// [`run`], one after the other as they are listed, for trials that share something: what one leaves behind meets the same
/// one every time.
pub fn run_in_order(trials: Vec<Trial>) -> ExitCode {
    run_with(Arguments { test_threads: Some(1), ..Arguments::from_args() }, require, trials)
}

fn run_with(arguments: Arguments, ready: fn() -> Result<(), String>, trials: Vec<Trial>) -> ExitCode {
    let trials = match std::env::var(ONLY) {
        Ok(list) if !list.is_empty() => match named(trials, &list) {
            Ok(trials) => trials,
            Err(reason) => {
                eprintln!("error: {ONLY}: {reason}");
                return ExitCode::FAILURE;
            }
        },
        _ => trials,
    };
    let missing = if arguments.list { None } else { ready().err() };
    let trials = match missing {
        None => trials,
        Some(reason) if std::env::var_os(REQUIRE_ROOT).is_some_and(|v| v == "1") => {
            eprintln!("error: {REQUIRE_ROOT}=1, but {reason}; {} tests not run", trials.len());
            return ExitCode::FAILURE;
        }
        Some(reason) => trials.into_iter().map(|trial| ignored(&trial, &reason)).collect(),
    };
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn named(mut trials: Vec<Trial>, list: &str) -> Result<Vec<Trial>, String> {
    let names: Vec<&str> = list.split(',').map(str::trim).collect();
    let fits = |trial: &Trial, name: &str| trial.name().starts_with(name);
    if let Some(name) = names.iter().find(|name| !trials.iter().any(|trial| fits(trial, name))) {
        return Err(format!("there is no test whose name begins with {name:?}"));
    }
    trials.retain(|trial| names.iter().any(|name| fits(trial, name)));
    Ok(trials)
}

fn ignored(trial: &Trial, reason: &str) -> Trial {
    let reason = reason.to_owned();
    Trial::ignorable_test(trial.name(), move || Ok(Completion::ignored_with(reason))).with_kind(trial.kind())
}

/// Gives this process a mount namespace of its own with an empty bpffs at `at` (an existing folder). Pins, and the
/// programs and maps they hold, vanish with the process and its children, however they end. Mounting over
/// `/sys/fs/bpf` hides the host's pins from an agent started by the test.
///
/// Call it in `main` before any thread exists: `unshare` moves the calling thread only.
///
/// # Errors
/// The step that failed and the kernel's answer.
pub fn private_bpffs(at: &Path) -> Result<(), String> {
    private_mounts().map_err(|e| format!("{e:#}"))?;
    mount(Some("bpf"), at, Some("bpf"), MsFlags::empty(), None::<&str>)
        .map_err(|e| format!("mount bpffs on {}: {e}", at.display()))
}
