//! What networks of one process must not share: address ranges, tunnel ports, names of devices.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ipnet::IpNet;

use crate::domain::config::{BackendConfig, NetworkConfig};

/// The claims of all networks, seen from one of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Claims {
    all: Arc<Mutex<Vec<Claim>>>,
    /// The network's name; empty without one.
    name: String,
}

#[derive(Clone, Debug)]
struct Claim {
    name: String,
    ranges: Vec<IpNet>,
    port: Option<u16>,
    device: Option<String>,
}

/// A claim, for as long as this lives.
#[derive(Debug)]
pub(super) struct Claimed {
    claims: Claims,
}

/// Another network of this node was there first.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClaimsError {
    #[error(
        "Network {range} overlaps {other} of network {owner}: on one node every network needs its own range"
    )]
    Range { range: IpNet, other: IpNet, owner: String },
    #[error("Backend.Port {port} is that of network {owner} too: on one node every udp network needs its own, such as {}", port.checked_add(1).unwrap_or(8286))]
    Port { port: u16, owner: String },
}

impl Claims {
    /// The same claims seen from the network `name`.
    pub(super) fn of_network(&self, name: &str) -> Self {
        Self { all: self.all.clone(), name: name.to_owned() }
    }

    /// # Errors
    /// Another network has some of it.
    pub(super) fn claim(&self, config: &NetworkConfig) -> Result<Claimed, ClaimsError> {
        let v4 = config.v4.map(|range| IpNet::from(range.network));
        let v6 = config.v6.map(|range| IpNet::from(range.network));
        let ranges: Vec<IpNet> = v4.into_iter().chain(v6).collect();
        let port = match config.backend {
            BackendConfig::Udp { port, .. } => Some(port),
            BackendConfig::HostGw | BackendConfig::Alloc => None,
        };
        let mut all = self.lock();
        all.retain(|claim| claim.name != self.name);
        for claim in all.iter() {
            let owner = claim.name.clone();
            let meet = |a: &IpNet, b: &IpNet| a.contains(b) || b.contains(a);
            let overlap = ranges.iter().find_map(|range| {
                claim.ranges.iter().find(|other| meet(range, other)).map(|other| (*range, *other))
            });
            if let Some((range, other)) = overlap {
                return Err(ClaimsError::Range { range, other, owner });
            }
            if let Some(port) = port.filter(|port| claim.port == Some(*port)) {
                return Err(ClaimsError::Port { port, owner });
            }
        }
        all.push(Claim { name: self.name.clone(), ranges, port, device: None });
        Ok(Claimed { claims: self.clone() })
    }

    /// One insert, remove or look at a time: usable after a panic elsewhere.
    fn lock(&self) -> MutexGuard<'_, Vec<Claim>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claimed {
    /// Claims the device that `choose` names when it is told the others' devices.
    pub(super) fn device(&mut self, choose: impl FnOnce(&[String]) -> String) -> String {
        let mut all = self.claims.lock();
        let others: Vec<String> = all
            .iter()
            .filter(|claim| claim.name != self.claims.name)
            .filter_map(|claim| claim.device.clone())
            .collect();
        let device = choose(&others);
        if let Some(own) = all.iter_mut().find(|claim| claim.name == self.claims.name) {
            own.device = Some(device.clone());
        }
        device
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        let name = &self.claims.name;
        self.claims.lock().retain(|claim| claim.name != *name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> NetworkConfig {
        NetworkConfig::parse(text).unwrap()
    }

    #[test]
    fn the_first_one_keeps_what_it_has_until_it_goes() {
        let claims = Claims::default();
        let (blue, red) = (claims.of_network("blue"), claims.of_network("red"));
        let mut first = blue.claim(&config(r#"{"Network":"10.1.0.0/16"}"#)).unwrap();
        assert_eq!(first.device(|_| "flannel0".into()), "flannel0");
        let error = red.claim(&config(r#"{"Network":"10.0.0.0/8","Backend":{"Type":"alloc"}}"#)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Network 10.0.0.0/8 overlaps 10.1.0.0/16 of network blue: on one node every network needs its own range"
        );
        let error = red.claim(&config(r#"{"Network":"10.2.0.0/16"}"#)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Backend.Port 8285 is that of network blue too: on one node every udp network needs its own, such as 8286"
        );
        let mut second =
            red.claim(&config(r#"{"Network":"10.2.0.0/16","Backend":{"Type":"udp","Port":8286}}"#)).unwrap();
        assert_eq!(second.device(|others| format!("not {others:?}")), r#"not ["flannel0"]"#);
        // Again, with another configuration.
        drop(first);
        blue.claim(&config(r#"{"Network":"10.3.0.0/16"}"#)).unwrap();
    }
}
