//! Nodes as leases: what the watch of Nodes says, folded into [`LeaseEvent`]s. Pure.
//!
//! A Node is a lease when a flannel daemon speaks for it (its marker annotation) and Kubernetes has given it a pod
//! CIDR. Nodes are told apart by name, leases by subnet: a Node whose pod CIDR changes is one lease gone and another
//! come, and of two Nodes with one pod CIDR only one can be right. That is our own, else the one known first; the other
//! is reported, and looked at again when the first goes.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;

use super::annotations::Annotations;
use crate::domain::lease::{Lease, LeaseEvent, Subnets, Unreadable};
use crate::domain::wording::shown;

/// The condition that keeps pods off a node whose network does not work yet.
const NETWORK_UNAVAILABLE: &str = "NetworkUnavailable";

/// Which families the cluster's network has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Families {
    pub(super) v4: bool,
    pub(super) v6: bool,
}

/// All Nodes that are, or should be, leases.
#[derive(Debug)]
pub(super) struct Nodes {
    own: String,
    annotations: Annotations,
    families: Families,
    claims: BTreeMap<String, Claim>,
    /// Who has a subnet.
    owners: BTreeMap<Subnets, String>,
}

#[derive(Clone, Debug, PartialEq)]
enum Claim {
    Lease(Lease),
    /// Its subnets belong to another Node.
    Beaten(Lease),
    Unreadable(String),
}

impl Nodes {
    pub(super) fn new(own: &str, annotations: Annotations, families: Families) -> Self {
        Self { own: own.to_owned(), annotations, families, claims: BTreeMap::new(), owners: BTreeMap::new() }
    }

    /// The name of our own Node.
    pub(super) fn own(&self) -> &str {
        &self.own
    }

    /// Takes a complete list over: what is not in it is gone.
    pub(super) fn replace(&mut self, nodes: &[Node]) -> LeaseEvent {
        let listed: BTreeMap<&str, &Node> = nodes.iter().map(|node| (name(node), node)).collect();
        self.claims.retain(|name, _| listed.contains_key(name.as_str()));
        let claims = &self.claims;
        self.owners.retain(|_, owner| claims.contains_key(owner));
        for node in nodes {
            self.fold(node);
        }
        self.snapshot()
    }

    /// Everything there is.
    pub(super) fn snapshot(&self) -> LeaseEvent {
        let (mut leases, mut unreadable) = (Vec::new(), Vec::new());
        for (name, claim) in &self.claims {
            match claim {
                Claim::Lease(lease) => leases.push(lease.clone()),
                Claim::Beaten(lease) => unreadable.push(self.beaten(name, lease.subnets)),
                Claim::Unreadable(reason) => unreadable.push(unreadable_node(name, reason)),
            }
        }
        LeaseEvent::Snapshot(leases, unreadable)
    }

    /// A Node came or changed.
    pub(super) fn put(&mut self, node: &Node) -> Vec<LeaseEvent> {
        let aside = self.aside();
        let events = self.fold(node);
        self.told(events, &aside)
    }

    /// A Node was deleted.
    pub(super) fn remove(&mut self, node: &Node) -> Vec<LeaseEvent> {
        let aside = self.aside();
        let events = self.take_away(name(node), None);
        self.told(events, &aside)
    }

    /// Nodes that are no leases although they should be.
    fn aside(&self) -> BTreeSet<String> {
        let aside = self.claims.iter().filter(|(_, claim)| !matches!(claim, Claim::Lease(_)));
        aside.map(|(name, _)| name.clone()).collect()
    }

    /// That a Node is no longer put aside can only be told by a snapshot.
    fn told(&self, events: Vec<LeaseEvent>, before: &BTreeSet<String>) -> Vec<LeaseEvent> {
        if before.is_subset(&self.aside()) { events } else { vec![self.snapshot()] }
    }

    fn fold(&mut self, node: &Node) -> Vec<LeaseEvent> {
        let name = name(node);
        let mut claim = self.claim(node);
        if let Some(Claim::Lease(lease)) = &claim
            && !self.may_have(name, lease.subnets)
        {
            claim = Some(Claim::Beaten(lease.clone()));
        }
        if self.claims.get(name) == claim.as_ref() {
            return Vec::new();
        }
        let kept = match &claim {
            Some(Claim::Lease(lease)) => Some(lease.subnets),
            _ => None,
        };
        let mut events = self.take_away(name, kept);
        match &claim {
            Some(Claim::Lease(lease)) => {
                if let Some(other) = self.owners.insert(lease.subnets, name.to_owned())
                    && other != name
                    && let Some(Claim::Lease(beaten)) = self.claims.remove(&other)
                {
                    events.push(LeaseEvent::Unreadable(self.beaten(&other, beaten.subnets)));
                    self.claims.insert(other, Claim::Beaten(beaten));
                }
                events.push(LeaseEvent::Added(lease.clone()));
            }
            Some(Claim::Beaten(lease)) => {
                events.push(LeaseEvent::Unreadable(self.beaten(name, lease.subnets)));
            }
            Some(Claim::Unreadable(reason)) => {
                events.push(LeaseEvent::Unreadable(unreadable_node(name, reason)));
            }
            None => {}
        }
        if let Some(claim) = claim {
            self.claims.insert(name.to_owned(), claim);
        }
        events
    }

