//! Nothing of the demo stays behind.
//!
//! Agents and etcd are killed by the kernel when this process ends, however it ends. What the kernel does not know to be
//! ours (names in `/run/netns`, bpffs mounts, the folder of logs) carries our prefix and is swept by name; agents' rooms in
//! `/run/flannel` go with the names.

use std::{
    env,
    fs::{self, File},
    os::unix::fs::MetadataExt as _,
    path::PathBuf,
    process::exit,
    sync::OnceLock,
    thread::{park, spawn},
};

use anyhow::{Context as _, Result, bail};
use flannel_tests::namespace::Namespace;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    mount::{MntFlags, umount2},
    sys::signal::{SigSet, Signal},
    unistd::geteuid,
};

use super::NAME;

/// The lock's file. Named after the user, who in a user namespace is no longer known by number.
static LOCK: OnceLock<PathBuf> = OnceLock::new();

/// Held while the demo runs: two would sweep each other's things.
pub(super) fn alone() -> Result<Flock<File>> {
    let path = LOCK.get_or_init(|| env::temp_dir().join(format!("{NAME}-{}.lock", geteuid())));
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path)
        .with_context(|| format!("open {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, Errno::EWOULDBLOCK)) => bail!("a demo is running already; end it with Ctrl-C first"),
        Err((_, e)) => Err(e).with_context(|| format!("lock {}", path.display())),
    }
}

/// Removes what carries our prefix.
pub(super) fn sweep() {
    for entry in fs::read_dir(env::temp_dir()).into_iter().flatten().flatten() {
        let ours = entry.file_name().to_string_lossy().starts_with(&format!("{NAME}-"))
            && entry.metadata().is_ok_and(|meta| meta.is_dir() && meta.uid() == geteuid().as_raw());
        if !ours {
            continue;
        }
        for host in fs::read_dir(entry.path()).into_iter().flatten().flatten() {
            let _ = umount2(&host.path().join("bpffs"), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
        }
        let _ = fs::remove_dir_all(entry.path());
    }
    // Last: on an interrupt the agents still run, and would put their rooms back in a while.
    Namespace::forget_listed(&format!("{NAME}-"));
}

/// The demo is over: [`sweep`], and the lock's file goes too.
pub(super) fn end() {
    sweep();
    if let Some(path) = LOCK.get() {
        let _ = fs::remove_file(path);
    }
}

/// From now on Ctrl-C (or a plain `kill`) sweeps and ends this process, wherever it is.
///
/// Call it while there is one thread: later ones inherit that the signals are not for them.
pub(super) fn on_interrupt() -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().context("block signals")?;
    spawn(move || {
        if signals.wait().is_ok() {
            println!("\n  cleaning up");
            end();
            // Threads die with this call, and with them what they started.
            exit(130);
        }
    });
    Ok(())
}

/// Never returns: an interrupt ends the process.
pub(super) fn wait_for_interrupt() {
    loop {
        park();
    }
}
