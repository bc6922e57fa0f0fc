//! A JSON object read the way Go's decoder reads it into a struct (contract §2.1): keys match in any case, a later
//! one wins over an earlier, `null` leaves a number, boolean or string as it was.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use super::{ConfigError, DEFAULT_UDP_PORT, MAX_TEXT, TUNNEL_MTUS};
use crate::domain::wording::{nearest, quoted, shown};

/// Warnings about unknown or repeated keys that are given in full; the rest is only counted.
const MAX_WARNINGS: usize = 8;

/// Keys and the values' own text, in the order of the document.
pub(super) struct Object {
    entries: Vec<(String, Box<RawValue>)>,
}

impl Object {
    pub(super) fn parse(text: &str) -> Result<Self, ConfigError> {
        if text.len() > MAX_TEXT {
            return Err(ConfigError::TooLong { size: text.len() });
        }
        let value: &RawValue = serde_json::from_str(text)
            .map_err(|error| ConfigError::NotJson { reason: shown(&error.to_string()) })?;
        match kind(value.get()) {
            Kind::Object => Self::from_text(value.get()),
            // Go decodes null into a struct by doing nothing.
            Kind::Null => Ok(Self { entries: Vec::new() }),
            other => Err(ConfigError::NotAnObject { found: other.name() }),
        }
    }

    fn from_text(text: &str) -> Result<Self, ConfigError> {
        serde_json::from_str(text).map_err(|error| ConfigError::NotJson { reason: shown(&error.to_string()) })
    }

    /// The value that counts for `key`.
    fn last(&self, key: &str) -> Option<&str> {
        self.entries.iter().rev().find(|(name, _)| same_key(name, key)).map(|(_, value)| value.get())
    }

    /// The value that counts for `key` where `null` means "as if it were not there".
    fn last_not_null(&self, key: &str) -> Option<&str> {
        self.entries
            .iter()
            .rev()
            .filter(|(name, _)| same_key(name, key))
            .map(|(_, value)| value.get())
            .find(|value| kind(value) != Kind::Null)
    }

    pub(super) fn boolean(&self, key: &'static str) -> Result<Option<bool>, ConfigError> {
        self.last_not_null(key)
            .map(|value| {
                serde_json::from_str(value)
                    .map_err(|_| invalid(key, value, "must be true or false, without quotes"))
            })
            .transpose()
    }

    /// A whole number, not negative and without fraction or exponent.
    pub(super) fn unsigned(&self, key: &'static str) -> Result<Option<u64>, ConfigError> {
        self.last_not_null(key)
            .map(|value| {
                serde_json::from_str(value).map_err(|_| {
                    invalid(key, value, "must be a prefix length: a whole number such as 24, without quotes")
                })
            })
            .transpose()
    }

    pub(super) fn port(&self, key: &str, field: &'static str) -> Result<u16, ConfigError> {
        let Some(value) = self.last_not_null(key) else {
            return Ok(DEFAULT_UDP_PORT);
        };
        match serde_json::from_str(value) {
            Ok(port) if port != 0 => Ok(port),
            _ => Err(invalid(field, value, "must be a port number from 1 to 65535, without quotes")),
        }
    }

    /// `null` and a missing key are none.
    pub(super) fn tunnel_mtu(&self, key: &str, field: &'static str) -> Result<Option<u32>, ConfigError> {
        self.last_not_null(key)
            .map(|value| match serde_json::from_str(value) {
                Ok(mtu) if TUNNEL_MTUS.contains(&mtu) => Ok(mtu),
                _ => Err(invalid(
                    field,
                    value,
                    "must be the tunnel's MTU, from 68 to 65507 bytes and without quotes; a node takes it when its \
                     interface's MTU is at least 28 larger",
                )),
            })
            .transpose()
    }

    pub(super) fn string(&self, key: &str, field: &'static str) -> Result<Option<String>, ConfigError> {
        self.last_not_null(key)
            .map(|value| serde_json::from_str(value).map_err(|_| invalid(field, value, "must be a string")))
            .transpose()
    }

