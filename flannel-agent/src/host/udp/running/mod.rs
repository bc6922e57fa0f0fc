//! One tunnel that is up: the kernel's part, the user-space part, and the peers both know.

mod looks;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::Ipv4Addr;
use std::path::Path;
use std::time::{Duration, Instant};

use ipnet::Ipv4Net;

use super::errno::Refusal;
use super::filters;
use super::ladder::{self, Ground, KernelPath, Rung, Tier};
use super::maps::from_wire;
use super::prober::Prober;
use super::programs::PinFolder;
use super::report::{Ledger, TunnelReport};
use super::userspace::{Role, UdpGro, UserTunnel, UserTunnelConfig};
use crate::domain::host_state::{Datapath, HostItem, Tunnel, TunnelPeer};
use crate::domain::path_mtu::{Heard, Probe};
use crate::host::HostError;
use crate::host::netlink::{LinkInfo, Netlink, NextHop};

/// A tunnel, and what carries it.
pub(super) struct Running {
    tunnel: Tunnel,
    rung: Option<Rung>,
    kernel: Option<KernelPath>,
    user: Option<UserPath>,
    /// Made with the first probe.
    prober: Option<Prober>,
    peers: BTreeMap<Ipv4Net, Ipv4Addr>,
    /// What was wrong at the last look: said once, not at every look.
    complaint: Option<String>,
    /// Entries of an earlier agent came with the maps; someone should compare them with what is wanted.
    adopted: bool,
    kernels_part: KernelsPart,
    /// User space carries what the kernel could not: when that is tried again, and how long that was waited for.
    again: Option<(Instant, Duration)>,
}

/// What kept the kernel's part away may be over soon (an interface that went in the middle) or never.
const FIRST_AGAIN: Duration = Duration::from_secs(1);
const LAST_AGAIN: Duration = Duration::from_secs(600);

/// Hanging programs on interfaces takes the kernel some 10 ms each, for all of which it holds every other change of the
/// network back (an RCU grace period under the rtnl lock, `tcx_entry_sync`). User space carries packets in less than one:
/// where nothing does yet, it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum KernelsPart {
    /// As the tier says.
    Settled,
    /// User space has begun; the kernel's part comes with the next look, of which nobody was told yet.
    ToCome,
    /// It is brought up by the next [`Running::bring_up`].
    Due,
}

struct UserPath {
    /// What it was started for.
    tunnel: Tunnel,
    ifindex: u32,
    path: UserTunnel,
}

impl Running {
    pub(super) fn new(tunnel: Tunnel) -> Self {
        Self {
            tunnel,
            rung: None,
            kernel: None,
            user: None,
            prober: None,
            peers: BTreeMap::new(),
            complaint: None,
            adopted: false,
            kernels_part: KernelsPart::Settled,
            again: None,
        }
    }

    fn try_again_in(&mut self, wait: Duration) {
        self.again = Some((Instant::now() + wait, wait));
    }

    fn is_due_again(&self, now: Instant) -> bool {
        self.again.is_some_and(|(due, _)| due <= now)
    }

    /// User space carries packets for as long as it takes to bring up the kernel's part.
    pub(super) fn awaits_kernel(&self) -> bool {
        self.kernels_part != KernelsPart::Settled
    }

    /// Whether the next hops of peers matter.
    pub(super) fn knows_next_hops(&self) -> bool {
        self.kernel.is_some()
    }

    pub(super) fn is_up(&self) -> bool {
        self.rung.is_some()
    }

    fn is_in_kernel(&self) -> bool {
        self.rung.as_ref().is_some_and(|rung| rung.tier != Tier::Tun)
    }

