//! Developer commands: `cargo xtask setup | build-ebpf | check | test | vm | demo | bench`, one file each.
//!
//! Every command does the set-up it needs by itself, so each one works on a fresh clone.

mod bench;
mod build_ebpf;
mod check;
mod demo;
mod progress;
mod setup;
mod test;
mod vm;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

/// What to do.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Builds, tests and shows flannel-agent")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Installs what building and testing need and this machine lacks, and says what and why
    Setup(setup::Arguments),
    /// Builds the tc and XDP programs into target/bpf/flannel.bpf.o, which the agent embeds
    BuildEbpf,
    /// Formatting, clippy with warnings as errors (agent and eBPF programs), the import rule, licences
    Check,
    /// Every test: units, documentation, the eBPF programs and whole hosts in network namespaces; needs root
    Test(test::Arguments),
    /// The tests that depend on the kernel, on Debian's kernels from 5.10 to the newest, in QEMU; needs root
    Vm(vm::Arguments),
    /// Three hosts in network namespaces, pods that reach each other through the tunnel, and figures
    Demo(demo::Arguments),
    /// Measures the data paths against plain routes and the kernel's vxlan, and the agent itself; needs root
    Bench(bench::Arguments),
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Setup(arguments) => setup::run_with(&arguments),
        Command::BuildEbpf => build_ebpf::run(),
        Command::Check => check::run(),
        Command::Test(arguments) => test::run(&arguments),
        Command::Vm(arguments) => vm::run(&arguments),
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Bench(arguments) => bench::run(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// The workspace's folder.
fn workspace() -> PathBuf {
    let package = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    package.parent().map_or(package.clone(), PathBuf::from)
}
