//! The demo without root: a user namespace in which we are root over network namespaces of our own.
//!
//! The kernel loads no eBPF programs for such a root, so the tunnel runs in user space there.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::{getegid, geteuid},
};

pub(super) const WHAT_ROOT_ADDS: &str = "\
This was the user-space data path (tun), in a user namespace. As root (`sudo -E env PATH=$PATH cargo xtask demo`) the
kernel carries the packets itself: the tc and XDP programs encapsulate and decapsulate without waking the agent.";

const HOW_TO_GET_IT: &str = "\
the demo makes network namespaces, for which it needs root, or permission to make user namespaces. Either
  sudo -E env PATH=$PATH cargo xtask demo
or allow user namespaces:
  Debian:          sysctl -w kernel.unprivileged_userns_clone=1
  Ubuntu 24.04:    sysctl -w kernel.apparmor_restrict_unprivileged_userns=0
  anywhere:        sysctl -w user.max_user_namespaces=10000
In a container, its runtime may forbid it (seccomp): run the demo on the host or in a virtual machine";

/// Tries it in a process of its own, before anything is installed or built.
pub(super) fn require() -> Result<()> {
    let tried =
        Command::new("unshare").args(["--user", "--map-root-user", "--net", "--mount", "true"]).output();
    ensure!(tried.is_ok_and(|output| output.status.success()), HOW_TO_GET_IT);
    ensure!(
        fs::File::options().read(true).write(true).open("/dev/net/tun").is_ok(),
        "/dev/net/tun can't be opened, and without root there is no other data path; {}",
        if Path::new("/dev/net/tun").exists() {
            "as root: chmod 666 /dev/net/tun (the usual mode; the kernel checks again when a device is made)"
        } else {
            "as root: modprobe tun"
        }
    );
    Ok(())
}

/// Moves this process, which must have one thread only.
pub(super) fn enter() -> Result<()> {
    let (user, group) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET)
        .context(HOW_TO_GET_IT)?;
    for (file, text) in [
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("0 {user} 1")),
        ("gid_map", format!("0 {group} 1")),
    ] {
        let path = format!("/proc/self/{file}");
        fs::write(&path, &text).with_context(|| format!("write `{text}` to {path}"))?;
    }
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("make the mounts private")
}
