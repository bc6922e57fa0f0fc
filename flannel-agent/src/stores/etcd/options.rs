//! What an operator says about etcd, checked before anything is sent.
//!
//! Nothing here reaches the network: etcd may be down when a node boots. What can be wrong without asking etcd, such
//! as a missing file or a key that belongs to another certificate, is an error at once that names the flag.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use etcd_client::{Certificate, Identity, TlsOptions};

use crate::domain::etcd::{Endpoint, EtcdApi, Scheme};
use crate::stores::http::ClientTls;
use crate::stores::pem::{self, PemError};

const CA_FILE: &str = "--etcd-cafile";
const CERT_FILE: &str = "--etcd-certfile";
const KEY_FILE: &str = "--etcd-keyfile";

/// The `--etcd-*` flags. Empty texts and paths mean "not given".
#[derive(Clone)]
pub struct EtcdOptions {
    /// `http://host:port` or `https://host:port`; without a scheme the presence of TLS files decides.
    pub endpoints: Vec<String>,
    /// Folder of the network in etcd, cleaned as Go's `path.Join` does.
    pub prefix: String,
    /// Client certificate and key, PEM: both or neither.
    pub cert_file: Option<PathBuf>,
    pub key_file: Option<PathBuf>,
    /// Certificate authorities that may vouch for the server, PEM; the system's when not given.
    pub ca_file: Option<PathBuf>,
    /// User of etcd's own authentication: both or neither.
    pub username: Option<String>,
    pub password: Option<String>,
    /// Which keyspace.
    pub api: EtcdApi,
    /// How often a running watch is compared with a fresh list, give or take a fifth.
    pub resync: Duration,
}

impl Default for EtcdOptions {
    /// flanneld's defaults (contract §1.3); a full compare every five minutes.
    fn default() -> Self {
        Self {
            endpoints: vec!["http://127.0.0.1:4001".into(), "http://127.0.0.1:2379".into()],
            prefix: "/coreos.com/network".into(),
            cert_file: None,
            key_file: None,
            ca_file: None,
            username: None,
            password: None,
            api: EtcdApi::default(),
            resync: Duration::from_secs(300),
        }
    }
}

/// Options end up in logs; the password does not.
impl fmt::Debug for EtcdOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EtcdOptions")
            .field("endpoints", &self.endpoints.iter().map(|text| without_user(text)).collect::<Vec<_>>())
            .field("prefix", &self.prefix)
            .field("cert_file", &self.cert_file)
            .field("key_file", &self.key_file)
            .field("ca_file", &self.ca_file)
            .field("username", &self.username)
            .field("password", &self.password.as_ref().map(|_| "(hidden)"))
            .field("api", &self.api)
            .field("resync", &self.resync)
            .finish()
    }
}

