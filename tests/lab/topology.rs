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

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tempfile::TempDir;

use crate::{
    agent::{Agent, AgentFiles, AgentOptions, Status, SubnetEnv},
    bpf::{self, XdpLink},
    datastore::Datastore,
    namespace::Namespace,
    probe::ping::Ping,
};

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
    with_etcd: bool,
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
        self.with_etcd = false;
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
            Underlay::Direct | Underlay::Wire => store,
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
        if self.with_etcd {
            datastore.restart()?;
        }
        if let Some(config) = &self.config {
            datastore.put_config(config)?;
        }
        for host in &mut hosts {
            host.endpoint = datastore.endpoint();
        }
        Ok(Lab { hosts, datastore, _wire: wire, far, switch, folder })
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
            Underlay::Direct | Underlay::Wire => {
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
            endpoint: String::new(),
            plan: self.clone(),
            agent: None,
            pods: Vec::new(),
        })
    }
}

/// Hosts, switch and etcd. All of it goes when this value goes.
#[derive(Debug)]
pub struct Lab {
    // Dropped in this order: agents and pods, etcd, the switch, the files.
    hosts: Vec<Host>,
    datastore: Datastore,
    _wire: Vec<XdpLink>,
    far: Option<Arc<Namespace>>,
    switch: Arc<Namespace>,
    folder: TempDir,
}

