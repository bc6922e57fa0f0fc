//! Leases: which node has which subnet, and what the others must know of it.
//!
//! Text forms are flanneld's, byte for byte (contract §3.1, §3.2): tools and older daemons compare them as text.

#[cfg(test)]
mod tests;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::time::{Duration, Instant};

use ipnet::{Ipv4Net, Ipv6Net};
use serde_json::Value;

/// Longest IPv4 prefix in a lease key: flanneld reads the length as five bits.
pub const MAX_V4_PREFIX: u8 = 31;

/// Longest IPv6 prefix in a lease key: flanneld reads the length as seven bits.
pub const MAX_V6_PREFIX: u8 = 127;

/// Longest lease value that is looked at, in bytes. Real ones have about 150; whoever may write to the store must
/// not be able to make every node hold megabytes.
pub const MAX_VALUE_BYTES: usize = 64 * 1024;

/// The subnets of one lease: IPv4, IPv6, or both. At least one is present.
///
/// `Display` and `FromStr` are the lease key's last part: `10.5.34.0-24`, `10.12.13.0-24&fd00:12:13::-56`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subnets {
    pub v4: Option<Ipv4Net>,
    pub v6: Option<Ipv6Net>,
}

/// What a node publishes about itself in its lease.
#[derive(Clone, Debug, PartialEq)]
pub struct LeaseAttrs {
    pub public_ip: Ipv4Addr,
    pub public_ipv6: Option<Ipv6Addr>,
    /// A fixed constant per backend; empty for udp, alloc and the cloud backends.
    pub backend_type: String,
    /// The backend's own JSON. Boxed, since thousands of leases have none.
    pub backend_data: Option<Box<Value>>,
    pub backend_v6_data: Option<Box<Value>>,
    /// Fields we do not know, kept when the value is written again.
    pub unknown: Vec<(String, Value)>,
}

/// A subnet given to a node for a time.
#[derive(Clone, Debug, PartialEq)]
pub struct Lease {
    pub subnets: Subnets,
    pub attrs: LeaseAttrs,
    /// When the store drops it; `None` is a reservation, which never expires and must never be given a TTL.
    pub expires: Option<Instant>,
    /// The store's version of the entry, compared at renewal; 0 where a store has none.
    pub revision: u64,
}

/// A subnet that a node has for good (contract §3.9): it waits for the node, also while that is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reservation {
    pub subnets: Subnets,
    /// What the node is known by, [`LeaseAttrs::node`].
    pub public_ip: IpAddr,
}

/// What a store reports while it is watched. A stream of them always begins with a `Snapshot`, or an
/// `Interrupted` when the store can't be reached yet.
#[derive(Clone, Debug, PartialEq)]
pub enum LeaseEvent {
    /// Everything there is; what is not in it is gone.
    Snapshot(Vec<Lease>, Vec<Unreadable>),
    Added(Lease),
    Removed(Subnets),
    /// An entry that can't be understood; others are not affected.
    Unreadable(Unreadable),
    /// The store can't be reached or the watch broke; the next event after it is a `Snapshot`.
    Interrupted(String),
}

/// An entry of the store that is not a lease we understand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    pub key: String,
    pub reason: String,
}

/// Why a store's entry is not a lease.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeaseError {
    #[error(
        "key {key:?} is not a subnet: {reason}; a key looks like 10.5.34.0-24 or 10.5.34.0-24&fd00:5:34::-64"
    )]
    Key { key: String, reason: String },
    #[error("the value is not JSON: {0}")]
    Json(String),
    #[error("the value is {0} bytes long, at most {MAX_VALUE_BYTES} are read")]
    TooLong(usize),
    #[error("field {field} is {found}, it must be {wanted}")]
    Field { field: &'static str, found: String, wanted: &'static str },
}

impl Subnets {
    /// The subnets of a lease with one family.
    pub fn v4(net: Ipv4Net) -> Self {
        Self { v4: Some(net), v6: None }
    }

    /// Whether an address exists that is in both, in either family.
    pub fn overlaps(&self, other: &Self) -> bool {
        fn meet<N: Copy>(a: Option<N>, b: Option<N>, contains: impl Fn(N, N) -> bool) -> bool {
            matches!((a, b), (Some(a), Some(b)) if contains(a, b) || contains(b, a))
        }
        meet(self.v4, other.v4, |a: Ipv4Net, b| a.contains(&b))
            || meet(self.v6, other.v6, |a: Ipv6Net, b| a.contains(&b))
    }
}

/// The key's spelling. A lease without IPv4 is written with `0.0.0.0-0` in its place, as flanneld does.
impl fmt::Display for Subnets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.v4 {
            Some(v4) => write!(f, "{}-{}", v4.addr(), v4.prefix_len())?,
            None => f.write_str("0.0.0.0-0")?,
        }
        match self.v6 {
            Some(v6) => write!(f, "&{}-{}", v6.addr(), v6.prefix_len()),
            None => Ok(()),
        }
    }
}

/// Accepts canonical keys only: no host bits, no other spelling of the same address. Two keys are therefore never
/// the same subnets, and the removal of one can't be taken for the removal of the other.
impl FromStr for Subnets {
    type Err = LeaseError;

