//! The list of maps. Names, shapes and sizes are what the agent pins and takes over (`flannel_common::LAYOUT_VERSION`).

use core::cell::UnsafeCell;

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, BPF_NOEXIST},
    btf_maps::{Array, DevMapHash, HashMap, PerCpuArray, PerCpuHashMap},
    helpers::{bpf_get_smp_processor_id, bpf_jiffies64, bpf_ktime_get_coarse_ns, bpf_ktime_get_ns},
    macros::btf_map,
};
use flannel_common::{
    counter::{Count, Counter, MAX_COUNTERS},
    header::NO_PEER,
    peer::{MAX_PEER_DROPS, MAX_PEERS, Peer, PeerCount, PeerDrop, PeerKey, SUBNETS_AND_ORDER, place},
    pod::{MAX_PODS, PodKey, PortIndex},
    tunnel::{COARSE_CLOCK, SUBNETS_IN_ORDER, Settings},
};

/// Read-only to the programs and frozen by the loader, so the verifier knows every value and drops the branches it
/// excludes.
///
/// To the compiler it is memory that somebody else may have written (by its name it is reachable from outside), so that it
/// does not put the zeros in place of it; and unlike with a volatile read, only what is used is loaded, where it is used.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".rodata")]
static SETTINGS: Constants = Constants(UnsafeCell::new(Settings {
    local: 0,
    network: 0,
    network_mask: 0,
    subnet_mask: 0,
    own_subnet: 0,
    underlay: 0,
    device: 0,
    gro_pair: 0,
    port: 0,
    flags: 0,
    host_bits: 0,
}));

#[repr(transparent)]
struct Constants(UnsafeCell<Settings>);

// SAFETY: nobody writes to it after the programs were loaded.
unsafe impl Sync for Constants {}

/// Subnet → node; preallocated. The agent writes it.
#[btf_map]
static PEERS: HashMap<PeerKey, Peer, { MAX_PEERS as usize }> = HashMap::new();

/// The same peers in the order of their subnets, where the network has few enough of them: an array is read without a call
/// ([`Settings::place_of`]). `node` is 0 where there is no peer. The agent writes both.
#[btf_map]
static SUBNETS: Array<Peer, { SUBNETS_AND_ORDER as usize }, { BPF_F_MMAPABLE as usize }> = Array::new();

/// [`Counter`] → how often.
#[btf_map]
static COUNTERS: PerCpuArray<Count, { MAX_COUNTERS as usize }> = PerCpuArray::new();

/// [`place`] → traffic with a peer, as one CPU counts it. The loader makes it as long as there are CPUs.
#[btf_map]
static PEER_COUNTERS: Array<PeerCount, { MAX_PEERS as usize }> = Array::new();

/// Peer and reason → packets dropped. Rare, so entries are made when the first packet is dropped.
#[btf_map]
static PEER_DROPS: PerCpuHashMap<PeerDrop, u64, { MAX_PEER_DROPS as usize }, { BPF_F_NO_PREALLOC as usize }> =
    PerCpuHashMap::new();

/// MAC address of a pod → its port of the node's bridge. The agent writes it.
#[btf_map]
static PODS: HashMap<PodKey, PortIndex, { MAX_PODS as usize }> = HashMap::new();

/// The ports that exist: the kernel takes an interface out of this map when it goes, also while no agent runs. A pod that
/// comes back with its old MAC address on another port is then left to the bridge, not sent into the void.
#[btf_map]
static PORTS: DevMapHash<{ MAX_PODS as usize }> = DevMapHash::new();

/// How much traffic one run of a program stands for.
#[derive(Clone, Copy)]
pub(crate) struct Traffic {
    pub(crate) packets: u32,
    pub(crate) bytes: u32,
}

#[inline(always)]
pub(crate) fn settings() -> &'static Settings {
    // SAFETY: as for `Sync`.
    unsafe { &*SETTINGS.0.get() }
}

#[inline(always)]
pub(crate) fn peer(key: PeerKey) -> Option<Peer> {
    let settings = settings();
    if settings.flags & SUBNETS_IN_ORDER != 0 {
        // A peer that is being moved may for this one packet be looked up half moved.
        return SUBNETS.get(settings.place_of(key)).copied().filter(|peer| peer.node != 0);
    }
    // SAFETY: the value is copied before anything else runs. The agent may replace it meanwhile; a reader then sees
    // the old or the new node, for this one packet.
    unsafe { PEERS.get(key) }.copied()
}