    /// Forgets a Node's claim; its subnets go to the next that claims them, unless they are the ones it `keeps`.
    fn take_away(&mut self, name: &str, keeps: Option<Subnets>) -> Vec<LeaseEvent> {
        let Some(Claim::Lease(lease)) = self.claims.remove(name) else { return Vec::new() };
        if keeps == Some(lease.subnets) {
            return Vec::new();
        }
        self.owners.remove(&lease.subnets);
        let mut events = vec![LeaseEvent::Removed(lease.subnets)];
        let next = self.claims.iter_mut().find_map(|(name, claim)| match claim {
            Claim::Beaten(other) if other.subnets == lease.subnets => Some((name.clone(), claim)),
            _ => None,
        });
        if let Some((name, claim)) = next
            && let Claim::Beaten(lease) = claim.clone()
        {
            *claim = Claim::Lease(lease.clone());
            self.owners.insert(lease.subnets, name);
            events.push(LeaseEvent::Added(lease));
        }
        events
    }

    fn may_have(&self, name: &str, subnets: Subnets) -> bool {
        name == self.own || self.owners.get(&subnets).is_none_or(|owner| owner == name)
    }

    /// `None` when no flannel daemon speaks for the Node.
    fn claim(&self, node: &Node) -> Option<Claim> {
        let present = node.metadata.annotations.as_ref()?;
        if !self.annotations.is_managed(present) {
            return None;
        }
        let read = || {
            let attrs = self.annotations.attrs(present)?;
            if name(node) == self.own
                && self.annotations.overwritten(attrs.clone(), present).is_ok_and(|wanted| wanted != attrs)
            {
                // Changed since we wrote: taken away, our lease is taken again, and written anew.
                return Ok(None);
            }
            let subnets = pod_subnets(node, self.families)?;
            // Kubernetes takes no lease back, and a Node's version changes with every heartbeat of its kubelet.
            Ok(Some(Lease { subnets, attrs, expires: None, revision: 0 }))
        };
        match read() {
            Ok(lease) => lease.map(Claim::Lease),
            Err(reason) => Some(Claim::Unreadable(reason)),
        }
    }

    fn beaten(&self, name: &str, subnets: Subnets) -> Unreadable {
        let owner = self.owners.get(&subnets).map_or("another", String::as_str);
        unreadable_node(name, &format!("its pod CIDR {subnets} is node {owner}'s, which was known first"))
    }
}

fn unreadable_node(name: &str, reason: &str) -> Unreadable {
    Unreadable { key: format!("node {name}"), reason: reason.to_owned() }
}

/// The Node's name; the API server never gives one without.
pub(super) fn name(node: &Node) -> &str {
    node.metadata.name.as_deref().unwrap_or_default()
}

/// The pod CIDRs of the families the network has: `podCIDRs`, else `podCIDR`; the last of each family.
///
/// # Errors
/// Which one is missing or can't be read.
pub(super) fn pod_subnets(node: &Node, families: Families) -> Result<Subnets, String> {
    let spec = node.spec.as_ref();
    let several = spec.and_then(|spec| spec.pod_cidrs.clone()).unwrap_or_default();
    let one = spec.and_then(|spec| spec.pod_cidr.clone()).filter(|text| !text.is_empty());
    let texts = if several.is_empty() { one.into_iter().collect() } else { several };
    let mut subnets = Subnets { v4: None, v6: None };
    for text in &texts {
        match text.parse::<IpNet>().map(|net| net.trunc()) {
            Ok(IpNet::V4(net)) if families.v4 => subnets.v4 = Some(net),
            Ok(IpNet::V6(net)) if families.v6 => subnets.v6 = Some(net),
            Ok(_) => {}
            Err(_) => return Err(format!("its pod CIDR {} is no subnet", shown(text))),
        }
    }
    let missing = match (families.v4 && subnets.v4.is_none(), families.v6 && subnets.v6.is_none()) {
        (false, false) => return Ok(subnets),
        (true, false) => "IPv4",
        (false, true) => "IPv6",
        (true, true) => "IPv4 and IPv6",
    };
    let found = if texts.is_empty() { "none at all".to_owned() } else { shown(&texts.join(", ")) };
    Err(format!("it has no {missing} pod CIDR (spec.podCIDRs: {found})"))
}

