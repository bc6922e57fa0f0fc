//! Which kernels are booted, and where Debian has them.
//!
//! Each suite that is asked has an apt state of its own under `target/vm/apt`, so that the machine's own suites and
//! lists stay as they are, and a suite that is gone spoils no other. What was fetched stays under `target/vm/NAME`
//! until `--update`.

use std::{
    cmp::Ordering,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};

use super::folder;
use crate::progress::{Logged, Step};

/// The meta package that names a suite's current kernel. The flavour for virtual machines has what the tests need and a
/// quarter of the modules.
const META: &str = "linux-image-cloud-amd64";
/// Says which release a folder holds. Another name for it makes everyone fetch anew: the modules kept are others now.
const NOTE: &str = "release-2";

/// What a kernel consists of: one package up to 6.12, an image and its modules after that.
const PARTS: [&str; 3] = ["linux-image-", "linux-binary-", "linux-modules-"];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A row of the kernel matrix.
pub(super) struct Kernel {
    /// As `--kernel` has it.
    pub(super) name: &'static str,
    /// What its version begins with.
    series: &'static str,
    from: From,
}

/// Which suites are asked for it.
enum From {
    /// The first that has the series; of several versions in it the newest.
    First(&'static [Suite]),
    /// The newest of all of them; one that can't be had is passed over.
    Newest(&'static [Suite]),
}

struct Suite {
    archive: Archive,
    name: &'static str,
}

#[derive(Clone, Copy)]
enum Archive {
    Main,
    Security,
}

const fn suite(archive: Archive, name: &'static str) -> Suite {
    Suite { archive, name }
}

/// Oldest first. 5.10 is the oldest the kernel tiers promise to run on: when the mirror
/// this machine uses has it no more, the row fails rather than becoming a newer kernel.
pub(super) const KERNELS: [Kernel; 4] = [
    Kernel {
        name: "5.10",
        series: "5.10.",
        from: From::First(&[suite(Archive::Security, "bullseye-security"), suite(Archive::Main, "bullseye")]),
    },
    Kernel {
        name: "6.1",
        series: "6.1.",
        from: From::First(&[suite(Archive::Security, "bookworm-security"), suite(Archive::Main, "bookworm")]),
    },
    Kernel {
        name: "6.12",
        series: "6.12.",
        from: From::First(&[suite(Archive::Security, "trixie-security"), suite(Archive::Main, "trixie")]),
    },
    Kernel {
        name: "newest",
        series: "",
        from: From::Newest(&[suite(Archive::Main, "trixie-backports"), suite(Archive::Main, "sid")]),
    },
];

/// A kernel on this machine.
pub(super) struct Fetched {
    /// `6.1.0-56-cloud-amd64`
    pub(super) release: String,
    pub(super) image: PathBuf,
    /// A cpio archive of its modules.
    pub(super) modules: PathBuf,
}

/// Whether what was fetched earlier will do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Cache {
    Use,
    Renew,
}

impl Kernel {
    /// The kernel from the cache, or from the first suite that has it.
    pub(super) fn fetch(&self, cache: Cache) -> Result<Fetched> {
        let folder = folder().join(self.name);
        if cache == Cache::Use
            && let Ok(release) = fs::read_to_string(folder.join(NOTE))
        {
            return Ok(fetched(&folder, release));
        }
        let step = Step::begin(&format!("kernel {}: fetch", self.name));
        let (apt, version) = self.find(&step)?;
        step.note(&version);
        let release = download(&apt, &version, &folder)
            .with_context(|| format!("fetch kernel {} (package {META} {version})", self.name))?;
        step.done(&format!("{version} from {}", apt.suite));
        Ok(fetched(&folder, release))
    }

