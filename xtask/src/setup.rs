//! `cargo xtask setup`: what building and testing need, installed when it is missing, each with its reason.
//!
//! Parts of the Rust toolchain come from rustup, programs from Debian's or Ubuntu's packages, and bpf-linker from
//! crates.io, built once per machine against the toolchain's own LLVM and kept in the user's cache folder. Where
//! everything is there, this takes a few milliseconds and says nothing but that.

pub(crate) mod helm;
pub(crate) mod kube;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    progress::{Logged, Step, cargo},
    workspace,
};

const LINKER_VERSION: &str = "0.13.0";
/// Major version of the LLVM that the pinned rustc carries; bpf-linker's must not be older.
const LLVM: &str = "22";

/// How to see that a package is there.
enum Sign {
    Program(&'static str),
    File(&'static str),
    /// A C compiler works only with the C library's headers.
    Compiler,
}

struct Package {
    name: &'static str,
    sign: Sign,
    why: &'static str,
}

const fn package(name: &'static str, sign: Sign, why: &'static str) -> Package {
    Package { name, sign, why }
}

const PACKAGES: [Package; 15] = [
    package("gcc", Sign::Program("cc"), "links Rust programs, compiles the C parts of `ring` (TLS)"),
    package("libc6-dev", Sign::Compiler, "headers of the C library, for gcc"),
    package(
        "ca-certificates",
        Sign::File("/etc/ssl/certs/ca-certificates.crt"),
        "cargo downloads crates over HTTPS",
    ),
    package("protobuf-compiler", Sign::Program("protoc"), "etcd's API is generated at build time"),
    package(
        "libprotobuf-dev",
        Sign::File("/usr/include/google/protobuf/descriptor.proto"),
        "definitions that etcd's API includes",
    ),
    package("iproute2", Sign::Program("ip"), "hosts of tests and demo: namespaces, devices, routes"),
    package("ethtool", Sign::Program("ethtool"), "tests switch offloads of devices"),
    package("iptables", Sign::Program("iptables"), "tests of ClusterIP, masquerade and FORWARD rules"),
    package("nftables", Sign::Program("nft"), "tests see what rules the kernel has"),
    package("iputils-ping", Sign::Program("ping"), "a test pings over IPv6; for looking around in a lab"),
    package("procps", Sign::Program("sysctl"), "for looking around in a lab"),
    package("tcpdump", Sign::Program("tcpdump"), "for looking at the wire in a lab"),
    package("openssl", Sign::Program("openssl"), "tests make certificates for etcd"),
    package("etcd-server", Sign::Program("etcd"), "the datastore of tests and demo"),
    package("etcd-client", Sign::Program("etcdctl"), "publishes the network configuration in tests and demo"),
];

/// What `cargo xtask vm` needs beyond them.
const FOR_MACHINES: [Package; 5] = [
    package("qemu-system-x86", Sign::Program("qemu-system-x86_64"), "boots other kernels"),
    package("busybox-static", Sign::Program("busybox"), "small programs of the guests"),
    package("kmod", Sign::Program("depmod"), "modules of the guests"),
    package("cpio", Sign::Program("cpio"), "packs the guests"),
    package(
        "debian-archive-keyring",
        Sign::File("/usr/share/keyrings/debian-archive-keyring.gpg"),
        "the kernels are Debian's packages",
    ),
];

#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Also build kube-apiserver, for `cargo xtask test --kube`: minutes, once per machine
    #[arg(long)]
    kube: bool,
}

/// [`run`], and what was asked for besides.
pub(crate) fn run_with(arguments: &Arguments) -> Result<()> {
    run()?;
    if arguments.kube {
        kube::run()?;
        helm::run()?;
    }
    Ok(())
}

/// Installs what is missing.
///
/// Without root it says the command that would, for everything at once.
pub(crate) fn run() -> Result<()> {
    let mut installed = rust_components()?;
    installed |= packages(&PACKAGES)?;
    installed |= linker()?;
    if !installed {
        println!("setup: everything is there");
    }
    Ok(())
}

/// Installs what the kernel matrix needs and is missing.
pub(crate) fn run_for_machines() -> Result<()> {
    packages(&FOR_MACHINES).map(drop)
}

/// rust-src (core for the BPF target is built from it), rustfmt, clippy. rust-toolchain.toml names them, but a
/// toolchain that was installed before, or with RUSTUP_AUTO_INSTALL=0, may lack them.
fn rust_components() -> Result<bool> {
    let sysroot = PathBuf::from(printed(Command::new("rustc").args(["--print", "sysroot"]))?);
    let parts = [
        ("rust-src", "lib/rustlib/src/rust/library/Cargo.lock", "core for the BPF target is built from it"),
        ("rustfmt", "bin/rustfmt", "`cargo xtask check`"),
        ("clippy", "bin/cargo-clippy", "`cargo xtask check`"),
    ];
    let missing: Vec<_> = parts.iter().filter(|(_, file, _)| !sysroot.join(file).exists()).collect();
    for (name, _, why) in &missing {
        let step = Step::begin(&format!("rustup: {name}"));
        let mut rustup = Command::new("rustup");
        rustup.current_dir(workspace()).args(["component", "add", name]);
        Logged::run(&mut rustup, "setup-rustup", |line| step.note(line))?
            .require_success(&format!("`rustup component add {name}` failed"))?;
        step.done(why);
    }
    Ok(!missing.is_empty())
}

/// Debian's packages.
fn packages(wanted: &[Package]) -> Result<bool> {
    let missing: Vec<(&str, &str)> =
        wanted.iter().filter(|package| !is_there(&package.sign)).map(|p| (p.name, p.why)).collect();
    if missing.is_empty() {
        return Ok(false);
    }

    println!("setup: this machine lacks");
    for (name, why) in &missing {
        println!("  {name:<18} {why}");
    }
    let names: Vec<&str> = missing.iter().map(|(name, _)| *name).collect();
    let by_hand = format!("apt-get update && apt-get install -y {}", names.join(" "));
    ensure!(
        on_path("apt-get").is_some(),
        "no apt-get here; install what is listed above with this system's own package manager, then run this again"
    );
    if !nix::unistd::geteuid().is_root() {
        bail!("installing packages needs root; run\n  sudo sh -c '{by_hand}'\nand then this again");
    }

    apt("apt-get update", &["update"])?;
    let mut arguments = vec!["install", "-y", "--no-install-recommends"];
    arguments.extend(&names);
    apt(&format!("apt-get install ({})", names.len()), &arguments)?;
    for package in wanted {
        ensure!(
            is_there(&package.sign),
            "package {} is installed, but what it is needed for is still not there ({})",
            package.name,
            package.why
        );
    }
    Ok(true)
}

fn apt(what: &str, arguments: &[&str]) -> Result<()> {
    let step = Step::begin(what);
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["-o", "DPkg::Lock::Timeout=120"]).args(arguments);
    Logged::run(&mut command, "setup-apt", |line| step.note(line))?
        .require_success(&format!("`{what}` failed"))?;
    step.done("");
    Ok(())
}