    fn from_str(key: &str) -> Result<Self, LeaseError> {
        let bad = |reason: &str| LeaseError::Key { key: shorten(key), reason: reason.into() };
        let (v4, v6) = match key.split_once('&') {
            Some((v4, v6)) => (v4, Some(v6)),
            None => (key, None),
        };
        let (address, len) = v4.split_once('-').ok_or_else(|| bad("it has no -<prefix length>"))?;
        let address: Ipv4Addr = address.parse().map_err(|_| bad("that is no IPv4 address"))?;
        let len: u8 = len.parse().map_err(|_| bad("the prefix length is not a number"))?;
        let v4 = if address.is_unspecified() && len == 0 {
            None
        } else if len > MAX_V4_PREFIX {
            return Err(bad("the IPv4 prefix length is above 31"));
        } else {
            Some(Ipv4Net::new(address, len).map_err(|_| bad("the IPv4 prefix length is above 31"))?)
        };
        let v6 = match v6 {
            None => None,
            Some(text) => {
                let (address, len) =
                    text.split_once('-').ok_or_else(|| bad("its IPv6 part has no -<prefix length>"))?;
                let address: Ipv6Addr = address.parse().map_err(|_| bad("that is no IPv6 address"))?;
                let len: u8 = len.parse().map_err(|_| bad("the IPv6 prefix length is not a number"))?;
                if len > MAX_V6_PREFIX {
                    return Err(bad("the IPv6 prefix length is above 127"));
                }
                Some(Ipv6Net::new(address, len).map_err(|_| bad("the IPv6 prefix length is above 127"))?)
            }
        };
        if v4.is_none() && v6.is_none() {
            return Err(bad("it names no subnet"));
        }
        if v4.is_some_and(|net| net.trunc() != net) || v6.is_some_and(|net| net.trunc() != net) {
            return Err(bad("the address has bits beyond the prefix length"));
        }
        let subnets = Self { v4, v6 };
        match subnets.to_string() {
            canonical if canonical == key => Ok(subnets),
            canonical => Err(bad(&format!("it should be spelled {canonical}"))),
        }
    }
}

impl LeaseAttrs {
    /// What a node is known by: its public IPv4 address, or where the network is of only IPv6 its public IPv6 address.
    /// `None` when it names no node.
    pub fn node(&self) -> Option<IpAddr> {
        let v4 = Some(self.public_ip).filter(|address| !address.is_unspecified()).map(IpAddr::from);
        v4.or(self.public_ipv6.map(IpAddr::from))
    }

    /// What is published of a node that is known by this address and has nothing else to say.
    pub fn of_node(node: IpAddr) -> Self {
        match node {
            IpAddr::V4(v4) => Self::new(v4),
            IpAddr::V6(v6) => Self { public_ipv6: Some(v6), ..Self::new(Ipv4Addr::UNSPECIFIED) },
        }
    }

    /// Whether both name the same node addresses.
    pub fn names_the_node_of(&self, other: &Self) -> bool {
        (self.public_ip, self.public_ipv6) == (other.public_ip, other.public_ipv6)
    }

    /// What a node with this address and no backend data publishes (udp, alloc).
    pub fn new(public_ip: Ipv4Addr) -> Self {
        Self {
            public_ip,
            public_ipv6: None,
            backend_type: String::new(),
            backend_data: None,
            backend_v6_data: None,
            unknown: Vec::new(),
        }
    }

    /// The value as today's flanneld writes it, byte for byte (contract §3.2): fields in its order, no spaces,
    /// `PublicIPv6` always present, and `<`, `>`, `&` and the two line separators escaped as Go's encoder does.
    pub fn to_json(&self) -> String {
        let mut fields = vec![("PublicIP", Value::from(self.public_ip.to_string()))];
        fields.push(("PublicIPv6", self.public_ipv6.map_or(Value::Null, |ip| ip.to_string().into())));
        if !self.backend_type.is_empty() {
            fields.push(("BackendType", self.backend_type.as_str().into()));
        }
        let mut json = String::from("{");
        let data = [("BackendData", &self.backend_data), ("BackendV6Data", &self.backend_v6_data)];
        let known = fields.iter().map(|(name, value)| (*name, value));
        let data = data.into_iter().filter_map(|(name, value)| Some((name, value.as_deref()?)));
        let unknown = self.unknown.iter().map(|(name, value)| (name.as_str(), value));
        for (name, value) in known.chain(data).chain(unknown) {
            if json.len() > 1 {
                json.push(',');
            }
            json.push_str(&format!("{}:{value}", Value::from(name)));
        }
        json.push('}');
        escape_as_go(&json)
    }