    fn find(&self, step: &Step) -> Result<(Apt, String)> {
        let (From::First(suites) | From::Newest(suites)) = &self.from;
        let (mut best, mut misses): (Option<(Apt, String)>, Vec<String>) = (None, Vec::new());
        for suite in *suites {
            let found = Apt::open(suite, step).and_then(|apt| Ok((apt.newest(self.series)?, apt)));
            match found {
                Ok((version, apt)) => {
                    if best.as_ref().is_none_or(|(_, old)| is_newer(&version, old)) {
                        best = Some((apt, version));
                    }
                    if matches!(self.from, From::First(_)) {
                        break;
                    }
                }
                Err(e) => misses.push(format!("  {e:#}")),
            }
        }
        best.with_context(|| {
            format!(
                "kernel {} can't be had: asked for package {META} of version {}*\n{}",
                self.name,
                self.series,
                misses.join("\n")
            )
        })
    }
}

fn fetched(folder: &Path, release: String) -> Fetched {
    Fetched { release, image: folder.join("vmlinuz"), modules: folder.join("modules.cpio") }
}

/// apt with one suite and its own state.
struct Apt {
    suite: String,
    state: PathBuf,
}

impl Apt {
    fn open(suite: &Suite, step: &Step) -> Result<Self> {
        let site = suite.archive.site()?;
        let what = format!("{} of {site}", suite.name);
        step.note(&what);
        let label = format!("{}-{}", suite.archive.label(), suite.name);
        let state = folder().join("apt").join(label);
        fs::create_dir_all(state.join("lists/partial"))
            .and_then(|()| fs::create_dir_all(state.join("cache/archives/partial")))
            .with_context(|| format!("create {}", state.display()))?;
        let line = format!("deb [signed-by={KEYRING}] {site} {} main\n", suite.name);
        fs::write(state.join("sources.list"), line).context("write sources.list")?;
        let apt = Self { suite: what, state };
        let mut update = apt.command("apt-get");
        // Errors, not warnings, when a list can't be had.
        update.args(["-o", "APT::Update::Error-Mode=any", "update"]);
        apt.printed(&mut update)?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let at = |name: &str| self.state.join(name).display().to_string();
        for option in [
            format!("Dir::Etc::sourcelist={}", at("sources.list")),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            format!("Dir::State::lists={}", at("lists")),
            format!("Dir::Cache={}", at("cache")),
            "Acquire::Languages=none".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            "Acquire::Retries=2".to_owned(),
            "Acquire::http::Timeout=20".to_owned(),
            // A suite whose support has ended is signed no more.
            "Acquire::Check-Valid-Until=false".to_owned(),
            "APT::Sandbox::User=root".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command
    }

    fn printed(&self, command: &mut Command) -> Result<String> {
        let output = command.output().context("start apt")?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(
            output.status.success(),
            "suite {}: {}",
            self.suite,
            errors.lines().next().unwrap_or_default()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Version of the newest kernel whose version begins with `series`.
    fn newest(&self, series: &str) -> Result<String> {
        let text = self.printed(self.command("apt-cache").args(["madison", META]))?;
        let versions = text.lines().filter_map(|line| line.split('|').nth(1)).map(str::trim);
        let mut newest: Option<&str> = None;
        for version in versions.filter(|version| version.starts_with(series)) {
            if newest.is_none_or(|old| is_newer(version, old)) {
                newest = Some(version);
            }
        }
        newest.map(str::to_owned).with_context(|| format!("suite {} has no {META} {series}*", self.suite))
    }

    /// The packages that make up the kernel, as `NAME=VERSION`: what META depends on, and what that depends on.
    fn parts(&self, version: &str) -> Result<Vec<String>> {
        let mut parts = vec![format!("{META}={version}")];
        let mut looked = 0;
        while let Some(part) = parts.get(looked) {
            looked += 1;
            let text = self.printed(self.command("apt-cache").args(["show", part]))?;
            for dependency in dependencies(&text) {
                if !parts.contains(&dependency) {
                    parts.push(dependency);
                }
            }
        }
        Ok(parts)
    }
}

/// The exact dependencies among [`PARTS`] that `apt-cache show` tells.
fn dependencies(text: &str) -> impl Iterator<Item = String> {
    let line = text.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
    line.split(", ").filter_map(|dependency| {
        let (name, version) = dependency.split_once(" (= ")?;
        let is_part = PARTS.iter().any(|prefix| name.starts_with(prefix));
        is_part.then(|| format!("{name}={}", version.trim_end_matches(')')))
    })
}

/// `linux-image-cloud-amd64=…` is, `linux-image-6.1.0-56-cloud-amd64=…` is not.
fn is_meta(part: &str) -> bool {
    !PARTS
        .iter()
        .filter_map(|prefix| part.strip_prefix(prefix))
        .any(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

fn is_newer(version: &str, old: &str) -> bool {
    Command::new("dpkg")
        .args(["--compare-versions", version, "gt", old])
        .status()
        .map_or(version.cmp(old) == Ordering::Greater, |status| status.success())
}

impl Archive {
    const fn label(self) -> &'static str {
        match self {
            Self::Main => "debian",
            Self::Security => "debian-security",
        }
    }

    /// The mirror this machine gets its own packages from.
    fn site(self) -> Result<String> {
        let label = match self {
            Self::Main => "Debian",
            Self::Security => "Debian-Security",
        };
        let output = Command::new("apt-get")
            .args(["indextargets", "--format", "$(SITE)", "Created-By: Packages"])
            .arg(format!("Label: {label}"))
            .output()
            .context("start apt-get")?;
        let text = String::from_utf8_lossy(&output.stdout);
        text.lines().next().map(str::to_owned).with_context(|| {
            format!("the kernels are packages of {label}, which this system's apt does not use; add it to its sources")
        })
    }
}

/// The release and its image: in /boot, or since 7.x beside the modules.
fn image_in(root: &Path) -> Result<(String, PathBuf)> {
    let names = |folder: PathBuf| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok())
    };
    let boot = root.join("boot");
    let in_boot = names(boot.clone())
        .find_map(|name| Some((name.strip_prefix("vmlinuz-")?.to_owned(), boot.join(&name))));
    let modules = root.join("usr/lib/modules");
    let beside =
        || names(modules.clone()).map(|release| (release.clone(), modules.join(release).join("vmlinuz")));
    in_boot
        .or_else(|| beside().find(|(_, image)| image.is_file()))
        .context("the packages hold neither /boot/vmlinuz-* nor /usr/lib/modules/*/vmlinuz")
}

/// Downloads, unpacks and prunes; the release it is.
fn download(apt: &Apt, version: &str, folder: &Path) -> Result<String> {
    let _ = fs::remove_dir_all(folder);
    let (packages, root) = (folder.join("packages"), folder.join("root"));
    for path in [&packages, &root] {
        fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))?;
    }
    let mut download = apt.command("apt-get");
    // Packages that only name others are known already, and mirrors clear them away first.
    let parts = apt.parts(version)?;
    let parts = parts.iter().filter(|part| !is_meta(part));
    download.current_dir(&packages).arg("download").args(parts);
    run("vm-download", &mut download)?;
    for entry in fs::read_dir(&packages)? {
        run("vm-unpack", Command::new("dpkg-deb").arg("-x").arg(entry?.path()).arg(&root))?;
    }