    /// Brings the tunnel up as `tunnel` says, or changes the running one, or repairs it.
    ///
    /// # Errors
    /// What is missing. A tunnel that was up before stays as it was, as far as it still is.
    pub(super) async fn bring_up(
        &mut self,
        netlink: &Netlink,
        bpffs: &Path,
        tunnel: &Tunnel,
    ) -> Result<(), HostError> {
        if let Some((_, waited)) = self.again {
            self.try_again_in((2 * waited).min(LAST_AGAIN));
        }
        let device = link(netlink, tunnel, &tunnel.device).await?;
        let underlay = link(netlink, tunnel, &tunnel.underlay).await?;
        let datapath = tunnel.options.datapath;
        if datapath == Datapath::Auto && !self.is_up() && !is_carried_already(bpffs, tunnel) {
            self.start_user_path(tunnel, &device, Role::WholePath)?;
            tracing::debug!("user space carries {} until the kernel does", tunnel.device);
            self.tunnel = tunnel.clone();
            let reason = "until the kernel's part is in place".to_owned();
            self.rung = Some(Rung { tier: Tier::Tun, reason });
            self.kernels_part = KernelsPart::ToCome;
            return Ok(());
        }
        self.start_user_path(tunnel, &device, first_role(datapath))?;

        let fresh = self.kernel.is_none();
        let rung = if datapath == Datapath::Tun {
            Err("chosen by --udp-datapath=tun".to_owned())
        } else {
            let ground = Ground { netlink, bpffs, tunnel, device, underlay, peers: &self.peers };
            match ladder::climb(&ground, &mut self.kernel).await {
                Ok(rung) => Ok(rung),
                // A tier that carries packets is not given up because a step of its repair failed.
                Err(e) if datapath == Datapath::Auto && !self.is_in_kernel() => Err(e.to_string()),
                Err(e) => return Err(e),
            }
        };
        let rung = match rung {
            Ok(rung) => rung,
            Err(reason) => {
                // User space carries everything before the kernel stops to.
                self.set_role(Role::WholePath);
                self.kernel = None;
                ladder::tear_down(netlink, bpffs, &self.tunnel).await?;
                if self.tunnel.underlay != tunnel.underlay {
                    ladder::tear_down(netlink, bpffs, tunnel).await?;
                }
                if datapath == Datapath::Auto && self.again.is_none() {
                    self.try_again_in(FIRST_AGAIN);
                }
                Rung { tier: Tier::Tun, reason }
            }
        };
        if fresh {
            self.adopt_peers(tunnel)?;
        }
        self.refill()?;
        if rung.tier != Tier::Tun {
            self.again = None;
        }
        self.set_role(match rung.tier {
            Tier::Xdp => Role::Exceptions { udp_gro: UdpGro::Allowed },
            Tier::TcBridge | Tier::TcGro | Tier::Tc => Role::Exceptions { udp_gro: UdpGro::Forbidden },
            Tier::Tun => Role::WholePath,
        });
        self.tell_user_path();
        if self.rung.as_ref() != Some(&rung) {
            tracing::info!("udp datapath {} on {}: {}", rung.tier.name(), tunnel.underlay, rung.reason);
        }
        if self.tunnel.underlay != tunnel.underlay {
            filters::leave_underlay(&self.tunnel)?;
        }
        self.tunnel = tunnel.clone();
        self.rung = Some(rung);
        self.complaint = None;
        self.kernels_part = KernelsPart::Settled;
        Ok(())
    }

    /// Starts the user-space path, or starts it again when it ended or was started for something else.
    fn start_user_path(&mut self, tunnel: &Tunnel, device: &LinkInfo, role: Role) -> Result<(), HostError> {
        if let Some(user) = &self.user
            && user.ifindex == device.index
            && user.path.is_running().is_ok()
            && serves(&user.tunnel, tunnel)
        {
            user.path.set_mtu(tunnel.mtu);
            return Ok(());
        }
        // The old one holds the port.
        self.user = None;
        let path = UserTunnel::start(UserTunnelConfig {
            device: tunnel.device.clone(),
            local: tunnel.local,
            port: tunnel.port,
            mtu: tunnel.mtu,
            network: tunnel.network,
            own_subnet: tunnel.own_subnet,
            source_check: tunnel.options.source_check,
            role,
        })?;
        self.user = Some(UserPath { tunnel: tunnel.clone(), ifindex: device.index, path });
        self.tell_user_path();
        Ok(())
    }

    fn set_role(&self, role: Role) {
        if let Some(user) = &self.user {
            user.path.set_role(role);
        }
    }

    fn tell_user_path(&self) {
        if let Some(user) = &self.user {
            user.path.set_peers(self.peers.iter().map(|(subnet, node)| (*subnet, *node)).collect());
        }
    }

    /// What an earlier agent left in the map is in use until someone says otherwise.
    fn adopt_peers(&mut self, tunnel: &Tunnel) -> Result<(), Refusal> {
        let Some(kernel) = &self.kernel else { return Ok(()) };
        for (base, peer) in kernel.maps.open().entries()? {
            if let Ok(subnet) = Ipv4Net::new(base, tunnel.own_subnet.prefix_len())
                && let Entry::Vacant(place) = self.peers.entry(subnet)
            {
                place.insert(from_wire(peer.node));
                self.adopted = true;
            }
        }
        Ok(())
    }

    /// Peers that a new map lacks are forgotten here as well: the next look at the host shows them missing, and they
    /// are put again with their next hop of that time.
    fn refill(&mut self) -> Result<(), Refusal> {
        let Some(kernel) = &self.kernel else { return Ok(()) };
        let entries = kernel.maps.open().entries()?;
        let before = self.peers.len();
        self.peers.retain(|subnet, _| entries.contains_key(&subnet.network()));
        self.adopted |= self.peers.len() != before;
        Ok(())
    }

    /// Adds or moves a peer. [`Running::tell_user_path`] is the caller's, after the last of a batch.
    ///
    /// # Errors
    /// No way to the node, or one that leads through the tunnel itself; a lease of another size than ours.
    pub(super) fn put_peer(
        &mut self,
        peer: &TunnelPeer,
        next_hop: Option<&Result<NextHop, HostError>>,
    ) -> Result<(), HostError> {
        if let Some(kernel) = &mut self.kernel {
            let put = match next_hop {
                Some(next_hop) => kernel.put_peer(peer.subnet, peer.node, next_hop),
                None => Err(format!("nobody said where the way to {} leads", peer.node)),
            };
            put.map_err(|reason| {
                HostError::new(format!("put {}", HostItem::TunnelPeer(peer.clone())), reason)
            })?;
        }
        self.peers.insert(peer.subnet, peer.node);
        Ok(())
    }

