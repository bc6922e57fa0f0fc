//! flannel's annotations on a Node (contract §4.1): a lease as Kubernetes keeps it. Pure.
//!
//! Names and values are flanneld's, byte for byte, so that both can serve one cluster. What a value means is decided
//! where leases are ([`crate::domain::lease`]); here is only how it is spread over annotations.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

use serde_json::Value;

use crate::domain::interface::PublicAddresses;
use crate::domain::lease::{LeaseAttrs, MAX_VALUE_BYTES};
use crate::domain::wording::{quoted, shown};

/// What a Node carries, by whole name.
pub(super) type Present = BTreeMap<String, String>;

const MANAGED: &str = "kube-subnet-manager";
const BACKEND_TYPE: &str = "backend-type";
const BACKEND_DATA: &str = "backend-data";
const BACKEND_V6_DATA: &str = "backend-v6-data";
const PUBLIC_IP: &str = "public-ip";
const PUBLIC_IPV6: &str = "public-ipv6";
const PUBLIC_IP_OVERWRITE: &str = "public-ip-overwrite";
const PUBLIC_IPV6_OVERWRITE: &str = "public-ipv6-overwrite";
const NODE_PUBLIC_IP: &str = "node-public-ip";
const NODE_PUBLIC_IPV6: &str = "node-public-ipv6";

/// The annotations of one prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Annotations {
    /// Ends with `/` or `-`.
    prefix: String,
}

impl Annotations {
    /// Takes `--kube-annotation-prefix` by flanneld's rules: `org.com` is `org.com/…`, `org.com/9` is `org.com/9-…`.
    ///
    /// # Errors
    /// What is wrong with the prefix.
    pub(super) fn new(prefix: &str) -> Result<Self, String> {
        let wrong = |reason: &str| {
            Err(format!(
                "{} {reason}; it must be a DNS name, alone or with a slash and a word, such as flannel.alpha.coreos.com \
                 or example.com/blue",
                quoted(prefix)
            ))
        };
        let (domain, word) = match prefix.split_once('/') {
            Some((_, word)) if word.contains('/') => return wrong("has more than one slash"),
            Some((domain, word)) => (domain, word),
            None => (prefix, ""),
        };
        let allowed =
            |text: &str| text.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-'));
        let labels: Vec<&str> = domain.split('.').collect();
        if labels.len() < 2 {
            return wrong("has no dot in its domain");
        }
        if labels.iter().any(|label| label.is_empty() || !allowed(label)) {
            return wrong("has a domain with other letters than a-z, 0-9, - and _, or an empty part");
        }
        if !allowed(word) {
            return wrong("has other letters than a-z, 0-9, - and _ behind its slash");
        }
        let dash = if word.is_empty() || word.ends_with('-') { "" } else { "-" };
        Ok(Self { prefix: format!("{domain}/{word}{dash}") })
    }

    /// The whole name of an annotation.
    fn name(&self, suffix: &str) -> String {
        format!("{}{suffix}", self.prefix)
    }

