//! `/run/flannel/subnet.env`: what container runtimes and CNI plugins read, and what a restarted agent remembers its
//! subnet by (contract §6).
//!
//! Readers source the file as a shell script at any moment, so it is replaced in one step and never half written. It
//! is never removed either: a host that reboots its agent keeps its network (contract §14, T50).

mod dotenv;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ipnet::{Ipv4Net, Ipv6Net};

use crate::domain::lease::Subnets;
use crate::domain::wording::quoted;

/// Mode of a new file, whatever the umask; of an existing one the mode is kept.
const FILE_MODE: u32 = 0o644;
const DIRECTORY_MODE: u32 = 0o755;

/// Bytes of an old file that are read; ours has about a hundred.
const MAX_READ: u64 = 64 * 1024;

/// The file's contents. `Display` is the exact text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubnetEnv {
    /// The whole overlay, per family.
    pub networks: Subnets,
    /// This node's lease; the file names its first host address.
    pub subnets: Subnets,
    /// MTU for pods in bytes.
    pub mtu: u32,
    /// Whether the agent masquerades; if not, a container runtime may do it itself.
    pub ip_masq: bool,
}

/// What an old file says. Nothing in it is trusted: the store and the configuration decide whether it still fits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PreviousSubnets {
    pub network: Option<Ipv4Net>,
    pub subnet: Option<Ipv4Net>,
    pub network_v6: Option<Ipv6Net>,
    pub subnet_v6: Option<Ipv6Net>,
    /// Why something that is there could not be used, for the log.
    pub ignored: Vec<String>,
}

/// The file could not be written.
#[derive(Debug, thiserror::Error)]
#[error("{doing} {}: {source}", path.display())]
pub struct SubnetEnvError {
    doing: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl SubnetEnv {
    /// Replaces the file at `path` in one step, durably; makes the directories above it as needed. A file that says the
    /// same already is left as it is.
    ///
    /// # Errors
    /// Says what was being done to which path. The old file is untouched then.
    pub fn write(&self, path: &Path) -> Result<(), SubnetEnvError> {
        let failed = |doing| move |source| SubnetEnvError { doing, path: path.to_path_buf(), source };
        let (Some(directory), Some(name)) = (directory(path), path.file_name()) else {
            return Err(failed("write")(io::Error::other("not the name of a file")));
        };
        DirBuilder::new()
            .recursive(true)
            .mode(DIRECTORY_MODE)
            .create(directory)
            .map_err(failed("create the directory of"))?;
        let mode = match fs::metadata(path) {
            Ok(old) if old.is_file() => {
                // After a restart it usually says the same, and making a file durable can take longer than the whole start.
                let text = self.to_string();
                if old.len() == text.len() as u64
                    && fs::read(path).is_ok_and(|bytes| bytes == text.as_bytes())
                {
                    return Ok(());
                }
                old.permissions().mode() & 0o7777
            }
            Ok(_) => return Err(failed("replace")(io::Error::other("it is there and not a regular file"))),
            Err(_) => FILE_MODE,
        };
        let mut prefix = std::ffi::OsString::from(".");
        prefix.push(name);
        let mut file = tempfile::Builder::new()
            .prefix(&prefix)
            .tempfile_in(directory)
            .map_err(failed("create a file next to"))?;
        file.as_file().set_permissions(Permissions::from_mode(mode)).map_err(failed("set the mode of"))?;
        file.write_all(self.to_string().as_bytes()).map_err(failed("write"))?;
        file.as_file().sync_all().map_err(failed("sync"))?;
        file.persist(path).map_err(|error| failed("replace")(error.error))?;
        // Without this the old name may come back after a power cut. Some file systems can't: then it may.
        let _ = File::open(directory).and_then(|directory| directory.sync_all());
        Ok(())
    }
}

impl fmt::Display for SubnetEnv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { networks, subnets, mtu, ip_masq } = self;
        if let (Some(network), Some(subnet)) = (networks.v4, subnets.v4) {
            let own = Ipv4Addr::from_bits(subnet.network().to_bits().saturating_add(1));
            writeln!(f, "FLANNEL_NETWORK={}", network.trunc())?;
            writeln!(f, "FLANNEL_SUBNET={own}/{}", subnet.prefix_len())?;
        }
        if let (Some(network), Some(subnet)) = (networks.v6, subnets.v6) {
            let own = Ipv6Addr::from_bits(subnet.network().to_bits().saturating_add(1));
            writeln!(f, "FLANNEL_IPV6_NETWORK={}", network.trunc())?;
            writeln!(f, "FLANNEL_IPV6_SUBNET={own}/{}", subnet.prefix_len())?;
        }
        writeln!(f, "FLANNEL_MTU={mtu}")?;
        writeln!(f, "FLANNEL_IPMASQ={ip_masq}")
    }
}

