//! What the flags mean together: plain, checked data. Nothing here touches the system.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::etcd::EtcdSettings;
use super::flags::{Flags, IPTABLES_RESYNC, InterfaceFlags, LogFlags, NodeFlags, NotBuiltFlags};
use super::kube::{KubeFlags, KubeSettings, PodVariables};
use super::server::{
    EmbeddedSettings, NetworksSettings, RemoteSettings, SERVED_CONFIG_PATH, ServeSettings, Served,
};
use crate::domain::config::TUNNEL_MTUS;
use crate::domain::host_state::TunnelOptions;
use crate::domain::interface::{PublicAddresses, Selector};
use crate::domain::wording::quoted;

/// A lease lasts a day (contract §3.4); a margin of a day or more would renew without pause.
const MARGINS: std::ops::RangeInclusive<i64> = 1..=1439;

/// Longest path of a Unix socket: `sun_path` has 108 bytes, one of them for the end (unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// Everything the daemon was told.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    pub store: StoreSettings,
    /// Serve the leases to other nodes instead of joining a network.
    pub serve: Option<ServeSettings>,
    /// Join several networks instead of the one without a name.
    pub networks: Option<NetworksSettings>,
    /// In the order they are tried; empty means by `public`, else by the default route.
    pub selectors: Vec<Selector>,
    pub public: PublicAddresses,
    pub subnet_file: PathBuf,
    /// The lease is renewed this long before it ends.
    pub renew_margin: Duration,
    /// Where `/healthz` and `/readyz` are served, if at all.
    pub healthz: Option<SocketAddr>,
    /// Where `status` is answered, if at all.
    pub status_socket: Option<PathBuf>,
    pub tunnel: TunnelOptions,
    /// The tunnel's MTU, when it is not to follow the interface.
    pub tunnel_mtu: Option<u32>,
    /// Where the BPF file system is mounted.
    pub bpffs: PathBuf,
    pub verbosity: Verbosity,
    /// What an operator should be told.
    pub warnings: Vec<String>,
}

/// Where leases are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreSettings {
    Etcd(EtcdSettings),
    Kube(KubeSettings),
    /// At a flannel server.
    Remote(RemoteSettings),
    /// In a file of this server.
    Embedded(EmbeddedSettings),
}

/// A certificate with its key, both PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientCertificate {
    pub cert_file: PathBuf,
    pub key_file: PathBuf,
}

/// Text that must not reach a log: flanneld printed its etcd password there (contract §14, T32).
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(String);

/// glog's level, as it is given with `-v`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Verbosity(pub u32);

/// Settings that can't be meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SettingsError {
    pub(super) text: String,
    pub(super) code: u8,
}

/// How each flag that was set was set, as the operator wrote it: `-ip-masq` or `FLANNELD_IP_MASQ`.
pub(super) type Origins = BTreeMap<String, String>;

impl Secret {
    /// The text itself.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<secret>")
    }
}

impl Verbosity {
    /// The least severe level that is logged.
    pub fn level(self) -> tracing::Level {
        match self.0 {
            0 => tracing::Level::INFO,
            1..=4 => tracing::Level::DEBUG,
            _ => tracing::Level::TRACE,
        }
    }
}

