//! A lab that stands: its hosts, their agents and pods.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::mount::{MntFlags, umount2};
use tempfile::TempDir;

use super::{NETWORK, Plan, PodLink, Store, Underlay};
use crate::{
    agent::{Agent, AgentFiles, AgentOptions, Repetition, Status, SubnetEnv, repetitions},
    bpf::XdpLink,
    datastore::Datastore,
    lease_server::LeaseServer,
    namespace::Namespace,
    probe::ping::Ping,
};

/// Hosts, switch and etcd. All of it goes when this value goes.
#[derive(Debug)]
pub struct Lab {
    // Dropped in this order: agents and pods, the stores, the switch, the files.
    pub(super) hosts: Vec<Host>,
    pub(super) server: Option<LeaseServer>,
    pub(super) datastore: Datastore,
    pub(super) _wire: Vec<XdpLink>,
    pub(super) far: Option<Arc<Namespace>>,
    pub(super) switch: Arc<Namespace>,
    pub(super) folder: TempDir,
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
            store: Store::Etcd,
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

    /// The flannel server of a lab that has one.
    ///
    /// # Errors
    /// It has none.
    pub fn server_mut(&mut self) -> Result<&mut LeaseServer> {
        self.server.as_mut().context("this lab has no flannel server")
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

    /// What agents said so often that they never came to rest, a line each.
    pub fn unrest(&self) -> String {
        let said = |host: &Host| {
            let log = fs::read_to_string(host.files.log()).unwrap_or_default();
            let lines = repetitions(&log, crate::slower());
            let say =
                |line: &Repetition| format!("the agent on {} does not come to rest: {line}\n", host.name());
            lines.iter().map(say).collect::<String>()
        };
        self.hosts.iter().map(said).collect()
    }

    /// What came of a test on this lab: its failure with the agents' last words, and a failure also where an agent did not
    /// come to rest.
    ///
    /// # Errors
    /// Each of these; none hides another.
    pub fn verdict(&self, result: Result<()>) -> Result<()> {
        let unrest = self.unrest();
        match result {
            Ok(()) if unrest.is_empty() => Ok(()),
            Ok(()) => bail!("{unrest}{}", self.logs()),
            Err(e) => bail!("{e:#}\n{unrest}{}", self.logs()),
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}{}", self.unrest(), self.logs());
        }
    }
}

/// A node: a namespace with forwarding on, `eth0` on the underlay, and at most one agent.
#[derive(Debug)]
pub struct Host {
    pub(super) number: u8,
    pub(super) address: Ipv4Addr,
    pub(super) netns: Arc<Namespace>,
    pub(super) files: AgentFiles,
    /// Flags that name the store.
    pub(super) store: Vec<String>,
    pub(super) plan: Plan,
    pub(super) agent: Option<Agent>,
    pub(super) pods: Vec<Pod>,
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
        let agent = Agent::start(&self.netns, &self.files, &self.store, &own)?;
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
    let ping = Ping::new(pod, gateway).count(1).patience(Duration::from_millis(100));
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
