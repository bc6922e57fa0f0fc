//! etcd's v2 API as it is written: <https://github.com/etcd-io/etcd/blob/v3.4.30/Documentation/v2/api.md>.

use std::time::{Duration, Instant};

use serde::Deserialize;

use crate::stores::registry::{Entry, Lifetime};

/// There is no such key.
pub(super) const KEY_NOT_FOUND: u32 = 100;
/// The key is not what `prevIndex` says.
pub(super) const COMPARE_FAILED: u32 = 101;
/// The key is a directory.
pub(super) const NOT_A_FILE: u32 = 102;
/// `prevExist=false`, and it exists.
pub(super) const KEY_EXISTS: u32 = 105;
/// What a watch asks for is not among the last thousand changes.
pub(super) const INDEX_CLEARED: u32 = 401;

/// The answer to a read, a write, or a wait.
#[derive(Debug, Deserialize)]
pub(super) struct Action {
    pub(super) action: String,
    pub(super) node: Node,
    #[serde(rename = "prevNode")]
    pub(super) previous: Option<Node>,
}

/// A key, or a directory of keys.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Node {
    /// Begins with a slash, whatever was asked for.
    pub(super) key: String,
    value: String,
    pub(super) dir: bool,
    nodes: Vec<Node>,
    /// Seconds left when the answer was made; without it the key never ends.
    ttl: Option<i64>,
    pub(super) modified_index: u64,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ApiError {
    pub(super) error_code: u32,
    message: String,
    #[serde(default)]
    cause: String,
    /// etcd's index as it refused.
    #[serde(default)]
    pub(super) index: u64,
}

impl ApiError {
    /// "Compare failed ([99 != 4])"
    pub(super) fn text(&self) -> String {
        match self.cause.as_str() {
            "" => self.message.clone(),
            cause => format!("{} ({cause})", self.message),
        }
    }
}

impl Node {
    /// By our own clock: `expiration` is by etcd's, which may be wrong. `at` is when the answer was made, or just before.
    pub(super) fn lifetime(&self, at: Instant) -> Lifetime {
        match self.ttl {
            None => Lifetime::Forever,
            // What ended a moment ago may still be listed, with a negative rest.
            Some(seconds) => {
                Lifetime::Until(at + Duration::from_secs(u64::try_from(seconds).unwrap_or_default()))
            }
        }
    }

    pub(super) fn entry(self, key: String, at: Instant) -> Entry {
        let lifetime = self.lifetime(at);
        Entry { key, value: self.value.into_bytes(), revision: self.modified_index, lifetime }
    }

    /// Every key below this one, however deep. Directories are only where they lie.
    pub(super) fn files(self, found: &mut Vec<Node>) {
        let mut left = vec![self];
        while let Some(mut node) = left.pop() {
            left.append(&mut node.nodes);
            if !node.dir {
                found.push(node);
            }
        }
    }
}

/// A folder or a key as we name it, and as etcd does: below `/`, cleaned as it cleans.
#[derive(Clone, Debug)]
pub(super) struct Place {
    ours: String,
    theirs: String,
}

impl Place {
    pub(super) fn new(ours: &str) -> Self {
        let mut parts: Vec<&str> = Vec::new();
        for part in ours.split('/') {
            match part {
                "" | "." => {}
                ".." => drop(parts.pop()),
                part => parts.push(part),
            }
        }
        Self { ours: ours.to_owned(), theirs: parts.iter().map(|part| format!("/{part}")).collect() }
    }

    /// The path of a request.
    pub(super) fn path(&self) -> String {
        let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"/-._~".contains(byte);
        let text = self.theirs.bytes().map(|byte| match plain(&byte) {
            true => char::from(byte).to_string(),
            false => format!("%{byte:02X}"),
        });
        format!("/v2/keys{}", text.collect::<String>())
    }

    /// Our name of a key of theirs that lies in this folder.
    pub(super) fn key_inside(&self, theirs: &str) -> Option<String> {
        let rest = theirs.strip_prefix(&self.theirs)?.strip_prefix('/')?;
        (!rest.is_empty()).then(|| format!("{}{rest}", self.ours))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_named_as_etcd_names_them_and_back() {
        for (folder, path, key) in [
            (
                "/coreos.com/network/subnets/",
                "/v2/keys/coreos.com/network/subnets",
                "/coreos.com/network/subnets/a",
            ),
            ("coreos.com/network/", "/v2/keys/coreos.com/network", "/coreos.com/network/a"),
            ("/", "/v2/keys", "/a"),
            ("", "/v2/keys", "/a"),
            ("../x/", "/v2/keys/x", "/x/a"),
            ("/what? #1/ü/", "/v2/keys/what%3F%20%231/%C3%BC", "/what? #1/ü/a"),
        ] {
            let place = Place::new(folder);
            assert_eq!(place.path(), path);
            assert_eq!(place.key_inside(key), Some(format!("{folder}a")), "{folder}");
        }
        let place = Place::new("/n/subnets/");
        for other in ["/n/subnets", "/n/subnets/", "/n/subnets2/a", "/n/config", "/"] {
            assert_eq!(place.key_inside(other), None, "{other}");
        }
        assert_eq!(
            Place::new("/n/subnets/10.12.13.0-24&fd00:12:13::-56").path(),
            "/v2/keys/n/subnets/10.12.13.0-24%26fd00%3A12%3A13%3A%3A-56"
        );
    }

    #[test]
    fn a_recorded_keyspace_is_read_with_its_directories_and_ends() {
        let text = r#"{"action":"get","node":{"key":"/a","dir":true,"nodes":[
            {"key":"/a/config","value":"{}","modifiedIndex":9,"createdIndex":9},
            {"key":"/a/subnets","dir":true,"nodes":[
                {"key":"/a/subnets/10.5.1.0-24","value":"x","expiration":"2026-11-27T12:01:28.27Z","ttl":60,
                 "modifiedIndex":4,"createdIndex":4},
                {"key":"/a/subnets/deep","dir":true,"modifiedIndex":7,"createdIndex":7}],
             "modifiedIndex":4,"createdIndex":4}],"modifiedIndex":4,"createdIndex":4}}"#;
        let action: Action = serde_json::from_str(text).unwrap();
        let mut files = Vec::new();
        action.node.files(&mut files);
        files.sort_by(|one, other| one.key.cmp(&other.key));
        let asked = Instant::now();
        let seen: Vec<_> =
            files.iter().map(|node| (node.key.as_str(), node.modified_index, node.lifetime(asked))).collect();
        let end = Lifetime::Until(asked + Duration::from_secs(60));
        assert_eq!(seen, [("/a/config", 9, Lifetime::Forever), ("/a/subnets/10.5.1.0-24", 4, end)]);
    }
}
