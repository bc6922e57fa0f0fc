//! A network namespace of our own: a host, a pod or a switch of the lab.
//!
//! It is kept by a file descriptor, so it needs no name and no cleaning up: when the last descriptor and the last
//! process in it are gone, the kernel removes it with its devices, routes and rules, however the test ended. Only the
//! demo gives it a name in `/run/netns` too, for people who want to look around with `ip netns exec`; there agents leave
//! the mounts of their rooms (`flannel-agent/src/host/udp/gro_pair/room.rs`), which would outlive everybody.
//!
//! Threads enter a namespace, processes are started in it; the thread that calls us never changes its own.

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::fd::{AsRawFd as _, OwnedFd, RawFd},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    thread,
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};

/// Where iproute2 looks for names.
const NAMES: &str = "/run/netns";
/// Where agents mount their rooms: `DEVICE.NUMBER_OF_THE_HOST'S_NAMESPACE.room`.
const ROOMS: &str = "/run/flannel";

/// Packets that left by a device.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// A packet that is segmented later counts as one.
    pub packets: u64,
    /// With Ethernet headers.
    pub bytes: u64,
}

/// A namespace and, while this value lives, the reason it exists.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    fd: Arc<OwnedFd>,
    listed: Option<PathBuf>,
}

impl Namespace {
    /// A new, empty namespace with `lo` up and IPv6 off. `name` is for messages.
    ///
    /// # Errors
    /// Not permitted (CAP_SYS_ADMIN), or a missing `ip`.
    pub fn new(name: &str) -> Result<Self> {
        let fd = thread::scope(|scope| {
            scope
                .spawn(|| {
                    unshare(CloneFlags::CLONE_NEWNET).context("unshare the network namespace")?;
                    File::open("/proc/thread-self/ns/net").context("open /proc/thread-self/ns/net")
                })
                .join()
                .map_err(|_| anyhow!("the thread that makes a namespace panicked"))?
        })
        .with_context(|| format!("make network namespace {name}"))?;
        let namespace = Self { name: name.to_owned(), fd: Arc::new(fd.into()), listed: None };
        namespace.ip("link set lo up")?;
        // Absent when the kernel has no IPv6, which is as good.
        let _ = namespace.sysctl("net.ipv6.conf.all.disable_ipv6", "1");
        let _ = namespace.sysctl("net.ipv6.conf.default.disable_ipv6", "1");
        Ok(namespace)
    }

    /// [`Self::new`], and `ip netns` knows it by `name` until it is dropped.
    ///
    /// # Errors
    /// As `new`; also when the name is taken.
    pub fn listed(name: &str) -> Result<Self> {
        let mut namespace = Self::new(name)?;
        let path = PathBuf::from(NAMES).join(name);
        fs::create_dir_all(NAMES).with_context(|| format!("create {NAMES}"))?;
        File::create_new(&path).with_context(|| format!("create {}", path.display()))?;
        let none = None::<&str>;
        if let Err(e) = mount(Some(namespace.path().as_str()), &path, none, MsFlags::MS_BIND, none) {
            let _ = fs::remove_file(&path);
            return Err(e).with_context(|| format!("name network namespace {}", path.display()));
        }
        namespace.listed = Some(path);
        Ok(namespace)
    }

