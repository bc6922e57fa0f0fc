//! `cargo xtask build-ebpf`: the tc and XDP programs as `target/bpf/flannel.bpf.o`, which the agent embeds.
//!
//! BPF is a tier 3 target without a prebuilt `core`, so stable's bootstrap switch builds `core` from rust-src and
//! bpf-linker makes the object. What is missing is said before anything is compiled. The same sources, toolchain and
//! flags give the same bytes in every folder: a shipped object can be built again and compared.

mod symbols;

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

/// Where the agent's build script looks, and where the tests' benchmarks do.
const OBJECTS: [(&str, &str); 2] =
    [("flannel-bpf", "target/bpf/flannel.bpf.o"), ("flannel-cost", "target/bpf/flannel-cost.bpf.o")];
/// A target folder of its own: the flags here and those of ordinary builds would invalidate each other's caches.
const BUILD: &str = "target/bpf-build";
const LINKER: &str = "target/tools/bin/bpf-linker";

const INSTALL_LINKER: &str = "\
run `cargo xtask setup`, or by hand on Debian 12 (libllvm22 is in bookworm-security):
  apt-get install -y gcc libc6-dev libllvm22
  mkdir -p target/tools/llvm/lib
  ln -sf /usr/lib/$(gcc -print-multiarch)/libLLVM.so.22.1 target/tools/llvm/lib/libLLVM.so
  LLVM_PREFIX=$PWD/target/tools/llvm cargo install bpf-linker --version 0.13.0 --locked \\
      --no-default-features --features llvm-22 --root target/tools";

/// Architectures on which kernels load any address in one access. There the verifier takes such loads, and headers in
/// packets (at odd offsets for their fields' size) cost a third fewer instructions.
const UNALIGNED_ACCESS: [&str; 4] = ["x86_64", "aarch64", "powerpc64", "s390x"];

/// Builds the object when its inputs changed; else leaves the file, and its time, alone.
pub(crate) fn run() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask lies in no workspace")?;
    let rustc = Rustc::ask(root)?;
    rustc.require_sources()?;
    let linker = require_linker(root, &rustc)?;

    let folder = compile(root, &rustc, &linker)?;
    for (binary, object) in OBJECTS {
        finish(root, &rustc, &folder.join(binary), &root.join(object))?;
    }
    Ok(())
}

/// From what the linker made to the object as it is used.
fn finish(root: &Path, rustc: &Rustc, built: &Path, object: &Path) -> Result<()> {
    let bytes = fs::read(built).with_context(|| format!("read {}", built.display()))?;
    let panics =
        symbols::panicking(&bytes).with_context(|| format!("read the symbols of {}", built.display()))?;
    ensure!(
        panics.is_empty(),
        "the programs can panic, which no kernel loads (it would say `last insn is not an exit or jmp`):\n  {}\n\
         an index, a slice, an `unwrap` or a checked operation the compiler could not prove harmless",
        panics.join("\n  ")
    );

    let fresh = strip(root, rustc, built, object)?;
    let name = object.strip_prefix(root).unwrap_or(object).display();
    if fs::read(object).is_ok_and(|old| old == fresh) {
        println!("{name}: unchanged, {} KiB", fresh.len() / 1024);
    } else {
        replace(object, &fresh)?;
        println!("{name}: built, {} KiB", fresh.len() / 1024);
    }
    Ok(())
}

/// What the pinned compiler says about itself.
struct Rustc {
    sysroot: PathBuf,
    release: String,
    host: String,
    llvm: u32,
}

impl Rustc {
    fn ask(root: &Path) -> Result<Self> {
        let about = output(tool("rustc", root).arg("-vV"))?;
        let field = |name: &str| {
            about.lines().find_map(|line| line.strip_prefix(name)).map(str::trim).with_context(|| {
                format!(
                    "`rustc -vV` has no line `{name}`; a rustup toolchain is expected (rust-toolchain.toml)"
                )
            })
        };
        let llvm = field("LLVM version:")?;
        Ok(Self {
            sysroot: PathBuf::from(output(tool("rustc", root).args(["--print", "sysroot"]))?.trim()),
            release: field("release:")?.to_owned(),
            host: field("host:")?.to_owned(),
            llvm: llvm
                .split('.')
                .next()
                .and_then(|major| major.parse().ok())
                .with_context(|| format!("`{llvm}` is no LLVM version"))?,
        })
    }

    fn require_sources(&self) -> Result<()> {
        let sources = self.sysroot.join("lib/rustlib/src/rust/library/Cargo.lock");
        ensure!(
            sources.is_file(),
            "the sources of core for rustc {} are missing ({}); run `rustup component add rust-src`",
            self.release,
            sources.display()
        );
        Ok(())
    }
}

/// bpf-linker, known to start and to read what rustc writes.
fn require_linker(root: &Path, rustc: &Rustc) -> Result<PathBuf> {
    let linker = [root.join(LINKER)].into_iter().chain(on_path("bpf-linker")).find(|path| path.is_file());
    let Some(linker) = linker else {
        bail!("bpf-linker is neither at {LINKER} nor on PATH; {INSTALL_LINKER}")
    };

    let binary = fs::read(&linker).with_context(|| format!("read {}", linker.display()))?;
    // `bpf-linker --version` does not tell. No such string: linked statically, and the version is unknown.
    if let Some(llvm) = shared_llvm(&binary)
        && llvm < rustc.llvm
    {
        bail!(
            "{} was built for LLVM {llvm} but rustc {} emits LLVM {}; {INSTALL_LINKER}",
            linker.display(),
            rustc.release,
            rustc.llvm
        );
    }
    output(Command::new(&linker).arg("--version")).with_context(|| {
        format!("{} does not start; is its LLVM (apt: libllvm22) installed?", linker.display())
    })?;
    Ok(linker)
}

