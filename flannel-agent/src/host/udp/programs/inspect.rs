//! What aya does not ask of bpf(2): which interface a pinned link hangs on, which programs run at a tcx hook in which
//! order, and to detach a link at once.
//!
//! aya's `SchedClassifier::query_tcx` opens every program by its id, which needs CAP_SYS_ADMIN; ids alone don't.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

// linux/bpf.h
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_PROG_QUERY: libc::c_int = 16;
const BPF_LINK_DETACH: libc::c_int = 34;
const BPF_LINK_TYPE_XDP: u32 = 6;
const BPF_LINK_TYPE_TCX: u32 = 11;

/// Programs at one hook that are looked at; the kernel allows 64 (`BPF_MPROG_MAX`).
const MAX_PROGRAMS: usize = 64;

/// Where a link is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    Xdp,
    /// With its `bpf_attach_type`.
    Tcx(u32),
    Other(u32),
}

/// A pinned link, as the kernel describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkState {
    pub kind: LinkKind,
    pub program: u32,
    /// 0 once the interface is gone.
    pub ifindex: u32,
}

/// `union bpf_attr` for BPF_OBJ_GET
#[repr(C)]
struct ObjectAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

/// `union bpf_attr` for BPF_OBJ_GET_INFO_BY_FD
#[repr(C)]
struct InfoAttr {
    fd: u32,
    info_len: u32,
    info: u64,
}

/// `struct bpf_link_info` up to what XDP and tcx links say
#[repr(C)]
#[derive(Default)]
struct LinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    /// the union that follows is aligned to 8
    padding: u32,
    ifindex: u32,
    attach_type: u32,
}

/// `union bpf_attr` for BPF_PROG_QUERY
#[repr(C)]
#[derive(Default)]
struct QueryAttr {
    ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    programs: u64,
    count: u32,
    padding: u32,
    program_flags: u64,
    links: u64,
    link_flags: u64,
    revision: u64,
}

/// `union bpf_attr` for BPF_LINK_DETACH
#[repr(C)]
struct DetachAttr {
    fd: u32,
}

/// The object pinned at `path`; `None` when nothing is.
fn open(path: &Path) -> io::Result<Option<OwnedFd>> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjectAttr { path: path.as_ptr() as u64, fd: 0, flags: 0 };
    // SAFETY: the attribute points to a string that outlives the call.
    match unsafe { bpf(BPF_OBJ_GET, &mut attr) } {
        // SAFETY: the kernel just gave us this descriptor, and nobody else knows it.
        Ok(fd) => Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) })),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// Detaches the link pinned at `path` before returning. The kernel lets go of a link whose file is removed only after
/// an RCU grace period, and until then its place is taken. Nothing pinned there is a success.
pub fn detach(path: &Path) -> io::Result<()> {
    let Some(fd) = open(path)? else { return Ok(()) };
    let mut attr = DetachAttr { fd: fd.as_raw_fd().cast_unsigned() };
    // SAFETY: the attribute names an open descriptor and no memory.
    unsafe { bpf(BPF_LINK_DETACH, &mut attr) }.map(drop)
}

/// The link pinned at `path`; `None` when nothing is.
pub fn pinned_link(path: &Path) -> io::Result<Option<LinkState>> {
    let Some(fd) = open(path)? else { return Ok(None) };
    let mut info = LinkInfo::default();
    let mut attr = InfoAttr {
        fd: fd.as_raw_fd().cast_unsigned(),
        info_len: size_of::<LinkInfo>() as u32,
        info: (&raw mut info) as u64,
    };
    // SAFETY: the attribute points to `info` and says how long it is.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    let kind = match info.kind {
        BPF_LINK_TYPE_XDP => LinkKind::Xdp,
        BPF_LINK_TYPE_TCX => LinkKind::Tcx(info.attach_type),
        other => LinkKind::Other(other),
    };
    Ok(Some(LinkState { kind, program: info.program, ifindex: info.ifindex }))
}

/// Ids of the programs at a tcx hook, in the order they run.
pub fn tcx_programs(ifindex: u32, attach_type: u32) -> io::Result<Vec<u32>> {
    let mut ids = vec![0_u32; MAX_PROGRAMS];
    let mut attr = QueryAttr {
        ifindex,
        attach_type,
        programs: ids.as_mut_ptr() as u64,
        count: MAX_PROGRAMS as u32,
        ..QueryAttr::default()
    };
    // SAFETY: the attribute points to `ids` and says how many fit.
    unsafe { bpf(BPF_PROG_QUERY, &mut attr) }?;
    ids.truncate(usize::try_from(attr.count).unwrap_or(MAX_PROGRAMS));
    Ok(ids)
}

/// # Safety
/// `attr` must be what `command` takes, and every pointer in it must be good for what the kernel does with it.
pub(super) unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_int> {
    // SAFETY: as the caller promises; the kernel reads and writes no more than the size given.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    libc::c_int::try_from(result).map_err(io::Error::other)
}