    /// Removes names in `/run/netns` that begin with `prefix`, and the rooms of agents there: what a killed run left
    /// behind.
    pub fn forget_listed(prefix: &str) {
        for entry in fs::read_dir(NAMES).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().starts_with(prefix) {
                forget(&entry.path());
            }
        }
    }

    /// Name for messages, and in `ip netns` if it is listed.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Path that names the namespace to a child process of ours: `ip link add … netns PATH`.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.fd.as_raw_fd())
    }

    /// Runs `work` on a thread inside the namespace and waits for it. Sockets made there stay in the namespace and may
    /// be returned. Processes must not be started there (see [`Self::command`]).
    ///
    /// # Errors
    /// What `work` returns, or that the namespace can't be entered.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            scope
                .spawn(|| {
                    self.enter()?;
                    work()
                })
                .join()
                .map_err(|panic| anyhow!("panic in namespace {}: {}", self.name, panic_text(&*panic)))?
        })
    }

    /// [`Self::run`] without waiting.
    pub fn spawn<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> thread::JoinHandle<Result<T>> {
        let namespace = Arc::clone(self);
        thread::spawn(move || {
            namespace.enter()?;
            work()
        })
    }

    fn enter(&self) -> Result<()> {
        setns(&*self.fd, CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("enter network namespace {}", self.name))
    }

    /// A command that will run inside the namespace, in a process group of its own (a Ctrl-C at the terminal is ours to
    /// handle). It is killed when the **thread** that starts it ends, so nothing outlives a test that was killed:
    /// start it from a thread that lives as long as it should.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        use std::os::unix::process::CommandExt as _;
        let mut command = Command::new(program);
        command.stdin(Stdio::null()).process_group(0);
        let fd = Arc::clone(&self.fd);
        // SAFETY: between fork and exec only two system calls are made, both async-signal-safe; the closure owns the
        // descriptor, so it is open.
        unsafe { command.pre_exec(move || prepare_child(fd.as_raw_fd())) };
        command
    }

    /// Runs a command line inside the namespace (split at white space, no shell) and returns what it printed.
    ///
    /// # Errors
    /// The command can't be started or fails; the text has its error output.
    pub fn output(&self, command_line: &str) -> Result<String> {
        let mut words = command_line.split_whitespace();
        let program = words.next().context("an empty command line")?;
        let output = self
            .command(program)
            .args(words)
            .output()
            .with_context(|| format!("start `{program}` in {}", self.name))?;
        ensure!(
            output.status.success(),
            "`{command_line}` in {}: {}; {}{}",
            self.name,
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr).trim_end()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// `ip ARGUMENTS` inside the namespace.
    ///
    /// # Errors
    /// As [`Self::output`].
    pub fn ip(&self, arguments: &str) -> Result<String> {
        self.output(&format!("ip {arguments}"))
    }

    /// `iptables -w ARGUMENTS` inside the namespace.
    ///
    /// # Errors
    /// As [`Self::output`].
    pub fn iptables(&self, arguments: &str) -> Result<String> {
        self.output(&format!("iptables -w {arguments}"))
    }

    /// Packets that matched a rule of the `filter` table, written as `iptables-save` prints it (`FORWARD -p icmp`).
    ///
    /// # Errors
    /// No such rule.
    pub fn iptables_packets(&self, rule: &str) -> Result<u64> {
        let rules = self.output("iptables-save -c -t filter")?;
        rules
            .lines()
            .filter_map(|line| line.strip_prefix('[')?.split_once("] -A "))
            .find(|(_, text)| *text == rule)
            .and_then(|(counts, _)| counts.split(':').next()?.parse().ok())
            .with_context(|| format!("no rule `{rule}` in {}:\n{rules}", self.name))
    }

    /// Writes a sysctl of the namespace; `key` with dots.
    ///
    /// # Errors
    /// No such key, or the kernel refuses the value.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        self.run(|| fs::write(&path, value).with_context(|| format!("write {value} to {path}")))
            .with_context(|| format!("set sysctl in {}", self.name))
    }

    /// Reads a sysctl of the namespace.
    ///
    /// # Errors
    /// No such key.
    pub fn read_sysctl(&self, key: &str) -> Result<String> {
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        self.run(|| Ok(fs::read_to_string(&path).with_context(|| format!("read {path}"))?.trim().to_owned()))
    }

    /// Switches offloads of a device: `"tso off gso off"`.
    ///
    /// # Errors
    /// No such device or feature, or it can't be changed.
    pub fn offload(&self, device: &str, settings: &str) -> Result<()> {
        self.output(&format!("ethtool -K {device} {settings}")).map(drop)
    }

    /// True when the device exists here.
    pub fn has_device(&self, device: &str) -> bool {
        self.ip(&format!("link show dev {device}")).is_ok()
    }

    /// What a device has sent since it exists, as `/proc/net/dev` counts.
    ///
    /// # Errors
    /// No such device.
    pub fn sent(&self, device: &str) -> Result<Sent> {
        let text =
            self.run(|| fs::read_to_string("/proc/thread-self/net/dev").context("read /proc/net/dev"))?;
        let counts: Vec<u64> = text
            .lines()
            .find_map(|line| line.trim_start().strip_prefix(device)?.strip_prefix(':'))
            .with_context(|| format!("no device {device} in {}", self.name))?
            .split_whitespace()
            .map_while(|number| number.parse().ok())
            .collect();
        // Eight columns of what was received, then the same of what was sent.
        let [.., bytes, packets, _, _, _, _, _, _] = counts.as_slice() else {
            bail!("/proc/net/dev has no counts of {device}:\n{text}");
        };
        Ok(Sent { packets: *packets, bytes: *bytes })
    }

    /// The index of a device.
    ///
    /// # Errors
    /// No such device.
    pub fn ifindex(&self, device: &str) -> Result<u32> {
        self.run(|| nix::net::if_::if_nametoindex(device).with_context(|| format!("find device {device}")))
            .with_context(|| format!("in {}", self.name))
    }

    /// The MAC address of a device.
    ///
    /// # Errors
    /// No such device.
    pub fn mac(&self, device: &str) -> Result<String> {
        let line = self.ip(&format!("-br link show dev {device}"))?;
        match line.split_whitespace().nth(2) {
            Some(mac) => Ok(mac.to_owned()),
            None => bail!("`ip -br link show dev {device}` in {} printed no address: {line}", self.name),
        }
    }
}

