//! What a flannel server and its clients say to each other (contract §5.2), byte for byte flanneld 0.7.0's.
//!
//! What is added is where 0.7.0 does not look: fields it does not know (`IPv6Subnet`, `unreadable`), headers, and the
//! parameters `previous`, `only` and `from`.

use std::time::{Duration, Instant};

use ipnet::{Ipv4Net, Ipv6Net};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use crate::domain::config::NetworkConfig;
use crate::domain::lease::{Lease, LeaseAttrs, LeaseEvent, Reservation, Subnets, Unreadable};
use crate::stores::StoreError;

/// Stands for the network without a name.
pub const UNNAMED: &str = "_";

/// What kind of failure a status of 500 is, for clients that know; its text is for people.
pub const ERROR_HEADER: &str = "flannel-error";

/// A lease without an end, and what is gone: Go's zero time.
const NEVER: &str = "0001-01-01T00:00:00Z";

/// A lease as it is said: `{"Subnet":…,"Attrs":…,"Expiration":…}`.
#[derive(Debug, Serialize, Deserialize)]
pub struct WireLease {
    #[serde(rename = "Subnet", alias = "subnet")]
    subnet: Ipv4Net,
    #[serde(rename = "IPv6Subnet", default, skip_serializing_if = "Option::is_none")]
    ipv6_subnet: Option<Ipv6Net>,
    #[serde(rename = "Attrs")]
    attrs: Box<RawValue>,
    #[serde(rename = "Expiration", default)]
    expiration: Option<String>,
}

/// `{"Subnet":…,"PublicIP":…}`.
#[derive(Debug, Serialize, Deserialize)]
pub struct WireReservation {
    #[serde(rename = "Subnet")]
    subnet: Ipv4Net,
    #[serde(rename = "IPv6Subnet", default, skip_serializing_if = "Option::is_none")]
    ipv6_subnet: Option<Ipv6Net>,
    #[serde(rename = "PublicIP")]
    public_ip: std::net::IpAddr,
}

