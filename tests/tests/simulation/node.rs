//! One simulated node: the real loop on a host that only remembers.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use flannel_agent::agent::{self, Agent, AgentOptions, Company, End, Orders};
use flannel_agent::backends::{self, BackendContext};
use flannel_agent::domain::host_state::TunnelOptions;
use flannel_agent::domain::interface::{
    ExternalInterface, Families, HostFacts, Interface, InterfaceAddress, PublicAddresses, Selection,
};
use flannel_agent::health::Health;
use flannel_agent::host::fake::FakeHost;
use flannel_agent::startup;
use flannel_agent::stores::memory::MemoryStore;
use flannel_agent::stores::{LeaseRequest, LeaseStore};
use flannel_agent::subnet_env::PreviousSubnets;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::link::{Link, Trouble};

/// A node, its agent running or not.
pub(crate) struct Node {
    pub(crate) ip: Ipv4Addr,
    link: Link,
    host: FakeHost,
    health: Health,
    subnet_file: PathBuf,
    task: Option<JoinHandle<()>>,
    /// Since when nothing has been wrong with its link and its agent has run.
    well_since: Instant,
    is_well: bool,
}

impl Node {
    pub(crate) fn new(number: u8, store: &MemoryStore, files: &Path) -> Self {
        let ip = Ipv4Addr::new(192, 0, 2, number);
        let host = FakeHost::new();
        host.rewire(|facts| *facts = uplink(ip));
        Self {
            ip,
            link: Link::new(store),
            host,
            health: Health::default(),
            subnet_file: files.join(format!("{number}.env")),
            task: None,
            well_since: Instant::now(),
            is_well: true,
        }
    }

    /// As the daemon starts: configuration, lease, loop.
    pub(crate) fn start(&mut self) {
        self.health.forget();
        self.health.wait("subnet.env", "subnet.env is not written yet");
        self.well_since = Instant::now();
        let life = live(
            self.ip,
            self.link.clone(),
            self.host.clone(),
            self.health.clone(),
            self.subnet_file.clone(),
        );
        self.task = Some(tokio::spawn(async move {
            // Ended by a lost lease or a store that refuses: the supervisor starts it again.
            let _ = life.await;
        }));
    }

    /// SIGKILL: no goodbye, and everything stays on the host.
    pub(crate) fn kill(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.task.as_ref().is_none_or(JoinHandle::is_finished)
    }

    pub(crate) fn trouble(&mut self, trouble: Trouble) {
        self.link.set(trouble);
        let is_well = trouble == Trouble::None;
        if is_well != self.is_well {
            self.well_since = Instant::now();
        }
        self.is_well = is_well;
    }

    pub(crate) fn compact(&self) {
        self.link.compact();
    }

    /// It runs and has reached the store for so long, and thinks that it is ready.
    pub(crate) fn knows_since(&self, time: Duration) -> bool {
        !self.has_ended()
            && self.is_well
            && self.well_since.elapsed() >= time
            && self.health.reasons().is_empty()
    }

    /// `10.1.7.0/24`, as it wrote it last.
    pub(crate) fn subnet(&self) -> Option<String> {
        PreviousSubnets::read(&self.subnet_file).subnet.map(|subnet| subnet.to_string())
    }

    pub(crate) fn reasons(&self) -> Vec<String> {
        match self.has_ended() {
            true => vec!["it does not run".into()],
            false => self.health.reasons(),
        }
    }

    /// `10.1.8.0/24 via 192.0.2.8`, sorted.
    pub(crate) fn routes(&self) -> Vec<String> {
        let text = self.host.to_string();
        let mut routes: Vec<String> = text
            .lines()
            .filter_map(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                let via = words.iter().position(|word| *word == "via")?;
                Some(format!("{} via {}", words.get(via.checked_sub(1)?)?, words.get(via + 1)?))
            })
            .collect();
        routes.sort();
        routes
    }
}

async fn live(
    ip: Ipv4Addr,
    link: Link,
    host: FakeHost,
    health: Health,
    subnet_file: PathBuf,
) -> anyhow::Result<End> {
    let store: Arc<dyn LeaseStore> = Arc::new(link);
    let config = startup::wait_for_config(store.as_ref(), &health).await?;
    let interface = ExternalInterface {
        name: "eth0".to_owned(),
        index: 2,
        mtu: 1500,
        address: Some(ip),
        public_ip: Some(ip),
        address_v6: None,
        public_ipv6: None,
    };
    let context = BackendContext {
        interface,
        tunnel_device: "flannel0".to_owned(),
        tunnel: TunnelOptions::default(),
        tunnel_mtu: None,
    };
    let backend = backends::choose(&config, context.clone())?;
    let request = LeaseRequest {
        config: config.clone(),
        attrs: backend.lease_attrs(),
        previous: PreviousSubnets::read(&subnet_file).subnets(),
        previous_only: false,
    };
    let lease = startup::take_lease(store.as_ref(), &request, &health).await?;
    let selection =
        Selection { selectors: Vec::new(), public: PublicAddresses::default(), families: Families::V4 };
    let node = agent::Node { config, selection, context, backend, store, lease };
    let options = AgentOptions {
        subnet_file,
        renew_margin: Duration::from_secs(3600),
        path_mtu_lifetime: Duration::from_secs(600),
        company: Company::AmongNetworks,
    };
    let (_ask, mut questions) = mpsc::channel(1);
    Ok(Agent::new(node, host, options, health).run(Orders::default(), &mut questions).await)
}

/// A host whose only interface is the default route's.
fn uplink(ip: Ipv4Addr) -> HostFacts {
    let address = InterfaceAddress {
        address: ip.into(),
        prefix_len: 24,
        dynamic: false,
        temporary: false,
        deprecated: false,
    };
    let eth0 = Interface { name: "eth0".to_owned(), index: 2, mtu: 1500, up: true, addresses: vec![address] };
    HostFacts { interfaces: vec![eth0], default_route_v4: Some(2), ..HostFacts::default() }
}