    /// A string with a form of its own, for which `null` is as wrong as any other text.
    pub(super) fn required_text<T: FromStr>(
        &self,
        key: &'static str,
        format: &str,
    ) -> Result<Option<T>, ConfigError> {
        self.last(key).map(|value| text(key, value, format)).transpose()
    }

    /// A string with a form of its own, for which `null` means unset.
    pub(super) fn nullable_text<T: FromStr>(
        &self,
        key: &'static str,
        format: &str,
    ) -> Result<Option<T>, ConfigError> {
        self.last(key)
            .filter(|value| kind(value) != Kind::Null)
            .map(|value| text(key, value, format))
            .transpose()
    }

    /// An object inside; `null` is an empty one (Go keeps it as raw text that holds nothing).
    pub(super) fn object(&self, key: &'static str) -> Result<Option<Self>, ConfigError> {
        let Some(value) = self.last(key) else {
            return Ok(None);
        };
        match kind(value) {
            Kind::Object => Self::from_text(value).map(Some),
            Kind::Null => Ok(Some(Self { entries: Vec::new() })),
            _ => Err(invalid(key, value, r#"must be an object such as {"Type":"udp"}"#)),
        }
    }

    /// What to tell about keys that are not `known` or stand there more than once.
    pub(super) fn unknown_keys(&self, parent: &str, known: &[&str]) -> Vec<String> {
        let mut warnings = Vec::new();
        for (position, (name, _)) in self.entries.iter().enumerate() {
            match known.iter().find(|key| same_key(name, key)) {
                Some(key) => {
                    let later = self.entries.iter().skip(position + 1);
                    if later.clone().any(|(other, _)| same_key(other, key)) {
                        warnings
                            .push(format!("key {parent}{key} is there more than once: the last one counts"));
                    }
                }
                None => warnings.push(match nearest(name, known.iter().copied()) {
                    Some(near) => {
                        format!("unknown key {parent}{} is ignored (did you mean {near}?)", shown(name))
                    }
                    None => {
                        format!(
                            "unknown key {parent}{} is ignored; known are {}",
                            shown(name),
                            known.join(", ")
                        )
                    }
                }),
            }
            if warnings.len() > MAX_WARNINGS {
                warnings.truncate(MAX_WARNINGS);
                warnings.push("there are more unknown or repeated keys".to_owned());
                break;
            }
        }
        warnings
    }
}

fn text<T: FromStr>(field: &'static str, value: &str, format: &str) -> Result<T, ConfigError> {
    serde_json::from_str::<String>(value)
        .ok()
        .and_then(|text| text.parse().ok())
        .ok_or_else(|| invalid(field, value, format))
}

/// `value` is JSON text: a string already has its quotes.
fn invalid(field: &'static str, value: &str, expected: &str) -> ConfigError {
    let value = match serde_json::from_str::<String>(value) {
        Ok(text) => quoted(&text),
        Err(_) => shown(value),
    };
    ConfigError::Invalid { field, value, expected: expected.to_owned() }
}

/// Go compares keys by Unicode's simple case folding, under which two non-ASCII letters equal ASCII ones: the long s
/// and the Kelvin sign (`encoding/json`, `foldName`).
fn same_key(name: &str, key: &str) -> bool {
    let fold = |letter: char| match letter {
        '\u{17f}' => 's',
        '\u{212a}' => 'k',
        _ => letter.to_ascii_lowercase(),
    };
    name.chars().map(fold).eq(key.chars().map(fold))
}

/// What a JSON text is, by its first character.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Object,
    Array,
    String,
    Boolean,
    Null,
    Number,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Object => "an object",
            Self::Array => "an array",
            Self::String => "a string",
            Self::Boolean => "a boolean",
            Self::Null => "null",
            Self::Number => "a number",
        }
    }
}

fn kind(text: &str) -> Kind {
    match text.trim_start().bytes().next() {
        Some(b'{') => Kind::Object,
        Some(b'[') => Kind::Array,
        Some(b'"') => Kind::String,
        Some(b't' | b'f') => Kind::Boolean,
        Some(b'n') => Kind::Null,
        _ => Kind::Number,
    }
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;

        impl<'de> Visitor<'de> for InOrder {
            type Value = Object;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Object, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Object { entries })
            }
        }

        deserializer.deserialize_map(InOrder)
    }
}
