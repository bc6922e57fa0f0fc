//! The network configuration of a server that has its own store: read from files, and followed as they change.
//!
//! A file is the network without a name. Of a folder every `NAME.json` is the network of that name, and `_.json` the one
//! without. What can't be used is said once and changes nothing; a file that is deleted takes its network away, and its
//! leases stay for the case that it comes back.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::domain::config::{MAX_TEXT, NetworkConfig};
use crate::domain::network_name::NetworkName;
use crate::stores::embedded::Embedded;
use crate::stores::remote::wire::UNNAMED;

/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(1);

/// What was found, per network; as text or as the reason why it is of no use.
type Found = BTreeMap<Option<NetworkName>, Result<String, String>>;

/// Reads the files once.
pub(super) async fn read(path: &Path, store: &Embedded) {
    Follower::default().look(path, store).await;
}

/// Reads the files again and again until `stop`.
pub(super) async fn follow(path: PathBuf, store: Embedded, stop: CancellationToken) {
    let mut follower = Follower { seen: find(&path) };
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(LOOK) => follower.look(&path, &store).await,
        }
    }
}

#[derive(Default)]
struct Follower {
    seen: Found,
}

impl Follower {
    async fn look(&mut self, path: &Path, store: &Embedded) {
        let found = find(path);
        for (name, text) in &found {
            if self.seen.get(name) == Some(text) {
                continue;
            }
            let network = name.as_ref().map_or(UNNAMED, NetworkName::as_str);
            let written = match text {
                Ok(text) => {
                    store.configure(name.as_ref(), Some(text)).await.map_err(|error| error.to_string())
                }
                Err(reason) => Err(reason.clone()),
            };
            match written {
                Ok(()) => tracing::info!("network {network}: configured from {}", path.display()),
                Err(reason) => tracing::error!("network {network}: {reason}"),
            }
        }
        for name in self.seen.keys().filter(|name| !found.contains_key(name)) {
            let network = name.as_ref().map_or(UNNAMED, NetworkName::as_str);
            match store.configure(name.as_ref(), None).await {
                Ok(()) => tracing::warn!("network {network}: its file is gone, it is not served any more"),
                Err(error) => tracing::error!("network {network}: {error}"),
            }
        }
        self.seen = found;
    }
}

fn find(path: &Path) -> Found {
    if !path.is_dir() {
        // While it is replaced, or not there yet, the store has what it had.
        return if path.exists() { [(None, read_file(path))].into() } else { Found::new() };
    }
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) => {
            tracing::error!("--net-config-path: can't list {}: {error}", path.display());
            return Found::new();
        }
    };
    let files = entries.flatten().map(|entry| entry.path());
    files
        .filter(|file| file.extension().is_some_and(|extension| extension == "json"))
        .filter_map(|file| {
            let stem = file.file_stem()?.to_str()?;
            let name = match stem {
                UNNAMED => None,
                stem => match stem.parse() {
                    Ok(name) => Some(name),
                    Err(error) => {
                        tracing::debug!("{}: {error}", file.display());
                        return None;
                    }
                },
            };
            Some((name, read_file(&file)))
        })
        .collect()
}

fn read_file(path: &Path) -> Result<String, String> {
    let unread = |error: std::io::Error| format!("can't read {}: {error}", path.display());
    let facts = std::fs::metadata(path).map_err(unread)?;
    // Reading a FIFO would wait for who writes to it, and everything else with it.
    if !facts.is_file() {
        return Err(format!("{} is no file: it must hold a network configuration", path.display()));
    }
    if facts.len() > MAX_TEXT as u64 {
        return Err(format!("{} has {} bytes, at most {MAX_TEXT} are read", path.display(), facts.len()));
    }
    let text = std::fs::read_to_string(path).map_err(unread)?;
    NetworkConfig::parse_ranges(&text).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stores::{NetworkStores as _, StoreError};

    async fn config(store: &Embedded, name: Option<&str>) -> Option<String> {
        let name = name.map(|name| name.parse().unwrap());
        match store.networks().network(name.as_ref()).network_config().await {
            Ok(text) => Some(text),
            Err(StoreError::NoConfig { .. }) => None,
            Err(error) => panic!("{error}"),
        }
    }

    #[tokio::test]
    async fn a_folder_has_a_network_per_file() {
        let folder = tempfile::tempdir().unwrap();
        let store = Embedded::open(&folder.path().join("leases.redb")).unwrap();
        let files = folder.path().join("networks");
        std::fs::create_dir(&files).unwrap();
        let put = |name: &str, text: &str| std::fs::write(files.join(name), text).unwrap();
        put("_.json", r#"{"Network":"10.1.0.0/16"}"#);
        put("blue.json", "{\"Network\":\"10.2.0.0/16\"}\n");
        put("red.json", r#"{"Network":"10.3.0.0/99"}"#);
        put("notes.txt", "nothing");
        let mut follower = Follower::default();
        follower.look(&files, &store).await;
        assert_eq!(config(&store, None).await.as_deref(), Some(r#"{"Network":"10.1.0.0/16"}"#));
        assert_eq!(config(&store, Some("blue")).await.as_deref(), Some(r#"{"Network":"10.2.0.0/16"}"#));
        assert_eq!(config(&store, Some("red")).await, None);

        // An edit that is wrong changes nothing; a file that is gone takes its network.
        put("_.json", "{");
        put("red.json", r#"{"Network":"10.3.0.0/16"}"#);
        std::fs::remove_file(files.join("blue.json")).unwrap();
        follower.look(&files, &store).await;
        assert_eq!(config(&store, None).await.as_deref(), Some(r#"{"Network":"10.1.0.0/16"}"#));
        assert_eq!(config(&store, Some("red")).await.as_deref(), Some(r#"{"Network":"10.3.0.0/16"}"#));
        assert_eq!(config(&store, Some("blue")).await, None);
    }
}