/// A flag that can't be right.
#[derive(Debug, thiserror::Error)]
pub enum EtcdOptionsError {
    #[error("--etcd-endpoints names no endpoint; write it like http://10.0.0.1:2379")]
    NoEndpoint,
    #[error("--etcd-endpoints: {endpoint:?} {reason}; write it like http://10.0.0.1:2379")]
    Endpoint { endpoint: String, reason: &'static str },
    #[error("{given} is given without {missing}: both or neither")]
    Incomplete { given: &'static str, missing: &'static str },
    #[error(transparent)]
    Pem(#[from] PemError),
    #[error("--etcd-cafile, --etcd-certfile: the TLS files can't be used: {0}")]
    Tls(String),
}

/// Options that passed every check.
#[derive(Clone)]
pub(super) struct Checked {
    pub(super) endpoints: Vec<Target>,
    /// The same TLS as the endpoints', for HTTP.
    pub(super) http_tls: ClientTls,
    pub(super) prefix: String,
    pub(super) user: Option<(String, String)>,
    pub(super) resync: Duration,
}

/// One server, and how to speak to it.
#[derive(Clone)]
pub(super) struct Target {
    pub(super) url: String,
    /// `None` is plain HTTP.
    pub(super) tls: Option<TlsOptions>,
    pub(super) has_client_cert: bool,
}

pub(super) fn check(options: &EtcdOptions) -> Result<Checked, EtcdOptionsError> {
    let cert = given(&options.cert_file);
    let key = given(&options.key_file);
    let ca = given(&options.ca_file);
    let identity = match (cert, key) {
        (Some(cert), Some(key)) => Some(pem::identity(CERT_FILE, cert, KEY_FILE, key)?),
        (None, None) => None,
        (Some(_), None) => return Err(incomplete(CERT_FILE, KEY_FILE)),
        (None, Some(_)) => return Err(incomplete(KEY_FILE, CERT_FILE)),
    };
    let authorities = ca.map(|path| pem::authorities(CA_FILE, path)).transpose()?;
    let mut tls = TlsOptions::new();
    tls = match &authorities {
        Some(pem) => tls.ca_certificate(Certificate::from_pem(pem)),
        None => tls.with_native_roots(),
    };
    let has_client_cert = identity.is_some();
    let wants_tls = has_client_cert || ca.is_some();
    if let Some(identity) = &identity {
        tls = tls.identity(Identity::from_pem(&identity.cert, &identity.key));
    }
    let http_tls = ClientTls { authorities, identity };

    let mut endpoints = Vec::new();
    for text in options.endpoints.iter().filter(|text| !text.is_empty()) {
        let Endpoint { scheme, authority } = Endpoint::parse(text)
            .map_err(|reason| EtcdOptionsError::Endpoint { endpoint: without_user(text), reason })?;
        let secure = scheme.map_or(wants_tls, |scheme| scheme == Scheme::Https);
        if wants_tls && !secure {
            tracing::warn!(
                endpoint = %authority,
                "--etcd-endpoints says http, so the TLS files are not used and the connection is not protected"
            );
        }
        let endpoint = match secure {
            true => Target { url: format!("https://{authority}"), tls: Some(tls.clone()), has_client_cert },
            false => Target { url: format!("http://{authority}"), tls: None, has_client_cert: false },
        };
        endpoints.push(endpoint);
    }
    if endpoints.is_empty() {
        return Err(EtcdOptionsError::NoEndpoint);
    }

    let text = |value: &Option<String>| value.clone().filter(|text| !text.is_empty());
    let user = match (text(&options.username), text(&options.password)) {
        (Some(user), Some(password)) => Some((user, password)),
        (None, None) => None,
        (Some(_), None) => return Err(incomplete("--etcd-username", "--etcd-password")),
        (None, Some(_)) => return Err(incomplete("--etcd-password", "--etcd-username")),
    };
    Ok(Checked { endpoints, http_tls, prefix: clean(&options.prefix), user, resync: options.resync })
}

fn given(path: &Option<PathBuf>) -> Option<&Path> {
    path.as_deref().filter(|path| !path.as_os_str().is_empty())
}

fn incomplete(given: &'static str, missing: &'static str) -> EtcdOptionsError {
    EtcdOptionsError::Incomplete { given, missing }
}

fn without_user(endpoint: &str) -> String {
    match endpoint.rsplit_once('@') {
        Some((before, host)) => match before.split_once("://") {
            Some((scheme, _)) => format!("{scheme}://(hidden)@{host}"),
            None => format!("(hidden)@{host}"),
        },
        None => endpoint.to_owned(),
    }
}

/// Go's `path.Clean` without its special case for the empty path: keys are `<prefix>/config`, and `path.Join` drops
/// an empty prefix.
fn clean(prefix: &str) -> String {
    let rooted = prefix.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in prefix.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|last| *last != "..") => {
                parts.pop();
            }
            ".." if rooted => {}
            _ => parts.push(part),
        }
    }
    let joined = parts.join("/");
    match rooted {
        true => format!("/{joined}"),
        false => joined,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_endpoints(endpoints: &[&str]) -> EtcdOptions {
        EtcdOptions {
            endpoints: endpoints.iter().map(|text| (*text).into()).collect(),
            ..EtcdOptions::default()
        }
    }

    fn error(options: &EtcdOptions) -> String {
        check(options).err().unwrap().to_string()
    }

    #[test]
    fn prefixes_are_cleaned_as_go_joins_paths() {
        for (prefix, wanted) in [
            ("/coreos.com/network", "/coreos.com/network"),
            ("/coreos.com/network/", "/coreos.com/network"),
            ("//coreos.com///network//", "/coreos.com/network"),
            ("coreos.com/network", "coreos.com/network"),
            ("/a/./b/../c", "/a/c"),
            ("/../a", "/a"),
            ("../a", "../a"),
            ("/", "/"),
            ("", ""),
        ] {
            assert_eq!(clean(prefix), wanted, "{prefix}");
        }
    }

    #[test]
    fn endpoints_get_a_scheme_and_lose_the_slash() {
        let urls = |options: &EtcdOptions| -> Vec<String> {
            check(options).ok().unwrap().endpoints.into_iter().map(|endpoint| endpoint.url).collect()
        };
        let list =
            ["http://10.0.0.1:2379/", "HTTPS://etcd-1.example:443", "10.0.0.2:2379", "http://[fd00::1]:2379"];
        assert_eq!(
            urls(&with_endpoints(&list)),
            [
                "http://10.0.0.1:2379",
                "https://etcd-1.example:443",
                "http://10.0.0.2:2379",
                "http://[fd00::1]:2379"
            ]
        );
    }

    #[test]
    fn a_bad_endpoint_is_named_with_the_reason() {
        for (endpoint, reason) in [
            ("unix:///run/etcd", "is neither http nor https"),
            ("http://10.0.0.1", "has no port from 1 to 65535"),
            ("http://10.0.0.1:2379/v3", "has a path"),
        ] {
            let text = error(&with_endpoints(&[endpoint]));
            assert!(text.starts_with("--etcd-endpoints: "), "{text}");
            assert!(text.contains(&format!("{endpoint:?}")) && text.contains(reason), "{text}");
        }
        assert!(error(&with_endpoints(&["", ""])).contains("names no endpoint"));
    }

    #[test]
    fn a_password_is_never_printed() {
        let options = EtcdOptions {
            endpoints: vec!["http://root:s3cret@10.0.0.1:2379".into()],
            username: Some("root".into()),
            password: Some("s3cret".into()),
            ..EtcdOptions::default()
        };
        assert!(!format!("{options:?}").contains("s3cret"));
        let text = error(&options);
        assert!(text.contains("(hidden)@10.0.0.1:2379") && !text.contains("s3cret"), "{text}");
    }

    #[test]
    fn half_a_pair_names_the_other_half() {
        let path = Some(PathBuf::from("/nonexistent/file.pem"));
        let base = EtcdOptions::default;
        for (options, wanted) in [
            (
                EtcdOptions { cert_file: path.clone(), ..base() },
                "--etcd-certfile is given without --etcd-keyfile",
            ),
            (
                EtcdOptions { key_file: path.clone(), ..base() },
                "--etcd-keyfile is given without --etcd-certfile",
            ),
            (
                EtcdOptions { username: Some("u".into()), ..base() },
                "--etcd-username is given without --etcd-password",
            ),
            (
                EtcdOptions { password: Some("p".into()), ..base() },
                "--etcd-password is given without --etcd-username",
            ),
            (
                EtcdOptions { ca_file: path.clone(), ..base() },
                "--etcd-cafile: can't read /nonexistent/file.pem",
            ),
        ] {
            let text = error(&options);
            assert!(text.contains(wanted), "{text}");
        }
        let empty = EtcdOptions { cert_file: Some("".into()), password: Some(String::new()), ..base() };
        assert!(check(&empty).is_ok(), "empty means not given");
    }

    #[test]
    fn a_file_that_is_no_certificate_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ca.pem");
        for (content, reason) in
            [("hello", "holds no certificate"), ("-----BEGIN CERTIFICATE-----\n!\n", "is not PEM")]
        {
            std::fs::write(&path, content).unwrap();
            let text = error(&EtcdOptions { ca_file: Some(path.clone()), ..EtcdOptions::default() });
            assert!(text.starts_with(&format!("--etcd-cafile: {} {reason}", path.display())), "{text}");
        }
    }
}
