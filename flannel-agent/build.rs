//! Tells the agent where the eBPF object lies (`FLANNEL_BPF_OBJ`, read by `host/udp/object.rs`).
//!
//! In order: the environment variable of that name; `target/bpf/flannel.bpf.o`, which `cargo xtask build-ebpf`
//! makes; else an empty file and `cfg(flannel_bpf_missing)`, so that check, clippy and unprivileged tests work on a
//! machine that has nothing but rustup.

use std::{env, error::Error, fs, path::PathBuf};

const VARIABLE: &str = "FLANNEL_BPF_OBJ";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rustc-check-cfg=cfg(flannel_bpf_missing)");
    println!("cargo::rerun-if-env-changed={VARIABLE}");
    println!("cargo::rerun-if-changed=build.rs");

    let package = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let workspace = package.parent().ok_or("the package has no parent folder")?;
    let folder = workspace.join("target/bpf");

    let object = match env::var_os(VARIABLE) {
        Some(given) if !given.is_empty() => {
            let path = workspace.join(given);
            if !path.is_file() {
                return Err(format!("{VARIABLE}: {} is not a file", path.display()).into());
            }
            Some(path)
        }
        _ => Some(folder.join("flannel.bpf.o")).filter(|path| path.is_file()),
    };
    let path = match object {
        Some(path) => {
            println!("cargo::rerun-if-changed={}", path.display());
            path
        }
        None => {
            println!("cargo::rustc-cfg=flannel_bpf_missing");
            println!(
                "cargo::warning=no eBPF object: this build has the tun data path only; `cargo xtask build-ebpf` makes it"
            );
            // Watching a file that does not exist would rebuild the agent every time; an empty folder is watched at
            // no cost until the object appears in it.
            fs::create_dir_all(&folder)?;
            println!("cargo::rerun-if-changed={}", folder.display());
            let empty = PathBuf::from(env::var("OUT_DIR")?).join("no.bpf.o");
            fs::write(&empty, [])?;
            empty
        }
    };
    println!("cargo::rustc-env={VARIABLE}={}", path.display());
    Ok(())
}
