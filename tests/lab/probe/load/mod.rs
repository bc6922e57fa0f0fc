//! Load generators: as much as goes through, measured. Nothing is compared here; that packets arrive whole is for the
//! other probes.
//!
//! The client's threads run on one CPU and the server's on another, both with the real-time policy SCHED_FIFO, so that
//! neither moves nor waits for its turn; what is left to the scheduler is the path between them. Inner loops are system
//! calls on buffers prepared before, so a build without optimisation measures the same.

pub mod round_trips;
pub mod streams;
pub mod udp_flood;

use std::{fs, net::Ipv4Addr, sync::Arc, thread::JoinHandle, time::Duration};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

use crate::namespace::{Namespace, panic_text};

/// Priority of the load generators under SCHED_FIFO.
pub const LOAD_PRIORITY: i32 = 20;
/// Priority of a user-space forwarder between them: it must get its turn while they spin.
pub const FORWARDER_PRIORITY: i32 = 30;

/// Who talks to whom.
#[derive(Clone, Debug)]
pub struct Ends {
    /// Where the client is.
    pub client: Arc<Namespace>,
    /// Where the server is.
    pub server: Arc<Namespace>,
    /// The server's address.
    pub address: Ipv4Addr,
}

impl Ends {
    fn client_thread<T: Send + 'static>(
        &self,
        cpus: Cpus,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> JoinHandle<Result<T>> {
        self.client.spawn(move || {
            settle(cpus.client)?;
            work()
        })
    }

    fn server_thread<T: Send + 'static>(
        &self,
        cpus: Cpus,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> JoinHandle<Result<T>> {
        self.server.spawn(move || {
            settle(cpus.server)?;
            work()
        })
    }
}

/// Where client and server run.
#[derive(Clone, Copy, Debug)]
pub struct Cpus {
    client: usize,
    server: usize,
}

impl Cpus {
    /// The first two this process may use; one and the same where there is one.
    ///
    /// # Errors
    /// The kernel does not say.
    pub fn first_two() -> Result<Self> {
        let allowed = sched_getaffinity(Pid::from_raw(0)).context("ask which CPUs we may use")?;
        let mut cpus = (0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu).unwrap_or(false));
        let client = cpus.next().context("no CPU may be used")?;
        Ok(Self { client, server: cpus.next().unwrap_or(client) })
    }
}

/// Binds the calling thread to a CPU and gives it [`LOAD_PRIORITY`].
fn settle(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu).with_context(|| format!("choose CPU {cpu}"))?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("bind a thread to CPU {cpu}"))?;
    real_time(0, LOAD_PRIORITY)
}

/// Gives a thread (0: the calling one) the policy SCHED_FIFO.
fn real_time(thread: libc::pid_t, priority: i32) -> Result<()> {
    let parameter = libc::sched_param { sched_priority: priority };
    // SAFETY: the parameter is initialised and outlives the call.
    let failed = unsafe { libc::sched_setscheduler(thread, libc::SCHED_FIFO, &raw const parameter) } != 0;
    if failed {
        return Err(std::io::Error::last_os_error()).context(
            "set the policy SCHED_FIFO (needs CAP_SYS_NICE, and no cgroup without real-time share)",
        );
    }
    Ok(())
}

/// Gives the calling thread [`FORWARDER_PRIORITY`].
///
/// # Errors
/// Not permitted (CAP_SYS_NICE).
pub fn forward_in_real_time() -> Result<()> {
    real_time(0, FORWARDER_PRIORITY)
}

/// Gives every thread of a process [`FORWARDER_PRIORITY`], as `chrt --all-tasks --fifo` does.
///
/// # Errors
/// No such process, or not permitted (CAP_SYS_NICE).
pub fn let_process_forward_in_real_time(process: u32) -> Result<()> {
    let folder = format!("/proc/{process}/task");
    for entry in fs::read_dir(&folder).with_context(|| format!("read {folder}"))? {
        let entry = entry.with_context(|| format!("read {folder}"))?;
        let thread = entry.file_name().to_string_lossy().parse().context("a thread's number")?;
        real_time(thread, FORWARDER_PRIORITY)?;
    }
    Ok(())
}

/// Time all CPUs together spent with anything but idling, since boot (`/proc/stat`, proc_stat(5)): client, path and server,
/// interrupts included; what the host of a virtual machine stole is not.
///
/// # Errors
/// The file can't be read, or has another form.
pub fn busy_time() -> Result<Duration> {
    let text = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let all =
        text.lines().find_map(|line| line.strip_prefix("cpu ")).context("/proc/stat has no line `cpu`")?;
    let ticks: Vec<u64> = all.split_whitespace().map_while(|number| number.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal …
    let [user, nice, system, _, _, irq, softirq, ..] = ticks.as_slice() else {
        bail!("/proc/stat: `cpu {all}` has fewer than 7 numbers");
    };
    // SAFETY: sysconf has no preconditions.
    let per_second = u64::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) }).unwrap_or(100).max(1);
    Ok(Duration::from_millis((user + nice + system + irq + softirq) * 1000 / per_second))
}

fn joined<T>(thread: JoinHandle<Result<T>>) -> Result<T> {
    thread.join().map_err(|panic| anyhow!("panic: {}", panic_text(&*panic)))?
}

/// What `length` system calls on messages returned: how many, or an error.
fn messages(result: libc::c_int) -> std::io::Result<u64> {
    u64::try_from(result).map_err(|_| std::io::Error::last_os_error())
}

/// A load must take a while, or there is nothing to divide by.
fn require_time(time: Duration) -> Result<()> {
    ensure!(time >= Duration::from_millis(10), "a load of {time:?} is too short to measure");
    Ok(())
}