impl Drop for Namespace {
    /// The number is given to a later namespace, which would find the room its own.
    fn drop(&mut self) {
        forget_rooms(Path::new(&self.path()));
        if let Some(path) = &self.listed {
            unmount(path);
        }
    }
}

/// Takes a name out of `/run/netns`, and the rooms of the agents that ran there.
fn forget(name: &Path) {
    forget_rooms(name);
    unmount(name);
}

fn forget_rooms(namespace: &Path) {
    if let Ok(namespace) = fs::metadata(namespace) {
        let ending = format!(".{}.room", namespace.ino());
        for entry in fs::read_dir(ROOMS).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().ends_with(&ending) {
                unmount(&entry.path());
            }
        }
    }
}

fn unmount(path: &Path) {
    let _ = umount2(path, MntFlags::MNT_DETACH);
    let _ = fs::remove_file(path);
}

/// Mounts made from now on are this process's own, and so are the rooms of its agents: they show nowhere else, and vanish
/// with it. Call it before any thread exists: `unshare` moves the calling thread only.
///
/// # Errors
/// Not permitted (CAP_SYS_ADMIN).
pub fn private_mounts() -> Result<()> {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).context("unshare the mount namespace")?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("make the mounts private")?;
    fs::create_dir_all(ROOMS).with_context(|| format!("create {ROOMS}"))?;
    mount(Some("tmpfs"), ROOMS, Some("tmpfs"), MsFlags::empty(), none)
        .with_context(|| format!("mount a tmpfs on {ROOMS}"))
}

/// How whoever started this process sees a path: behind [`private_mounts`].
pub fn outside(path: impl AsRef<Path>) -> PathBuf {
    let root = PathBuf::from(format!("/proc/{}/root", std::os::unix::process::parent_id()));
    root.join(path.as_ref().strip_prefix("/").unwrap_or(path.as_ref()))
}

fn prepare_child(namespace: RawFd) -> std::io::Result<()> {
    // SAFETY: plain system calls on integers; `namespace` is open for the caller's lifetime.
    let failed = unsafe {
        libc::setns(namespace, libc::CLONE_NEWNET) != 0
            || libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) != 0
    };
    if failed { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

/// What a panic said, as far as it is text.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no text")
}
