//! `cargo xtask vm`: the tests that depend on the kernel, on the kernels of several Debian releases, in QEMU.
//!
//! No KVM is needed and none is used, so it runs wherever CI does; emulation is some ten times slower, and no figure of
//! time taken there means anything. A machine takes one CPU of ours, so as many run at once as there are. `kernels.rs` says which kernels, `guest.rs` what is in
//! the guests and what they run, `machine.rs` what counts as a failure.

mod guest;
mod kernels;
mod machine;

use std::{
    path::PathBuf,
    sync::{Mutex, PoisonError},
    thread,
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};

use self::{
    guest::{Built, RUNS, Wanted},
    kernels::{Cache, Fetched, Kernel},
    machine::Boot,
};
use crate::{
    build_ebpf,
    progress::{Logged, Step, cargo, cargo_step, seconds},
    setup, workspace,
};

#[derive(clap::Args, Default)]
pub(crate) struct Arguments {
    /// Only this kernel: 5.10, 6.1, 6.12 or newest (repeatable)
    #[arg(long, value_name = "NAME")]
    kernel: Vec<String>,
    /// Only this test binary
    #[arg(long, value_name = "BINARY")]
    test: Option<String>,
    /// Look for newer packages of the kernels first
    #[arg(long)]
    update: bool,
    /// Only tests whose name contains this
    filter: Option<String>,
}

/// Where kernels and guests are kept.
fn folder() -> PathBuf {
    workspace().join("target/vm")
}

/// Builds, fetches, boots, reports.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let started = Instant::now();
    ensure!(
        cfg!(target_arch = "x86_64"),
        "the kernel matrix is made of amd64 packages, and this is another machine"
    );
    let chosen = kernels::chosen(&arguments.kernel)?;
    let wanted = Wanted { test: arguments.test.as_deref(), filter: arguments.filter.as_deref() };
    if let Some(test) = wanted.test {
        let known: Vec<_> = RUNS.iter().map(|run| run.binary).collect();
        ensure!(known.contains(&test), "--test {test:?} is none of {}", known.join(", "));
    }
    setup::run()?;
    setup::run_for_machines()?;
    build_ebpf::run()?;
    let built = build()?;
    let step = Step::begin("pack the guest");
    let guest = guest::build(&built, &wanted)?;
    step.done("");

    let cache = if arguments.update { Cache::Renew } else { Cache::Use };
    let fetched: Vec<_> = chosen.into_iter().map(|kernel| (kernel, kernel.fetch(cache))).collect();
    let rows = at_once(fetched, |(kernel, fetched)| {
        let begun = Instant::now();
        let outcome = fetched.and_then(|fetched| {
            let boot = machine::boot(kernel.name, &fetched, &guest)?;
            Ok((fetched, boot))
        });
        Row { kernel, outcome, took: seconds(begun.elapsed()) }
    });
    report(&rows, started)
}

/// What comes of each, in their order; as many at the same time as there are CPUs.
fn at_once<T: Send, R: Send>(all: Vec<T>, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    let workers = cpus.min(all.len());
    let queue = Mutex::new(all.into_iter().enumerate());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let done = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                while let Some((place, one)) = next() {
                    let result = work(one);
                    done.lock().unwrap_or_else(PoisonError::into_inner).push((place, result));
                }
            });
        }
    });
    let mut done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
    done.sort_by_key(|(place, _)| *place);
    done.into_iter().map(|(_, result)| result).collect()
}

/// One kernel and what came of it.
struct Row {
    kernel: &'static Kernel,
    outcome: Result<(Fetched, Boot)>,
    took: String,
}

fn report(rows: &[Row], started: Instant) -> Result<()> {
    let (mut passed, mut failed, mut broken) = (0, 0, 0);
    for Row { kernel, outcome, .. } in rows {
        let (_, boot) = match outcome {
            Ok(done) => done,
            Err(e) => {
                println!("\n── kernel {} ──\n{e:#}", kernel.name);
                broken += 1;
                continue;
            }
        };
        for suite in boot.suites.iter().filter(|suite| !suite.is_good()) {
            println!(
                "\n── kernel {}: {} ──\n{}",
                kernel.name,
                suite.name,
                suite.output.join("\n").trim_end()
            );
            for wrong in &suite.wrong {
                println!("{wrong}");
            }
        }
        for wrong in &boot.wrong {
            println!("\n── kernel {} ──\n{wrong}", kernel.name);
        }
        passed += boot.suites.iter().map(|suite| suite.passed).sum::<u64>();
        failed += boot.suites.iter().map(|suite| suite.failed).sum::<u64>();
        broken += u64::from(!boot.is_good());
    }
    println!();
    for row in rows {
        println!("{}", line(row));
    }
    println!("{passed} passed, {failed} failed in {}", seconds(started.elapsed()));
    ensure!(broken == 0, "{broken} of {} kernels failed (all output: target/xtask/vm-*.log)", rows.len());
    Ok(())
}

fn line(row: &Row) -> String {
    let Row { kernel, outcome, took } = row;
    let Ok((fetched, boot)) = outcome else {
        return format!("  {:<8} not run", kernel.name);
    };
    let suites: Vec<_> =
        boot.suites.iter().map(|suite| format!("{}: {}", suite.name, suite.summary())).collect();
    let instructions: Vec<_> =
        boot.instructions.iter().map(|(name, count)| format!("{name} {count}")).collect();
    let wrong = if boot.is_good() { "" } else { "   FAILED" };
    format!(
        "  {:<8} {} in {took}{wrong}\n           {}\n           verified instructions: {}",
        kernel.name,
        fetched.release,
        suites.join("; "),
        if instructions.is_empty() { "none told".to_owned() } else { instructions.join(", ") },
    )
}

/// The agent and the test binaries, as `cargo xtask test` builds them too.
fn build() -> Result<Built> {
    cargo_step("build the agent", "vm-agent", cargo().args(["build", "--package", "flannel-agent"]))?;
    let step = Step::begin("build the tests");
    let mut command = cargo();
    command.args(["test", "--package", "flannel-tests", "--no-run"]);
    for run in RUNS {
        command.args(["--test", run.binary]);
    }
    let mut executables = Vec::new();
    let logged = Logged::run(&mut command, "vm-build", |line| {
        step.note(line.trim_start());
        // `  Executable tests/ebpf/main.rs (target/debug/deps/ebpf-0123abcd)`
        let path = line.trim_start().strip_prefix("Executable ").and_then(|rest| rest.split_once(" ("));
        if let Some((_, path)) = path {
            executables.push(workspace().join(path.trim_end_matches(')')));
        }
    })?;
    logged.require_success("building the tests failed")?;
    let tests = RUNS
        .iter()
        .map(|run| {
            let is_it = |path: &&PathBuf| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                name.rsplit_once('-').is_some_and(|(stem, _)| stem == run.binary)
            };
            let found = executables.iter().find(is_it).cloned();
            found.with_context(|| format!("cargo built no test binary {}", run.binary))
        })
        .collect::<Result<_>>()?;
    step.done("");
    Ok(Built { agent: workspace().join("target/debug/flannel-agent"), tests })
}

#[cfg(test)]
mod tests {
    use super::at_once;

    #[test]
    fn what_is_done_at_the_same_time_comes_back_in_order() {
        let numbers: Vec<u64> = (0..50).collect();
        let doubled = at_once(numbers.clone(), |number| {
            std::thread::sleep(std::time::Duration::from_micros(50 - number));
            2 * number
        });
        assert_eq!(doubled, numbers.iter().map(|number| 2 * number).collect::<Vec<_>>());
    }
}