    /// Removes a peer; that it is gone is a success. [`Running::tell_user_path`] is the caller's.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn remove_peer(&mut self, peer: &TunnelPeer) -> Result<(), HostError> {
        if let Some(kernel) = &mut self.kernel
            && peer.subnet.prefix_len() == self.tunnel.own_subnet.prefix_len()
        {
            kernel.maps.remove(peer.subnet.network())?;
        }
        self.peers.remove(&peer.subnet);
        Ok(())
    }

    /// Makes the user-space path know the peers there are.
    pub(super) fn peers_changed(&self) {
        self.tell_user_path();
    }

    pub(super) fn has_peer(&self, subnet: Ipv4Net) -> bool {
        self.peers.contains_key(&subnet)
    }

    /// Sends a probe of a path's MTU.
    ///
    /// # Errors
    /// No socket to be had.
    pub(super) fn probe(&mut self, probe: &Probe) -> Result<(), HostError> {
        let prober = match self.prober.take().filter(|prober| prober.serves(&self.tunnel)) {
            Some(prober) => prober,
            None => Prober::start(&self.tunnel)?,
        };
        self.prober.insert(prober).send(probe);
        Ok(())
    }

    /// Returns with what came of probes, and meanwhile follows the pods that packets are passed on to. Cancel-safe.
    pub(super) async fn heard(&mut self, netlink: &Netlink) -> Vec<Heard> {
        let Self { prober, kernel, .. } = self;
        let hearing = async {
            match prober {
                Some(prober) => prober.heard().await,
                None => std::future::pending().await,
            }
        };
        let following = async {
            if let Some(kernel) = kernel {
                kernel.follow_pods(netlink).await;
            }
            std::future::pending().await
        };
        tokio::select! {
            heard = hearing => heard,
            never = following => never,
        }
    }

    /// Packets sent to each of these peers so far; `None` for one that is not there.
    pub(super) fn sent(&self, subnets: &[Ipv4Net]) -> Vec<Option<u64>> {
        subnets
            .iter()
            .map(|subnet| {
                self.peers.get(subnet)?;
                let in_kernel =
                    self.kernel.as_ref().and_then(|kernel| kernel.maps.open().count_of(subnet.network()));
                let in_user = self.user.as_ref().map_or(0, |user| user.path.sent(*subnet));
                Some(in_kernel.unwrap_or_default().tx_packets.wrapping_add(in_user))
            })
            .collect()
    }

    pub(super) fn report(&self) -> Option<TunnelReport> {
        let rung = self.rung.as_ref()?;
        let user = self.user.as_ref().map(|user| user.path.counters());
        let ledger =
            Ledger { kernel: self.kernel.as_ref().map(|kernel| kernel.maps.open()), user: user.as_ref() };
        Some(TunnelReport {
            device: self.tunnel.device.clone(),
            underlay: self.tunnel.underlay.clone(),
            tier: rung.tier,
            reason: self.reason(rung),
            counters: ledger.counters(),
            peers: ledger.peers(self.peers.iter().map(|(subnet, node)| (*subnet, *node))),
        })
    }

    fn reason(&self, rung: &Rung) -> String {
        let mut reason = match (&self.kernel, rung.tier) {
            (Some(kernel), Tier::Xdp) => kernel.xdp_reason(),
            _ => rung.reason.clone(),
        };
        if let Some(place) = self.kernel.as_ref().and_then(KernelPath::place) {
            reason.push_str("; ");
            reason.push_str(&place);
        }
        reason
    }
}

/// Whether links or filters of an earlier agent are there: then a failure to bring the tunnel up must not take them away.
pub(super) fn is_carried_already(bpffs: &Path, tunnel: &Tunnel) -> bool {
    PinFolder::new(bpffs, &tunnel.device).is_in_use() || filters::carry(tunnel)
}

async fn link(netlink: &Netlink, tunnel: &Tunnel, name: &str) -> Result<LinkInfo, HostError> {
    netlink.link(name).await?.ok_or_else(|| {
        HostError::new(
            format!("bring up the tunnel on {}", tunnel.device),
            format!("there is no network device {name}"),
        )
    })
}

/// Before the tier is known. Merging datagrams would keep them from a tc program taken over.
fn first_role(datapath: Datapath) -> Role {
    match datapath {
        Datapath::Tun => Role::WholePath,
        _ => Role::Exceptions { udp_gro: UdpGro::Forbidden },
    }
}

/// Whether a user-space path started for one tunnel does for the other. An MTU is no reason to start it again.
fn serves(started: &Tunnel, wanted: &Tunnel) -> bool {
    let key =
        |t: &Tunnel| (t.device.clone(), t.local, t.port, t.network, t.own_subnet, t.options.source_check);
    key(started) == key(wanted)
}
