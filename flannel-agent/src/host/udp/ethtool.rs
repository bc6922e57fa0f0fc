//! Offload features and driver names of network devices, asked for as `ethtool -k` and `-i` do (SIOCETHTOOL), without
//! needing that program on the node.
//!
//! Features are addressed by their name strings, the kernel's stable interface (linux/ethtool.h, `ETH_SS_FEATURES`);
//! their bit numbers differ between kernels. Everything resolves in the calling thread's network namespace.

use std::ffi::c_void;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::errno::describe;
use crate::host::HostError;

// linux/ethtool.h
const ETHTOOL_GDRVINFO: u32 = 0x03;
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GFEATURES: u32 = 0x3a;
const ETHTOOL_SFEATURES: u32 = 0x3b;
const ETH_SS_FEATURES: u32 = 4;
const ETH_GSTRING_LEN: usize = 32;
const DRVINFO_LEN: usize = 196;

/// More features than any kernel has (6.18: 64); a bound for what the kernel's answer may make us allocate.
const MAX_FEATURES: usize = 1024;

/// An offload the tunnel depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Feature {
    /// Merge received segments (`gro`).
    Gro,
    /// Every kind of TCP segmentation by the device (`tso`).
    Tso,
    /// Segmentation in software, last before the device (`gso`).
    Gso,
    /// UDP segmentation by the device (`tx-udp-segmentation`).
    UdpSegmentation,
}

impl Feature {
    /// As `ethtool -K` takes it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gro => "gro",
            Self::Tso => "tso",
            Self::Gso => "gso",
            Self::UdpSegmentation => "tx-udp-segmentation",
        }
    }

    /// Whether the kernel's feature `name` belongs to this offload: `tso` is a group of several.
    fn covers(self, name: &str) -> bool {
        match self {
            Self::Gro => name == "rx-gro",
            Self::Tso => name.starts_with("tx-tcp") && name.ends_with("segmentation"),
            Self::Gso => name == "tx-generic-segmentation",
            Self::UdpSegmentation => name == "tx-udp-segmentation",
        }
    }
}

/// A socket to ask through.
pub struct Ethtool {
    socket: OwnedFd,
}

/// One word of 32 features, as `struct ethtool_get_features_block`.
#[repr(C)]
#[derive(Clone, Copy, Default, bytemuck::Pod, bytemuck::Zeroable)]
struct FeatureBlock {
    available: u32,
    requested: u32,
    active: u32,
    never_changed: u32,
}

impl Ethtool {
    /// # Errors
    /// No socket to be had.
    pub fn open() -> Result<Self, HostError> {
        socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
            .map(|socket| Self { socket })
            .map_err(|e| HostError::new("open a socket for ethtool requests", describe(e as i32)))
    }

    /// Name of the driver behind a device: `veth`, `virtio_net`, `mlx5_core`.
    ///
    /// # Errors
    /// No such device, or one whose driver does not say (`lo`).
    pub fn driver(&self, device: &str) -> Result<String, HostError> {
        let mut request = [0_u32; DRVINFO_LEN / 4];
        request[0] = ETHTOOL_GDRVINFO;
        let bytes = bytemuck::cast_slice_mut::<u32, u8>(&mut request);
        self.call(device, bytes).map_err(|e| failed("ask for the driver of", device, &e))?;
        Ok(text(bytes.get(4..36).unwrap_or_default()))
    }

    /// Whether the offload is on. A group counts as on while any of its members is; a kernel that lacks it has it off.
    ///
    /// # Errors
    /// No such device.
    pub fn is_on(&self, device: &str, feature: Feature) -> Result<bool, HostError> {
        let doing = "read the offloads of";
        let names = self.names(device).map_err(|e| failed(doing, device, &e))?;
        let blocks = self.blocks(device, names.len()).map_err(|e| failed(doing, device, &e))?;
        Ok(members(&names, feature).any(|bit| is_set(&blocks, bit, |block| block.active)))
    }

    /// Switches the offload, all of its members that this device lets one switch.
    ///
    /// # Errors
    /// No such device, missing CAP_NET_ADMIN, or the device keeps the offload as it was.
    pub fn set(&self, device: &str, feature: Feature, wanted: Switch) -> Result<(), HostError> {
        let doing = format!("switch {} {} on", feature.name(), wanted.word());
        let failed_io = |e: &io::Error| failed(&doing, device, e);
        let names = self.names(device).map_err(|e| failed_io(&e))?;
        let blocks = self.blocks(device, names.len()).map_err(|e| failed_io(&e))?;
        // struct ethtool_sfeatures: cmd, size, then (valid, requested) per block
        let mut request = vec![0_u32; 2 + 2 * blocks.len()];
        request[0] = ETHTOOL_SFEATURES;
        request[1] = u32::try_from(blocks.len()).unwrap_or_default();
        for bit in members(&names, feature).filter(|bit| is_set(&blocks, *bit, |block| block.available)) {
            let mask = 1_u32 << (bit % 32);
            if let Some(valid) = request.get_mut(2 + 2 * (bit / 32)) {
                *valid |= mask;
            }
            if wanted == Switch::On
                && let Some(requested) = request.get_mut(3 + 2 * (bit / 32))
            {
                *requested |= mask;
            }
        }
        self.call(device, bytemuck::cast_slice_mut(&mut request)).map_err(|e| failed_io(&e))?;
        if self.is_on(device, feature)? == (wanted == Switch::On) {
            Ok(())
        } else {
            Err(HostError::new(format!("{doing} {device}"), "the device keeps it as it is"))
        }
    }

