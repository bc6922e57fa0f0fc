//! Developer commands.

mod build_ebpf;

fn main() -> anyhow::Result<()> {
    build_ebpf::run()
}
