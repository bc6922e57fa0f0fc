//! A flannel server, from both sides: `--listen` and `--store` of the one who has the leases, `--remote` of those who ask
//! for them (contract §5); and several networks, which only that protocol and etcd know.

use std::collections::BTreeSet;
use std::path::PathBuf;

use clap::{ArgAction, Args};

use super::flags::SUBNET_DIR;
use super::go;
use super::settings::{ClientCertificate, Resolver, SettingsError};
use crate::domain::network_name::NetworkName;

/// Where the embedded store is, when `--store=embedded` names no file.
const EMBEDDED_PATH: &str = "/var/lib/flannel/leases.redb";

/// Where a server with an embedded store finds the network configuration, unless `--net-config-path` says.
pub(super) const SERVED_CONFIG_PATH: &str = "/etc/flannel/net-conf.json";

#[derive(Args)]
#[command(next_help_heading = "Leases from a flannel server, and being one")]
pub(super) struct ServerFlags {
    /// Serve leases to other nodes on this address, and join no network: 0.0.0.0:8888, or fd://3 for a socket of
    /// systemd's
    #[arg(long, value_name = "ADDRESS")]
    pub(super) listen: Option<String>,
    /// Lease from the flannel server at host:port; several, separated by commas: any that answers will do
    #[arg(long, value_name = "ADDRESSES")]
    pub(super) remote: Option<String>,
    /// Where a server keeps the leases: etcd, or embedded:FILE, a file of its own with the network configuration read
    /// from --net-config-path
    #[arg(long, value_name = "etcd|embedded[:FILE]", default_value = "etcd")]
    pub(super) store: String,
    /// Authority that signed the other side's certificate (PEM); a server with it serves only clients that have one
    #[arg(long, value_name = "FILE")]
    pub(super) remote_cafile: Option<String>,
    /// Certificate of the server with --listen, of the client with --remote (PEM)
    #[arg(long, value_name = "FILE")]
    pub(super) remote_certfile: Option<String>,
    /// The key of --remote-certfile (PEM)
    #[arg(long, value_name = "FILE")]
    pub(super) remote_keyfile: Option<String>,
}

#[derive(Args)]
#[command(next_help_heading = "Several networks")]
pub(super) struct NetworksFlags {
    /// Join these networks, by name and separated by commas, each below --etcd-prefix
    #[arg(long, value_name = "NAMES")]
    pub(super) networks: Option<String>,
    /// Join networks as they are made and leave them as they are deleted; all of them, or those of --networks
    #[arg(long, action = ArgAction::Set, default_value = "false", value_parser = go::boolean)]
    pub(super) watch_networks: bool,
    /// Directory for NAME.env of each network
    #[arg(long, value_name = "DIR", default_value = SUBNET_DIR)]
    pub(super) subnet_dir: String,
}

/// How to reach a flannel server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteSettings {
    /// As given: the store checks them.
    pub servers: Vec<String>,
    pub ca_file: Option<PathBuf>,
    pub identity: Option<ClientCertificate>,
}

/// How leases are served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServeSettings {
    /// As given: the server checks it.
    pub listen: String,
    pub identity: Option<ClientCertificate>,
    /// Clients must show a certificate that it signed.
    pub ca_file: Option<PathBuf>,
}

/// Leases in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EmbeddedSettings {
    pub path: PathBuf,
    /// A network configuration, or a folder with one per network.
    pub net_config: PathBuf,
}

/// Which networks are joined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworksSettings {
    /// Empty allows all.
    pub allowed: BTreeSet<NetworkName>,
    /// Follow what is made and deleted.
    pub watch: bool,
    pub subnet_dir: PathBuf,
}

/// What the flags about servers come to.
pub(super) struct Served {
    pub(super) serve: Option<ServeSettings>,
    pub(super) remote: Option<RemoteSettings>,
    pub(super) embedded: Option<PathBuf>,
}

fn given(value: Option<String>) -> Option<String> {
    value.filter(|text| !text.is_empty())
}