    /// Reads what any flanneld writes: v0.7.0's values without `PublicIPv6`, names in any case (the last one wins),
    /// and base64 in place of raw `BackendData` as v0.7.0's server mode makes it.
    ///
    /// A missing `PublicIP` reads as 0.0.0.0, as flanneld reads it; [`Peers`](crate::domain::peers::Peers) refuses
    /// such a lease.
    pub fn from_json(json: &str) -> Result<Self, LeaseError> {
        if json.len() > MAX_VALUE_BYTES {
            return Err(LeaseError::TooLong(json.len()));
        }
        let value: Value = serde_json::from_str(json).map_err(|error| LeaseError::Json(error.to_string()))?;
        let Value::Object(fields) = value else {
            return Err(LeaseError::Json(format!("{} where an object was expected", kind(&value))));
        };
        let mut attrs = Self::new(Ipv4Addr::UNSPECIFIED);
        for (name, value) in fields {
            match name.to_ascii_lowercase().as_str() {
                "publicip" => attrs.public_ip = address("PublicIP", &value, "an IPv4 address")?,
                "publicipv6" if value.is_null() => attrs.public_ipv6 = None,
                "publicipv6" => {
                    attrs.public_ipv6 = Some(address("PublicIPv6", &value, "an IPv6 address or null")?);
                }
                // Go leaves a string as it is when it decodes null.
                "backendtype" if value.is_null() => {}
                "backendtype" => match value {
                    Value::String(text) => attrs.backend_type = text,
                    other => return Err(field("BackendType", &other, "a string")),
                },
                "backenddata" => attrs.backend_data = Some(Box::new(value)),
                "backendv6data" => attrs.backend_v6_data = Some(Box::new(value)),
                _ => attrs.unknown.push((name, value)),
            }
        }
        // The one backend whose data is a string by nature keeps it.
        if attrs.backend_type != "extension" {
            attrs.backend_data = attrs.backend_data.map(|data| Box::new(undo_base64(*data)));
        }
        Ok(attrs)
    }

    /// Takes over fields of an older value of the same lease that this program does not know.
    pub fn keep_unknown_of(&mut self, older: &Self) {
        for (name, value) in &older.unknown {
            if !self.unknown.iter().any(|(known, _)| known == name) {
                self.unknown.push((name.clone(), value.clone()));
            }
        }
    }
}

impl Lease {
    /// When to renew: `margin` before the end, and up to `jitter` earlier so that nodes that started together do not
    /// renew together. `None` for a reservation.
    ///
    /// Never before `now`, and jitter takes at most half of the time that is left, so that a margin close to the
    /// lifetime can't turn renewal into a loop.
    pub fn renew_at(&self, now: Instant, margin: Duration, jitter: Duration) -> Option<Instant> {
        let remaining = self.expires?.saturating_duration_since(now);
        let wait = remaining.saturating_sub(margin);
        Some(now + (wait - jitter.min(wait / 2)))
    }
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", shorten(&self.key), self.reason)
    }
}

/// A store's text, cut for messages.
fn shorten(text: &str) -> String {
    const KEPT: usize = 80;
    match text.char_indices().nth(KEPT) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "an object".into(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
        Value::String(text) => format!("{:?}", shorten(text)),
    }
}

fn field(field: &'static str, value: &Value, wanted: &'static str) -> LeaseError {
    LeaseError::Field { field, found: kind(value), wanted }
}

fn address<A: FromStr>(name: &'static str, value: &Value, wanted: &'static str) -> Result<A, LeaseError> {
    value.as_str().and_then(|text| text.parse().ok()).ok_or_else(|| field(name, value, wanted))
}

/// Go's `encoding/json` escapes these even inside raw values; in JSON they can only stand inside strings.
fn escape_as_go(json: &str) -> String {
    let mut escaped = String::with_capacity(json.len());
    for character in json.chars() {
        match character {
            '<' => escaped.push_str("\\u003c"),
            '>' => escaped.push_str("\\u003e"),
            '&' => escaped.push_str("\\u0026"),
            '\u{2028}' => escaped.push_str("\\u2028"),
            '\u{2029}' => escaped.push_str("\\u2029"),
            other => escaped.push(other),
        }
    }
    escaped
}

/// v0.7.0's server mode, built with Go 1.6, encodes raw data as a base64 string. Undone when the string is base64 of
/// a JSON object, else the value is left as it is.
fn undo_base64(value: Value) -> Value {
    let decoded =
        value.as_str().and_then(decode_base64).and_then(|bytes| serde_json::from_slice(&bytes).ok());
    match decoded {
        Some(Value::Object(object)) => Value::Object(object),
        _ => value,
    }
}

/// RFC 4648 §4, padding required.
fn decode_base64(text: &str) -> Option<Vec<u8>> {
    if text.is_empty() || !text.len().is_multiple_of(4) {
        return None;
    }
    let digits = text.trim_end_matches('=');
    if text.len() - digits.len() > 2 {
        return None;
    }
    let mut bytes = Vec::with_capacity(text.len() / 4 * 3);
    let (mut bits, mut count) = (0u32, 0u32);
    for digit in digits.bytes() {
        let value = match digit {
            b'A'..=b'Z' => digit - b'A',
            b'a'..=b'z' => digit - b'a' + 26,
            b'0'..=b'9' => digit - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = (bits << 6 | u32::from(value)) & 0xff_ffff;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    Some(bytes)
}
