//! `cargo xtask setup --kube`: a real kube-apiserver for the tests.
//!
//! No package of Debian carries it, but the source package `kubernetes` of Debian 12 (upstream 1.20.2, dependencies
//! vendored) and Debian's Go build it without anything else from outside. That takes minutes, so the binary is kept in
//! the user's cache folder, as bpf-linker is.
//!
//! Two things are not in the source package and are made here, as upstream's build makes them: the OpenAPI definitions
//! (their list of exceptions is compared with upstream's, so that what is generated is what upstream generates), and a
//! `reflect2` that works with today's Go: the vendored 1.0.1 panics at run time with Go 1.18 and later.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use super::{Package, Sign, cache_folder, package, packages, place, printed};
use crate::{
    progress::{Logged, Step},
    workspace,
};

/// Of the API server, and of Debian 12's source package.
const VERSION: &str = "1.20.2";

const PACKAGES: [Package; 6] = [
    package("golang-go", Sign::Program("go"), "builds kube-apiserver, the real API server of the tests"),
    package("dpkg-dev", Sign::Program("dpkg-source"), "apt-get source, for the API server's source"),
    package("xz-utils", Sign::Program("xz"), "unpacks source packages"),
    package("etcd-server", Sign::Program("etcd"), "the API server's store"),
    package("openssl", Sign::Program("openssl"), "makes the API server's service account key"),
    package("curl", Sign::Program("curl"), "tests talk to the API server"),
];

/// The server, where [`run`] puts it.
pub(crate) fn server_path() -> PathBuf {
    workspace().join("target/tools/bin/kube-apiserver")
}

/// From the workspace, else from the user's cache, else built into both (about five minutes on two cores).
///
/// # Errors
/// Another system than Debian 12 without a cached binary; a step of the build failed (its log is named).
pub(crate) fn run() -> Result<()> {
    let here = server_path();
    if starts(&here) {
        println!("setup: kube-apiserver {VERSION} is there");
        return Ok(());
    }
    let cached = cache_folder()
        .map(|folder| folder.join(format!("kube-apiserver-{VERSION}")))
        .unwrap_or_else(|| workspace().join("target/tools/cache"))
        .join("kube-apiserver");
    if starts(&cached) {
        let step = Step::begin("kube-apiserver");
        place(&cached, &here)?;
        step.done(&format!("from {}", cached.display()));
        return Ok(());
    }
    packages(&PACKAGES)?;
    let build = Build::begin()?;
    build.fetch()?;
    build.unpack()?;
    build.definitions()?;
    build.server(&here)?;
    ensure!(starts(&here), "{} was built but does not start", here.display());
    place(&here, &cached)?;
    // 700 MB that nothing needs any more.
    let _ = fs::remove_dir_all(&build.folder);
    Ok(())
}

fn starts(server: &Path) -> bool {
    server.is_file()
        && printed(Command::new(server).arg("--version")).is_ok_and(|version| version.contains(VERSION))
}

/// A build in `target/kube`.
struct Build {
    folder: PathBuf,
    downloads: PathBuf,
    /// Where a GOPATH has `k8s.io/kubernetes`.
    source: PathBuf,
}

impl Build {
    fn begin() -> Result<Self> {
        let folder = workspace().join("target/kube");
        let build = Self {
            downloads: folder.join("downloads"),
            source: folder.join("go/src/k8s.io/kubernetes"),
            folder,
        };
        if build.source.exists() {
            // Half a build is no start for another.
            fs::remove_dir_all(&build.source)
                .with_context(|| format!("remove {}", build.source.display()))?;
        }
        for folder in
            [&build.downloads, &build.source, &build.folder.join("bin"), &build.folder.join("lists/partial")]
        {
            fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        }
        Ok(build)
    }

    /// The source, and the newer reflect2, into `downloads`. apt gets lists of its own: the machine's stay as they are.
    fn fetch(&self) -> Result<()> {
        let step = Step::begin("kube-apiserver: source");
        let sources = self.folder.join("sources.list");
        fs::write(&sources, source_line()?).with_context(|| format!("write {}", sources.display()))?;
        let own_state = [
            format!("Dir::Etc::sourcelist={}", sources.display()),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            format!("Dir::State::lists={}", self.folder.join("lists").display()),
        ];
        let apt = |arguments: &[&str], own: bool| {
            let mut command = Command::new("apt-get");
            command.current_dir(&self.downloads).args(["-o", "APT::Sandbox::User=root"]);
            if own {
                command.args(own_state.iter().flat_map(|option| ["-o", option]));
            }
            command.args(arguments);
            Logged::run(&mut command, "setup-kube-apt", |line| step.note(line))?
                .require_success(&format!("`apt-get {}` failed", arguments.join(" ")))
        };
        apt(&["update"], true)?;
        apt(&["source", "--download-only", "kubernetes"], true)?;
        apt(&["download", "golang-github-modern-go-reflect2-dev"], false)?;
        step.done("Debian's source package");
        Ok(())
    }