/// The interface a pod hangs on, if it is still there.
#[inline(always)]
pub(crate) fn pod_port(key: PodKey) -> Option<PortIndex> {
    // SAFETY: the value is copied before anything else runs; a port that is replaced meanwhile is the old or the new one.
    let port = *unsafe { PODS.get(key) }?;
    PORTS.get_ifindex(port)
}

/// Whether an interface that the agent has put into `PORTS` is still there.
#[inline(always)]
pub(crate) fn is_there(port: PortIndex) -> bool {
    PORTS.get_ifindex(port).is_some()
}

#[inline(always)]
pub(crate) fn count(counter: Counter, traffic: Traffic) {
    if let Some(slot) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the slot belongs to this CPU, and programs on one CPU do not interrupt each other here: all hooks
        // run with bottom halves disabled.
        let slot = unsafe { &mut *slot };
        slot.packets += u64::from(traffic.packets);
        slot.bytes += u64::from(traffic.bytes);
    }
}

/// What this CPU has sent to a peer.
pub(crate) struct Sent(*mut PeerCount);

impl Sent {
    /// `None` for an index that can't be.
    #[inline(always)]
    pub(crate) fn to(index: u32) -> Option<Self> {
        peer_slot(index).map(Self)
    }

    /// Identification of the next datagram: how many packets went before it, so that fragments of two that are under way at
    /// once are told apart (RFC 791, 2.3). CPUs begin far from each other.
    #[inline(always)]
    pub(crate) fn next_id(&self) -> u16 {
        // SAFETY: as in `peer_slot`.
        let start = (unsafe { bpf_get_smp_processor_id() } as u16).wrapping_mul(0x9E37);
        // SAFETY: as in `count`.
        start.wrapping_add(unsafe { (*self.0).tx_packets } as u16)
    }

    #[inline(always)]
    pub(crate) fn count(self, traffic: Traffic) {
        // SAFETY: as in `count`.
        let slot = unsafe { &mut *self.0 };
        slot.tx_packets += u64::from(traffic.packets);
        slot.tx_bytes += u64::from(traffic.bytes);
    }
}

#[inline(always)]
pub(crate) fn count_received(index: u32, traffic: Traffic) {
    if let Some(slot) = peer_slot(index) {
        // SAFETY: as in `count`.
        let slot = unsafe { &mut *slot };
        slot.rx_packets += u64::from(traffic.packets);
        slot.rx_bytes += u64::from(traffic.bytes);
        // SAFETY: the helper has no preconditions. The verifier makes one load of it.
        let tick = unsafe { bpf_jiffies64() };
        if slot.tick != tick {
            slot.tick = tick;
            slot.last_seen = now();
        }
    }
}

/// This CPU's counts of a peer.
#[inline(always)]
fn peer_slot(index: u32) -> Option<*mut PeerCount> {
    // SAFETY: the helper has no preconditions. Programs stay on their CPU while they run.
    let cpu = unsafe { bpf_get_smp_processor_id() };
    PEER_COUNTERS.get_ptr_mut(place(index, cpu)?)
}

/// A packet that is dropped, or would be, and the peer it belongs to as far as can be told.
#[inline(always)]
pub(crate) fn count_dropped(reason: Counter, peer: u32, traffic: Traffic) {
    count(reason, traffic);
    if peer == NO_PEER {
        return;
    }
    let key = PeerDrop { peer, reason: reason as u32 };
    let packets = u64::from(traffic.packets);
    match PEER_DROPS.get_ptr_mut(key) {
        // SAFETY: as in `count`.
        Some(slot) => unsafe { *slot += packets },
        // Another CPU may be first: then this one packet is not counted. A full map is no reason to do otherwise with the
        // packet.
        None => drop(PEER_DROPS.insert(key, packets, u64::from(BPF_NOEXIST))),
    }
}

/// Nanoseconds of CLOCK_MONOTONIC, as precise as is cheap on this kernel.
#[inline(always)]
fn now() -> u64 {
    // SAFETY: neither helper has preconditions; the verifier never sees the one that this kernel lacks.
    unsafe {
        if settings().flags & COARSE_CLOCK != 0 { bpf_ktime_get_coarse_ns() } else { bpf_ktime_get_ns() }
    }
}
