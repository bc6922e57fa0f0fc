//! The eBPF programs, loaded for packet rows: one packet in, verdict, packet and counters out, through
//! `BPF_PROG_TEST_RUN` (<https://docs.kernel.org/bpf/bpf_prog_run.html>), or the same packet many times for its cost.
//!
//! Maps and helpers are the kernel's own. What a test run cannot show (which device a redirect names, packets of a
//! device without Ethernet header, metadata arriving in tc) is for tests with real interfaces.

use std::{collections::BTreeMap, net::Ipv4Addr, time::Duration};

use anyhow::{Context as _, Result, bail};
use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, DevMapHash, HashMap, MapData, PerCpuArray, PerCpuHashMap, PerCpuValues},
    programs::{Program, ProgramInfo, SchedClassifier, TestRun as _, TestRunOptions, Xdp},
    util::nr_cpus,
};
use flannel_agent::host::udp::object::OBJECT;
use flannel_common::{
    counter::{Count, Counter},
    peer::{MAX_PEERS, MAX_SUBNETS, Peer, PeerCount, PeerDrop, place},
    tunnel::{SUBNETS_IN_ORDER, Settings},
};

use crate::kernel::XDP_FRAGS;

/// The builds of XDP decapsulation that this kernel can load.
pub fn xdp_builds() -> impl Iterator<Item = &'static str> {
    ["flannel_decap_xdp", "flannel_decap_xdp_frags"].into_iter().filter(|name| is_for_this_kernel(name))
}

/// Whether this kernel can load that program. The agent asks for the build with fragments only where the plain one does
/// not fit the interface.
pub fn is_for_this_kernel(program: &str) -> bool {
    program != "flannel_decap_xdp_frags" || XDP_FRAGS.met()
}

/// All programs of the object, in no order.
pub const ALL: [&str; 6] = [
    "flannel_encap",
    "flannel_ingress",
    "flannel_gro",
    "flannel_decap_xdp",
    "flannel_decap_xdp_frags",
    "flannel_pass",
];

/// Verdicts, as test runs return them.
pub mod verdict {
    /// `TC_ACT_UNSPEC`, `TCX_NEXT`.
    pub const NEXT: i32 = -1;
    pub const TC_OK: i32 = 0;
    pub const TC_SHOT: i32 = 2;
    pub const TC_REDIRECT: i32 = 7;
    pub const XDP_DROP: i32 = 1;
    pub const XDP_PASS: i32 = 2;
}

/// What one packet led to.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    pub verdict: i32,
    /// For XDP with the metadata in front, where the kernel gives it back ([`crate::kernel::XDP_TEST_METADATA`]).
    pub packet: Vec<u8>,
    /// Counters that moved; those of earlier packets are cleared before a run.
    pub counted: BTreeMap<Counter, Count>,
}

/// Context of a run: what surrounds the bytes of a packet.
#[derive(Clone, Copy, Debug, Default)]
pub enum Context {
    #[default]
    Plain,
    /// tc: a packet that is still to be segmented.
    Gso { size: u32, segments: u32 },
    /// XDP: this many of the input's first bytes are metadata.
    Metadata(u32),
}

/// A loaded object.
pub struct Programs {
    ebpf: Ebpf,
    settings: Settings,
}

impl Programs {
    /// Loads every program this kernel can load, under the given settings. Nothing is attached.
    ///
    /// # Errors
    /// The program and the verifier's log.
    pub fn load(settings: &Settings) -> Result<Self> {
        Self::load_object(settings, OBJECT)
    }

