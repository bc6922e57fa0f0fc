//! bpf(2) without a library: programs of a few instructions that hand every frame to another device or do nothing, for XDP
//! and for tc; and what can be read from outside of programs and maps that an agent pinned.
//!
//! A veth pair whose far end redirects is what a wire is to a node: frames become XDP frames, so the receiver gets fresh
//! packets without anything the sender's stack knew of them (no segmentation state, no unfinished checksums), each at
//! most an MTU long. They are made here by hand, with bpf(2), because nothing the agent loads should depend on them, and
//! because four instructions need no compiler.

use std::{
    fs, io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    path::Path,
};

use anyhow::{Context as _, Result};

use crate::namespace::Namespace;

/// `enum bpf_cmd`, linux/bpf.h
const MAP_LOOKUP: libc::c_long = 1;
const PROG_LOAD: libc::c_long = 5;
const OBJ_GET: libc::c_long = 7;
const PROG_GET_FD_BY_ID: libc::c_long = 13;
const LINK_CREATE: libc::c_long = 28;
const ENABLE_STATS: libc::c_long = 32;
/// `BPF_PROG_TYPE_XDP`
const TYPE_XDP: u32 = 6;
/// `BPF_PROG_TYPE_SCHED_CLS`
const TYPE_CLASSIFIER: u32 = 3;
/// `BPF_F_BEFORE`: without naming another program, before all of them.
const BEFORE: u32 = 1 << 3;
/// `TCX_NEXT`
const NEXT: i32 = -1;
/// `BPF_XDP` of `enum bpf_attach_type`
const ATTACH_XDP: u32 = 37;
/// `XDP_FLAGS_DRV_MODE`, linux/if_link.h: the driver's own hook or nothing.
const NATIVE: u32 = 1 << 2;
/// `XDP_FLAGS_SKB_MODE`
const GENERIC: u32 = 1 << 1;
/// `XDP_PASS`
const PASS: i32 = 2;
/// `bpf_redirect()` of `enum bpf_func_id`
const HELPER_REDIRECT: i32 = 23;

/// Of `enum bpf_attach_type`.
#[derive(Clone, Copy, Debug)]
pub enum TcHook {
    Ingress = 46,
    Egress = 47,
}

/// An attached program; detached when dropped.
#[derive(Debug)]
pub struct XdpLink {
    _link: OwnedFd,
}

/// As [`XdpLink`], at a tc hook.
#[derive(Debug)]
pub struct TcxLink {
    _link: OwnedFd,
    /// The kernel's number of the program.
    pub program: u32,
}

/// Every frame that arrives on `device` leaves by `to`, in the driver.
///
/// # Errors
/// No such devices, no native XDP there, or not permitted (CAP_BPF, CAP_NET_ADMIN).
pub fn redirect(namespace: &Namespace, device: &str, to: &str) -> Result<XdpLink> {
    let to = namespace.ifindex(to)?;
    let code = [
        instruction(0xb7, 1, i32::try_from(to).context("interface index")?),
        instruction(0xb7, 2, 0),
        instruction(0x85, 0, HELPER_REDIRECT),
        instruction(0x95, 0, 0),
    ];
    attach(namespace, device, &code)
}

/// Every frame passes.
///
/// # Errors
/// As [`redirect`].
pub fn pass(namespace: &Namespace, device: &str) -> Result<XdpLink> {
    attach(namespace, device, &[instruction(0xb7, 0, PASS), instruction(0x95, 0, 0)])
}

/// As [`pass`], in the stack's own imitation, which any device has.
///
/// # Errors
/// As [`redirect`].
pub fn pass_generic(namespace: &Namespace, device: &str) -> Result<XdpLink> {
    attach_in(GENERIC, namespace, device, &[instruction(0xb7, 0, PASS), instruction(0x95, 0, 0)])
}

/// As many classifiers as a tc hook holds (one less than `BPF_MPROG_MAX`, Linux 6.6), each of which hands packets on to the next.
///
/// # Errors
/// As [`redirect`].
pub fn fill(namespace: &Namespace, device: &str, hook: TcHook) -> Result<Vec<TcxLink>> {
    (0..63).map(|_| classifier(namespace, device, hook)).collect()
}