    /// Upstream's tree, with the newer reflect2. Debian's patches touch nothing of the API server.
    fn unpack(&self) -> Result<()> {
        let step = Step::begin("kube-apiserver: unpacking");
        let archive = self.download("kubernetes_", ".orig.tar.gz")?;
        self.go_on(
            Command::new("tar")
                .arg("xf")
                .arg(&archive)
                .arg("--strip-components=1")
                .arg("-C")
                .arg(&self.source),
            &step,
        )?;
        let package = self.download("golang-github-modern-go-reflect2-dev_", ".deb")?;
        let newer = self.folder.join("reflect2");
        self.go_on(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&newer), &step)?;
        let from = newer.join("usr/share/gocode/src/github.com/modern-go/reflect2");
        let to = self.source.join("vendor/github.com/modern-go/reflect2");
        for old in sources_in(&to)? {
            fs::remove_file(&old).with_context(|| format!("remove {}", old.display()))?;
        }
        for new in sources_in(&from)? {
            let name = new.file_name().context("a file without a name")?;
            fs::copy(&new, to.join(name)).with_context(|| format!("copy {}", new.display()))?;
        }
        step.done("");
        Ok(())
    }

    /// `pkg/generated/openapi`, from the packages that are marked for it.
    fn definitions(&self) -> Result<()> {
        let step = Step::begin("kube-apiserver: definitions");
        let generator = self.folder.join("bin/openapi-gen");
        self.go_on(
            self.go()
                .arg("build")
                .arg("-o")
                .arg(&generator)
                .arg("./vendor/k8s.io/kube-openapi/cmd/openapi-gen"),
            &step,
        )?;
        let packages = self.marked_packages()?;
        let violations = self.folder.join("violations");
        self.go_on(
            self.go_tool(&generator)
                .args(["--logtostderr", "-i", &packages, "-p", "k8s.io/kubernetes/pkg/generated/openapi"])
                .args(["-O", "zz_generated.openapi"])
                .args(["-h", "vendor/k8s.io/code-generator/hack/boilerplate.go.txt", "-r"])
                .arg(&violations),
            &step,
        )?;
        let read = |path: &Path| fs::read_to_string(path).with_context(|| format!("read {}", path.display()));
        ensure!(
            read(&violations)? == read(&self.source.join("api/api-rules/violation_exceptions.list"))?,
            "the generated definitions are not upstream's: {} differs from api/api-rules/violation_exceptions.list",
            violations.display()
        );
        step.done("as upstream makes them");
        Ok(())
    }

    /// Packages with the mark `+k8s:openapi-gen=`, comma separated, in the order upstream's build has them.
    fn marked_packages(&self) -> Result<String> {
        let found = printed(Command::new("sh").arg("-c").current_dir(&self.source).arg(format!(
            "cd '{}' && grep -rl --include='*.go' '^// *+k8s:openapi-gen=' pkg cmd vendor/k8s.io/*/ \
             | grep -v -e /code-generator/ -e /sample- -e _test.go | xargs -n1 dirname | LC_ALL=C sort -u",
            self.source.display()
        )))?;
        let packages: Vec<String> =
            found.lines().map(|folder| format!("k8s.io/kubernetes/{folder}")).collect();
        ensure!(!packages.is_empty(), "no package in {} is marked for OpenAPI", self.source.display());
        Ok(packages.join(","))
    }

    fn server(&self, to: &Path) -> Result<()> {
        let step = Step::begin("kube-apiserver: building, once");
        let folder = to.parent().context("a file in no folder")?;
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
        let version = "k8s.io/kubernetes/vendor/k8s.io/component-base/version";
        let flags = format!(
            "-s -w -X {version}.gitMajor=1 -X {version}.gitMinor=20 -X {version}.gitVersion=v{VERSION}"
        );
        self.go_on(
            self.go()
                .args(["build", "-v", "-trimpath", "-tags", "providerless", "-ldflags", &flags, "-o"])
                .arg(to)
                .arg("./cmd/kube-apiserver"),
            &step,
        )?;
        step.done("the API server of the tests");
        Ok(())
    }

    fn go(&self) -> Command {
        self.go_tool(Path::new("go"))
    }

    /// A command in the source tree, with the modules of its `vendor` folder: module mode asks for updates that nothing
    /// here could fetch.
    fn go_tool(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .current_dir(&self.source)
            .env("GO111MODULE", "off")
            .env("GOPATH", self.folder.join("go"))
            .env("GOCACHE", self.folder.join("go-cache"))
            .env("GOFLAGS", "")
            .env("CGO_ENABLED", "0");
        command
    }

    fn go_on(&self, command: &mut Command, step: &Step) -> Result<()> {
        let name = command.get_program().to_string_lossy().into_owned();
        Logged::run(command, "setup-kube", |line| step.note(line))?
            .require_success(&format!("{name} failed while making kube-apiserver"))
    }

    fn download(&self, start: &str, end: &str) -> Result<PathBuf> {
        let read = || format!("read {}", self.downloads.display());
        for entry in fs::read_dir(&self.downloads).with_context(read)? {
            let entry = entry.with_context(read)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(start) && name.ends_with(end) {
                return Ok(entry.path());
            }
        }
        anyhow::bail!("apt-get brought no {start}*{end} into {}", self.downloads.display())
    }
}

/// Debian 12's source packages, from where this machine gets its own packages.
fn source_line() -> Result<String> {
    let targets = printed(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(CODENAME) $(COMPONENT)",
        "Created-By: Packages",
    ]))?;
    let uri = targets
        .lines()
        .find_map(|line| line.strip_suffix(" bookworm main"))
        .context("kube-apiserver is built from a source package of Debian 12 (bookworm, main), which this system's apt does not know")?;
    Ok(format!("deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {uri} bookworm main\n"))
}

/// Go and assembly files right in `folder`.
fn sources_in(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    let files = entries.flatten().map(|entry| entry.path());
    Ok(files.filter(|path| path.extension().is_some_and(|end| end == "go" || end == "s")).collect())
}