fn is_there(sign: &Sign) -> bool {
    match sign {
        Sign::Program(name) => on_path(name).is_some(),
        Sign::File(path) => Path::new(path).exists(),
        Sign::Compiler => ["/usr/include/stdlib.h", "/usr/include/bits/libc-header-start.h"]
            .iter()
            .any(|path| Path::new(path).exists()),
    }
}

/// Also looks where programs of root are, which may not be on a user's PATH.
pub(crate) fn on_path(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
}

fn linker_path() -> PathBuf {
    workspace().join("target/tools/bin/bpf-linker")
}

fn linker_starts(path: &Path) -> bool {
    path.is_file() && printed(Command::new(path).arg("--version")).is_ok()
}

/// bpf-linker: from the workspace, else from the user's cache, else built into both (about a minute).
fn linker() -> Result<bool> {
    let here = linker_path();
    if linker_starts(&here) {
        return Ok(false);
    }
    if let Some(given) = on_path("bpf-linker")
        && printed(Command::new(&given).arg("--version"))?.contains(LINKER_VERSION)
    {
        return Ok(false);
    }
    let rustc = printed(Command::new("rustc").arg("-V"))?;
    let rustc = rustc.split(' ').nth(1).context("`rustc -V` prints no version")?;
    let llvm = toolchain_llvm()?;

    let cached = cache_folder()
        .map(|folder| folder.join(format!("bpf-linker-{LINKER_VERSION}-llvm{LLVM}-rustc{rustc}")))
        .unwrap_or_else(|| workspace().join("target/tools/cache"))
        .join("bpf-linker");
    if linker_starts(&cached) {
        let step = Step::begin("bpf-linker");
        place(&cached, &here)?;
        step.done(&format!("from {}", cached.display()));
        return Ok(true);
    }

    let step = Step::begin("bpf-linker: building, once");
    let tools = workspace().join("target/tools");
    let prefix = tools.join("llvm");
    let link = prefix.join("lib/libLLVM.so");
    fs::create_dir_all(prefix.join("lib")).with_context(|| format!("create {}", prefix.display()))?;
    let _ = fs::remove_file(&link);
    std::os::unix::fs::symlink(&llvm, &link)
        .with_context(|| format!("link {} to {}", link.display(), llvm.display()))?;

    let mut install = cargo();
    // Outside the workspace, whose cargo configuration is not meant for it.
    install
        .current_dir(env::temp_dir())
        .env("RUSTUP_TOOLCHAIN", rustc)
        .env("LLVM_PREFIX", &prefix)
        .args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked", "--force"])
        .args(["--no-default-features", "--features", &format!("llvm-{LLVM}")])
        .arg("--root")
        .arg(&tools)
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    if let Some(folder) = llvm.parent() {
        // Found again at run time wherever it lies.
        install.env("RUSTFLAGS", format!("-Clink-arg=-Wl,-rpath,{}", folder.display()));
    }
    Logged::run(&mut install, "setup-bpf-linker", |line| step.note(line.trim_start()))?
        .require_success("bpf-linker could not be built")?;
    ensure!(
        linker_starts(&here),
        "{} was built but does not start; is {} readable?",
        here.display(),
        llvm.display()
    );
    let _ = place(&here, &cached);
    step.done("links the eBPF programs");
    Ok(true)
}

