//! Where pins live: `<bpffs>/flannel/<device>/v<layout>/`, maps by name, links as `link_<what>`.
//!
//! A pinned link keeps its program attached and a pinned map its contents when the agent is gone, so packets flow on
//! and the next agent takes over. A folder of another layout version holds links worth taking over (the hook they
//! occupy is the one we need) and maps that are not.
//!
//! What the agent changed on the underlay is noted here too, as empty folders: the notes live exactly as long as the
//! change, which a reboot undoes. Names on a bpffs can't contain a dot (the kernel refuses them), so it is written
//! as a colon, which no device name contains.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use flannel_common::LAYOUT_VERSION;
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::inspect;
use crate::host::udp::errno::{Refusal, describe, describe_io};
use crate::host::udp::ethtool::{Feature, Switch};

/// Links start so; what hangs in the kernel by them is let go by removing the file.
const LINK_PREFIX: &str = "link_";
/// Ends the name of a link that is about to take another one's place.
const SUCCESSOR: &str = "_next";
/// How long to wait for another tunnel's turn, which is a few system calls; who holds it longer was stopped.
const TURN: Duration = Duration::from_secs(1);
/// Where a program is pinned for a moment while it is loaded.
const PASSAGE: &str = "loading";
/// Folder of notes on changed offloads.
const CHANGED: &str = "changed";
/// Folder that says: XDP's marks did not arrive here.
const XDP_DISPROVED: &str = "xdp_disproved";

/// The pins of one tunnel.
#[derive(Clone, Debug)]
pub struct PinFolder {
    /// `<bpffs>/flannel/<device>`
    device: PathBuf,
    /// `<bpffs>/flannel/<device>/v3`
    current: PathBuf,
}

/// The links that carry a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkPin {
    Encap,
    Ingress,
    Xdp,
    Gro,
    Bridge,
    /// XDP program that does nothing but switch the GRO pair's NAPI on (kernels before 5.13).
    Pass,
}

impl LinkPin {
    const fn name(self) -> &'static str {
        match self {
            Self::Encap => "link_encap",
            Self::Ingress => "link_ingress",
            Self::Xdp => "link_xdp",
            Self::Gro => "link_gro",
            Self::Bridge => "link_bridge",
            Self::Pass => "link_pass",
        }
    }
}

impl PinFolder {
    /// The folder for `device`, whether it is there or not.
    #[must_use]
    pub fn new(bpffs: &Path, device: &str) -> Self {
        let device = bpffs.join("flannel").join(escape(device));
        let current = device.join(format!("v{LAYOUT_VERSION}"));
        Self { device, current }
    }

    /// The devices that have a folder, whoever made it.
    #[must_use]
    pub fn devices(bpffs: &Path) -> Vec<String> {
        let mut devices: Vec<String> =
            names_in(&bpffs.join("flannel")).iter().map(|folder| unescape(folder)).collect();
        devices.sort();
        devices
    }

