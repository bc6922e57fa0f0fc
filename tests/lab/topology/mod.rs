//! Hosts, the underlay between them, and pods.
//!
//! ```text
//!   pod ─ eth0 ══ pod0 ─ cni0 ─ [host h1] ─ eth0 ══ sw-h1 ─┐
//!                                            10.99.0.11    br0  [switch]  etcd on 10.99.0.1
//!   pod ─ eth0 ══ pod0 ─ cni0 ─ [host h2] ─ eth0 ══ sw-h2 ─┘
//! ```
//!
//! Each box is a network namespace, `══` a veth pair. The addresses are those of the recordings in `fixtures/`, so
//! recorded packets can be played back. Pods are attached once their host has a subnet, with the bridge and the MTU of
//! its `subnet.env`, as a container runtime does.

pub mod cards;
mod lab;

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MsFlags, mount};

use crate::{
    agent::AgentFiles,
    bpf::{self, XdpLink},
    datastore::Datastore,
    lease_server::LeaseServer,
    namespace::Namespace,
};

pub use self::lab::{Host, Lab, Pod};

/// Port of a lab's flannel server.
const SERVER_PORT: u16 = 8888;

/// Overlay range of a lab that asks for no other configuration.
pub const NETWORK: &str = "10.244.0.0/16";

/// What lies between the hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Underlay {
    /// A bridge in a namespace of its own; any number of hosts.
    Bridge,
    /// Two hosts, one veth pair: packets cross whole, up to 64 KiB, as between containers of one machine. etcd is reached
    /// through a second device, `mgmt0`.
    Direct,
    /// Two hosts, each with a veth pair into the switch, where XDP hands every frame from one to the other: what a network
    /// card sees, nothing longer than the MTU, every checksum finished. etcd as above.
    Wire,
    /// Two hosts, each with a network card of this machine ([`cards`]). etcd as above.
    Cards,
    /// Two hosts in networks of their own (10.99.0.11, 10.99.1.12), and between their routers a link that carries no more
    /// than so many bytes. etcd is on the first router, which is the switch.
    Narrow(u32),
}

/// How pods hang on their host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PodLink {
    /// Ports of the bridge `cni0` (CNI `bridge` plugin, Docker).
    Bridge,
    /// A routed veth each (CNI `ptp` plugin).
    Routed,
}

/// Where the lab's agents have their leases from.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Store {
    Etcd,
    /// A flannel server of this binary, its leases in a file.
    Server(PathBuf),
    Nothing,
}

/// A lab to be.
#[derive(Clone, Debug)]
pub struct Plan {
    name: String,
    hosts: u8,
    underlay: Underlay,
    pods: PodLink,
    mtu: u32,
    rp_filter: u8,
    config: Option<String>,
    store: Store,
    listed: bool,
}

impl Plan {
    /// How many (1 to 200); else 2.
    #[must_use]
    pub fn hosts(mut self, hosts: u8) -> Self {
        self.hosts = hosts;
        self
    }

    /// Else a bridge.
    #[must_use]
    pub fn underlay(mut self, underlay: Underlay) -> Self {
        self.underlay = underlay;
        self
    }

    /// Else ports of a bridge.
    #[must_use]
    pub fn pods(mut self, pods: PodLink) -> Self {
        self.pods = pods;
        self
    }

    /// MTU of the underlay, bytes; else 1500.
    #[must_use]
    pub fn mtu(mut self, mtu: u32) -> Self {
        self.mtu = mtu;
        self
    }

    /// `rp_filter` of the hosts (1 is strict); else 0.
    #[must_use]
    pub fn rp_filter(mut self, value: u8) -> Self {
        self.rp_filter = value;
        self
    }

    /// What stands in etcd before the first agent starts; else the udp backend on [`NETWORK`].
    #[must_use]
    pub fn config(mut self, json: &str) -> Self {
        self.config = Some(json.to_owned());
        self
    }

    /// Nothing stands in etcd.
    #[must_use]
    pub fn without_config(mut self) -> Self {
        self.config = None;
        self
    }

    /// No etcd runs: for hosts without agents ([`crate::reference`]).
    #[must_use]
    pub fn without_etcd(mut self) -> Self {
        self.config = None;
        self.store = Store::Nothing;
        self
    }

