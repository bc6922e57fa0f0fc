//! The list of maps. Names, shapes and sizes are what the agent pins and takes over (`flannel_common::LAYOUT_VERSION`).

use aya_ebpf::{
    Global,
    btf_maps::{HashMap, PerCpuArray},
    macros::btf_map,
};
use flannel_common::{
    counter::{Count, Counter, MAX_COUNTERS},
    peer::{MAX_PEERS, Peer, PeerCount, PeerKey},
    tunnel::Settings,
};

/// Read-only to the programs and frozen by the loader, so the verifier knows every value and drops the branches it
/// excludes.
#[unsafe(no_mangle)]
static SETTINGS: Global<Settings> = Global::new(Settings {
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
});

/// Subnet → node; preallocated. The agent writes it.
#[btf_map]
static PEERS: HashMap<PeerKey, Peer, { MAX_PEERS as usize }> = HashMap::new();

/// [`Counter`] → how often.
#[btf_map]
static COUNTERS: PerCpuArray<Count, { MAX_COUNTERS as usize }> = PerCpuArray::new();

/// [`Peer::index`] → traffic with it.
#[btf_map]
static PEER_COUNTERS: PerCpuArray<PeerCount, { MAX_PEERS as usize }> = PerCpuArray::new();

/// How much traffic one run of a program stands for.
#[derive(Clone, Copy)]
pub(crate) struct Traffic {
    pub(crate) packets: u32,
    pub(crate) bytes: u32,
}

#[inline(always)]
pub(crate) fn settings() -> Settings {
    SETTINGS.load()
}

#[inline(always)]
pub(crate) fn peer(key: PeerKey) -> Option<Peer> {
    // SAFETY: the value is copied before anything else runs. The agent may replace it meanwhile; a reader then sees
    // the old or the new node, for this one packet.
    unsafe { PEERS.get(key) }.copied()
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

#[inline(always)]
pub(crate) fn count_sent(index: u32, traffic: Traffic) {
    if let Some(slot) = PEER_COUNTERS.get_ptr_mut(index) {
        // SAFETY: as in `count`.
        let slot = unsafe { &mut *slot };
        slot.tx_packets += u64::from(traffic.packets);
        slot.tx_bytes += u64::from(traffic.bytes);
    }
}

#[inline(always)]
pub(crate) fn count_received(index: u32, traffic: Traffic) {
    if let Some(slot) = PEER_COUNTERS.get_ptr_mut(index) {
        // SAFETY: as in `count`.
        let slot = unsafe { &mut *slot };
        slot.rx_packets += u64::from(traffic.packets);
        slot.rx_bytes += u64::from(traffic.bytes);
    }
}