/// A classifier before all others on tc ingress of `device`, which hands every packet on to the next (Linux 6.6).
///
/// # Errors
/// As [`redirect`].
pub fn classifier_in_front(namespace: &Namespace, device: &str) -> Result<TcxLink> {
    classifier(namespace, device, TcHook::Ingress)
}

fn classifier(namespace: &Namespace, device: &str, hook: TcHook) -> Result<TcxLink> {
    let ifindex = namespace.ifindex(device)?;
    let program = load(TYPE_CLASSIFIER, &[instruction(0xb7, 0, NEXT), instruction(0x95, 0, 0)])
        .context("load a classifier")?;
    let id = u32::try_from(fdinfo(&program, "prog_id")?).context("prog_id")?;
    let link = namespace.run(|| {
        let attributes = Attributes::default()
            .u32(descriptor(program.as_raw_fd()))
            .u32(ifindex)
            .u32(hook as u32)
            .u32(BEFORE);
        bpf_fd(LINK_CREATE, attributes).with_context(|| format!("attach a classifier to {device}"))
    })?;
    Ok(TcxLink { _link: link, program: id })
}

/// `struct bpf_insn` without source register and offset: opcode, destination register, immediate.
fn instruction(opcode: u8, register: u8, immediate: i32) -> [u8; 8] {
    let [a, b, c, d] = immediate.to_ne_bytes();
    [opcode, register, 0, 0, a, b, c, d]
}

fn attach(namespace: &Namespace, device: &str, code: &[[u8; 8]]) -> Result<XdpLink> {
    attach_in(NATIVE, namespace, device, code)
}

fn attach_in(mode: u32, namespace: &Namespace, device: &str, code: &[[u8; 8]]) -> Result<XdpLink> {
    let ifindex = namespace.ifindex(device)?;
    let program = load(TYPE_XDP, code).context("load an XDP program")?;
    // struct link_create of union bpf_attr: prog_fd, target_ifindex, attach_type, flags
    let link = namespace.run(|| {
        let attributes =
            Attributes::default().u32(descriptor(program.as_raw_fd())).u32(ifindex).u32(ATTACH_XDP).u32(mode);
        bpf_fd(LINK_CREATE, attributes).with_context(|| format!("attach XDP to {device}"))
    })?;
    Ok(XdpLink { _link: link })
}

fn load(kind: u32, code: &[[u8; 8]]) -> Result<OwnedFd> {
    // Before 5.11 programs count against RLIMIT_MEMLOCK, 64 KiB by default, and a moment longer than they live.
    let unlimited = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
    // SAFETY: the limit is an initialised struct that outlives the call. Where it is refused, loading says so.
    let _ = unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const unlimited) };
    let license = c"GPL";
    // prog_type, insn_cnt, insns, license
    let attributes = Attributes::default()
        .u32(kind)
        .u32(u32::try_from(code.len()).context("instructions")?)
        .u64(code.as_ptr() as u64)
        .u64(license.as_ptr() as u64);
    Ok(bpf_fd(PROG_LOAD, attributes)?)
}

/// While this lives, the kernel counts runs and run time of every program (BPF_ENABLE_STATS; some 20 ns per run).
#[derive(Debug)]
pub struct Statistics {
    _on: OwnedFd,
}

impl Statistics {
    /// # Errors
    /// Not permitted, or a kernel before 5.8.
    pub fn enable() -> Result<Self> {
        // BPF_STATS_RUN_TIME
        let on = bpf_fd(ENABLE_STATS, Attributes::default().u32(0)).context("switch BPF statistics on")?;
        Ok(Self { _on: on })
    }
}

/// What a program did while [`Statistics`] were on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RunTime {
    /// Nanoseconds, all runs together.
    pub nanoseconds: u64,
    /// How often it ran.
    pub runs: u64,
}

