//! What is compared: each variant is two hosts and their pods in a lab of its own, ready to carry traffic.

use std::{
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
#[cfg(feature = "bare")]
use flannel_tests::bare::{self, Bare, Receiver};
use flannel_tests::{
    agent::AgentOptions,
    bpf::{self, XdpLink},
    probe::{
        load::{Ends, let_process_forward_in_real_time},
        ping::Ping,
    },
    proxy::Proxies,
    reference,
    topology::{Host, Lab, Underlay},
};

use super::{NAME, traffic::Mode};

/// What everything is compared with.
pub(super) const HOST_GW: &str = "host-gw";
pub(super) const VXLAN: &str = "vxlan";
/// Stands for the original.
pub(super) const PROXY: &str = "proxy";

/// Nothing better can come.
const BEST: &str = "tc+bridge";
/// A path that has been the same for so long stays.
const AT_REST: Duration = Duration::from_secs(2);
/// An agent that has not come to rest by then never will.
const REST_LIMIT: Duration = Duration::from_secs(30);

/// How packets come from one pod to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Host to host, no pods, no overlay.
    Bare,
    HostGw,
    /// Host-gw, with an XDP program on the underlay that does nothing: tells what attaching one costs by itself.
    HostGwAndXdp,
    Vxlan,
    /// The agent, with `--udp-datapath` so.
    Agent(&'static str),
    /// The agent's hooks, with the least that programs can do there.
    #[cfg(feature = "bare")]
    Least(Receiver),
    /// One read, one send.
    Proxy,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Variant {
    pub(super) name: &'static str,
    way: Way,
}

const fn variant(name: &'static str, way: Way) -> Variant {
    Variant { name, way }
}

impl Variant {
    /// In the order of the tables.
    pub(super) fn all(mode: Mode) -> Vec<Self> {
        let mut all = vec![
            variant("no overlay", Way::Bare),
            variant(HOST_GW, Way::HostGw),
            variant("host-gw + XDP", Way::HostGwAndXdp),
            variant(VXLAN, Way::Vxlan),
            variant("udp xdp", Way::Agent("xdp")),
            variant("udp tc", Way::Agent("tc")),
            variant("udp tun", Way::Agent("tun")),
            variant(PROXY, Way::Proxy),
        ];
        match mode {
            #[cfg(not(feature = "bare"))]
            Mode::Wire => {}
            #[cfg(feature = "bare")]
            Mode::Wire => {
                all.insert(5, variant("least xdp", Way::Least(Receiver::Xdp)));
                all.insert(7, variant("least tc", Way::Least(Receiver::Tc)));
            }
            Mode::SuperPackets => all.insert(4, variant("udp auto", Way::Agent("auto"))),
        }
        all
    }

    /// Builds its lab and sends the first packets, which resolve neighbours.
    pub(super) fn start(&self, mode: Mode, agent: &Path) -> Result<Standing> {
        self.build(mode, agent).with_context(|| format!("set up {}", self.name))
    }

    fn build(&self, mode: Mode, agent: &Path) -> Result<Standing> {
        let underlay = match mode {
            Mode::Wire => Underlay::Wire,
            Mode::SuperPackets => Underlay::Direct,
        };
        let mut plan = Lab::new(NAME).underlay(underlay);
        if !matches!(self.way, Way::Agent(_)) {
            plan = plan.without_etcd();
        }
        let mut lab = plan.build()?;
        #[cfg(feature = "bare")]
        let mut programs = None;
        let (mut proxies, mut links, mut path) = (None, Vec::new(), String::new());
        match self.way {
            Way::Bare => {}
            Way::HostGw => reference::host_gw(&mut lab)?,
            Way::HostGwAndXdp => {
                reference::host_gw(&mut lab)?;
                for host in lab.hosts() {
                    links.push(bpf::pass(host.netns(), "eth0")?);
                }
            }
            Way::Vxlan => reference::vxlan(&mut lab)?,
            Way::Agent(tier) => path = start_agents(&mut lab, tier, agent)?,
            #[cfg(feature = "bare")]
            Way::Least(receiver) => programs = Some(bare::start(&mut lab, receiver)?),
            Way::Proxy => proxies = Some(Proxies::start(&mut lab)?),
        }
        let ends = self.ends(&lab)?;
        let greeting = Ping::new(&ends.client, ends.address).run()?;
        ensure!(greeting.received > 0, "no ping comes through: {greeting}\n{}", lab.logs());
        Ok(Standing {
            name: self.name,
            path,
            ends,
            _proxies: proxies,
            _links: links,
            #[cfg(feature = "bare")]
            _programs: programs,
            lab,
        })
    }

    fn ends(&self, lab: &Lab) -> Result<Ends> {
        let (from, to) = (lab.host(0), lab.host(1));
        if self.way == Way::Bare {
            return Ok(Ends {
                client: from.netns().clone(),
                server: to.netns().clone(),
                address: to.address(),
            });
        }
        Ok(Ends {
            client: from.pod()?.netns.clone(),
            server: to.pod()?.netns.clone(),
            address: to.pod()?.address,
        })
    }
}

/// An agent per host; what carries its packets, in its own words.
fn start_agents(lab: &mut Lab, tier: &str, agent: &Path) -> Result<String> {
    let options = AgentOptions::with_binary(agent.to_owned()).datapath(tier);
    lab.bring_up_with(&[options.clone(), options])?;
    for host in lab.hosts() {
        let status = host.status()?;
        ensure!(
            tier == "auto" || status.tier() == tier,
            "asked for {tier}, the agent on {} says {}",
            host.name(),
            status.reasons()
        );
        let_process_forward_in_real_time(host.agent()?.pid())?;
    }
    if tier == "auto" {
        rest(lab.host(1))?;
        return rest(lab.host(0));
    }
    Ok(lab.host(0).status()?.path().to_owned())
}

/// What carries the host's packets when nothing changes any more: `auto` passes the pods' bridge by a moment after it has
/// an address.
fn rest(host: &Host) -> Result<String> {
    let path = || -> Result<String> { Ok(host.status()?.path().to_owned()) };
    let started = Instant::now();
    let (mut last, mut since) = (path()?, started);
    while last != BEST && since.elapsed() < AT_REST {
        sleep(Duration::from_millis(50));
        let now = path()?;
        if now != last {
            (last, since) = (now, Instant::now());
        }
        ensure!(
            started.elapsed() < REST_LIMIT,
            "the agent on {} does not come to rest, now it says {last}",
            host.name()
        );
    }
    Ok(last)
}

/// A variant that carries traffic until it is dropped.
pub(super) struct Standing {
    pub(super) name: &'static str,
    /// The tier in the agent's words (`tc+gro`); empty for others.
    pub(super) path: String,
    pub(super) ends: Ends,
    // Dropped before the lab they stand in.
    _proxies: Option<Proxies>,
    _links: Vec<XdpLink>,
    #[cfg(feature = "bare")]
    _programs: Option<Bare>,
    pub(super) lab: Lab,
}
