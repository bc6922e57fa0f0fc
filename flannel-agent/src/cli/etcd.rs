//! Leases in etcd: the flags that say how to reach it, of the daemon and of the commands that work on leases.

use std::path::PathBuf;

use clap::Args;

use super::settings::{ClientCertificate, Resolver, Secret, SettingsError};
use crate::domain::etcd::{Endpoint, EtcdApi};
use crate::domain::wording::quoted;

#[derive(Args)]
#[command(next_help_heading = "Leases in etcd")]
pub(super) struct EtcdFlags {
    /// Endpoints, separated by commas and without spaces; any that answers will do
    #[arg(long, value_name = "URLS", default_value = "http://127.0.0.1:4001,http://127.0.0.1:2379")]
    pub(super) etcd_endpoints: String,
    /// Where the network's keys are
    #[arg(long, value_name = "KEY", default_value = "/coreos.com/network")]
    pub(super) etcd_prefix: String,
    /// Certificate authority that signed etcd's certificate (PEM)
    #[arg(long, value_name = "FILE")]
    pub(super) etcd_cafile: Option<String>,
    /// This node's certificate for etcd (PEM); needs --etcd-keyfile
    #[arg(long, value_name = "FILE")]
    pub(super) etcd_certfile: Option<String>,
    /// The key of --etcd-certfile (PEM)
    #[arg(long, value_name = "FILE")]
    pub(super) etcd_keyfile: Option<String>,
    /// User to log in to etcd as
    #[arg(long, value_name = "NAME")]
    pub(super) etcd_username: Option<String>,
    /// Its password; better given as FLANNELD_ETCD_PASSWORD, which a process list does not show
    #[arg(long, value_name = "TEXT")]
    pub(super) etcd_password: Option<Secret>,
    /// Keyspace the leases are in: v3, or v2 as flanneld before 0.18 had it; auto takes v3 unless only v2 holds a network
    /// configuration
    #[arg(long, value_name = "auto|v2|v3", default_value = "auto")]
    pub(super) etcd_api: String,
}

/// How to reach etcd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdSettings {
    /// As given: with or without scheme, at least one. Each is an [`Endpoint`].
    pub endpoints: Vec<String>,
    /// As given: the store cleans it.
    pub prefix: String,
    pub ca_file: Option<PathBuf>,
    pub identity: Option<ClientCertificate>,
    pub login: Option<Login>,
    pub api: EtcdApi,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Login {
    pub username: String,
    pub password: Secret,
}

impl Resolver<'_> {
    pub(super) fn etcd(&mut self, flags: EtcdFlags) -> Result<EtcdSettings, SettingsError> {
        if flags.etcd_endpoints.contains('@') {
            // Not quoted: what stands before the @ may be a password.
            let name = self.name("etcd-endpoints");
            let text = format!("{name} names a user, who goes to -etcd-username and -etcd-password");
            return Err(SettingsError { text, code: 2 });
        }
        // Split verbatim, as flanneld does: a space would become part of the endpoint.
        let endpoints: Vec<String> = flags.etcd_endpoints.split(',').map(str::to_owned).collect();
        for endpoint in &endpoints {
            if let Err(reason) = Endpoint::parse(endpoint) {
                let expected = format!(
                    "{} {reason}; endpoints are such as https://10.0.0.1:2379, separated by commas only",
                    quoted(endpoint)
                );
                return Err(self.invalid("etcd-endpoints", &flags.etcd_endpoints, &expected));
            }
        }
        let path = |file: Option<String>| file.filter(|file| !file.is_empty()).map(PathBuf::from);
        let (cert, key) = (path(flags.etcd_certfile), path(flags.etcd_keyfile));
        let identity = self.certificate(cert, key, "etcd-certfile", "etcd-keyfile")?;
        let password = flags.etcd_password.unwrap_or_default();
        let login = match flags.etcd_username.filter(|username| !username.is_empty()) {
            Some(username) => Some(Login { username, password }),
            None => {
                if !password.expose().is_empty() {
                    let name = self.name("etcd-password");
                    self.warnings.push(format!("{name} has no effect without -etcd-username"));
                }
                None
            }
        };
        let api = match flags.etcd_api.as_str() {
            "auto" => EtcdApi::Auto,
            "v2" => EtcdApi::V2,
            "v3" => EtcdApi::V3,
            other => return Err(self.invalid("etcd-api", other, "must be auto, v2 or v3")),
        };
        Ok(EtcdSettings {
            endpoints,
            prefix: flags.etcd_prefix,
            ca_file: path(flags.etcd_cafile),
            identity,
            login,
            api,
        })
    }
}
