//! The object into the kernel: maps made or opened, programs relocated to them, the verifier asked.
//!
//! Not by `aya::EbpfLoader`: making one reads and parses all types of the kernel (`/sys/kernel/btf/vmlinux`, also when it
//! is told to do without), and its first `load` tries out two dozen features of the kernel. Both are for programs that are
//! relocated to kernel types; of ours none is, and they took half of a start. Parsing, relocation, maps and links are
//! aya's all the same. What is lost: the object's own types and line numbers, which `bpftool` would show.

use std::collections::{HashMap, HashSet};
use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use aya::maps::{Array, Map, MapData, MapError};
use aya::programs::{SchedClassifier, Xdp};
use aya_obj::programs::XdpAttachType;
use aya_obj::{EbpfSectionKind, Object, ProgramSection};
use flannel_common::tunnel::Settings;

use super::PinFolder;
use super::inspect::bpf;
use crate::host::udp::errno::Refusal;
use crate::host::udp::maps::{MapShape, SHAPES};
use crate::host::udp::object;

// linux/bpf.h
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_MAP_FREEZE: libc::c_int = 22;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
const BPF_F_XDP_HAS_FRAGS: u32 = 1 << 5;
const BPF_OBJ_NAME_LEN: usize = 16;

/// The verifier gives way to signals (`EAGAIN`); libbpf asks it this often, too.
const TRIES: usize = 5;

/// What the verifier may say about a program it refuses, bytes: at first, and at most.
const LOG: (usize, usize) = (64 * 1024, 16 * 1024 * 1024);

/// The object of one set of settings, relocated; its programs are loaded one by one.
pub(super) struct Loadable {
    object: Object,
    /// Programs refer to it by descriptor until they are loaded.
    _constants: Option<MapData>,
}

/// The maps of a loaded object, by name.
pub struct LoadedMaps {
    maps: HashMap<String, MapData>,
    new: HashSet<&'static str>,
}

/// A program the verifier has accepted.
pub(super) enum Accepted {
    Classifier(SchedClassifier),
    Xdp(Xdp),
}

/// `union bpf_attr` for BPF_PROG_LOAD, up to what is used of it
#[repr(C)]
#[derive(Default)]
struct LoadAttr {
    kind: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; BPF_OBJ_NAME_LEN],
    ifindex: u32,
    attach_type: u32,
}

/// `union bpf_attr` for BPF_OBJ_PIN
#[repr(C)]
struct PinAttr {
    path: u64,
    fd: u32,
    flags: u32,
}

/// `union bpf_attr` for BPF_MAP_FREEZE
#[repr(C)]
struct FreezeAttr {
    fd: u32,
}

impl LoadedMaps {
    /// Takes a map out of it.
    pub fn take(&mut self, name: &str) -> Option<Result<Map, MapError>> {
        self.maps.remove(name).map(Map::from_map_data)
    }

    /// Whether it was not there before.
    #[must_use]
    pub fn is_new(&self, name: &str) -> bool {
        self.new.contains(name)
    }
}

impl Loadable {
    /// Opens the pinned maps, makes and pins those that are missing, and sets every reference to them.
    ///
    /// # Errors
    /// No BPF in this kernel, a missing capability, an object of another version.
    pub(super) fn open(settings: &Settings, pins: &PinFolder) -> Result<(Self, LoadedMaps), Refusal> {
        let mut object = Object::parse(object::OBJECT).map_err(|e| unfit(&e))?;
        let bytes = bytemuck::bytes_of(settings);
        object.patch_map_data([("SETTINGS", (bytes, true))].into()).map_err(|e| unfit(&e))?;

        let wanted = std::mem::take(&mut object.maps);
        let (mut maps, mut new, mut constants) = (HashMap::new(), HashSet::new(), None);
        for (name, wanted) in &wanted {
            if let Some(shape) = SHAPES.iter().find(|shape| shape.name == name) {
                let found = found(shape, pins)?;
                if found.is_none() {
                    new.insert(shape.name);
                }
                let map = found.map_or_else(|| make(shape, wanted, pins), Ok)?;
                maps.insert(name.clone(), map);
            } else if wanted.section_kind() == EbpfSectionKind::Rodata {
                constants = Some((name.as_str(), frozen(name, wanted.clone())?));
            } else {
                return Err(unfit(&format!("it has a map {name}, of which this agent knows nothing")));
            }
        }
        let sections: HashSet<usize> = object.functions.keys().map(|(section, _)| *section).collect();
        let made = maps.iter().map(|(name, map)| (name.as_str(), map));
        let references = made
            .chain(constants.iter().map(|(name, map)| (*name, map)))
            .filter_map(|(name, map)| Some((name, map.fd().as_fd().as_raw_fd(), wanted.get(name)?)));
        object.relocate_maps(references, &sections).map_err(|e| unfit(&e))?;
        object.relocate_calls(&sections).map_err(|e| unfit(&e))?;
        let constants = constants.map(|(_, map)| map);
        Ok((Self { object, _constants: constants }, LoadedMaps { maps, new }))
    }