    /// The programs that measure the others.
    ///
    /// # Errors
    /// `cargo xtask build-ebpf` did not run, or as [`Self::load`].
    pub fn load_measuring(settings: &Settings) -> Result<Self> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bpf/flannel-cost.bpf.o");
        let object = std::fs::read(path).with_context(|| format!("read {path}"))?;
        Self::load_object(settings, &object)
    }

    fn load_object(settings: &Settings, object: &[u8]) -> Result<Self> {
        let mut ebpf = EbpfLoader::new()
            .override_global("SETTINGS", settings, true)
            .map_max_entries("PEER_COUNTERS", cpus()? * MAX_PEERS)
            .load(object)
            .context("load the eBPF object")?;
        for (name, program) in ebpf.programs_mut().filter(|(name, _)| is_for_this_kernel(name)) {
            match program {
                Program::Xdp(program) => program.load(),
                Program::SchedClassifier(program) => program.load(),
                _ => bail!("{name} is neither tc nor XDP"),
            }
            .map_err(|e| anyhow::anyhow!("{name}: {e:#}"))?;
        }
        let map = ebpf.map_mut("SUBNETS").context("no map SUBNETS")?;
        Array::<&mut MapData, Peer>::try_from(map)?.set(MAX_SUBNETS, settings.order(), 0)?;
        Ok(Self { ebpf, settings: *settings })
    }

    /// Tells the programs that `peer` leases the subnet that starts at `subnet`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn add_peer(&mut self, subnet: Ipv4Addr, peer: Peer) -> Result<()> {
        let key = u32::from_ne_bytes(subnet.octets());
        if self.settings.flags & SUBNETS_IN_ORDER != 0 {
            let map = self.ebpf.map_mut("SUBNETS").context("no map SUBNETS")?;
            let mut subnets: Array<&mut MapData, Peer> = Array::try_from(map)?;
            return Ok(subnets.set(self.settings.place_of(key), peer, 0)?);
        }
        let map = self.ebpf.map_mut("PEERS").context("no map PEERS")?;
        let mut peers: HashMap<&mut MapData, u32, Peer> = HashMap::try_from(map)?;
        Ok(peers.insert(key, peer, 0)?)
    }

    /// Makes an interface known to the programs, as the agent does with pods' ports and the door.
    ///
    /// # Errors
    /// The kernel's: there is no such interface.
    pub fn add_port(&mut self, ifindex: u32) -> Result<()> {
        let map = self.ebpf.map_mut("PORTS").context("no map PORTS")?;
        let mut ports: DevMapHash<&mut MapData> = DevMapHash::try_from(map)?;
        Ok(ports.insert(ifindex, ifindex, None, 0)?)
    }

    /// Runs one packet.
    ///
    /// # Errors
    /// An unknown program, or input the kernel does not take (shorter than an Ethernet header).
    pub fn run(&mut self, program: &str, packet: &[u8], context: Context) -> Result<Outcome> {
        self.clear_counters()?;
        let ctx = context.bytes(packet.len());
        let mut out = vec![0; packet.len() + 256];
        let options = TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_in: ctx.as_deref(),
            ..TestRunOptions::default()
        };
        let result = match self.ebpf.program(program).with_context(|| format!("no program {program}"))? {
            Program::Xdp(program) => program.test_run(options),
            Program::SchedClassifier(program) => program.test_run(options),
            _ => bail!("{program} is neither tc nor XDP"),
        }
        .with_context(|| format!("test run of {program} with {} bytes", packet.len()))?;
        out.truncate(result.data_size_out as usize);
        Ok(Outcome { verdict: result.return_value.cast_signed(), packet: out, counted: self.counted()? })
    }

    /// Time per packet over `repeat` runs of one packet. tc programs see their own result again, so only packets that
    /// are left unchanged cost the same each time.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn time(&mut self, program: &str, packet: &[u8], repeat: u32) -> Result<Duration> {
        let options = TestRunOptions { data_in: Some(packet), repeat, ..TestRunOptions::default() };
        let result = match self.ebpf.program(program).with_context(|| format!("no program {program}"))? {
            Program::Xdp(program) => program.test_run(options),
            Program::SchedClassifier(program) => program.test_run(options),
            _ => bail!("{program} is neither tc nor XDP"),
        };
        Ok(result.with_context(|| format!("timed run of {program}"))?.duration)
    }

    /// Instructions the verifier walked; `None` before Linux 5.16.
    ///
    /// # Errors
    /// An unknown program.
    pub fn verified_instructions(&self, program: &str) -> Result<Option<u32>> {
        Ok(self.info(program)?.verified_instruction_count())
    }

    /// Bytes of bytecode after the verifier's rewriting.
    ///
    /// # Errors
    /// An unknown program.
    pub fn translated_size(&self, program: &str) -> Result<Option<u32>> {
        Ok(self.info(program)?.size_translated())
    }

    /// Counters that are not 0, summed over all CPUs.
    ///
    /// # Errors
    /// The kernel's.
    pub fn counted(&self) -> Result<BTreeMap<Counter, Count>> {
        let counters =
            PerCpuArray::<_, Count>::try_from(self.ebpf.map("COUNTERS").context("no map COUNTERS")?)?;
        let mut counted = BTreeMap::new();
        for counter in Counter::ALL {
            let sum = counters.get(&(*counter as u32), 0)?.iter().fold(Count::default(), |sum, cpu| Count {
                packets: sum.packets + cpu.packets,
                bytes: sum.bytes + cpu.bytes,
            });
            if sum != Count::default() {
                counted.insert(*counter, sum);
            }
        }
        Ok(counted)
    }

    /// Traffic with the peer of that index, summed over all CPUs, since the object was loaded.
    ///
    /// # Errors
    /// The kernel's.
    pub fn peer_count(&self, index: u32) -> Result<PeerCount> {
        let map = self.ebpf.map("PEER_COUNTERS").context("no map PEER_COUNTERS")?;
        let counts = Array::<_, PeerCount>::try_from(map)?;
        (0..cpus()?)
            .filter_map(|cpu| place(index, cpu))
            .try_fold(PeerCount::default(), |sum, place| Ok(sum.and(&counts.get(&place, 0)?)))
    }

    /// Packets held against the peer of that index, by reason, since the object was loaded.
    ///
    /// # Errors
    /// The kernel's.
    pub fn peer_drops(&self, index: u32) -> Result<BTreeMap<Counter, u64>> {
        let map = self.ebpf.map("PEER_DROPS").context("no map PEER_DROPS")?;
        let drops = PerCpuHashMap::<_, PeerDrop, u64>::try_from(map)?;
        let mut counted = BTreeMap::new();
        for entry in drops.iter() {
            let (key, packets) = entry?;
            let reason = Counter::ALL.get(key.reason as usize).context("a reason that is none")?;
            if key.peer == index {
                counted.insert(*reason, packets.iter().sum());
            }
        }
        Ok(counted)
    }

    /// # Errors
    /// The kernel's.
    pub fn clear_counters(&mut self) -> Result<()> {
        let zero = vec![Count::default(); cpus()? as usize];
        let mut counters =
            PerCpuArray::<_, Count>::try_from(self.ebpf.map_mut("COUNTERS").context("no map COUNTERS")?)?;
        for counter in Counter::ALL {
            counters.set(*counter as u32, PerCpuValues::try_from(zero.clone())?, 0)?;
        }
        Ok(())
    }

    /// A tc program, to be attached.
    ///
    /// # Errors
    /// There is no such tc program.
    pub fn classifier(&mut self, name: &str) -> Result<&mut SchedClassifier> {
        Ok(self.ebpf.program_mut(name).with_context(|| format!("no program {name}"))?.try_into()?)
    }

    /// An XDP program, to be attached.
    ///
    /// # Errors
    /// There is no such XDP program.
    pub fn xdp(&mut self, name: &str) -> Result<&mut Xdp> {
        Ok(self.ebpf.program_mut(name).with_context(|| format!("no program {name}"))?.try_into()?)
    }

    fn info(&self, program: &str) -> Result<ProgramInfo> {
        Ok(self.ebpf.program(program).with_context(|| format!("no program {program}"))?.info()?)
    }
}

fn cpus() -> Result<u32> {
    let count = nr_cpus().map_err(|(what, e)| anyhow::anyhow!("{what}: {e}"))?;
    Ok(u32::try_from(count)?)
}

impl Context {
    /// As `struct __sk_buff` and `struct xdp_md` of `linux/bpf.h` have it.
    fn bytes(self, packet: usize) -> Option<Vec<u8>> {
        let words = match self {
            Self::Plain => return None,
            Self::Gso { size, segments } => {
                let mut words = vec![0_u32; 48];
                words[41] = segments;
                words[44] = size;
                words
            }
            // data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
            Self::Metadata(length) => vec![length, packet as u32, 0, 0, 0, 0],
        };
        Some(words.iter().flat_map(|word| word.to_ne_bytes()).collect())
    }
}