    /// Whether there is a folder at all.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.device.is_dir()
    }

    /// Every pin of every layout version: links, then maps.
    #[must_use]
    pub fn pins(&self) -> (Vec<PathBuf>, Vec<PathBuf>) {
        let mut pins: Vec<PathBuf> = names_in(&self.device)
            .into_iter()
            .map(|version| self.device.join(version))
            .flat_map(|folder| names_in(&folder).into_iter().map(move |name| folder.join(name)))
            .filter(|path| path.is_file())
            .collect();
        pins.sort();
        pins.into_iter().partition(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(LINK_PREFIX))
        })
    }

    /// Makes the folder and takes the links and notes of other layout versions into it. Their maps stay where they are,
    /// for [`PinFolder::of_other_versions`], until [`PinFolder::retire_other_versions`].
    ///
    /// # Errors
    /// `bpffs` is no bpffs and can't be made one, or missing permission.
    pub fn prepare(&self, bpffs: &Path) -> Result<(), Refusal> {
        ensure_bpffs(bpffs)?;
        let failed =
            |e: &io::Error| Refusal::from_io(format!("make the folder {}", self.current.display()), e);
        fs::create_dir_all(&self.current).map_err(|e| failed(&e))?;
        // An agent was killed before it gave the new link the old one's name: the old one does.
        for name in names_in(&self.current).iter().filter(|name| name.ends_with(SUCCESSOR)) {
            drop_link(&self.current.join(name)).map_err(|e| failed(&e))?;
        }
        let _turn = self.turn();
        for other in self.other_versions() {
            let is_ours =
                |name: &String| name.starts_with(LINK_PREFIX) || name == CHANGED || name == XDP_DISPROVED;
            for name in names_in(&other).into_iter().filter(is_ours) {
                if !self.current.join(&name).exists() {
                    tracing::info!("taking over {name} of another layout version in {}", other.display());
                    // Fails at worst where both versions have it; ours wins, the other goes with its folder.
                    let _ = fs::rename(other.join(&name), self.current.join(&name));
                }
            }
        }
        Ok(())
    }

    /// Waits for our turn among the tunnels of this bpffs. Until it is dropped, no other one, of this agent or another, puts
    /// a program on a hook or names its pin, so nobody sees what is between the two. Two in one thread would wait for each
    /// other.
    #[must_use]
    pub(super) fn turn(&self) -> Option<File> {
        let folder = File::open(self.device.parent()?).ok()?;
        let started = Instant::now();
        loop {
            match folder.try_lock() {
                Ok(()) => return Some(folder),
                Err(TryLockError::WouldBlock) if started.elapsed() < TURN => sleep(Duration::from_millis(1)),
                Err(e) => {
                    tracing::debug!("the turn of the tunnel pinned in {}: {e}", self.device.display());
                    return None;
                }
            }
        }
    }

    /// The pins of this link that other tunnels may have.
    pub(super) fn of_other_devices(&self, link: LinkPin) -> Vec<PathBuf> {
        let Some(all) = self.device.parent() else { return Vec::new() };
        let others = names_in(all).into_iter().map(|name| all.join(name)).filter(|path| *path != self.device);
        others
            .flat_map(|device| names_in(&device).into_iter().map(move |version| device.join(version)))
            .map(|version| version.join(link.name()))
            .collect()
    }

    /// A map of the other layout versions, where they have one of that name.
    #[must_use]
    pub fn of_other_versions(&self, map: &str) -> Vec<PathBuf> {
        self.other_versions().into_iter().map(|folder| folder.join(map)).filter(|pin| pin.exists()).collect()
    }

    /// Removes what other layout versions left, now that no program uses it.
    ///
    /// # Errors
    /// Missing permission.
    pub fn retire_other_versions(&self) -> Result<(), Refusal> {
        for other in self.other_versions() {
            for name in names_in(&other).iter().filter(|name| name.starts_with(LINK_PREFIX)) {
                let _ = drop_link(&other.join(name));
            }
            remove_tree(&other)
                .map_err(|e| Refusal::from_io(format!("remove the pins in {}", other.display()), &e))?;
        }
        Ok(())
    }

    /// Whether an earlier run left anything here.
    #[must_use]
    pub fn is_in_use(&self) -> bool {
        names_in(&self.device).iter().any(|version| {
            names_in(&self.device.join(version)).iter().any(|name| name.starts_with(LINK_PREFIX))
        })
    }

    #[must_use]
    pub fn link(&self, link: LinkPin) -> PathBuf {
        self.current.join(link.name())
    }

    #[must_use]
    pub fn map(&self, name: &str) -> PathBuf {
        self.current.join(name)
    }

    pub(super) fn passage(&self) -> PathBuf {
        self.current.join(PASSAGE)
    }

    /// Detaches a link and removes its pin. Gone already is a success.
    ///
    /// # Errors
    /// Missing permission.
    pub fn remove_link(&self, link: LinkPin) -> Result<(), Refusal> {
        let path = self.link(link);
        drop_link(&path).map_err(|e| Refusal::from_io(format!("remove the pin {}", path.display()), &e))
    }

    /// Where the link that will take the place of this one is pinned for a moment; what an agent that was killed in that
    /// moment left there is detached.
    pub(super) fn make_way_for_successor(&self, link: LinkPin) -> Result<PathBuf, Refusal> {
        let path = self.successor(link);
        drop_link(&path).map_err(|e| Refusal::from_io(format!("remove the pin {}", path.display()), &e))?;
        Ok(path)
    }

    /// Lets go of a link and gives its name to its successor.
    pub(super) fn succeed(&self, link: LinkPin) -> Result<(), Refusal> {
        self.remove_link(link)?;
        let (from, to) = (self.successor(link), self.link(link));
        fs::rename(&from, &to).map_err(|e| Refusal::from_io(format!("rename the pin {}", from.display()), &e))
    }

    fn successor(&self, link: LinkPin) -> PathBuf {
        self.current.join(format!("{}{SUCCESSOR}", link.name()))
    }

    /// Links first, then everything else, of every layout version, then the folders. Gone already is a success.
    ///
    /// # Errors
    /// Missing permission.
    pub fn remove_all(&self) -> Result<(), Refusal> {
        let failed =
            |e: io::Error| Refusal::from_io(format!("remove the pins in {}", self.device.display()), &e);
        for version in names_in(&self.device) {
            let folder = self.device.join(version);
            for name in names_in(&folder).iter().filter(|name| name.starts_with(LINK_PREFIX)) {
                drop_link(&folder.join(name)).map_err(failed)?;
            }
        }
        ignore_missing(remove_tree(&self.device)).map_err(failed)?;
        // The parent serves other tunnels too; it goes with the last.
        if let Some(parent) = self.device.parent() {
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }

    /// Remembers that XDP decapsulates on this interface but its marks don't arrive. An interface that is made anew has
    /// another index, and deserves another proof.
    pub(crate) fn note_xdp_disproved(&self, ifindex: u32) -> Result<(), Refusal> {
        self.make_note(&self.current.join(XDP_DISPROVED).join(ifindex.to_string()))
    }

    pub(crate) fn is_xdp_disproved(&self, ifindex: u32) -> bool {
        self.current.join(XDP_DISPROVED).join(ifindex.to_string()).exists()
    }

    /// Remembers that an offload of `device` was switched to `to`.
    pub(crate) fn note_changed(&self, device: &str, feature: Feature, to: Switch) -> Result<(), Refusal> {
        self.make_note(&self.change_note(device, feature, to))
    }

    pub(crate) fn forget_changed(&self, device: &str, feature: Feature, to: Switch) {
        let _ = fs::remove_dir(self.change_note(device, feature, to));
        let _ = fs::remove_dir(self.current.join(CHANGED).join(escape(device)));
        let _ = fs::remove_dir(self.current.join(CHANGED));
    }

    /// Every noted change: device, offload, what it was switched to. By agents of other layout versions too.
    pub(crate) fn changed(&self) -> Vec<(String, Feature, Switch)> {
        names_in(&self.device)
            .iter()
            .flat_map(|version| changed_in(&self.device.join(version).join(CHANGED)))
            .collect()
    }

    fn change_note(&self, device: &str, feature: Feature, to: Switch) -> PathBuf {
        self.current.join(CHANGED).join(escape(device)).join(note_name(feature, to))
    }

    fn make_note(&self, path: &Path) -> Result<(), Refusal> {
        fs::create_dir_all(path)
            .map_err(|e| Refusal::from_io(format!("make the note {}", path.display()), &e))
    }

    fn other_versions(&self) -> Vec<PathBuf> {
        names_in(&self.device)
            .into_iter()
            .filter(|name| name.strip_prefix('v').is_some_and(|version| version.parse::<u32>().is_ok()))
            .map(|name| self.device.join(name))
            .filter(|path| *path != self.current)
            .collect()
    }
}

