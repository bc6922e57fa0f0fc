//! `cargo xtask check`: formatting, clippy with warnings as errors for the agent and for the eBPF programs, who may import
//! whom, and licences where cargo-deny is installed.
//!
//! The compiler keeps crates apart; the folders of one crate it does not. So the import rule of the architecture page
//! (`flannel-agent/src/lib.rs`) is read from the sources here.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    progress::{Step, cargo, cargo_step},
    setup, workspace,
};

/// What the files of a folder below `flannel-agent/src` must not name.
struct Rule {
    folder: &'static str,
    /// Folders and files of the crate.
    ours: &'static [&'static str],
    /// Paths of other crates and of std.
    theirs: &'static [&'static str],
}

/// Input and output, and what brings it.
const NO_IO: &[&str] = &[
    "tokio",
    "tokio_util",
    "futures_util",
    "async_trait",
    "axum",
    "aya",
    "etcd_client",
    "libc",
    "netlink_proto",
    "netlink_packet_core",
    "netlink_packet_route",
    "netlink_sys",
    "nix",
    "rtnetlink",
    "rustls",
    "tempfile",
    "std::fs",
    "std::process",
    "std::thread",
    "std::env",
    "std::net::TcpStream",
    "std::net::TcpListener",
    "std::net::UdpSocket",
];

const EDGES: &[&str] =
    &["agent", "cli", "commands", "health", "metrics", "server", "startup", "status", "subnet_env"];

const RULES: &[Rule] = &[
    Rule { folder: "domain", ours: &["backends", "stores", "host"], theirs: NO_IO },
    Rule { folder: "domain", ours: EDGES, theirs: &["flannel_common"] },
    Rule { folder: "backends", ours: &["stores", "host"], theirs: NO_IO },
    Rule { folder: "backends", ours: EDGES, theirs: &["flannel_common"] },
    Rule { folder: "stores", ours: &["backends", "host"], theirs: &["flannel_common"] },
    Rule { folder: "stores", ours: EDGES, theirs: &[] },
    Rule { folder: "host", ours: &["backends", "stores"], theirs: &[] },
    Rule { folder: "host", ours: EDGES, theirs: &[] },
    Rule {
        folder: "server",
        ours: &["agent", "backends", "cli", "commands", "host"],
        theirs: &["flannel_common"],
    },
];

/// Names that say nothing about what is inside.
const EMPTY_NAMES: &[&str] = &["util", "utils", "helper", "helpers", "types", "manager", "misc"];

/// All of it.
pub(crate) fn run() -> Result<()> {
    setup::run()?;
    let mut format = cargo();
    format.args(["fmt", "--all", "--", "--check"]);
    cargo_step("formatting", "check-fmt", &mut format)?;

    let step = Step::begin("imports and names");
    let broken = broken_rules(&workspace())?;
    ensure!(broken.is_empty(), "the import rule is broken:\n  {}", broken.join("\n  "));
    step.done("");

    let mut lint = cargo();
    lint.args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]);
    cargo_step("clippy", "check-clippy", &mut lint)?;

    let mut lint = cargo();
    let target = if cfg!(target_endian = "big") { "bpfeb-unknown-none" } else { "bpfel-unknown-none" };
    lint.env("RUSTC_BOOTSTRAP", "1")
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .args(["clippy", "--package", "flannel-ebpf", "--target", target, "-Z", "build-std=core"])
        // A folder of its own: these flags would throw away what build-ebpf keeps.
        .args(["--profile", "bpf", "--target-dir", "target/bpf-clippy", "--", "-D", "warnings"]);
    cargo_step("clippy, eBPF programs", "check-clippy-ebpf", &mut lint)?;

    let installed = Command::new("cargo").args(["deny", "--version"]).output();
    if installed.is_ok_and(|output| output.status.success()) {
        let mut deny = cargo();
        deny.args(["deny", "--all-features", "check", "bans", "licenses", "sources"]);
        cargo_step("licences, bans, sources", "check-deny", &mut deny)?;
    } else {
        println!(
            "  - licences, bans, sources: not checked, cargo-deny is not installed (`cargo install cargo-deny`)"
        );
    }
    Ok(())
}

/// `file:line: what is wrong`
fn broken_rules(workspace: &Path) -> Result<Vec<String>> {
    let mut broken = Vec::new();
    for package in ["flannel-agent/src", "flannel-common/src", "flannel-ebpf/src", "tests", "xtask/src"] {
        let folder = workspace.join(package);
        for file in sources(&folder)? {
            let inside = file.strip_prefix(&folder).unwrap_or(&file);
            let shown = file.strip_prefix(workspace).unwrap_or(&file).display().to_string();
            for part in inside.with_extension("").components() {
                let name = part.as_os_str().to_string_lossy();
                if EMPTY_NAMES.contains(&name.as_ref()) {
                    broken.push(format!("{shown}: `{name}` says nothing about what is inside"));
                }
            }
            if package == "flannel-agent/src" {
                let text = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
                let found = forbidden_paths(inside, &text);
                broken.extend(found.into_iter().map(|(line, what)| format!("{shown}:{line}: {what}")));
            }
        }
    }
    Ok(broken)
}