    /// Has the verifier look at a program.
    ///
    /// # Errors
    /// It refuses, and what it said last; the object has no such program.
    pub(super) fn load(&self, name: &'static str, pins: &PinFolder) -> Result<Accepted, Refusal> {
        let doing = || format!("load {name}");
        let program = self.object.programs.get(name).ok_or_else(|| Refusal::new(doing(), super::MISSING))?;
        let function = self
            .object
            .functions
            .get(&program.function_key())
            .ok_or_else(|| Refusal::new(doing(), super::MISSING))?;
        let (kind, attach_type, flags) = match program.section {
            ProgramSection::SchedClassifier => (BPF_PROG_TYPE_SCHED_CLS, 0, 0),
            ProgramSection::Xdp { frags: false, .. } => (BPF_PROG_TYPE_XDP, BPF_XDP, 0),
            ProgramSection::Xdp { frags: true, .. } => (BPF_PROG_TYPE_XDP, BPF_XDP, BPF_F_XDP_HAS_FRAGS),
            _ => return Err(unfit(&format!("{name} is neither a tc nor an XDP program"))),
        };
        let count = u32::try_from(function.instructions.len()).map_err(|e| unfit(&e))?;
        let attributes = || LoadAttr {
            kind,
            instruction_count: count,
            instructions: function.instructions.as_ptr() as u64,
            license: program.license.as_ptr() as u64,
            flags,
            name: cut(name),
            attach_type,
            ..LoadAttr::default()
        };
        // SAFETY: instructions and license are borrowed from the object while the call runs, which reads no more of them
        // than it is told and up to the final zero.
        let fd = match unsafe { load(&mut attributes()) } {
            Ok(fd) => fd,
            // SAFETY: as above.
            Err(e) => return Err(Refusal::from_verifier(doing(), &e, &unsafe { log_of(&attributes) })),
        };
        through_a_pin(&fd, pins, |path| match kind {
            BPF_PROG_TYPE_XDP => Xdp::from_pin(path, XdpAttachType::Interface).map(Accepted::Xdp),
            _ => SchedClassifier::from_pin(path).map(Accepted::Classifier),
        })
        .map_err(|e| Refusal::from_io(doing(), &e))?
        .map_err(|e| Refusal::from_program(doing(), &e))
    }
}

/// The map at its pin.
fn found(shape: &MapShape, pins: &PinFolder) -> Result<Option<MapData>, Refusal> {
    let path = pins.map(shape.pin);
    if !path.exists() {
        return Ok(None);
    }
    let doing = || format!("open the pinned map {}", path.display());
    MapData::from_pin(&path).map(Some).map_err(|e| Refusal::from_map(doing(), &e))
}

/// A new map, pinned.
fn make(shape: &MapShape, wanted: &aya_obj::Map, pins: &PinFolder) -> Result<MapData, Refusal> {
    let doing = || format!("make map {}", shape.name);
    let definition = shape
        .definition(wanted)
        .ok_or_else(|| unfit(&format!("its map {} is of another kind", shape.name)))?;
    let map = MapData::create(definition, shape.name, None).map_err(|e| Refusal::from_map(doing(), &e))?;
    map.pin(pins.map(shape.pin)).map_err(|e| Refusal::from_pin(format!("pin map {}", shape.name), &e))?;
    Ok(map)
}