    /// No etcd: leases come from a flannel server, which is `binary` with `--listen`.
    #[must_use]
    pub fn served_by(mut self, binary: &Path) -> Self {
        self.store = Store::Server(binary.to_owned());
        self
    }

    /// `ip netns` knows the hosts as `NAME-h1`, … and the pods as `NAME-pod1`, …
    #[must_use]
    pub fn listed(mut self) -> Self {
        self.listed = true;
        self
    }

    /// Builds the hosts and starts etcd.
    ///
    /// # Errors
    /// Not root, a missing program (`ip`, `etcd`, `etcdctl`), or what the kernel refused.
    pub fn build(self) -> Result<Lab> {
        self.assemble().context("build the lab")
    }

    fn assemble(self) -> Result<Lab> {
        ensure!((1..=200).contains(&self.hosts), "a lab has 1 to 200 hosts, not {}", self.hosts);
        ensure!(
            self.hosts == 2 || self.underlay == Underlay::Bridge,
            "a link joins 2 hosts, not {}",
            self.hosts
        );
        let folder = tempfile::Builder::new()
            .prefix(&format!("{}-", self.name))
            .tempdir()
            .context("make the lab's folder")?;

        let switch = Arc::new(self.namespace("switch")?);
        let (underlay, store) = (Ipv4Addr::new(10, 99, 0, 1), Ipv4Addr::new(10, 98, 0, 1));
        switch.ip(&format!("link add br0 mtu {} type bridge", self.mtu))?;
        switch.ip("link set br0 up")?;
        let store = match self.underlay {
            Underlay::Bridge | Underlay::Narrow(_) => underlay,
            Underlay::Direct | Underlay::Wire | Underlay::Cards => store,
        };
        switch.ip(&format!("addr add {store}/24 dev br0"))?;

        let far = match self.underlay {
            Underlay::Narrow(mtu) => Some(Arc::new(self.far_router(&switch, mtu)?)),
            _ => None,
        };
        let mut hosts: Vec<Host> = Vec::new();
        for number in 1..=self.hosts {
            let side = if number == 2 { far.as_deref().unwrap_or(&switch) } else { &switch };
            hosts.push(self.host(number, folder.path(), side)?);
        }
        if let [first, second] = hosts.as_slice()
            && self.underlay == Underlay::Direct
        {
            first.netns.ip(&format!(
                "link add eth0 mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}",
                second.netns.path(),
                mtu = self.mtu
            ))?;
        }
        if self.underlay == Underlay::Cards {
            cards::hand_out(&hosts, self.mtu)?;
        }
        let wire = if self.underlay == Underlay::Wire { self.wire(&hosts, &switch)? } else { Vec::new() };
        for host in &hosts {
            host.netns.ip(&format!("addr add {}/24 dev eth0", host.address))?;
            host.netns.ip("link set eth0 up")?;
            if matches!(self.underlay, Underlay::Bridge | Underlay::Narrow(_)) {
                // Names eth0 as the interface to choose by itself. Behind the switch is the other router, if anything.
                let [a, b, c, _] = host.address.octets();
                let router = Ipv4Addr::new(a, b, c, 1);
                host.netns.ip(&format!("route add default via {router} dev eth0"))?;
            }
        }

        let mut datastore = Datastore::new(&switch, store, folder.path());
        let mut server = None;
        if let Store::Server(binary) = &self.store {
            let address = (store, SERVER_PORT).into();
            let server = server.insert(LeaseServer::new(&switch, binary, address, folder.path()));
            if let Some(config) = &self.config {
                server.put_config(config)?;
            }
            server.restart()?;
        } else if self.store == Store::Etcd {
            datastore.restart()?;
            if let Some(config) = &self.config {
                datastore.put_config(config)?;
            }
        }
        let flag = match &server {
            Some(server) => format!("--remote={}", server.address()),
            None => format!("--etcd-endpoints={}", datastore.endpoint()),
        };
        for host in &mut hosts {
            host.store = vec![flag.clone()];
        }
        Ok(Lab { hosts, server, datastore, _wire: wire, far, switch, folder })
    }