impl Lab {
    /// A plan for two hosts on a bridge; `name` is for messages and folders.
    #[expect(clippy::new_ret_no_self, reason = "reads as `Lab::new(\"x\").hosts(3).build()`")]
    pub fn new(name: &str) -> Plan {
        Plan {
            name: format!("flannel-{name}-{}", std::process::id()),
            hosts: 2,
            underlay: Underlay::Bridge,
            pods: PodLink::Bridge,
            mtu: 1500,
            rp_filter: 0,
            config: Some(format!(r#"{{"Network":"{NETWORK}"}}"#)),
            with_etcd: true,
            listed: false,
        }
    }

    /// Gives the plan a name without this process's number.
    pub fn named(name: &str) -> Plan {
        Plan { name: name.to_owned(), ..Self::new(name) }
    }

    /// Host by index, from 0.
    ///
    /// # Panics
    /// There are fewer.
    pub fn host(&self, index: usize) -> &Host {
        &self.hosts[index]
    }

    /// As [`Self::host`].
    ///
    /// # Panics
    /// There are fewer.
    pub fn host_mut(&mut self, index: usize) -> &mut Host {
        &mut self.hosts[index]
    }

    /// All of them.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// The namespace between the hosts. Port `sw-h1` is the wire of host 1: what passes there is what a NIC would see.
    pub fn switch(&self) -> &Arc<Namespace> {
        &self.switch
    }

    /// The routers of a narrow underlay, the first host's first; `narrow` is the link between them.
    pub fn routers(&self) -> impl Iterator<Item = &Arc<Namespace>> {
        [&self.switch].into_iter().chain(&self.far)
    }

    /// MTU of the underlay, bytes.
    pub fn underlay_mtu(&self) -> u32 {
        self.hosts.first().map_or(0, |host| host.plan.mtu)
    }

    /// etcd.
    pub fn datastore(&self) -> &Datastore {
        &self.datastore
    }

    /// etcd, to stop and start it.
    pub fn datastore_mut(&mut self) -> &mut Datastore {
        &mut self.datastore
    }

    /// The lab's files.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Starts one agent per host with these tiers, waits until all are ready and know each other, and attaches one pod
    /// to each host.
    ///
    /// # Errors
    /// One does not get ready; the text has its log.
    pub fn bring_up(&mut self, tiers: &[&str]) -> Result<()> {
        ensure!(
            tiers.len() == self.hosts.len(),
            "{} tiers given for {} hosts",
            tiers.len(),
            self.hosts.len()
        );
        let options = AgentOptions::new()?;
        let each: Vec<_> = tiers.iter().map(|tier| options.clone().datapath(tier)).collect();
        self.bring_up_with(&each)
    }

    /// [`Self::bring_up`] with other options for each host.
    ///
    /// # Errors
    /// As there.
    pub fn bring_up_with(&mut self, options: &[AgentOptions]) -> Result<()> {
        for (host, options) in self.hosts.iter_mut().zip(options) {
            host.start_agent(options)?;
        }
        self.wait_connected()?;
        for host in &mut self.hosts {
            host.attach_pod()?;
        }
        Ok(())
    }

    /// Waits until every agent is ready and knows all others.
    ///
    /// # Errors
    /// Not in time; with status and log of the one that is missing something.
    pub fn wait_connected(&mut self) -> Result<()> {
        let peers = self.hosts.len().saturating_sub(1);
        for host in &mut self.hosts {
            host.agent_mut()?.wait_peers(peers)?;
        }
        Ok(())
    }

    /// Every pod pings every other host's pod `count` times.
    ///
    /// # Errors
    /// A single lost ping.
    pub fn ping_all_pairs(&self, count: u32) -> Result<()> {
        for from in &self.hosts {
            for to in self.hosts.iter().filter(|to| to.number != from.number) {
                let report = Ping::new(&from.pod()?.netns, to.pod()?.address).count(count).run()?;
                ensure!(report.lost() == 0, "pod of {} → pod of {}: {report}", from.name(), to.name());
            }
        }
        Ok(())
    }

    /// The ends of all agents' logs, for messages.
    pub fn logs(&self) -> String {
        self.hosts
            .iter()
            .filter(|host| host.files.log().exists())
            .map(|host| {
                format!("── log of the agent on {} ──\n{}\n", host.name(), crate::tail(&host.files.log()))
            })
            .collect()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
    }
}

/// A node: a namespace with forwarding on, `eth0` on the underlay, and at most one agent.
#[derive(Debug)]
pub struct Host {
    number: u8,
    address: Ipv4Addr,
    netns: Arc<Namespace>,
    files: AgentFiles,
    endpoint: String,
    plan: Plan,
    agent: Option<Agent>,
    pods: Vec<Pod>,
}

impl Host {
    /// `h1`, `h2` …
    pub fn name(&self) -> String {
        format!("h{}", self.number)
    }

    /// On the underlay.
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Its namespace.
    pub fn netns(&self) -> &Arc<Namespace> {
        &self.netns
    }

    /// Where its agent keeps its things.
    pub fn files(&self) -> &AgentFiles {
        &self.files
    }

    /// Starts an agent; one that runs is killed first.
    ///
    /// # Errors
    /// The binary can't be started.
    pub fn start_agent(&mut self, options: &AgentOptions) -> Result<&mut Agent> {
        self.agent = None;
        let mut own = options.clone();
        if self.plan.underlay != Underlay::Bridge {
            own = own.flag("--iface=eth0");
        }
        let agent = Agent::start(&self.netns, &self.files, &self.endpoint, &own)?;
        Ok(self.agent.insert(agent))
    }

    /// The agent.
    ///
    /// # Errors
    /// None was started.
    pub fn agent(&self) -> Result<&Agent> {
        self.agent.as_ref().with_context(|| format!("no agent was started on {}", self.name()))
    }

    /// The agent, to wait for it or kill it.
    ///
    /// # Errors
    /// None was started.
    pub fn agent_mut(&mut self) -> Result<&mut Agent> {
        let name = self.name();
        self.agent.as_mut().with_context(|| format!("no agent was started on {name}"))
    }

    /// What the agent says of itself.
    ///
    /// # Errors
    /// It does not answer.
    pub fn status(&self) -> Result<Status> {
        self.agent()?.status()
    }

    /// The first pod.
    ///
    /// # Errors
    /// None was attached.
    pub fn pod(&self) -> Result<&Pod> {
        self.pods.first().with_context(|| format!("no pod was attached to {}", self.name()))
    }

    /// All pods, in order of attachment.
    pub fn pods(&self) -> &[Pod] {
        &self.pods
    }

    /// Attaches one more pod, with the subnet and MTU of the agent's `subnet.env`.
    ///
    /// # Errors
    /// No `subnet.env` yet, or what the kernel refused.
    pub fn attach_pod(&mut self) -> Result<&Pod> {
        let env = SubnetEnv::read(&self.files.subnet_env())?;
        let index = u8::try_from(self.pods.len()).context("too many pods")?;
        let pod =
            self.make_pod(&env, index).with_context(|| format!("attach pod {index} to {}", self.name()))?;
        self.pods.push(pod);
        self.pod()?;
        self.pods.last().context("the pod just attached")
    }

    fn make_pod(&self, env: &SubnetEnv, index: u8) -> Result<Pod> {
        let part =
            if index == 0 { format!("pod{}", self.number) } else { format!("pod{}-{index}", self.number) };
        let netns = Arc::new(self.plan.namespace(&part)?);
        let (port, mtu, gateway) = (format!("pod{index}"), env.mtu, env.gateway);
        let address = Ipv4Addr::from(u32::from(env.base()) + 2 + u32::from(index));
        let host = &self.netns;
        host.ip(&format!(
            "link add {port} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}",
            netns.path()
        ))?;
        match self.plan.pods {
            PodLink::Bridge => {
                if !host.has_device("cni0") {
                    host.ip(&format!("link add cni0 mtu {mtu} type bridge"))?;
                    host.ip(&format!("addr add {gateway}/{} dev cni0", env.prefix))?;
                    host.ip("link set cni0 up")?;
                }
                host.ip(&format!("link set {port} master cni0 up"))?;
                host.output(&format!("bridge link set dev {port} hairpin on"))?;
                netns.ip(&format!("addr add {address}/{} dev eth0", env.prefix))?;
                netns.ip("link set eth0 up")?;
                netns.ip(&format!("route add default via {gateway}"))?;
            }
            PodLink::Routed => {
                host.ip(&format!("link set {port} up"))?;
                host.ip(&format!("addr add {gateway}/32 dev {port}"))?;
                host.ip(&format!("route add {address} dev {port}"))?;
                netns.ip(&format!("addr add {address}/32 dev eth0"))?;
                netns.ip("link set eth0 up")?;
                netns.ip(&format!("route add {gateway} dev eth0"))?;
                netns.ip(&format!("route add default via {gateway} dev eth0"))?;
            }
        }
        wait_for_carrier(&netns, gateway)?;
        Ok(Pod { netns, address, gateway, port })
    }

    /// Waits until `command_line`, run on the host, succeeds and prints `pattern`; returns how long it took.
    ///
    /// # Errors
    /// Not within `limit`: with the last output.
    pub fn wait_output(&self, command_line: &str, pattern: &str, limit: Duration) -> Result<Duration> {
        let started = Instant::now();
        loop {
            let output = self.netns.output(command_line);
            if let Ok(text) = &output
                && text.contains(pattern)
            {
                return Ok(started.elapsed());
            }
            if started.elapsed() > limit {
                bail!(
                    "{}: `{command_line}` does not show `{pattern}` within {limit:?}: {output:?}",
                    self.name()
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Folder in which the agent of this host pins.
    pub fn bpffs(&self) -> Option<&PathBuf> {
        self.files.bpffs.as_ref()
    }
}

/// Until the pod reaches its own node. The kernel opens a new port of a bridge when its link watcher finds the time, up to
/// a second after the devices are up.
fn wait_for_carrier(pod: &Arc<Namespace>, gateway: Ipv4Addr) -> Result<()> {
    let started = Instant::now();
    let ping = Ping::new(pod, gateway).count(1).option("-W0.1");
    loop {
        let report = ping.run()?;
        if report.lost() == 0 {
            return Ok(());
        }
        ensure!(started.elapsed() < Duration::from_secs(5), "the pod does not reach {gateway}: {report}");
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.agent = None;
        if let Some(bpffs) = &self.files.bpffs {
            let _ = umount2(bpffs, MntFlags::MNT_DETACH);
        }
    }
}

/// A pod: a namespace with one device, `eth0`.
#[derive(Debug)]
pub struct Pod {
    /// Its namespace.
    pub netns: Arc<Namespace>,
    /// Its address in the overlay.
    pub address: Ipv4Addr,
    /// The host's address on `cni0`.
    pub gateway: Ipv4Addr,
    /// The host's end of its veth pair.
    pub port: String,
}
