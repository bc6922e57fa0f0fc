//! Everything of one store into another, byte for byte: configurations and leases, with what they have left to live.
//!
//! Nothing that is there is overwritten, so it can be run again: what is the same already is counted and left. What
//! differs is reported, and nothing else suffers.

use std::fmt;
use std::time::Duration;

use super::{Entry, RegistryError, RegistryNetworks, join};
use crate::domain::lease::Subnets;
use crate::domain::network_name::NetworkName;
use crate::domain::wording::quoted;
use crate::stores::{LEASE_TTL, StoreError};

/// An entry on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    /// Below the prefix: `config`, `blue/subnets/10.1.2.0-24`.
    pub key: String,
    pub value: String,
    /// `None` is for ever.
    pub left: Option<Duration>,
}

/// What became of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Received {
    New,
    /// The same is there already.
    Same,
    /// Something else is there, which stays.
    Other(String),
}

impl RegistryNetworks {
    /// Every configuration and every lease below the prefix; other people's keys are passed over.
    ///
    /// # Errors
    /// The store can't be reached.
    pub async fn contents(&self) -> Result<Vec<Content>, StoreError> {
        let folder = join(&self.prefix, "");
        let listing = self.registry.list(&folder).await.map_err(|error| self.failed(error))?;
        let mut contents = Vec::new();
        for entry in listing.entries {
            let Some(key) = entry.key.strip_prefix(&folder).filter(|key| is_ours(key)).map(str::to_owned)
            else {
                continue;
            };
            let Ok(value) = String::from_utf8(entry.value.clone()) else {
                tracing::warn!("{} is not text and is left behind", quoted(&entry.key));
                continue;
            };
            let left = self.left(&entry).await?;
            contents.push(Content { key, value, left });
        }
        Ok(contents)
    }

    async fn left(&self, entry: &Entry) -> Result<Option<Duration>, StoreError> {
        let left = self.registry.remaining(entry.lifetime).await.map_err(|error| self.failed(error))?;
        // No store takes less than a second, and a lease that ends now may be renewed in the next moment.
        Ok(left.map(|left| left.clamp(Duration::from_secs(1), LEASE_TTL)))
    }

    /// What would become of an entry here.
    ///
    /// # Errors
    /// The store can't be reached.
    pub async fn compare(&self, content: &Content) -> Result<Received, StoreError> {
        let key = join(&self.prefix, &content.key);
        let present = self.registry.get(&key).await.map_err(|error| self.failed(error))?;
        Ok(match present {
            None => Received::New,
            Some(entry) if entry.value == content.value.as_bytes() => Received::Same,
            Some(entry) => Received::Other(String::from_utf8_lossy(&entry.value).into_owned()),
        })
    }

    /// Takes an entry in, unless something is there.
    ///
    /// # Errors
    /// The store can't be reached.
    pub async fn receive(&self, content: &Content) -> Result<Received, StoreError> {
        let key = join(&self.prefix, &content.key);
        let created = self.registry.create(&key, content.value.clone(), content.left).await;
        match created.map_err(|error| self.failed(error))? {
            Some(_) => Ok(Received::New),
            None => self.compare(content).await,
        }
    }

    fn failed(&self, error: RegistryError) -> StoreError {
        let store = self.registry.name().to_owned();
        match error {
            RegistryError::Unreachable(reason) => StoreError::Unreachable { store, reason },
            RegistryError::Refused(reason) => StoreError::Refused { store, reason },
        }
    }
}

/// Configurations and leases, of the network without a name or of a named one.
pub(super) fn is_ours(key: &str) -> bool {
    let of_network = |rest: &str| {
        rest == "config" || rest.strip_prefix("subnets/").is_some_and(|last| last.parse::<Subnets>().is_ok())
    };
    of_network(key)
        || key
            .split_once('/')
            .is_some_and(|(name, rest)| name.parse::<NetworkName>().is_ok() && of_network(rest))
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.key, self.value)?;
        match self.left {
            Some(left) => write!(f, " ({} s left)", left.as_secs()),
            None if self.key.ends_with("config") => Ok(()),
            None => f.write_str(" (reserved)"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_peoples_keys_stay_where_they_are() {
        for ours in ["config", "subnets/10.1.2.0-24", "blue/config", "blue/subnets/10.1.2.0-24&fd00::-64"] {
            assert!(is_ours(ours), "{ours}");
        }
        for others in
            ["", "config/x", "subnets/", "subnets/x", "a/b/config", "subnets/10.1.2.0-24/x", ".x/config"]
        {
            assert!(!is_ours(others), "{others}");
        }
    }
}