/// Constants the verifier may rely on: nobody can write to them any more.
fn frozen(name: &str, wanted: aya_obj::Map) -> Result<MapData, Refusal> {
    let doing = || format!("make map {name}");
    let failed = |e: &MapError| Refusal::from_map(doing(), e);
    let value: [u8; size_of::<Settings>()] = wanted
        .data()
        .try_into()
        .map_err(|_| unfit(&format!("its constants are {} bytes long", wanted.data().len())))?;
    let map = MapData::create(wanted, name, None).map_err(|e| failed(&e))?;
    let mut map = Map::from_map_data(map).map_err(|e| failed(&e))?;
    let mut array: Array<&mut MapData, [u8; size_of::<Settings>()]> =
        Array::try_from(&mut map).map_err(|e| failed(&e))?;
    array.set(0, value, 0).map_err(|e| failed(&e))?;
    let Map::Array(map) = map else { return Err(unfit(&"its constants are no array")) };
    let mut attribute = FreezeAttr { fd: map.fd().as_fd().as_raw_fd().cast_unsigned() };
    // SAFETY: the attribute names an open descriptor and no memory.
    unsafe { bpf(BPF_MAP_FREEZE, &mut attribute) }.map_err(|e| Refusal::from_io(doing(), &e))?;
    Ok(map)
}

/// # Safety
/// As [`bpf`].
unsafe fn load(attribute: &mut LoadAttr) -> io::Result<OwnedFd> {
    let mut tries = 0;
    loop {
        tries += 1;
        // SAFETY: as the caller promises.
        match unsafe { bpf(BPF_PROG_LOAD, attribute) } {
            // SAFETY: the kernel just gave us this descriptor, and nobody else knows it.
            Ok(fd) => return Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            Err(e) if e.raw_os_error() == Some(libc::EAGAIN) && tries < TRIES => {}
            Err(e) => return Err(e),
        }
    }
}

/// What the verifier has to say about a program it refused. Asked for only then: writing it takes longer than the rest.
///
/// # Safety
/// As [`bpf`], for what `attributes` returns.
unsafe fn log_of(attributes: &impl Fn() -> LoadAttr) -> String {
    let mut log = vec![0_u8; LOG.0];
    loop {
        let mut attribute = attributes();
        (attribute.log_level, attribute.log) = (1, log.as_mut_ptr() as u64);
        attribute.log_size = u32::try_from(log.len()).unwrap_or(u32::MAX);
        // SAFETY: as the caller promises; the log is as large as told.
        let result = unsafe { load(&mut attribute) };
        let is_cut = result.is_err_and(|e| e.raw_os_error() == Some(libc::ENOSPC));
        if !is_cut || log.len() >= LOG.1 {
            let text = log.split(|byte| *byte == 0).next().unwrap_or_default();
            return String::from_utf8_lossy(text).into_owned();
        }
        log = vec![0; log.len() * 4];
    }
}

/// aya takes programs it has not loaded itself from a bpffs only.
fn through_a_pin<T>(fd: &OwnedFd, pins: &PinFolder, take: impl FnOnce(&Path) -> T) -> io::Result<T> {
    let pin = pins.passage();
    // What an agent that was killed in that moment left.
    super::pins::ignore_missing(std::fs::remove_file(&pin))?;
    let path = CString::new(OsStr::as_bytes(pin.as_os_str()))?;
    let mut attribute = PinAttr { path: path.as_ptr() as u64, fd: fd.as_raw_fd().cast_unsigned(), flags: 0 };
    // SAFETY: the attribute points to a string that outlives the call.
    unsafe { bpf(BPF_OBJ_PIN, &mut attribute) }?;
    let taken = take(&pin);
    std::fs::remove_file(&pin)?;
    Ok(taken)
}

/// As much of a name as the kernel keeps.
fn cut(name: &str) -> [u8; BPF_OBJ_NAME_LEN] {
    let mut bytes = [0; BPF_OBJ_NAME_LEN];
    for (to, from) in bytes.iter_mut().zip(name.bytes().take(BPF_OBJ_NAME_LEN - 1)) {
        *to = from;
    }
    bytes
}

fn unfit(error: &dyn std::fmt::Display) -> Refusal {
    Refusal::new("load the eBPF object", error.to_string())
}
