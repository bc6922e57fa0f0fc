//! The eBPF object, embedded at build time so that running the agent needs no toolchain (`build.rs` says from where).

/// The ELF object of `flannel-ebpf`, aligned for the loader; empty when the agent was built without it.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("FLANNEL_BPF_OBJ"));

/// What to say when a BPF tier is asked for and [`is_built`] is false.
pub const NOT_BUILT: &str = "built without the eBPF object; run `cargo xtask build-ebpf` and build again";

/// Whether [`OBJECT`] holds programs. False only for developer builds made before `cargo xtask build-ebpf`.
#[must_use]
pub const fn is_built() -> bool {
    cfg!(not(flannel_bpf_missing))
}
