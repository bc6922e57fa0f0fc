//! What is in a guest and what runs there: the tables of this file. Another test binary, module or program is a line.
//!
//! The guest is nothing but an initramfs: the host's own programs with their libraries at their paths, busybox's applets
//! behind them in `PATH`, and an `/init` that runs one test binary after the other and powers off.

use std::{
    fs,
    fs::File,
    io,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use super::folder;

/// Tests of one binary that are run in the guest.
pub(super) struct Run {
    /// `[[test]]` of package flannel-tests.
    pub(super) binary: &'static str,
    /// Tests whose name begins with one of these; all where there is none.
    only: &'static [&'static str],
}

const fn all(binary: &'static str) -> Run {
    Run { binary, only: &[] }
}

/// In this order. Emulation is slow: what depends on the kernel, and on no time shorter than seconds.
pub(super) const RUNS: &[Run] = &[
    all("ebpf"),
    Run {
        binary: "tunnel",
        only: &[
            "a_new_agent_takes_over_without_losing_a_packet",
            "packets_flow_on_while_no_agent_runs",
            "another_layout_version_and_back_lose_nothing",
            "tiers_change_under_traffic_without_losing_a_packet",
        ],
    },
    all("kernels"),
];

/// Ethernet addresses of the guest's network cards, which the tests may take.
pub(super) const CARDS: [&str; 2] = ["02:00:00:00:f1:01", "02:00:00:00:f1:02"];

/// Loaded at start. Kinds of devices, matches and targets are loaded by the kernel when they are first used.
const MODULES: &[&str] = &["tun", "veth", "bridge", "vxlan", "sch_ingress", "cls_bpf", "cls_u32"];

/// Of the network cards. Built in, where a kernel has no such module; a test that finds no card says so.
const DRIVERS: &[&str] = &["virtio_pci", "virtio_net"];

/// Beside the test binaries and the agent.
const PROGRAMS: &[&str] = &[
    "sh",
    "busybox",
    "modprobe",
    "ip",
    "tc",
    "bridge",
    "ss",
    "ethtool",
    "iptables",
    "iptables-restore",
    "nft",
    "sysctl",
    "etcd",
    "etcdctl",
];

/// Copied as they are.
const FOLDERS: &[&str] = &["/usr/lib/x86_64-linux-gnu/xtables", "/etc/iproute2"];
const FILES: &[&str] = &["/etc/protocols", "/etc/services"];

/// The test binaries as cargo built them.
pub(super) struct Built {
    pub(super) agent: PathBuf,
    /// One of each [`Run`], in that order.
    pub(super) tests: Vec<PathBuf>,
}

/// What is asked of the guest beyond the tables.
#[derive(Default)]
pub(super) struct Wanted<'a> {
    /// Only this binary.
    pub(super) test: Option<&'a str>,
    /// Only tests whose name contains this.
    pub(super) filter: Option<&'a str>,
}

impl Wanted<'_> {
    pub(super) fn runs(&self) -> impl Iterator<Item = &'static Run> {
        RUNS.iter().filter(|run| self.test.is_none_or(|test| test == run.binary))
    }
}

/// Builds the archive that is the same under every kernel.
pub(super) fn build(built: &Built, wanted: &Wanted<'_>) -> Result<PathBuf> {
    let (root, archive) = (folder().join("guest"), folder().join("guest.cpio"));
    let _ = fs::remove_dir_all(&root);
    for path in [
        "usr/bin",
        "usr/sbin",
        "usr/lib",
        "usr/lib64",
        "etc",
        "proc",
        "sys",
        "dev",
        "run",
        "tmp",
        "var",
        "root",
    ] {
        fs::create_dir_all(root.join(path)).with_context(|| format!("create {path} of the guest"))?;
    }
    for (link, to) in [
        ("bin", "usr/bin"),
        ("sbin", "usr/sbin"),
        ("lib", "usr/lib"),
        ("lib64", "usr/lib64"),
        ("var/run", "/run"),
    ] {
        symlink(to, root.join(link)).with_context(|| format!("link {link} of the guest"))?;
    }
    for name in PROGRAMS {
        let path = crate::setup::on_path(name)
            .with_context(|| format!("{name} is not installed; `cargo xtask setup`"))?;
        put(&root, &path, &path)?;
    }
    // The kernel calls it when it needs a module.
    let modprobe = root.join("usr/sbin/modprobe");
    if !modprobe.exists() {
        symlink("../bin/modprobe", &modprobe).context("link modprobe")?;
    }
    for path in FOLDERS.iter().chain(FILES).map(Path::new).filter(|path| path.exists()) {
        copy_tree(path, &inside(&root, path)?)?;
    }
    // Where the tests look for it: next to their own folder.
    put(&root, &built.agent, Path::new("/tests/flannel-agent"))?;
    for (run, binary) in RUNS.iter().zip(&built.tests) {
        put(&root, binary, &Path::new("/tests/deps").join(run.binary))?;
    }
    let init = root.join("init");
    fs::write(&init, script(wanted)).context("write /init of the guest")?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755)).context("make /init executable")?;
    pack(&root, &archive)?;
    fs::remove_dir_all(&root).with_context(|| format!("remove {}", root.display()))?;
    Ok(archive)
}