/// Whether the Node already says that its network works, in flanneld's words.
pub(super) fn says_network_is_up(node: &Node) -> bool {
    let conditions = node.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions
        .into_iter()
        .flatten()
        .any(|condition| condition.type_ == NETWORK_UNAVAILABLE && condition.status == "False")
}

/// The patch that says so (contract §4.3); `now` in RFC 3339.
pub(super) fn network_is_up(now: &str) -> serde_json::Value {
    serde_json::json!({"status": {"conditions": [{
        "type": NETWORK_UNAVAILABLE,
        "status": "False",
        "reason": "FlannelIsUp",
        "message": "Flannel is running on this node",
        "lastTransitionTime": now,
        "lastHeartbeatTime": now,
    }]}})
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const V4: Families = Families { v4: true, v6: false };

    fn nodes() -> Nodes {
        Nodes::new("h1", Annotations::new("flannel.alpha.coreos.com").unwrap(), V4)
    }

    fn node(name: &str, cidrs: &[&str], ip: &str) -> Node {
        serde_json::from_value(json!({
            "metadata": {"name": name, "resourceVersion": "7", "annotations": {
                "flannel.alpha.coreos.com/backend-data": "null",
                "flannel.alpha.coreos.com/backend-type": "",
                "flannel.alpha.coreos.com/kube-subnet-manager": "true",
                "flannel.alpha.coreos.com/public-ip": ip,
            }},
            "spec": {"podCIDR": cidrs.first(), "podCIDRs": cidrs},
        }))
        .unwrap()
    }

    /// `+10.244.2.0-24 10.0.0.2`, `-10.244.2.0-24`, `! node h3: why`
    fn told(events: &[LeaseEvent]) -> Vec<String> {
        events
            .iter()
            .map(|event| match event {
                LeaseEvent::Added(lease) => format!("+{} {}", lease.subnets, lease.attrs.public_ip),
                LeaseEvent::Removed(subnets) => format!("-{subnets}"),
                LeaseEvent::Unreadable(entry) => format!("! {}: {}", entry.key, entry.reason),
                LeaseEvent::Snapshot(leases, unreadable) => {
                    let leases: Vec<String> = leases
                        .iter()
                        .map(|lease| format!("{} {}", lease.subnets, lease.attrs.public_ip))
                        .collect();
                    format!("={} ! {}", leases.join(", "), unreadable.len())
                }
                other => format!("{other:?}"),
            })
            .collect()
    }

    #[test]
    fn a_node_that_changes_nothing_of_ours_tells_nothing() {
        let mut nodes = nodes();
        let mut h2 = node("h2", &["10.244.2.0/24"], "10.0.0.2");
        assert_eq!(told(&nodes.put(&h2)), ["+10.244.2.0-24 10.0.0.2"]);
        // A kubelet's heartbeat, every few seconds and on every node.
        h2.metadata.labels = Some(BTreeMap::from([("a".into(), "b".into())]));
        assert!(nodes.put(&h2).is_empty());
        let moved = node("h2", &["10.244.2.0/24"], "10.0.0.9");
        assert_eq!(told(&nodes.put(&moved)), ["+10.244.2.0-24 10.0.0.9"]);
        assert_eq!(told(&nodes.remove(&moved)), ["-10.244.2.0-24"]);
        assert!(nodes.remove(&moved).is_empty());
    }

    #[test]
    fn a_node_whose_pod_cidr_changes_is_one_lease_gone_and_another_come() {
        let mut nodes = nodes();
        nodes.put(&node("h2", &["10.244.2.0/24"], "10.0.0.2"));
        let events = nodes.put(&node("h2", &["10.244.7.0/24"], "10.0.0.2"));
        assert_eq!(told(&events), ["-10.244.2.0-24", "+10.244.7.0-24 10.0.0.2"]);
    }

    #[test]
    fn of_two_nodes_with_one_pod_cidr_the_first_has_it_until_it_goes() {
        let mut nodes = nodes();
        let (h2, h3) =
            (node("h2", &["10.244.2.0/24"], "10.0.0.2"), node("h3", &["10.244.2.0/24"], "10.0.0.3"));
        nodes.put(&h3);
        assert_eq!(
            told(&nodes.put(&h2)),
            ["! node h2: its pod CIDR 10.244.2.0-24 is node h3's, which was known first"]
        );
        assert!(nodes.put(&h2).is_empty());
        assert_eq!(told(&nodes.remove(&h3)), ["=10.244.2.0-24 10.0.0.2 ! 0"]);
    }

    #[test]
    fn our_own_pod_cidr_is_ours_whoever_was_first() {
        let mut nodes = nodes();
        nodes.put(&node("h3", &["10.244.1.0/24"], "10.0.0.3"));
        let events = nodes.put(&node("h1", &["10.244.1.0/24"], "10.0.0.1"));
        assert_eq!(
            told(&events),
            [
                "! node h3: its pod CIDR 10.244.1.0-24 is node h1's, which was known first",
                "+10.244.1.0-24 10.0.0.1"
            ]
        );
    }

    #[test]
    fn nodes_of_others_and_nodes_that_cannot_be_read_hide_nothing() {
        let mut nodes = nodes();
        let mut foreign = node("h4", &["10.244.4.0/24"], "10.0.0.4");
        foreign.metadata.annotations = None;
        let no_cidr = node("h5", &[], "10.0.0.5");
        let good = node("h2", &["10.244.2.0/24"], "10.0.0.2");
        let LeaseEvent::Snapshot(leases, unreadable) = nodes.replace(&[foreign, no_cidr.clone(), good])
        else {
            panic!("no snapshot");
        };
        assert_eq!(leases.len(), 1);
        assert_eq!(
            unreadable,
            [unreadable_node("h5", "it has no IPv4 pod CIDR (spec.podCIDRs: none at all)")]
        );
        assert_eq!(
            told(&nodes.put(&node("h5", &["10.244.5.0/24"], "10.0.0.5"))),
            ["=10.244.2.0-24 10.0.0.2, 10.244.5.0-24 10.0.0.5 ! 0"]
        );
        assert_eq!(
            told(&nodes.put(&no_cidr)),
            ["-10.244.5.0-24", "! node h5: it has no IPv4 pod CIDR (spec.podCIDRs: none at all)"]
        );
    }

    #[test]
    fn a_list_takes_away_what_it_does_not_have() {
        let mut nodes = nodes();
        nodes.put(&node("h2", &["10.244.2.0/24"], "10.0.0.2"));
        nodes.put(&node("h3", &["10.244.2.0/24"], "10.0.0.3"));
        let LeaseEvent::Snapshot(leases, unreadable) =
            nodes.replace(&[node("h3", &["10.244.2.0/24"], "10.0.0.3")])
        else {
            panic!("no snapshot");
        };
        assert_eq!(leases[0].attrs.public_ip.to_string(), "10.0.0.3");
        assert!(unreadable.is_empty());
    }

    #[test]
    fn both_families_come_from_pod_cidrs_and_one_from_pod_cidr() {
        let both = Families { v4: true, v6: true };
        let dual = node("h2", &["10.244.2.0/24", "fd00:10:244:2::/64"], "10.0.0.2");
        assert_eq!(pod_subnets(&dual, both).unwrap().to_string(), "10.244.2.0-24&fd00:10:244:2::-64");
        assert_eq!(pod_subnets(&dual, V4).unwrap().to_string(), "10.244.2.0-24");
        let mut old = node("h2", &["10.244.2.0/24"], "10.0.0.2");
        old.spec.as_mut().unwrap().pod_cidrs = None;
        assert_eq!(pod_subnets(&old, V4).unwrap().to_string(), "10.244.2.0-24");
        assert_eq!(
            pod_subnets(&old, both).unwrap_err(),
            "it has no IPv6 pod CIDR (spec.podCIDRs: 10.244.2.0/24)"
        );
        let wrong = node("h2", &["10.244.2.0"], "10.0.0.2");
        assert_eq!(pod_subnets(&wrong, V4).unwrap_err(), "its pod CIDR 10.244.2.0 is no subnet");
    }

    #[test]
    fn an_overwrite_that_changes_later_makes_us_write_again() {
        let mut nodes = nodes();
        let mut own = node("h1", &["10.244.1.0/24"], "10.0.0.1");
        assert_eq!(told(&nodes.put(&own)), ["+10.244.1.0-24 10.0.0.1"]);
        if let Some(annotations) = own.metadata.annotations.as_mut() {
            annotations.insert("flannel.alpha.coreos.com/public-ip-overwrite".into(), "203.0.113.9".into());
        }
        assert_eq!(told(&nodes.put(&own)), ["-10.244.1.0-24"]);
    }
}
