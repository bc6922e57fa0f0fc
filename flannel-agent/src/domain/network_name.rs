//! Names of networks, where one store keeps several (contract §5.4).
//!
//! They come from keys of the store and become parts of keys, of file names and of URLs: whoever may write to the store
//! must not be able to name a file outside a folder.

use std::fmt;
use std::str::FromStr;

use super::wording::quoted;

/// Longest name in bytes. With `.env` behind it, it must fit into a file name (NAME_MAX is 255).
const MAX_BYTES: usize = 200;

/// A name that is one part of a path and says nothing else than itself.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetworkName(String);

/// Why a text names no network.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("network name {name} {reason}; a name is such as blue")]
pub struct NetworkNameError {
    name: String,
    reason: &'static str,
}

impl NetworkName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NetworkName {
    type Err = NetworkNameError;

    fn from_str(name: &str) -> Result<Self, NetworkNameError> {
        let reason = if name.is_empty() {
            "is empty"
        } else if name.len() > MAX_BYTES {
            "is longer than 200 bytes"
        } else if name == "_" {
            "stands for the network without a name"
        } else if name.starts_with('.') {
            "begins with a dot"
        } else if name.contains(|c: char| c == '/' || c.is_control() || c.is_whitespace()) {
            "contains a slash, a space or a control character"
        } else if matches!(name, "config" | "subnets") {
            "is a key of the network without a name"
        } else {
            return Ok(Self(name.to_owned()));
        };
        Err(NetworkNameError { name: quoted(name), reason })
    }
}

impl fmt::Display for NetworkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_part_of_a_path() {
        for good in ["blue", "red-1", "a.b", "grün", "_x"] {
            assert_eq!(good.parse::<NetworkName>().map(|name| name.to_string()), Ok(good.to_owned()));
        }
        let long = "x".repeat(201);
        for bad in ["", "_", ".", "..", ".hidden", "a/b", "a b", "a\nb", "config", "subnets", &long] {
            let text = bad.parse::<NetworkName>().unwrap_err().to_string();
            assert!(text.starts_with("network name ") && text.ends_with("such as blue"), "{text}");
        }
    }
}