/// Copies a program so that nobody ever sees half of it.
fn place(from: &Path, to: &Path) -> Result<()> {
    let folder = to.parent().context("a file in no folder")?;
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let new = folder.join(format!(".new-{}", std::process::id()));
    fs::copy(from, &new).with_context(|| format!("copy {} to {}", from.display(), new.display()))?;
    fs::rename(&new, to).with_context(|| format!("rename {} to {}", new.display(), to.display()))
}

fn cache_folder() -> Option<PathBuf> {
    let caches = match env::var_os("XDG_CACHE_HOME").filter(|path| !path.is_empty()) {
        Some(path) => PathBuf::from(path),
        None => env::home_dir()?.join(".cache"),
    };
    Some(caches.join("flannel-agent"))
}

/// rustc's own LLVM, a shared library in the toolchain's `lib` folder: the very version that wrote the bitcode, on every
/// distribution, without a package.
fn toolchain_llvm() -> Result<PathBuf> {
    let library = PathBuf::from(printed(Command::new("rustc").args(["--print", "sysroot"]))?).join("lib");
    let prefix = format!("libLLVM.so.{LLVM}");
    fs::read_dir(&library)
        .with_context(|| format!("read {}", library.display()))?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix)))
        .with_context(|| {
            format!(
                "{} has no {prefix}*; on Debian `apt-get install libllvm{LLVM}`, then build bpf-linker {LINKER_VERSION} \
                 with LLVM_PREFIX set to a folder whose lib/libLLVM.so links to it (--root target/tools)",
                library.display()
            )
        })
}

fn printed(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.current_dir(workspace()).output().with_context(|| format!("start {name}"))?;
    ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr).trim_end());
    Ok(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}