/// Makes `path` a mounted bpffs if it isn't one.
///
/// # Errors
/// What to mount where, when the agent may not do it itself.
pub fn ensure_bpffs(path: &Path) -> Result<(), Refusal> {
    let doing = || format!("mount a bpffs on {}", path.display());
    if !path.is_dir() {
        fs::create_dir_all(path).map_err(|e| Refusal::new(doing(), describe_io(&e)))?;
    }
    // A folder of a bpffs is one too.
    if is_bpffs(path) {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), path, Some("bpf"), flags, Some("mode=0700")).map_err(|e| {
        let by_hand = format!("mount -t bpf bpf {}", path.display());
        let reason = match e as i32 {
            libc::EPERM | libc::EACCES => {
                format!("{}; needs CAP_SYS_ADMIN, or `{by_hand}` beforehand", describe(e as i32))
            }
            libc::ENODEV => format!("{}; this kernel has no bpffs (CONFIG_BPF_SYSCALL)", describe(e as i32)),
            errno => describe(errno),
        };
        Refusal::new(doing(), reason)
    })
}

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC)
}

/// Device, offload and what it was switched to, of each note in the folder.
fn changed_in(folder: &Path) -> Vec<(String, Feature, Switch)> {
    let mut changes = Vec::new();
    for device in names_in(folder) {
        for note in names_in(&folder.join(&device)) {
            let known = [Feature::Gro, Feature::Tso, Feature::Gso, Feature::UdpSegmentation]
                .into_iter()
                .flat_map(|feature| [(feature, Switch::On), (feature, Switch::Off)])
                .find(|(feature, to)| note == note_name(*feature, *to));
            if let Some((feature, to)) = known {
                changes.push((unescape(&device), feature, to));
            }
        }
    }
    changes
}