fn sources(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
            let path = entry.with_context(|| format!("read {}", folder.display()))?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Line and complaint for each path in `text` that the file's folder must not name.
fn forbidden_paths(file: &Path, text: &str) -> Vec<(usize, String)> {
    let module = module_path(file);
    let Some(folder) = module.first() else { return Vec::new() };
    let mut found = Vec::new();
    for (number, path) in named_paths(text) {
        let own = absolute(&module, &path);
        for rule in RULES.iter().filter(|rule| rule.folder == folder) {
            let bad = match &own {
                Some(top) => rule.ours.contains(&top.as_str()),
                None => rule.theirs.iter().any(|t| path == *t || path.starts_with(&format!("{t}::"))),
            };
            if bad {
                found.push((number, format!("{folder}/ must not use `{path}`")));
            }
        }
    }
    found
}

/// `stores/etcd/mod.rs` → stores, etcd
fn module_path(file: &Path) -> Vec<String> {
    let mut parts: Vec<String> =
        file.with_extension("").components().map(|c| c.as_os_str().to_string_lossy().into_owned()).collect();
    if parts.last().is_some_and(|last| last == "mod") {
        parts.pop();
    }
    parts
}

/// The first name below the crate's root, for `crate::…` and for `super::…` that climbs there; none for other crates.
fn absolute(module: &[String], path: &str) -> Option<String> {
    let names: Vec<&str> = path.split("::").collect();
    if names.first() == Some(&"crate") {
        return names.get(1).map(|name| (*name).to_owned());
    }
    let up = names.iter().take_while(|name| **name == "super").count();
    if up == 0 {
        return None;
    }
    // A `super` inside an inline module stays one level deeper than this counts: then the name is none of the folders.
    let kept = module.len().saturating_sub(up);
    match module.first() {
        Some(first) if kept > 0 => Some(first.clone()),
        _ => names.get(up).map(|name| (*name).to_owned()),
    }
}

/// Every path in the source with its line, with the branches of `use a::{b, c::d}` written out.
fn named_paths(text: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut line = 1;
    // Prefixes of the groups we are in.
    let mut groups: Vec<String> = Vec::new();
    let mut path = String::new();
    let code = without_comments_and_strings(text);
    let mut letters = code.chars().peekable();
    while let Some(c) = letters.next() {
        match c {
            _ if c.is_alphanumeric() || c == '_' => path.push(c),
            ':' if letters.peek() == Some(&':') && !path.is_empty() => {
                letters.next();
                path.push_str("::");
            }
            '{' if path.ends_with("::") => groups.push(std::mem::take(&mut path)),
            _ => {
                if !path.is_empty() {
                    found.push((line, format!("{}{path}", groups.concat())));
                    path.clear();
                }
                match c {
                    '\n' => line += 1,
                    '}' => {
                        groups.pop();
                    }
                    // A block, not a group: its closing brace must find something to close.
                    '{' => groups.push(String::new()),
                    _ => {}
                }
            }
        }
    }
    found.retain(|(_, path)| path.contains("::"));
    found
}

/// The source with comments and string contents blanked out, line breaks kept.
fn without_comments_and_strings(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if rest.starts_with("r#\"") {
            rest.get(3..).and_then(|r| r.find("\"#")).map_or(rest.len(), |end| end + 5)
        } else if c == '"' {
            string_length(rest)
        } else if rest.starts_with("'\"'") {
            3
        } else {
            code.push(c);
            rest = rest.get(c.len_utf8()..).unwrap_or_default();
            continue;
        };
        let (gone, left) = rest.split_at(skipped);
        code.push(' ');
        code.extend(gone.chars().filter(|c| *c == '\n'));
        rest = left;
    }
    code
}

fn string_length(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            '\\' if !escaped => escaped = true,
            '"' if !escaped => return at + 1,
            _ => escaped = false,
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complaints(file: &str, text: &str) -> Vec<(usize, String)> {
        forbidden_paths(Path::new(file), text)
    }

    #[test]
    fn a_forbidden_import_is_found_with_its_line_however_it_is_written() {
        let cases = [
            ("domain/lease.rs", "\nuse crate::host::HostError;\n", 2),
            ("domain/lease.rs", "use crate::{\n    domain::peers,\n    stores::{etcd, memory},\n};\n", 3),
            ("backends/udp.rs", "fn f() { let x = crate::host::udp::probe(); }\n", 1),
            ("stores/etcd/mod.rs", "use super::super::host::linux;\n", 1),
            ("domain/config/mod.rs", "use tokio::time;\n", 1),
            ("domain/config.rs", "// fine\nuse std::{collections::BTreeMap, fs};\n", 2),
        ];
        for (file, text, line) in cases {
            let found = complaints(file, text);
            assert!(found.iter().any(|(at, _)| *at == line), "{file}: {text}: {found:?}");
        }
    }

    #[test]
    fn what_is_allowed_or_only_mentioned_is_not_reported() {
        let cases = [
            (
                "domain/lease.rs",
                "use std::net::Ipv4Addr;\nuse serde::Deserialize;\nuse super::peers::Peers;\n",
            ),
            (
                "domain/lease.rs",
                "/// See `crate::host::Host`.\n/* crate::stores */ const A: &str = \"crate::host::x\";\n",
            ),
            ("backends/udp.rs", "use crate::domain::{config, peers};\n"),
            ("stores/etcd/v3.rs", "use super::Registry;\nuse etcd_client::Client;\nuse tokio::time;\n"),
            ("host/linux.rs", "use crate::domain::host_state::Change;\nuse flannel_common::peer;\n"),
            ("agent.rs", "use crate::{backends::Backend, host::Host, stores::LeaseStore};\n"),
            ("domain/lease.rs", "mod tests { use super::*; use super::super::lease::Lease; }\n"),
        ];
        for (file, text) in cases {
            assert_eq!(complaints(file, text), [], "{file}: {text}");
        }
    }
}