    let (release, image) = image_in(&root)?;
    fs::rename(&image, folder.join("vmlinuz")).context("take the kernel")?;

    // The guest has one /usr, whatever the package's time had.
    let old = root.join("lib/modules");
    let all = if old.exists() { old } else { root.join("usr/lib/modules") };
    let tree = folder.join("fs/usr/lib/modules").join(&release);
    fs::create_dir_all(tree.parent().context("a folder")?)?;
    fs::rename(all.join(&release), &tree).with_context(|| format!("{} has no modules", all.display()))?;
    keep_only(&tree.join("kernel"), &["net", "drivers", "lib", "crypto", "arch"])?;
    keep_only(&tree.join("kernel/drivers"), &["net", "virtio"])?;
    run("vm-depmod", Command::new("depmod").arg("-b").arg(folder.join("fs/usr")).arg(&release))?;
    super::guest::pack(&folder.join("fs"), &folder.join("modules.cpio"))?;
    for path in [packages, root, folder.join("fs")] {
        fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
    }
    // Last: without it, nothing was fetched.
    fs::write(folder.join(NOTE), &release).context("note the release")?;
    Ok(release)
}

fn keep_only(folder: &Path, names: &[&str]) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let entry = entry?;
        if !names.iter().any(|name| entry.file_name() == *name) {
            let path = entry.path();
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.with_context(|| format!("remove {}", path.display()))?;
        }
    }
    Ok(())
}

fn run(name: &str, command: &mut Command) -> Result<()> {
    let program = command.get_program().to_string_lossy().into_owned();
    Logged::run(command, name, |_| {})?.require_success(&format!("{program} failed"))
}

/// The rows that `--kernel` names, all without.
pub(super) fn chosen(names: &[String]) -> Result<Vec<&'static Kernel>> {
    for name in names {
        if !KERNELS.iter().any(|kernel| kernel.name == name) {
            let known: Vec<_> = KERNELS.iter().map(|kernel| kernel.name).collect();
            bail!("--kernel {name:?} is none of {}", known.join(", "));
        }
    }
    Ok(KERNELS.iter().filter(|kernel| names.is_empty() || names.iter().any(|n| n == kernel.name)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_exact_dependencies_on_parts_of_the_kernel_are_followed() {
        let text = "Package: linux-image-7.3.4+deb13-cloud-amd64\nDepends: dracut | initramfs-tools (>= 0.120+deb8u2), \
                    linux-base-7.3.4+deb13-cloud-amd64 (= 7.3.4-1~bpo13+1), linux-binary-7.3.4+deb13-cloud-amd64 (= \
                    7.3.4-1~bpo13+1), linux-modules-7.3.4+deb13-cloud-amd64 (= 7.3.4-1~bpo13+1)\n";
        let found: Vec<_> = dependencies(text).collect();
        assert_eq!(
            found,
            [
                "linux-binary-7.3.4+deb13-cloud-amd64=7.3.4-1~bpo13+1",
                "linux-modules-7.3.4+deb13-cloud-amd64=7.3.4-1~bpo13+1"
            ]
        );
    }

    #[test]
    fn an_unknown_kernel_is_named_with_the_known_ones() {
        let error = chosen(&["4.19".to_owned()]).err().map(|e| e.to_string());
        assert_eq!(error.as_deref(), Some("--kernel \"4.19\" is none of 5.10, 6.1, 6.12, newest"));
        assert_eq!(chosen(&[]).map(|all| all.len()).ok(), Some(KERNELS.len()));
    }
}