    fn names(&self, device: &str) -> io::Result<Vec<String>> {
        // struct ethtool_sset_info with one count, then struct ethtool_gstrings
        let mut info = [0_u32; 6];
        info[0] = ETHTOOL_GSSET_INFO;
        info[2] = 1 << ETH_SS_FEATURES;
        self.call(device, bytemuck::cast_slice_mut(&mut info))?;
        let count = usize::try_from(info[4]).unwrap_or(usize::MAX).min(MAX_FEATURES);
        let mut request = vec![0_u32; 3 + count * ETH_GSTRING_LEN / 4];
        request[0] = ETHTOOL_GSTRINGS;
        request[1] = ETH_SS_FEATURES;
        request[2] = u32::try_from(count).unwrap_or_default();
        let bytes = bytemuck::cast_slice_mut::<u32, u8>(&mut request);
        self.call(device, bytes)?;
        Ok(bytes.get(12..).unwrap_or_default().chunks_exact(ETH_GSTRING_LEN).map(text).collect())
    }

    fn blocks(&self, device: &str, features: usize) -> io::Result<Vec<FeatureBlock>> {
        let count = features.div_ceil(32);
        let mut request = vec![0_u32; 2 + 4 * count];
        request[0] = ETHTOOL_GFEATURES;
        request[1] = u32::try_from(count).unwrap_or_default();
        self.call(device, bytemuck::cast_slice_mut(&mut request))?;
        Ok(bytemuck::cast_slice(request.get(2..).unwrap_or_default()).to_vec())
    }

    /// One request; the kernel writes its answer over it. `request` must be as long as its own fields say.
    fn call(&self, device: &str, request: &mut [u8]) -> io::Result<()> {
        // SAFETY: ifreq is plain old data, all zeros is valid.
        let mut ifreq: libc::ifreq = unsafe { mem::zeroed() };
        let name = device.as_bytes();
        if name.is_empty() || name.len() >= libc::IFNAMSIZ {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        for (to, from) in ifreq.ifr_name.iter_mut().zip(name) {
            *to = from.cast_signed();
        }
        ifreq.ifr_ifru.ifru_data = request.as_mut_ptr().cast();
        let argument: *mut c_void = (&raw mut ifreq).cast();
        // SAFETY: SIOCETHTOOL takes an ifreq whose data points to the request; the kernel writes no further than the
        // counts in it say, which the callers derived from the buffer's length. Both live until the call returns.
        let result = unsafe {
            libc::ioctl(self.socket.as_fd().as_raw_fd(), libc::SIOCETHTOOL as libc::Ioctl, argument)
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// How an offload shall be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switch {
    On,
    Off,
}

impl Switch {
    /// The other position.
    #[must_use]
    pub const fn opposite(self) -> Self {
        match self {
            Self::On => Self::Off,
            Self::Off => Self::On,
        }
    }

    /// `on` or `off`
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Off => "off",
        }
    }
}

fn members(names: &[String], feature: Feature) -> impl Iterator<Item = usize> {
    names.iter().enumerate().filter(move |(_, name)| feature.covers(name)).map(|(bit, _)| bit)
}

fn is_set(blocks: &[FeatureBlock], bit: usize, word: fn(&FeatureBlock) -> u32) -> bool {
    blocks.get(bit / 32).is_some_and(|block| word(block) & (1 << (bit % 32)) != 0)
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
}

fn failed(doing: &str, device: &str, error: &io::Error) -> HostError {
    let reason = match error.raw_os_error() {
        Some(libc::ENODEV) => format!("there is no network device {device}"),
        Some(errno) => describe(errno),
        None => error.to_string(),
    };
    HostError::new(format!("{doing} {device}"), reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tso_is_the_whole_group_and_nothing_else() {
        let names = [
            "tx-tcp-segmentation",
            "tx-tcp-ecn-segmentation",
            "tx-tcp-accecn-segmentation",
            "tx-tcp-mangleid-segmentation",
            "tx-tcp6-segmentation",
        ];
        for name in names {
            assert!(Feature::Tso.covers(name), "{name}");
        }
        for name in ["tx-generic-segmentation", "tx-udp-segmentation", "rx-gro", "tx-udp_tnl-segmentation"] {
            assert!(!Feature::Tso.covers(name), "{name}");
        }
        assert!(!Feature::Gro.covers("rx-gro-hw"));
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        let ethtool = Ethtool::open().unwrap();
        assert_eq!(
            ethtool.is_on("no-such-dev", Feature::Gro).unwrap_err().to_string(),
            "read the offloads of no-such-dev: there is no network device no-such-dev"
        );
        assert!(ethtool.driver("a-name-that-is-too-long").is_err());
    }

    #[test]
    fn the_loopback_device_has_gro_like_every_other() {
        assert!(Ethtool::open().unwrap().is_on("lo", Feature::Gro).unwrap());
    }
}
