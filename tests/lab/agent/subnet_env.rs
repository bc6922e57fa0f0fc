//! The file that container runtimes read (contract §6).

use std::{fs, net::Ipv4Addr, path::Path};

use anyhow::{Context as _, Result};

/// `subnet.env`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubnetEnv {
    /// `FLANNEL_NETWORK`
    pub network: String,
    /// First address of `FLANNEL_SUBNET`: the bridge's.
    pub gateway: Ipv4Addr,
    /// Its prefix length.
    pub prefix: u8,
    /// `FLANNEL_MTU`
    pub mtu: u32,
    /// `FLANNEL_IPMASQ`
    pub ip_masq: bool,
}

impl SubnetEnv {
    /// Reads the file.
    ///
    /// # Errors
    /// Missing file or key, or a value of another form.
    pub fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        let value = |key: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
                .with_context(|| format!("{} has no {key}:\n{text}", path.display()))
        };
        let subnet = value("FLANNEL_SUBNET")?;
        let (gateway, prefix) = subnet.split_once('/').with_context(|| format!("FLANNEL_SUBNET={subnet}"))?;
        Ok(Self {
            network: value("FLANNEL_NETWORK")?.to_owned(),
            gateway: gateway.parse().with_context(|| format!("FLANNEL_SUBNET={subnet}"))?,
            prefix: prefix.parse().with_context(|| format!("FLANNEL_SUBNET={subnet}"))?,
            mtu: value("FLANNEL_MTU")?.parse().context("FLANNEL_MTU")?,
            ip_masq: value("FLANNEL_IPMASQ")?.parse().context("FLANNEL_IPMASQ")?,
        })
    }

    /// Base address of the subnet.
    pub fn base(&self) -> Ipv4Addr {
        let host_bits = u32::MAX.checked_shr(u32::from(self.prefix)).unwrap_or(0);
        Ipv4Addr::from(u32::from(self.gateway) & !host_bits)
    }

    /// Key of the lease in the store: `10.244.7.0-24`.
    pub fn key(&self) -> String {
        format!("{}-{}", self.base(), self.prefix)
    }
}