/// What is told of leases: everything, or what changed, never both.
#[derive(Debug, Serialize, Deserialize)]
pub struct LeasesPage {
    pub events: Option<Vec<WireEvent>>,
    pub snapshot: Option<Vec<WireLease>>,
    pub cursor: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unreadable: Vec<WireUnreadable>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct WireEvent {
    #[serde(rename = "type")]
    pub kind: Kind,
    pub lease: WireLease,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Added,
    Removed,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct WireUnreadable {
    pub key: String,
    pub reason: String,
}

/// What is told of networks.
#[derive(Debug, Serialize, Deserialize)]
pub struct NetworksPage {
    pub events: Option<Vec<WireEvent>>,
    pub snapshot: Option<Vec<String>>,
    pub cursor: String,
}

/// Both clocks at one moment: leases end by the monotonic one, and are said in the other.
#[derive(Clone, Copy, Debug)]
pub struct Clocks {
    monotonic: Instant,
    wall: Timestamp,
}

impl Clocks {
    pub fn now() -> Self {
        Self { monotonic: Instant::now(), wall: Timestamp::now() }
    }

    /// The other side's clock, as its `Date` header has it (RFC 9110 §6.6.1), so that no two clocks are ever compared. A
    /// second is all it can tell, so ends may be a second early.
    pub fn of_answer(date: Option<&str>) -> Self {
        let said = date.and_then(|date| jiff::fmt::rfc2822::parse(date).ok()).map(|zoned| zoned.timestamp());
        let here = Self::now();
        // The second named may just be over.
        let said = said.map(|said| said.saturating_add(Duration::from_secs(1)).unwrap_or(said));
        Self { wall: said.unwrap_or(here.wall), ..here }
    }

    fn said(self, end: Option<Instant>) -> String {
        let Some(end) = end else { return NEVER.to_owned() };
        let left = end.saturating_duration_since(self.monotonic);
        self.wall.saturating_add(left).unwrap_or(Timestamp::MAX).to_string()
    }

    /// `None` where there is no end; what can't be read has ended.
    fn heard(self, text: &str) -> Option<Instant> {
        if text.is_empty() || text.starts_with("0001-01-01") {
            return None;
        }
        let left = text.parse::<Timestamp>().ok().map(|end| end.duration_since(self.wall));
        let left = left.and_then(|left| Duration::try_from(left).ok()).unwrap_or_default();
        Some(self.monotonic.checked_add(left).unwrap_or(self.monotonic + crate::stores::LEASE_TTL))
    }
}

impl WireLease {
    pub fn new(lease: &Lease, clocks: Clocks) -> Self {
        Self::of(lease.subnets, &lease.attrs, clocks.said(lease.expires))
    }

    /// What is said of a lease that is gone.
    pub fn gone(subnets: Subnets) -> Self {
        Self::of(subnets, &LeaseAttrs::new(std::net::Ipv4Addr::UNSPECIFIED), NEVER.to_owned())
    }

    /// What stands in an event that is about a network.
    fn none() -> Self {
        Self::gone(Subnets { v4: None, v6: None })
    }

    fn of(subnets: Subnets, attrs: &LeaseAttrs, expiration: String) -> Self {
        let attrs = RawValue::from_string(attrs_json(attrs)).unwrap_or_default();
        let Subnets { v4, v6 } = subnets;
        Self { subnet: v4.unwrap_or_default(), ipv6_subnet: v6, attrs, expiration: Some(expiration) }
    }

    pub fn subnets(&self) -> Subnets {
        let v4 = Some(self.subnet).filter(|net| net.prefix_len() != 0);
        Subnets { v4, v6: self.ipv6_subnet }
    }

    /// The lease, checked as an entry of a store is.
    ///
    /// # Errors
    /// What in it can't be understood.
    pub fn lease(&self, clocks: Clocks) -> Result<Lease, Unreadable> {
        let subnets = self.subnets();
        let unreadable = |reason: String| Unreadable { key: subnets.to_string(), reason };
        // Host bits and lengths no lease has.
        let subnets: Subnets = subnets.to_string().parse().map_err(|error| unreadable(format!("{error}")))?;
        let attrs = LeaseAttrs::from_json(self.attrs.get()).map_err(|error| unreadable(error.to_string()))?;
        let expires = clocks.heard(self.expiration.as_deref().unwrap_or_default());
        Ok(Lease { subnets, attrs, expires, revision: 0 })
    }
}

impl WireEvent {
    pub fn of_network(kind: Kind, name: String) -> Self {
        Self { kind, lease: WireLease::none(), network: Some(name) }
    }

    pub fn of_lease(kind: Kind, lease: WireLease) -> Self {
        Self { kind, lease, network: None }
    }

    /// What a store would say.
    pub fn heard(&self, clocks: Clocks) -> LeaseEvent {
        match self.kind {
            Kind::Removed => LeaseEvent::Removed(self.lease.subnets()),
            Kind::Added => match self.lease.lease(clocks) {
                Ok(lease) => LeaseEvent::Added(lease),
                Err(unreadable) => LeaseEvent::Unreadable(unreadable),
            },
        }
    }
}

impl From<Reservation> for WireReservation {
    fn from(Reservation { subnets, public_ip }: Reservation) -> Self {
        Self { subnet: subnets.v4.unwrap_or_default(), ipv6_subnet: subnets.v6, public_ip }
    }
}

impl From<WireReservation> for Reservation {
    fn from(WireReservation { subnet, ipv6_subnet, public_ip }: WireReservation) -> Self {
        let v4 = Some(subnet).filter(|net| net.prefix_len() != 0);
        Self { subnets: Subnets { v4, v6: ipv6_subnet }, public_ip }
    }
}

/// Attributes as 0.7.0 has them: without `PublicIPv6`, unless there is one.
pub fn attrs_json(attrs: &LeaseAttrs) -> String {
    let text = attrs.to_json();
    match attrs.public_ipv6 {
        None => text.replacen(r#","PublicIPv6":null"#, "", 1),
        Some(_) => text,
    }
}

/// The configuration as 0.7.0 says it: the defaults filled in, `Backend` as it was written.
///
/// # Errors
/// The text is no configuration.
pub fn config_json(text: &str) -> Result<String, StoreError> {
    let wrong =
        |reason: String| StoreError::Conflict(format!("the network configuration can't be used: {reason}"));
    let config = NetworkConfig::parse_ranges(text).map_err(|error| wrong(error.to_string()))?;
    let written: Map<String, Value> = serde_json::from_str(text).map_err(|error| wrong(error.to_string()))?;
    let as_written = |name: &str| {
        let found = written.iter().rev().find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.clone())
    };
    let mut said = Map::new();
    let mut say = |name: &str, value: Value| said.insert(name.to_owned(), value);
    if let Some(range) = config.v4 {
        say("Network", range.network.to_string().into());
        say("SubnetMin", range.subnet_min.to_string().into());
        say("SubnetMax", range.subnet_max.to_string().into());
        say("SubnetLen", range.subnet_len.into());
    } else {
        say("EnableIPv4", false.into());
    }
    if let Some(range) = config.v6 {
        say("EnableIPv6", true.into());
        say("IPv6Network", range.network.to_string().into());
        say("IPv6SubnetMin", range.subnet_min.to_string().into());
        say("IPv6SubnetMax", range.subnet_max.to_string().into());
        say("IPv6SubnetLen", range.subnet_len.into());
    }
    if config.enable_nftables {
        say("EnableNFTables", true.into());
    }
    if let Some(backend) = as_written("Backend") {
        say("Backend", backend);
    }
    Ok(Value::Object(said).to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_is_said_as_recorded_from_flanneld() {
        for (written, said) in [
            (
                r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#,
                r#"{"Network":"10.244.0.0/16","SubnetMin":"10.244.1.0","SubnetMax":"10.244.255.0","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#,
            ),
            (
                r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan","VNI":1}}"#,
                r#"{"Network":"10.1.0.0/16","SubnetMin":"10.1.1.0","SubnetMax":"10.1.255.0","SubnetLen":24,"Backend":{"Type":"vxlan","VNI":1}}"#,
            ),
            (
                r#"{"Network":"10.1.0.0/16"}"#,
                r#"{"Network":"10.1.0.0/16","SubnetMin":"10.1.1.0","SubnetMax":"10.1.255.0","SubnetLen":24}"#,
            ),
        ] {
            assert_eq!(config_json(written).unwrap(), said);
        }
        let error = config_json(r#"{"Network":"10.1.0.0/29"}"#).unwrap_err().to_string();
        assert!(error.contains("Network"), "{error}");
    }

    #[test]
    fn a_lease_is_said_as_recorded_from_flanneld() {
        let recorded = r#"{"Subnet":"10.244.5.0/24","Attrs":{"PublicIP":"10.97.0.12","BackendType":"vxlan","BackendData":{"VtepMAC":"fa:d7:19:f1:9c:34"}},"Expiration":"2026-11-21T21:12:03.525476139Z"}"#;
        let wire: WireLease = serde_json::from_str(recorded).unwrap();
        let clocks = Clocks::of_answer(Some("Fri, 20 Nov 2026 21:12:03 GMT"));
        let lease = wire.lease(clocks).unwrap();
        let left = lease.expires.unwrap() - clocks.monotonic;
        assert!((86399..=86400).contains(&left.as_secs()), "{left:?}");
        assert_eq!(serde_json::to_string(&WireLease::new(&lease, clocks)).unwrap(), recorded);
    }

    #[test]
    fn an_end_that_is_none_stays_none() {
        let clocks = Clocks::now();
        let lease = Lease {
            subnets: "10.1.2.0-24&fd00::-64".parse().unwrap(),
            attrs: LeaseAttrs::new("192.0.2.1".parse().unwrap()),
            expires: None,
            revision: 7,
        };
        let text = serde_json::to_string(&WireLease::new(&lease, clocks)).unwrap();
        assert_eq!(
            text,
            r#"{"Subnet":"10.1.2.0/24","IPv6Subnet":"fd00::/64","Attrs":{"PublicIP":"192.0.2.1"},"Expiration":"0001-01-01T00:00:00Z"}"#
        );
        let back: WireLease = serde_json::from_str(&text).unwrap();
        assert_eq!(back.lease(clocks).unwrap(), Lease { revision: 0, ..lease });
    }

    #[test]
    fn a_lease_that_can_not_be_one_names_what_is_wrong() {
        let clocks = Clocks::now();
        for (text, wanted) in [
            (r#"{"Subnet":"10.1.2.3/24","Attrs":{"PublicIP":"192.0.2.1"}}"#, "10.1.2.3"),
            (r#"{"Subnet":"10.1.2.0/24","Attrs":{"PublicIP":7}}"#, "PublicIP"),
        ] {
            let wire: WireLease = serde_json::from_str(text).unwrap();
            let error = wire.lease(clocks).unwrap_err().to_string();
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn events_are_said_as_recorded_from_flanneld() {
        let subnets = "10.244.66.0-24".parse().unwrap();
        let page = LeasesPage {
            events: Some(vec![WireEvent::of_lease(Kind::Removed, WireLease::gone(subnets))]),
            snapshot: None,
            cursor: "9".into(),
            unreadable: Vec::new(),
        };
        assert_eq!(
            serde_json::to_string(&page).unwrap(),
            r#"{"events":[{"type":"removed","lease":{"Subnet":"10.244.66.0/24","Attrs":{"PublicIP":"0.0.0.0"},"Expiration":"0001-01-01T00:00:00Z"}}],"snapshot":null,"cursor":"9"}"#
        );
        let event = WireEvent::of_network(Kind::Added, "red".into());
        assert_eq!(
            serde_json::to_string(&event).unwrap(),
            r#"{"type":"added","lease":{"Subnet":"0.0.0.0/0","Attrs":{"PublicIP":"0.0.0.0"},"Expiration":"0001-01-01T00:00:00Z"},"network":"red"}"#
        );
    }
}