    /// The second host's router, and the link of `mtu` bytes to the first's, `narrow` at both ends.
    fn far_router(&self, switch: &Namespace, mtu: u32) -> Result<Namespace> {
        let far = self.namespace("far")?;
        far.ip(&format!("link add br0 mtu {} type bridge", self.mtu))?;
        far.ip("link set br0 up")?;
        far.ip("addr add 10.99.1.1/24 dev br0")?;
        switch.ip(&format!(
            "link add narrow mtu {mtu} type veth peer name narrow mtu {mtu} netns {}",
            far.path()
        ))?;
        for (router, own, other, behind) in [
            (switch, "10.97.0.1", "10.97.0.2", "10.99.1.0/24"),
            (&far, "10.97.0.2", "10.97.0.1", "10.99.0.0/24"),
        ] {
            router.ip(&format!("addr add {own}/30 dev narrow"))?;
            router.ip("link set narrow up")?;
            router.ip(&format!("route add {behind} via {other}"))?;
            router.sysctl("net.ipv4.ip_forward", "1")?;
        }
        Ok(far)
    }

    /// `eth0` of each host, and the switch's redirects between their other ends.
    fn wire(&self, hosts: &[Host], switch: &Namespace) -> Result<Vec<XdpLink>> {
        for host in hosts {
            host.netns.ip(&format!(
                "link add eth0 mtu {mtu} type veth peer name wire-{} mtu {mtu} netns {}",
                host.name(),
                switch.path(),
                mtu = self.mtu
            ))?;
            // Segmentation and checksums before the wire, GRO behind it: a redirected frame keeps nothing unfinished.
            host.netns.offload("eth0", "tx off gro on")?;
            switch.ip(&format!("link set wire-{} up", host.name()))?;
        }
        [("wire-h1", "wire-h2"), ("wire-h2", "wire-h1")]
            .map(|(from, to)| bpf::redirect(switch, from, to))
            .into_iter()
            .collect()
    }

    fn namespace(&self, part: &str) -> Result<Namespace> {
        let name = format!("{}-{part}", self.name);
        if self.listed { Namespace::listed(&name) } else { Namespace::new(&name) }
    }

    fn host(&self, number: u8, folder: &Path, switch: &Namespace) -> Result<Host> {
        let name = format!("h{number}");
        let folder = folder.join(&name);
        let bpffs = folder.join("bpffs");
        fs::create_dir_all(&bpffs).with_context(|| format!("create {}", bpffs.display()))?;
        let mounted = mount(Some("bpf"), &bpffs, Some("bpf"), MsFlags::empty(), None::<&str>).is_ok();

        let netns = Arc::new(self.namespace(&name)?);
        netns.sysctl("net.ipv4.ip_forward", "1")?;
        for device in ["all", "default"] {
            netns.sysctl(&format!("net.ipv4.conf.{device}.rp_filter"), &self.rp_filter.to_string())?;
        }
        let (device, address) = match self.underlay {
            Underlay::Bridge | Underlay::Narrow(_) => ("eth0", None),
            Underlay::Direct | Underlay::Wire | Underlay::Cards => {
                ("mgmt0", Some(Ipv4Addr::new(10, 98, 0, number.saturating_add(10))))
            }
        };
        let network = u8::from(matches!(self.underlay, Underlay::Narrow(_)) && number == 2);
        let mtu = self.mtu;
        netns.ip(&format!(
            "link add {device} mtu {mtu} type veth peer name sw-{name} mtu {mtu} netns {}",
            switch.path()
        ))?;
        switch.ip(&format!("link set sw-{name} master br0 up"))?;
        if let Some(address) = address {
            netns.ip(&format!("addr add {address}/24 dev {device}"))?;
            netns.ip(&format!("link set {device} up"))?;
        }
        Ok(Host {
            number,
            address: Ipv4Addr::new(10, 99, network, number.saturating_add(10)),
            netns,
            files: AgentFiles { folder, bpffs: mounted.then_some(bpffs) },
            store: Vec::new(),
            plan: self.clone(),
            agent: None,
            pods: Vec::new(),
        })
    }
}