/// Major version of the shared LLVM a binary asks for (`libLLVM.so.22.1`, `libLLVM-22.so.1`).
fn shared_llvm(binary: &[u8]) -> Option<u32> {
    const PREFIXES: [&[u8]; 2] = [b"libLLVM.so.", b"libLLVM-"];
    PREFIXES.iter().find_map(|prefix| {
        let at = binary.windows(prefix.len()).position(|window| window == *prefix)? + prefix.len();
        let digits: String =
            binary.get(at..)?.iter().take_while(|b| b.is_ascii_digit()).map(|b| char::from(*b)).collect();
        digits.parse().ok()
    })
}

/// Runs cargo for the BPF target; returns the folder of the linked objects with all their debug sections.
fn compile(root: &Path, rustc: &Rustc, linker: &Path) -> Result<PathBuf> {
    let target = if cfg!(target_endian = "big") { "bpfeb-unknown-none" } else { "bpfel-unknown-none" };
    let arch = env::consts::ARCH;
    let mut flags = vec![
        format!("--cfg=bpf_target_arch=\"{arch}\""),
        // BTF is made from DWARF.
        "-Cdebuginfo=2".to_owned(),
        "-Clink-arg=--btf".to_owned(),
    ];
    if UNALIGNED_ACCESS.contains(&arch) {
        flags.push("-Clink-arg=--cpu-features=+allows-misaligned-mem-access".to_owned());
    }
    for (from, to) in [(root.to_owned(), "."), (rustc.sysroot.clone(), "rust"), (cargo_home()?, "cargo")] {
        flags.push(format!("--remap-path-prefix={}={to}", from.display()));
    }

    let mut cargo = tool("cargo", root);
    cargo
        .args(["build", "--package", "flannel-ebpf", "--bins", "--profile", "bpf"])
        .args(["--target", target, "-Z", "build-std=core", "--target-dir", BUILD])
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .env(format!("CARGO_TARGET_{}_LINKER", target.to_uppercase().replace('-', "_")), linker);
    let status = cargo.status().context("start cargo")?;
    ensure!(status.success(), "cargo could not build the eBPF programs ({status})");
    Ok(root.join(BUILD).join(target).join("bpf"))
}

/// The object without DWARF, which only `objdump -S` reads; BTF stays. The toolchain's own tool comes first, because
/// it is pinned; with neither tool the object stays as it is, which works as well.
fn strip(root: &Path, rustc: &Rustc, built: &Path, object: &Path) -> Result<Vec<u8>> {
    let out = object.with_extension("stripping");
    if let Some(folder) = object.parent() {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    let library = rustc.sysroot.join("lib");
    let own = library.join("rustlib").join(&rustc.host).join("bin/rust-objcopy");
    let installed = [format!("llvm-objcopy-{}", rustc.llvm), "llvm-objcopy".to_owned()];
    for objcopy in [own].into_iter().chain(installed.iter().filter_map(|name| on_path(name))) {
        // The toolchain's tool finds its LLVM only when told where.
        let mut command = Command::new(&objcopy);
        command.current_dir(root).env("LD_LIBRARY_PATH", &library).arg("--strip-debug").arg(built).arg(&out);
        match command.output() {
            Ok(done) if done.status.success() => {
                let bytes = fs::read(&out).with_context(|| format!("read {}", out.display()));
                fs::remove_file(&out).with_context(|| format!("remove {}", out.display()))?;
                return bytes;
            }
            Ok(_) | Err(_) => {}
        }
    }
    eprintln!("note: no working rust-objcopy or llvm-objcopy; the object keeps its DWARF");
    fs::read(built).with_context(|| format!("read {}", built.display()))
}

/// Whole or not at all: a build of the agent may be reading.
fn replace(object: &Path, bytes: &[u8]) -> Result<()> {
    let new = object.with_extension("new");
    fs::write(&new, bytes).with_context(|| format!("write {}", new.display()))?;
    fs::rename(&new, object).with_context(|| format!("rename {} to {}", new.display(), object.display()))
}

/// A tool of the pinned toolchain, free of what an outer cargo left in the environment.
fn tool(name: &str, root: &Path) -> Command {
    let mut command = Command::new(name);
    command.current_dir(root);
    for variable in
        ["RUSTC", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTFLAGS", "CARGO_ENCODED_RUSTFLAGS"]
    {
        command.env_remove(variable);
    }
    command
}

fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let done = match command.output() {
        Err(e) if e.kind() == io::ErrorKind::NotFound => bail!("{name} is not installed"),
        done => done.with_context(|| format!("start {name}"))?,
    };
    ensure!(done.status.success(), "{name}: {}", String::from_utf8_lossy(&done.stderr).trim());
    String::from_utf8(done.stdout).with_context(|| format!("{name} prints no text"))
}

fn on_path(name: &str) -> Option<PathBuf> {
    env::split_paths(&env::var_os("PATH")?).map(|folder| folder.join(name)).find(|path| path.is_file())
}

fn cargo_home() -> Result<PathBuf> {
    match env::var_os("CARGO_HOME") {
        Some(home) => Ok(home.into()),
        None => Ok(env::home_dir().context("neither CARGO_HOME nor HOME is set")?.join(".cargo")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_linkers_llvm_is_read_from_its_shared_library() {
        assert_eq!(shared_llvm(b"\0libc.so.6\0libLLVM.so.22.1\0"), Some(22));
        assert_eq!(shared_llvm(b"\0libLLVM-19.so.1\0"), Some(19));
        assert_eq!(shared_llvm(b"\0libc.so.6\0"), None);
    }
}