    fn get<'a>(&self, present: &'a Present, suffix: &str) -> Option<&'a str> {
        present.get(&self.name(suffix)).map(String::as_str)
    }

    /// Whether some flannel daemon speaks for the Node. Others are no peers.
    pub(super) fn is_managed(&self, present: &Present) -> bool {
        self.get(present, MANAGED) == Some("true")
    }

    /// Our own attributes as they are published: an operator's overwrite goes before our address.
    ///
    /// # Errors
    /// An overwrite that is no address.
    pub(super) fn overwritten(&self, mut attrs: LeaseAttrs, present: &Present) -> Result<LeaseAttrs, String> {
        if !attrs.public_ip.is_unspecified()
            && let Some(address) = self.address(present, PUBLIC_IP_OVERWRITE, "an IPv4 address")?
        {
            attrs.public_ip = address;
        }
        if attrs.public_ipv6.is_some()
            && let Some(address) = self.address(present, PUBLIC_IPV6_OVERWRITE, "an IPv6 address")?
        {
            attrs.public_ipv6 = Some(address);
        }
        Ok(attrs)
    }

    /// What stands where `--public-ip` and `--public-ipv6` would, and goes before them.
    ///
    /// # Errors
    /// A value that is no address.
    pub(super) fn node_addresses(&self, present: &Present) -> Result<PublicAddresses, String> {
        Ok(PublicAddresses {
            v4: self.address(present, NODE_PUBLIC_IP, "an IPv4 address")?,
            v6: self.address(present, NODE_PUBLIC_IPV6, "an IPv6 address")?,
        })
    }

    /// The annotations that must be written so that the Node says `attrs`; empty when it does.
    pub(super) fn missing(&self, attrs: &LeaseAttrs, present: &Present) -> Present {
        let mut wanted = self.of(attrs);
        wanted.retain(|name, value| present.get(name) != Some(value));
        wanted
    }

    /// Everything flanneld writes for these attributes (contract §4.1, write conditions included).
    fn of(&self, attrs: &LeaseAttrs) -> Present {
        let text = |data: &Option<Box<Value>>| data.as_deref().unwrap_or(&Value::Null).to_string();
        let backend = attrs.backend_type.as_str();
        let mut all = vec![(MANAGED, "true".to_owned()), (BACKEND_TYPE, backend.to_owned())];
        if backend != "vxlan" || attrs.backend_data.is_some() {
            all.push((BACKEND_DATA, text(&attrs.backend_data)));
            all.push((PUBLIC_IP, attrs.public_ip.to_string()));
        }
        let writes_v6 = match backend {
            "vxlan" | "wireguard" => attrs.backend_v6_data.is_some(),
            "host-gw" | "extension" => true,
            // In a network of only IPv6 it is all there is, where flanneld crashes (contract T17).
            _ => attrs.public_ip.is_unspecified(),
        };
        if let Some(address) = attrs.public_ipv6.filter(|_| writes_v6) {
            all.push((BACKEND_V6_DATA, text(&attrs.backend_v6_data)));
            all.push((PUBLIC_IPV6, address.to_string()));
        }
        all.into_iter().map(|(suffix, value)| (self.name(suffix), value)).collect()
    }

    /// Reads what some daemon wrote. A missing address reads as 0.0.0.0, which
    /// [`Peers`](crate::domain::peers::Peers) refuses.
    ///
    /// # Errors
    /// The annotation that can't be understood.
    pub(super) fn attrs(&self, present: &Present) -> Result<LeaseAttrs, String> {
        let address: Option<Ipv4Addr> = self.address(present, PUBLIC_IP, "an IPv4 address")?;
        let mut attrs = LeaseAttrs::new(address.unwrap_or(Ipv4Addr::UNSPECIFIED));
        attrs.public_ipv6 = self.address::<Ipv6Addr>(present, PUBLIC_IPV6, "an IPv6 address")?;
        attrs.backend_type = self.get(present, BACKEND_TYPE).unwrap_or_default().to_owned();
        attrs.backend_data = self.data(present, BACKEND_DATA)?;
        attrs.backend_v6_data = self.data(present, BACKEND_V6_DATA)?;
        Ok(attrs)
    }

    /// v0.7.0 wrote an empty text where today's daemons write `null`.
    fn data(&self, present: &Present, suffix: &str) -> Result<Option<Box<Value>>, String> {
        let Some(text) = self.get(present, suffix).filter(|text| !text.is_empty()) else { return Ok(None) };
        let wrong = |reason: String| format!("annotation {}: {reason}", self.name(suffix));
        if text.len() > MAX_VALUE_BYTES {
            return Err(wrong(format!(
                "it is {} bytes long, at most {MAX_VALUE_BYTES} are read",
                text.len()
            )));
        }
        match serde_json::from_str(text) {
            Ok(Value::Null) => Ok(None),
            Ok(value) => Ok(Some(Box::new(value))),
            Err(error) => Err(wrong(format!("{} is not JSON: {error}", shown(text)))),
        }
    }

    fn address<A: std::str::FromStr>(
        &self,
        present: &Present,
        suffix: &str,
        wanted: &str,
    ) -> Result<Option<A>, String> {
        let Some(text) = self.get(present, suffix).filter(|text| !text.is_empty()) else { return Ok(None) };
        text.parse()
            .map(Some)
            .map_err(|_| format!("annotation {} is {}, not {wanted}", self.name(suffix), shown(text)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flannel() -> Annotations {
        Annotations::new("flannel.alpha.coreos.com").unwrap()
    }

    fn present(pairs: &[(&str, &str)]) -> Present {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_prefix_gets_its_slash_and_its_dash() {
        let cases = [
            ("flannel.alpha.coreos.com", "flannel.alpha.coreos.com/"),
            ("flannel.alpha.coreos.com/", "flannel.alpha.coreos.com/"),
            ("org.com", "org.com/"),
            ("org.com/", "org.com/"),
            ("org.com/9", "org.com/9-"),
            ("org.com/9-", "org.com/9-"),
            ("org.com/a_b", "org.com/a_b-"),
            ("sub-1.org.com/blue", "sub-1.org.com/blue-"),
        ];
        for (given, prefix) in cases {
            assert_eq!(Annotations::new(given).unwrap().prefix, prefix, "{given}");
        }
        for wrong in
            ["", "org", "org/x", "org.com/a/b", "Org.com", "org.com/X", "org..com", ".com", "org.com/a b"]
        {
            let error = Annotations::new(wrong).unwrap_err();
            assert!(error.contains("example.com/blue"), "{wrong}: {error}");
        }
    }

    #[test]
    fn a_lease_without_backend_data_is_written_as_flanneld_writes_it() {
        let attrs = LeaseAttrs::new("10.99.0.11".parse().unwrap());
        let wanted = present(&[
            ("flannel.alpha.coreos.com/backend-data", "null"),
            ("flannel.alpha.coreos.com/backend-type", ""),
            ("flannel.alpha.coreos.com/kube-subnet-manager", "true"),
            ("flannel.alpha.coreos.com/public-ip", "10.99.0.11"),
        ]);
        assert_eq!(flannel().missing(&attrs, &Present::new()), wanted);
        assert_eq!(flannel().missing(&attrs, &wanted), Present::new());
        let mut changed = wanted.clone();
        changed.insert("flannel.alpha.coreos.com/public-ip".into(), "10.99.0.12".into());
        assert_eq!(flannel().missing(&attrs, &changed).len(), 1);
        assert_eq!(flannel().attrs(&wanted).unwrap(), attrs);
        assert!(flannel().is_managed(&wanted));
    }

    #[test]
    fn what_is_written_depends_on_the_backend_as_in_flanneld() {
        let names = |backend: &str, v4: Option<Value>, v6: Option<Value>| {
            let mut attrs = LeaseAttrs::new("10.0.0.1".parse().unwrap());
            attrs.public_ipv6 = Some("fd00::1".parse().unwrap());
            attrs.backend_type = backend.into();
            attrs.backend_data = v4.map(Box::new);
            attrs.backend_v6_data = v6.map(Box::new);
            let all = flannel().missing(&attrs, &Present::new());
            all.keys().map(|name| name.rsplit('/').next().unwrap().to_owned()).collect::<Vec<_>>().join(" ")
        };
        let data = || Some(serde_json::json!({"VNI":1,"VtepMAC":"5e:8d:9e:a8:a1:5a"}));
        assert_eq!(names("", None, None), "backend-data backend-type kube-subnet-manager public-ip");
        assert_eq!(
            names("host-gw", None, None),
            "backend-data backend-type backend-v6-data kube-subnet-manager public-ip public-ipv6"
        );
        assert_eq!(names("vxlan", None, None), "backend-type kube-subnet-manager");
        assert_eq!(names("vxlan", data(), None), "backend-data backend-type kube-subnet-manager public-ip");
        assert_eq!(
            names("vxlan", None, data()),
            "backend-type backend-v6-data kube-subnet-manager public-ipv6"
        );
    }

    #[test]
    fn backend_data_keeps_its_bytes() {
        let text = r#"{"VNI":1,"VtepMAC":"5e:8d:9e:a8:a1:5a"}"#;
        let node = present(&[
            ("flannel.alpha.coreos.com/backend-data", text),
            ("flannel.alpha.coreos.com/backend-type", "vxlan"),
            ("flannel.alpha.coreos.com/kube-subnet-manager", "true"),
            ("flannel.alpha.coreos.com/public-ip", "10.99.0.11"),
        ]);
        let attrs = flannel().attrs(&node).unwrap();
        assert_eq!(flannel().missing(&attrs, &Present::new()), node);
    }

    #[test]
    fn an_overwrite_goes_before_our_address_and_is_checked() {
        let attrs = LeaseAttrs::new("10.0.0.1".parse().unwrap());
        let node = present(&[("flannel.alpha.coreos.com/public-ip-overwrite", "203.0.113.9")]);
        let published = flannel().overwritten(attrs.clone(), &node).unwrap();
        assert_eq!(published.public_ip.to_string(), "203.0.113.9");
        assert_eq!(
            flannel().missing(&published, &node).get("flannel.alpha.coreos.com/public-ip").unwrap(),
            "203.0.113.9"
        );
        let node = present(&[("flannel.alpha.coreos.com/public-ip-overwrite", "nowhere")]);
        let error = flannel().overwritten(attrs, &node).unwrap_err();
        assert_eq!(
            error,
            "annotation flannel.alpha.coreos.com/public-ip-overwrite is nowhere, not an IPv4 address"
        );
        let node = present(&[("flannel.alpha.coreos.com/node-public-ip", "192.0.2.7")]);
        assert_eq!(flannel().node_addresses(&node).unwrap().v4, Some("192.0.2.7".parse().unwrap()));
    }

    #[test]
    fn what_can_not_be_read_is_named() {
        let cases = [
            ("public-ip", "10.0.0.300", "not an IPv4 address"),
            ("public-ipv6", "10.0.0.1", "not an IPv6 address"),
            ("backend-data", "{", "is not JSON"),
        ];
        for (suffix, value, reason) in cases {
            let name = format!("flannel.alpha.coreos.com/{suffix}");
            let error = flannel().attrs(&present(&[(&name, value)])).unwrap_err();
            assert!(error.contains(&name) && error.contains(reason), "{error}");
        }
        // v0.7.0's way to say nothing.
        let old = present(&[("flannel.alpha.coreos.com/backend-data", "")]);
        assert_eq!(flannel().attrs(&old).unwrap().backend_data, None);
    }
}