impl Resolver<'_> {
    pub(super) fn server(&mut self, flags: ServerFlags) -> Result<Served, SettingsError> {
        let (listen, remote) = (given(flags.listen), given(flags.remote));
        if listen.is_some() && remote.is_some() {
            let (listen, remote) = (self.name("listen"), self.name("remote"));
            let text = format!(
                "{listen} and {remote}: a server has its leases from a store, not from another server"
            );
            return Err(SettingsError { text, code: 1 });
        }
        if remote.as_deref().is_some_and(|servers| servers.contains('@')) {
            // Not quoted: what stands before the @ may be a password.
            let name = self.name("remote");
            let text = format!(
                "{name} names a user, which the protocol does not know; a client is known by -remote-certfile"
            );
            return Err(SettingsError { text, code: 2 });
        }
        let embedded = self.embedded(&flags.store, listen.is_some())?;
        let path = |file: Option<String>| given(file).map(PathBuf::from);
        let (cert, key) = (path(flags.remote_certfile), path(flags.remote_keyfile));
        let identity = self.certificate(cert, key, "remote-certfile", "remote-keyfile")?;
        let ca_file = path(flags.remote_cafile);
        if listen.is_none() && remote.is_none() {
            for (flag, set) in [("remote-certfile", identity.is_some()), ("remote-cafile", ca_file.is_some())]
            {
                if set {
                    let name = self.name(flag);
                    self.warnings.push(format!("{name} has no effect without -listen or -remote"));
                }
            }
        }
        if listen.is_some() && ca_file.is_some() && identity.is_none() {
            let name = self.name("remote-cafile");
            let text = format!(
                "{name} is given without -remote-certfile: clients are asked for certificates over TLS, which needs one here"
            );
            return Err(SettingsError { text, code: 2 });
        }
        let serve = listen.map(|listen| ServeSettings {
            listen,
            identity: identity.clone(),
            ca_file: ca_file.clone(),
        });
        let servers = |text: String| text.split(',').map(str::to_owned).collect();
        let remote = remote.map(|text| RemoteSettings { servers: servers(text), ca_file, identity });
        Ok(Served { serve, remote, embedded })
    }

    fn embedded(&self, store: &str, listens: bool) -> Result<Option<PathBuf>, SettingsError> {
        let expected = "must be etcd, embedded, or embedded:/path/of/a/file";
        let path = match store.split_once(':').unwrap_or((store, "")) {
            ("etcd", "") => return Ok(None),
            ("embedded", "") => EMBEDDED_PATH,
            ("embedded", path) if path.starts_with('/') && !path.ends_with('/') => path,
            _ => return Err(self.invalid("store", store, expected)),
        };
        if !listens {
            let expected =
                "needs -listen: the file is one server's, and nodes lease from that server with -remote";
            return Err(self.invalid("store", store, expected));
        }
        Ok(Some(path.into()))
    }

    pub(super) fn networks(
        &mut self,
        flags: NetworksFlags,
    ) -> Result<Option<NetworksSettings>, SettingsError> {
        let names = given(flags.networks);
        if names.is_none() && !flags.watch_networks {
            if flags.subnet_dir != SUBNET_DIR {
                let name = self.name("subnet-dir");
                self.warnings.push(format!("{name} has no effect without -networks or -watch-networks"));
            }
            return Ok(None);
        }
        let text = names.unwrap_or_default();
        let allowed = text
            .split(',')
            .filter(|name| !name.is_empty())
            .map(|name| name.parse().map_err(|error| self.invalid("networks", &text, &format!("{error}"))))
            .collect::<Result<BTreeSet<_>, _>>()?;
        if allowed.is_empty() && !flags.watch_networks {
            return Err(self.invalid("networks", &text, "names no network; names are such as blue,red"));
        }
        let subnet_dir = self.absolute("subnet-dir", flags.subnet_dir)?;
        Ok(Some(NetworksSettings { allowed, watch: flags.watch_networks, subnet_dir }))
    }
}