fn note_name(feature: Feature, to: Switch) -> String {
    format!("{}_{}", feature.name(), to.word())
}

fn escape(device: &str) -> String {
    device.replace('.', ":")
}

fn unescape(folder: &str) -> String {
    folder.replace(':', ".")
}

/// Names in a folder; none when there is no such folder.
fn names_in(folder: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

fn remove_tree(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        } else {
            ignore_missing(fs::remove_file(entry.path()))?;
        }
    }
    fs::remove_dir(folder)
}

/// Detached at once where it is a link; then the file goes.
pub(super) fn drop_link(path: &Path) -> io::Result<()> {
    if let Err(e) = inspect::detach(path) {
        tracing::debug!("detaching {}: {e}; the kernel does so when its file is removed", path.display());
    }
    ignore_missing(fs::remove_file(path))
}

pub(super) fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // An ordinary folder serves for everything but pinning itself.
    fn folder() -> (tempfile::TempDir, PinFolder) {
        let root = tempfile::tempdir().unwrap();
        let pins = PinFolder::new(root.path(), "flannel0");
        fs::create_dir_all(&pins.current).unwrap();
        (root, pins)
    }

    #[test]
    fn what_was_changed_is_remembered_per_device_until_it_is_forgotten() {
        let (_root, pins) = folder();
        pins.note_changed("eth0.100", Feature::Gro, Switch::On).unwrap();
        pins.note_changed("eth0.100", Feature::UdpSegmentation, Switch::Off).unwrap();
        let mut changed = pins.changed();
        changed.sort_by_key(|(_, feature, _)| *feature);
        assert_eq!(
            changed,
            [
                ("eth0.100".to_owned(), Feature::Gro, Switch::On),
                ("eth0.100".to_owned(), Feature::UdpSegmentation, Switch::Off)
            ]
        );
        pins.forget_changed("eth0.100", Feature::Gro, Switch::On);
        pins.forget_changed("eth0.100", Feature::UdpSegmentation, Switch::Off);
        assert!(pins.changed().is_empty());
        assert!(!pins.current.join(CHANGED).exists());
    }

    #[test]
    fn links_of_another_layout_version_move_in_and_its_maps_go() {
        let (_root, pins) = folder();
        let old = pins.device.join("v0");
        fs::create_dir_all(&old).unwrap();
        fs::write(old.join("link_xdp"), "old").unwrap();
        fs::write(old.join("peers"), "old").unwrap();
        assert!(pins.is_in_use());
        for other in pins.other_versions() {
            assert_eq!(other, old);
        }
        // prepare() itself wants a bpffs; this is its part that does not.
        fs::rename(old.join("link_xdp"), pins.link(LinkPin::Xdp)).unwrap();
        remove_tree(&old).unwrap();
        assert!(pins.is_in_use());
        assert!(pins.other_versions().is_empty());
    }

    #[test]
    fn removing_leaves_nothing_and_does_not_mind_when_nothing_is_there() {
        let (root, pins) = folder();
        fs::write(pins.link(LinkPin::Encap), "").unwrap();
        fs::write(pins.map("peers"), "").unwrap();
        pins.note_xdp_disproved(7).unwrap();
        assert!(pins.is_xdp_disproved(7) && !pins.is_xdp_disproved(8));
        pins.remove_all().unwrap();
        assert_eq!(names_in(root.path()), Vec::<String>::new());
        pins.remove_all().unwrap();
    }
}