impl Settings {
    /// # Errors
    /// What the first flag that can't be meant is, and what would be right. All flags that are not built are named at
    /// once.
    pub(super) fn resolve(
        flags: Flags,
        origins: &Origins,
        pod: &PodVariables,
    ) -> Result<Self, SettingsError> {
        let mut resolver = Resolver { origins, warnings: Vec::new() };
        resolver.refuse_not_built(&flags.not_built)?;
        let margin = flags.node.subnet_lease_renew_margin;
        let etcd = resolver.etcd(flags.etcd)?;
        let served = resolver.server(flags.server)?;
        let networks = resolver.networks(flags.networks)?;
        let store = resolver.store(etcd, flags.kube, &served, pod)?;
        if let Some(networks) = &networks {
            let flag = if networks.allowed.is_empty() { "watch-networks" } else { "networks" };
            let why = match (&store, &served.serve) {
                (StoreSettings::Kube(_), _) => Some("-kube-subnet-mgr leases from one network".to_owned()),
                (_, Some(serve)) => {
                    Some(format!("-listen {} serves every network there is", quoted(&serve.listen)))
                }
                _ => None,
            };
            if let Some(why) = why {
                let text = format!("{why}, leave {} out", resolver.name(flag));
                return Err(SettingsError { text, code: 2 });
            }
        }
        resolver.name_idle(&store, served.serve.is_some(), networks.is_some());
        let (selectors, public) = resolver.interface(flags.interface)?;
        let verbosity = resolver.log(&flags.log)?;
        let NodeFlags { subnet_file, healthz_ip, healthz_port, status_socket, .. } = flags.node;
        let settings = Self {
            store,
            serve: served.serve,
            networks,
            selectors,
            public,
            subnet_file: resolver.file("subnet-file", subnet_file)?,
            renew_margin: resolver.margin(margin)?,
            healthz: resolver.healthz(&healthz_ip, healthz_port)?,
            status_socket: resolver.status_socket(status_socket)?,
            tunnel: TunnelOptions {
                datapath: flags.udp.udp_datapath,
                source_check: flags.udp.udp_source_check,
                source_port: flags.udp.udp_source_port,
            },
            tunnel_mtu: resolver.tunnel_mtu(flags.udp.udp_mtu)?,
            bpffs: resolver.absolute("bpffs-path", flags.udp.bpffs_path)?,
            verbosity,
            warnings: resolver.warnings,
        };
        Ok(settings)
    }
}

pub(super) struct Resolver<'a> {
    pub(super) origins: &'a Origins,
    pub(super) warnings: Vec<String>,
}