/// `sh` is dash: busybox's shell would prefer its own applets to PATH, and those of `ip` and `tc` can't do half of it.
fn script(wanted: &Wanted<'_>) -> String {
    let mut text = format!(
        "#!/bin/sh\n\
         busybox=$(command -v busybox) && $busybox mkdir -p /bb && $busybox --install -s /bb\n\
         export PATH=/usr/sbin:/usr/bin:/bb HOME=/root FLANNEL_REQUIRE_ROOT=1 FLANNEL_TESTS_SLOWER=4 FLANNEL_TESTS_CARDS={cards}\n\
         mount -t proc proc /proc && mount -t sysfs sys /sys && mount -t devtmpfs dev /dev\n\
         mount -t tmpfs run /run; mount -t tmpfs tmp /tmp; mount -t bpf bpf /sys/fs/bpf\n\
         exec >/dev/ttyS0 2>&1 </dev/null\n\
         ip link set lo up\n",
        cards = CARDS.join(","),
    );
    text += &format!("modprobe -a {} || echo 'VM-FAILED modprobe'\n", MODULES.join(" "));
    text += &format!("for driver in {}; do modprobe -q $driver; done\n", DRIVERS.join(" "));
    text += "read -r up rest </proc/uptime; echo \"VM-UP $up\"\n";
    for run in wanted.runs() {
        let filter =
            wanted.filter.map(|filter| format!(" '{}'", filter.replace('\'', ""))).unwrap_or_default();
        let only = if wanted.filter.is_some() { String::new() } else { run.only.join(",") };
        text += &format!(
            "echo 'VM-RUN {0}'; FLANNEL_ONLY='{only}' /tests/deps/{0} --color never{filter}; echo \"VM-RC {0} $?\"\n",
            run.binary
        );
    }
    text + "echo 'VM-END'; poweroff -f\n"
}

/// Copies a program without symbols, and the libraries it needs, to their places.
fn put(root: &Path, from: &Path, to: &Path) -> Result<()> {
    let target = inside(root, to)?;
    strip(from, &target)?;
    let output = Command::new("ldd").arg(from).output().context("start ldd")?;
    for word in
        String::from_utf8_lossy(&output.stdout).split_whitespace().filter(|word| word.starts_with('/'))
    {
        let library = Path::new(word);
        let target = inside(root, library)?;
        if !target.exists() {
            fs::copy(library, &target).with_context(|| format!("copy {word}"))?;
        }
    }
    Ok(())
}

/// Debug information is most of a test binary, and every byte is copied by an emulated CPU.
fn strip(from: &Path, to: &Path) -> Result<()> {
    let stripped = Command::new("strip").arg("-o").arg(to).arg(from).stderr(Stdio::null()).status();
    if !stripped.is_ok_and(|status| status.success()) {
        fs::copy(from, to).with_context(|| format!("copy {}", from.display()))?;
    }
    Ok(())
}

/// The path in the guest, whose `/bin`, `/sbin` and `/lib` are links into `/usr`; its folder exists.
fn inside(root: &Path, path: &Path) -> Result<PathBuf> {
    let target = root.join(path.strip_prefix("/").unwrap_or(path));
    let folder = target.parent().context("a file in no folder")?;
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    Ok(target)
}

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    if from.is_dir() {
        fs::create_dir_all(to).with_context(|| format!("create {}", to.display()))?;
        for entry in fs::read_dir(from).with_context(|| format!("read {}", from.display()))? {
            let entry = entry?;
            copy_tree(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    fs::copy(from, to).map(drop).with_context(|| format!("copy {}", from.display()))
}

/// Packs a folder as the kernel unpacks it. Not compressed: an emulated CPU takes longer to unpack than to copy.
pub(super) fn pack(root: &Path, archive: &Path) -> Result<()> {
    let list =
        Command::new("find").arg(".").arg("-print0").current_dir(root).output().context("start find")?;
    ensure!(list.status.success(), "find in {} failed", root.display());
    let mut cpio = Command::new("cpio")
        .args(["--create", "--format=newc", "--quiet", "--null", "--owner=0:0"])
        .current_dir(root)
        .stdin(Stdio::piped())
        .stdout(File::create(archive).with_context(|| format!("create {}", archive.display()))?)
        .spawn()
        .context("start cpio")?;
    let mut input = cpio.stdin.take().context("cpio's input")?;
    io::Write::write_all(&mut input, &list.stdout).context("tell cpio what to pack")?;
    drop(input);
    ensure!(cpio.wait().context("wait for cpio")?.success(), "cpio could not pack {}", root.display());
    Ok(())
}