impl PreviousSubnets {
    /// Reads the file a former run left. A missing file is nothing; what can't be understood is nothing with a reason.
    pub fn read(path: &Path) -> Self {
        match read_text(path) {
            Ok(Some(text)) => Self::parse(&text),
            Ok(None) => Self::default(),
            Err(reason) => Self { ignored: vec![reason], ..Self::default() },
        }
        .located(path)
    }

    /// The subnets to ask for again.
    pub fn subnets(&self) -> Option<Subnets> {
        let subnets = Subnets { v4: self.subnet, v6: self.subnet_v6 };
        (subnets.v4.is_some() || subnets.v6.is_some()).then_some(subnets)
    }

    fn parse(text: &str) -> Self {
        let variables = match dotenv::parse(text) {
            Ok(variables) => variables,
            Err(reason) => return Self { ignored: vec![reason], ..Self::default() },
        };
        let mut ignored = Vec::new();
        let network = only_one::<Ipv4Net>(&variables, "FLANNEL_NETWORK", &mut ignored);
        let subnet = only_one::<Ipv4Net>(&variables, "FLANNEL_SUBNET", &mut ignored);
        let network_v6 = only_one::<Ipv6Net>(&variables, "FLANNEL_IPV6_NETWORK", &mut ignored);
        let subnet_v6 = only_one::<Ipv6Net>(&variables, "FLANNEL_IPV6_SUBNET", &mut ignored);
        Self {
            network: network.map(|net| net.trunc()),
            subnet: subnet.map(|net| net.trunc()),
            network_v6: network_v6.map(|net| net.trunc()),
            subnet_v6: subnet_v6.map(|net| net.trunc()),
            ignored,
        }
    }

    fn located(mut self, path: &Path) -> Self {
        for reason in &mut self.ignored {
            *reason = format!("{}: {reason}", path.display());
        }
        self
    }
}

fn directory(path: &Path) -> Option<&Path> {
    path.parent().map(|parent| if parent.as_os_str().is_empty() { Path::new(".") } else { parent })
}

/// `None` when there is no such file.
fn read_text(path: &Path) -> Result<Option<String>, String> {
    match fs::metadata(path) {
        Ok(found) if found.is_file() => {}
        // Opening a pipe would wait for a writer.
        Ok(_) => return Err("not a regular file".to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.to_string()),
    }
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_READ + 1).read_to_end(&mut bytes))
        .map_err(|error| error.to_string())?;
    if bytes.len() as u64 > MAX_READ {
        return Err(format!("longer than {MAX_READ} bytes"));
    }
    String::from_utf8(bytes).map(Some).map_err(|_| "not text in UTF-8".to_owned())
}

/// The one network a variable holds. Releases with several cluster networks wrote lists; invalid elements are
/// skipped, and of several valid ones none is the right one.
fn only_one<T: FromStr>(variables: &dotenv::Variables, name: &str, ignored: &mut Vec<String>) -> Option<T> {
    let value = variables.get(name).filter(|value| !value.is_empty())?;
    let mut valid = value.split(',').filter_map(|element| element.trim().parse().ok());
    match (valid.next(), valid.next()) {
        (Some(one), None) => Some(one),
        (None, _) => {
            ignored.push(format!("{name}={} is no network such as 10.5.68.1/24", quoted(value)));
            None
        }
        (Some(_), Some(_)) => {
            ignored.push(format!("{name}={} names several networks", quoted(value)));
            None
        }
    }
}