impl Resolver<'_> {
    /// The flag as the operator wrote it.
    pub(super) fn name(&self, flag: &str) -> String {
        self.origins.get(flag).cloned().unwrap_or_else(|| format!("-{flag}"))
    }

    pub(super) fn invalid(&self, flag: &str, value: &str, expected: &str) -> SettingsError {
        let text = format!("invalid value {} for {}: {expected}", quoted(value), self.name(flag));
        SettingsError { text, code: 2 }
    }

    /// Warns of what was set and has no effect where leases come from elsewhere, or where no network is joined.
    fn name_idle(&mut self, store: &StoreSettings, serves: bool, several: bool) {
        let elsewhere = match store {
            StoreSettings::Etcd(_) => None,
            StoreSettings::Kube(_) => Some("with -kube-subnet-mgr"),
            StoreSettings::Remote(_) => Some("with -remote"),
            StoreSettings::Embedded(_) => Some("with -store=embedded"),
        };
        let of_node = |flag: &str| {
            ["iface", "public-ip", "udp-"].iter().any(|prefix| flag.starts_with(prefix))
                || ["subnet-file", "subnet-lease-renew-margin", "status-socket", "bpffs-path"].contains(&flag)
        };
        for (flag, origin) in self.origins {
            let why = match flag.as_str() {
                flag if flag.starts_with("etcd-") => elsewhere,
                flag if of_node(flag) && serves => Some("with -listen: a server joins no network"),
                "subnet-file" if several => Some("with several networks: each has its file in -subnet-dir"),
                _ => None,
            };
            self.warnings.extend(why.map(|why| format!("{origin} has no effect {why}")));
        }
    }

    fn refuse_not_built(&self, flags: &NotBuiltFlags) -> Result<(), SettingsError> {
        let given = |value: &Option<String>| value.as_deref().is_some_and(|value| !value.is_empty());
        let asked: Vec<String> = [
            ("ip-masq", flags.ip_masq, "masquerading"),
            ("ip-masq-fully-random-disable", flags.ip_masq_fully_random_disable, "masquerading"),
            ("iptables-forward-rules", flags.iptables_forward_rules == Some(true), "forward rules"),
            ("iptables-resync", flags.iptables_resync != IPTABLES_RESYNC, "firewall rules"),
            ("ip-blackhole-route", flags.ip_blackhole_route, "the blackhole route"),
            ("vmodule", given(&flags.vmodule), "verbosity by source file"),
            ("log_backtrace_at", given(&flags.log_backtrace_at), "stack traces in the log"),
        ]
        .into_iter()
        .filter(|(_, asked, _)| *asked)
        .map(|(flag, _, feature)| {
            format!("{}: this version does not have {feature} yet; leave it out", self.name(flag))
        })
        .collect();
        if asked.is_empty() { Ok(()) } else { Err(SettingsError { text: asked.join("\n"), code: 2 }) }
    }

    /// A certificate with its key, or neither.
    pub(super) fn certificate(
        &self,
        cert: Option<PathBuf>,
        key: Option<PathBuf>,
        cert_flag: &str,
        key_flag: &str,
    ) -> Result<Option<ClientCertificate>, SettingsError> {
        let (given, missing) = match (cert, key) {
            (Some(cert_file), Some(key_file)) => return Ok(Some(ClientCertificate { cert_file, key_file })),
            (None, None) => return Ok(None),
            (Some(_), None) => (cert_flag, key_flag),
            (None, Some(_)) => (key_flag, cert_flag),
        };
        let given = self.name(given);
        let text = format!("{given} is given without -{missing}: a certificate needs its key");
        // As 0.7.0 ends; today's flanneld would talk to etcd without TLS.
        Err(SettingsError { text, code: 1 })
    }

    fn store(
        &mut self,
        etcd: EtcdSettings,
        kube: KubeFlags,
        served: &Served,
        pod: &PodVariables,
    ) -> Result<StoreSettings, SettingsError> {
        let net_config = kube.given_net_config();
        let is_embedded = served.embedded.is_some();
        if kube.kube_api_url.as_deref().is_some_and(|url| url.contains('@')) {
            // Not quoted: what stands before the @ may be a password.
            let name = self.name("kube-api-url");
            let text = format!("{name} names a user; credentials are read from -kubeconfig-file");
            return Err(SettingsError { text, code: 2 });
        }
        let kube = kube.resolve(pod).unwrap_or_else(|idle| {
            for flag in idle.into_iter().filter(|flag| !(is_embedded && *flag == "net-config-path")) {
                let name = self.name(flag);
                self.warnings.push(format!("{name} has no effect without -kube-subnet-mgr"));
            }
            None
        });
        if let Some(kube) = kube {
            let other = [("listen", served.serve.is_some()), ("remote", served.remote.is_some())];
            return match other.into_iter().find(|(_, set)| *set) {
                Some((flag, _)) => {
                    let (kube, other) = (self.name("kube-subnet-mgr"), self.name(flag));
                    let text =
                        format!("{kube} and {other}: leases come from Kubernetes or from a server, not both");
                    Err(SettingsError { text, code: 2 })
                }
                None => Ok(StoreSettings::Kube(kube)),
            };
        }
        Ok(match (&served.remote, &served.embedded) {
            (Some(remote), _) => StoreSettings::Remote(remote.clone()),
            (None, Some(path)) => {
                let net_config = net_config.unwrap_or_else(|| SERVED_CONFIG_PATH.into());
                StoreSettings::Embedded(EmbeddedSettings { path: path.clone(), net_config })
            }
            (None, None) => StoreSettings::Etcd(etcd),
        })
    }

    fn interface(&self, flags: InterfaceFlags) -> Result<(Vec<Selector>, PublicAddresses), SettingsError> {
        let mut selectors: Vec<Selector> = flags
            .iface
            .iter()
            .filter(|text| !text.is_empty())
            .map(|text| Selector::from_iface(text))
            .collect();
        let patterns = flags.iface_regex.into_iter().filter(|pattern| !pattern.as_str().is_empty());
        selectors.extend(patterns.map(Selector::Pattern));
        if let Some(text) = flags.iface_can_reach.filter(|text| !text.is_empty()) {
            let address = text.parse().map_err(|_| {
                self.invalid("iface-can-reach", &text, "must be an IP address, such as 10.0.0.1")
            })?;
            selectors.push(Selector::CanReach(address));
        }
        let public = PublicAddresses {
            v4: self.public_ip(flags.public_ip)?,
            v6: self.public_ipv6(flags.public_ipv6)?,
        };
        Ok((selectors, public))
    }

    fn public_ip(&self, text: Option<String>) -> Result<Option<Ipv4Addr>, SettingsError> {
        let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(None) };
        let expected = match text.parse::<IpAddr>() {
            Ok(IpAddr::V4(v4)) if v4.is_unspecified() || v4.is_multicast() || v4.is_broadcast() => {
                "must be an address other nodes can send to"
            }
            Ok(IpAddr::V4(v4)) => return Ok(Some(v4)),
            Ok(IpAddr::V6(_)) => "must be an IPv4 address; an IPv6 address goes to -public-ipv6",
            Err(_) => "must be an IPv4 address, such as 192.0.2.1",
        };
        Err(self.invalid("public-ip", &text, expected))
    }

    fn public_ipv6(&self, text: Option<String>) -> Result<Option<Ipv6Addr>, SettingsError> {
        let Some(text) = text.filter(|text| !text.is_empty()) else { return Ok(None) };
        let expected = match text.parse::<IpAddr>() {
            Ok(IpAddr::V6(v6)) if v6.is_unspecified() || v6.is_multicast() => {
                "must be an address other nodes can send to"
            }
            Ok(IpAddr::V6(v6)) => return Ok(Some(v6)),
            Ok(IpAddr::V4(_)) => "must be an IPv6 address; an IPv4 address goes to -public-ip",
            Err(_) => "must be an IPv6 address, such as 2001:db8::1",
        };
        Err(self.invalid("public-ipv6", &text, expected))
    }

    fn margin(&self, minutes: i64) -> Result<Duration, SettingsError> {
        match u64::try_from(minutes) {
            Ok(count) if MARGINS.contains(&minutes) => Ok(Duration::from_secs(count * 60)),
            // The one range flanneld checks itself, after parsing.
            _ => Err(SettingsError {
                code: 1,
                ..self.invalid(
                    "subnet-lease-renew-margin",
                    &minutes.to_string(),
                    "must be from 1 to 1439 minutes: a lease lasts 1440",
                )
            }),
        }
    }

    fn healthz(&self, ip: &str, port: i64) -> Result<Option<SocketAddr>, SettingsError> {
        let ip = if ip.is_empty() { "0.0.0.0" } else { ip };
        let ip: IpAddr = ip.parse().map_err(|_| {
            self.invalid("healthz-ip", ip, "must be an IP address of this host, or 0.0.0.0 for all")
        })?;
        if port <= 0 {
            return Ok(None);
        }
        match u16::try_from(port) {
            Ok(port) => Ok(Some(SocketAddr::new(ip, port))),
            Err(_) => {
                Err(self.invalid("healthz-port", &port.to_string(), "must be from 1 to 65535, or 0 for off"))
            }
        }
    }

    fn tunnel_mtu(&self, bytes: i64) -> Result<Option<u32>, SettingsError> {
        if bytes == 0 {
            return Ok(None);
        }
        match u32::try_from(bytes) {
            Ok(mtu) if TUNNEL_MTUS.contains(&mtu) => Ok(Some(mtu)),
            _ => {
                let expected = "must be from 68 to 65507 bytes and 28 less than the interface's MTU at most, or 0 to \
                                follow the interface";
                Err(self.invalid("udp-mtu", &bytes.to_string(), expected))
            }
        }
    }

    fn file(&self, flag: &str, path: String) -> Result<PathBuf, SettingsError> {
        if path.is_empty() || path.ends_with('/') {
            return Err(self.invalid(flag, &path, "must name a file"));
        }
        Ok(PathBuf::from(path))
    }

    pub(super) fn absolute(&self, flag: &str, path: String) -> Result<PathBuf, SettingsError> {
        if !path.starts_with('/') {
            return Err(self.invalid(flag, &path, "must be a path from the root"));
        }
        Ok(PathBuf::from(path))
    }

    fn status_socket(&self, path: String) -> Result<Option<PathBuf>, SettingsError> {
        if path.is_empty() {
            return Ok(None);
        }
        if path.len() > MAX_SOCKET_PATH {
            let expected = format!("must be {MAX_SOCKET_PATH} bytes or less, the most the kernel takes");
            return Err(self.invalid("status-socket", &path, &expected));
        }
        self.absolute("status-socket", path).map(Some)
    }

    fn log(&mut self, flags: &LogFlags) -> Result<Verbosity, SettingsError> {
        if !flags.logtostderr {
            return Err(self.invalid("logtostderr", "false", "this version logs to standard error only"));
        }
        let severity = flags.stderrthreshold.to_uppercase();
        if !matches!(severity.as_str(), "INFO" | "WARNING" | "ERROR" | "FATAL" | "0" | "1" | "2" | "3") {
            let expected = "must be INFO, WARNING, ERROR or FATAL";
            return Err(self.invalid("stderrthreshold", &flags.stderrthreshold, expected));
        }
        if flags.log_dir.as_deref().is_some_and(|directory| !directory.is_empty()) {
            let name = self.name("log_dir");
            self.warnings.push(format!("{name} has no effect: the log goes to standard error"));
        }
        Ok(Verbosity(u32::try_from(flags.v).unwrap_or(0)))
    }
}