impl RunTime {
    /// What came on top of `before`.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            nanoseconds: self.nanoseconds.saturating_sub(before.nanoseconds),
            runs: self.runs.saturating_sub(before.runs),
        }
    }
}

/// Of the program that a pinned link keeps attached.
///
/// # Errors
/// Nothing is pinned there, or it is no link.
pub fn run_time(pinned_link: &Path) -> Result<RunTime> {
    let link = pinned(pinned_link)?;
    let id = fdinfo(&link, "prog_id")?;
    let program = bpf_fd(PROG_GET_FD_BY_ID, Attributes::default().u32(u32::try_from(id).context("prog_id")?))
        .with_context(|| format!("open BPF program {id}"))?;
    Ok(RunTime { nanoseconds: fdinfo(&program, "run_time_ns")?, runs: fdinfo(&program, "run_cnt")? })
}

/// A pinned map with values of at most 256 bytes, to look into.
#[derive(Debug)]
pub struct PinnedMap {
    map: OwnedFd,
}

impl PinnedMap {
    /// # Errors
    /// Nothing is pinned there, or it is no such map.
    pub fn open(path: &Path) -> Result<Self> {
        let map = pinned(path)?;
        let size = fdinfo(&map, "value_size")?;
        anyhow::ensure!(size <= 256, "{} has values of {size} bytes", path.display());
        Ok(Self { map })
    }

    /// True when there is an entry for a key of four bytes.
    ///
    /// # Errors
    /// The kernel refuses to look.
    pub fn has(&self, key: [u8; 4]) -> Result<bool> {
        let mut value = [0_u8; 256];
        // map_fd, padding, key, value, flags
        let attributes = Attributes::default()
            .u32(descriptor(self.map.as_raw_fd()))
            .u32(0)
            .u64(key.as_ptr() as u64)
            .u64(value.as_mut_ptr() as u64);
        match bpf(MAP_LOOKUP, &attributes) {
            Ok(_) => Ok(true),
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(e) => Err(e).context("look a key up in a map"),
        }
    }
}

fn pinned(path: &Path) -> Result<OwnedFd> {
    let mut bytes = path.to_string_lossy().into_owned().into_bytes();
    bytes.push(0);
    bpf_fd(OBJ_GET, Attributes::default().u64(bytes.as_ptr() as u64))
        .with_context(|| format!("open the pin {}", path.display()))
}

fn fdinfo(fd: &OwnedFd, key: &str) -> Result<u64> {
    let path = format!("/proc/self/fdinfo/{}", fd.as_raw_fd());
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':')?.trim().parse().ok())
        .with_context(|| format!("{path} has no {key}:\n{text}"))
}

/// `union bpf_attr` as bytes: fields in the kernel's order, the rest 0.
#[derive(Debug)]
struct Attributes {
    bytes: [u8; 128],
    used: usize,
}

impl Default for Attributes {
    fn default() -> Self {
        Self { bytes: [0; 128], used: 0 }
    }
}

impl Attributes {
    fn u32(self, value: u32) -> Self {
        self.field(&value.to_ne_bytes())
    }

    fn u64(self, value: u64) -> Self {
        self.field(&value.to_ne_bytes())
    }

    fn field(mut self, value: &[u8]) -> Self {
        let end = self.used + value.len();
        if let Some(place) = self.bytes.get_mut(self.used..end) {
            place.copy_from_slice(value);
        }
        self.used = end;
        self
    }
}

fn descriptor(fd: RawFd) -> u32 {
    fd.cast_unsigned()
}

/// A bpf(2) command that returns a descriptor.
fn bpf_fd(command: libc::c_long, attributes: Attributes) -> io::Result<OwnedFd> {
    let fd = bpf(command, &attributes)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf(command: libc::c_long, attributes: &Attributes) -> io::Result<RawFd> {
    // SAFETY: the attributes are as long as said; the pointers in them are to memory that the callers keep until the call
    // returns, as long as the kernel reads or writes there.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, attributes.bytes.as_ptr(), attributes.bytes.len()) };
    RawFd::try_from(result).ok().filter(|result| *result >= 0).ok_or_else(io::Error::last_os_error)
}
