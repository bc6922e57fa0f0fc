//! The interface under the overlay, followed while the agent runs.
//!
//! Every look at the host ends here. What has become of the interface is the domain's to say
//! ([`interface::follow`]); here the backend is made anew with it, so that the next comparison changes what has to
//! change: the tunnel's MTU, its programs and socket, subnet.env. A node that got another address publishes it in the
//! lease it holds; until the store shows it, both addresses are ours.

use super::{Agent, now, own_addresses};
use crate::backends::{self, BackendContext};
use crate::domain::interface::{self, ExternalInterface, Followed};
use crate::domain::peers::Changed;
use crate::host::Host;

/// What was last said about the interface.
#[derive(Debug, Default)]
pub(super) struct Underlay {
    away: Option<String>,
    preferred: Option<String>,
}

impl Underlay {
    /// Why it carries nothing for now.
    pub(super) fn away(&self) -> Option<&str> {
        self.away.as_deref()
    }

    /// The interface a restart would choose, when it is another one.
    pub(super) fn preferred(&self) -> Option<&str> {
        self.preferred.as_deref()
    }
}

impl<H: Host> Agent<H> {
    pub(super) async fn follow_interface(&mut self) {
        let facts = match self.host.facts(&self.node.selection.selectors).await {
            Ok(facts) => facts,
            Err(error) => {
                tracing::debug!("the interfaces can't be read, trying again: {error}");
                return;
            }
        };
        let (current, selection) = (&self.node.context.interface, &self.node.selection);
        let preferred = interface::preferred(current, selection, &facts);
        if preferred != self.underlay.preferred {
            if let Some(name) = &preferred {
                tracing::warn!(
                    "by the same flags {name} would be chosen now; {} stays in use until the agent is started again",
                    current.name
                );
            }
            self.underlay.preferred = preferred;
        }
        match interface::follow(current, selection, &facts) {
            Followed::There(found) if found == *current => self.interface_is_there(),
            Followed::There(found) => match self.take_interface(found) {
                Ok(()) => self.interface_is_there(),
                Err(error) => self.interface_is_away(error.to_string()),
            },
            Followed::Away(reason) => self.interface_is_away(reason),
        }
    }

    fn interface_is_there(&mut self) {
        if self.underlay.away.take().is_some() {
            tracing::info!("interface {} is back", self.node.context.interface);
            self.health.done("interface");
            self.retries.hurry(now());
        }
    }

    fn interface_is_away(&mut self, reason: String) {
        if self.underlay.away.as_ref() != Some(&reason) {
            tracing::warn!("waiting for the interface: {reason}");
            self.health.wait("interface", reason.clone());
            self.underlay.away = Some(reason);
        }
    }

    fn take_interface(&mut self, found: ExternalInterface) -> Result<(), backends::BackendError> {
        let context = BackendContext { interface: found, ..self.node.context.clone() };
        let backend = backends::rebuild(&self.node.config, context.clone())?;
        tracing::info!("interface {} is now {}", self.node.context.interface, context.interface);
        let (before, after) = (self.node.backend.mtu(), backend.mtu());
        if before != after {
            tracing::info!("MTU for pods was {before} and is {after}: {}", backend.mtu_reason());
        }
        let attrs = backend.lease_attrs();
        if !context.interface.addresses().eq(self.node.context.interface.addresses()) {
            self.node.store.reconnect();
        }
        let renumbered = !attrs.names_the_node_of(&self.node.backend.lease_attrs());
        self.node.context = context;
        self.node.backend = backend;
        self.paths.resize(self.node.backend.probed_mtu());
        self.retries.hurry(now());
        if renumbered {
            let to: Vec<String> =
                self.node.context.interface.public_addresses().map(|address| address.to_string()).collect();
            tracing::info!("this node is renumbered to {}; its lease is written again", to.join(" and "));
            self.health.wait("lease", "our lease does not name this node's new address yet");
            self.tenure.publish(&self.node);
        }
        self.renumber_peers();
        Ok(())
    }

    /// A peer that claims an address of ours is none.
    pub(super) fn renumber_peers(&mut self) {
        if self.peers.renumber(&own_addresses(&self.node.context.interface)) == Changed::Yes {
            self.peers_have_paths();
            self.report_refusals();
        }
    }
}
