//! The flags as they are typed. What they mean together is [`super::settings`]'s part.
//!
//! Every flag of flanneld 0.7.0 and of today's is here (contract §1.3), so that none is taken for a typing error. The
//! doc comments are the text of `-help`.

use clap::{ArgAction, Args, CommandFactory, Parser};

use super::etcd::EtcdFlags;
use super::go;
use super::go::Kind;
use super::kube::KubeFlags;
use super::server::{NetworksFlags, ServerFlags};
use crate::domain::host_state::{Datapath, SourceCheck, SourcePort};
use crate::domain::interface::Pattern;

/// The default of `--status-socket`, which `status` asks too.
pub(super) const STATUS_SOCKET: &str = "/run/flannel/status.sock";

/// The default of `--bpffs-path`, where `cleanup` looks too.
pub(super) const BPFFS_PATH: &str = "/sys/fs/bpf";

pub(super) const KUBE_ANNOTATION_PREFIX: &str = "flannel.alpha.coreos.com";
pub(super) const NET_CONFIG_PATH: &str = "/etc/kube-flannel/net-conf.json";
pub(super) const SUBNET_DIR: &str = "/run/flannel/networks";
pub(super) const IPTABLES_RESYNC: i64 = 5;

#[derive(Parser)]
#[command(disable_help_flag = true, disable_version_flag = true, args_override_self = true)]
#[command(term_width = 100, next_line_help = true)]
pub(super) struct Flags {
    #[command(flatten)]
    pub(super) etcd: EtcdFlags,
    #[command(flatten)]
    pub(super) kube: KubeFlags,
    #[command(flatten)]
    pub(super) server: ServerFlags,
    #[command(flatten)]
    pub(super) networks: NetworksFlags,
    #[command(flatten)]
    pub(super) interface: InterfaceFlags,
    #[command(flatten)]
    pub(super) node: NodeFlags,
    #[command(flatten)]
    pub(super) udp: UdpFlags,
    #[command(flatten)]
    pub(super) log: LogFlags,
    #[command(flatten)]
    pub(super) not_built: NotBuiltFlags,
}

#[derive(Args)]
#[command(
    next_help_heading = "The interface to the other nodes (tried in this order; else the default route's)"
)]
pub(super) struct InterfaceFlags {
    /// Interface by name or address; may be repeated, the first that works is taken
    #[arg(long, value_name = "NAME|IP", action = ArgAction::Append)]
    pub(super) iface: Vec<String>,
    /// Interface by a regular expression for its addresses, else its name; may be repeated
    #[arg(long, value_name = "REGEX", action = ArgAction::Append)]
    pub(super) iface_regex: Vec<Pattern>,
    /// Interface the kernel would send to this address from
    #[arg(long, value_name = "IP")]
    pub(super) iface_can_reach: Option<String>,
    /// Address the other nodes send to, if it is not the interface's; without the flags above it also chooses the
    /// interface
    #[arg(long, value_name = "IP")]
    pub(super) public_ip: Option<String>,
    /// The same for IPv6
    #[arg(long, value_name = "IP")]
    pub(super) public_ipv6: Option<String>,
}

#[derive(Args)]
#[command(next_help_heading = "This node")]
pub(super) struct NodeFlags {
    /// File to write FLANNEL_NETWORK, FLANNEL_SUBNET, FLANNEL_MTU and FLANNEL_IPMASQ to
    #[arg(long, value_name = "FILE", default_value = "/run/flannel/subnet.env")]
    pub(super) subnet_file: String,
    /// Renew the lease this many minutes before it ends, 1 to 1439
    #[arg(long, value_name = "MINUTES", default_value = "60", value_parser = go::integer)]
    pub(super) subnet_lease_renew_margin: i64,
    /// Address to serve /healthz and /readyz on
    #[arg(long, value_name = "IP", default_value = "0.0.0.0")]
    pub(super) healthz_ip: String,
    /// Port to serve /healthz and /readyz on; 0 is off
    #[arg(long, value_name = "PORT", default_value = "0", value_parser = go::integer)]
    pub(super) healthz_port: i64,
    /// Socket that `flannel-agent status` asks; empty is off
    #[arg(long, value_name = "PATH", default_value = STATUS_SOCKET)]
    pub(super) status_socket: String,
}

#[derive(Args)]
#[command(next_help_heading = "The udp backend")]
pub(super) struct UdpFlags {
    /// What carries packets: auto takes the best that works here; ebpf is xdp or tc; tun is user space
    #[arg(long, value_name = "auto|ebpf|xdp|tc|tun", default_value_t)]
    pub(super) udp_datapath: Datapath,
    /// Packets from a subnet their sender does not lease: drop, only count, or do not look
    #[arg(long, value_name = "enforce|observe|off", default_value_t)]
    pub(super) udp_source_check: SourceCheck,
    /// Outer source port: one per flow, which spreads load, or always the tunnel's own, as flanneld sends
    #[arg(long, value_name = "flow|fixed", default_value_t)]
    pub(super) udp_source_port: SourcePort,
    /// MTU of the tunnel, for all nodes' pods; 0 follows the interface and finds out what each path carries
    #[arg(long, value_name = "BYTES", default_value = "0", value_parser = go::integer)]
    pub(super) udp_mtu: i64,
    /// The mounted BPF file system, where programs and maps outlive the agent
    #[arg(long, value_name = "DIR", default_value = BPFFS_PATH)]
    pub(super) bpffs_path: String,
}

#[derive(Args)]
#[command(next_help_heading = "Log and version")]
pub(super) struct LogFlags {
    /// Verbosity: 0, 1 for details, 5 for everything
    #[arg(long = "v", value_name = "LEVEL", default_value = "0", value_parser = go::level)]
    pub(super) v: i32,
    /// Print the version and exit
    #[arg(long, action = ArgAction::Set, default_value = "false", value_parser = go::boolean)]
    pub(super) version: bool,
    /// Log to standard error; always so, false is refused
    #[arg(long, action = ArgAction::Set, default_value = "true", value_parser = go::boolean)]
    pub(super) logtostderr: bool,
    /// Log to standard error too; always so
    #[arg(long, action = ArgAction::Set, default_value = "false", value_parser = go::boolean)]
    pub(super) alsologtostderr: bool,
    /// Accepted and without effect, as in flanneld: everything goes to standard error
    #[arg(long, value_name = "SEVERITY", default_value = "INFO")]
    pub(super) stderrthreshold: String,
    /// Accepted and without effect, as in flanneld: no log files are written
    #[arg(long = "log_dir", value_name = "DIR")]
    pub(super) log_dir: Option<String>,
}

/// Known so that they can be refused by name. Those that may stand in a manifest with their default are accepted
/// with it.
#[derive(Args)]
#[command(
    next_help_heading = "Flags of flanneld this version refuses, because what they ask for is not built yet"
)]
pub(super) struct NotBuiltFlags {
    /// Masquerade what leaves the overlay
    #[arg(long, action = ArgAction::Set, default_value = "false", value_parser = go::boolean)]
    pub(super) ip_masq: bool,
    /// Masquerade without random ports
    #[arg(long, action = ArgAction::Set, default_value = "false", value_parser = go::boolean)]
    pub(super) ip_masq_fully_random_disable: bool,
    /// Accept forwarded packets of the overlay; false is accepted
    #[arg(long, action = ArgAction::Set, value_parser = go::boolean)]
    pub(super) iptables_forward_rules: Option<bool>,
    /// Seconds between checks of the firewall rules
    #[arg(long, value_name = "SECONDS", default_value_t = IPTABLES_RESYNC, value_parser = go::integer)]
    pub(super) iptables_resync: i64,
    /// Drop packets to unleased addresses of this node's subnet
    #[arg(long, action = ArgAction::Set, default_value = "false", value_parser = go::boolean)]
    pub(super) ip_blackhole_route: bool,
    /// Verbosity by source file
    #[arg(long, value_name = "PATTERN=LEVEL")]
    pub(super) vmodule: Option<String>,
    /// Stack trace at a line of the source
    #[arg(long = "log_backtrace_at", value_name = "FILE:LINE")]
    pub(super) log_backtrace_at: Option<String>,
}

/// The daemon's flags as clap sees them.
pub(super) fn command() -> clap::Command {
    Flags::command().mut_args(|arg| match kind(&arg) {
        Kind::Boolean => {
            let off = arg.get_default_values().iter().all(|value| value == "false");
            arg.num_args(0..=1)
                .require_equals(true)
                .value_name("BOOL")
                .hide_possible_values(true)
                .hide_default_value(off)
        }
        Kind::Valued => arg,
    })
}

/// How the flag `name` of `command` takes its value; `None` when there is no such flag.
pub(super) fn kind_of(command: &clap::Command, name: &str) -> Option<Kind> {
    command.get_arguments().find(|arg| arg.get_long() == Some(name)).map(kind)
}

fn kind(arg: &clap::Arg) -> Kind {
    if arg.get_value_parser().type_id() == std::any::TypeId::of::<bool>() {
        Kind::Boolean
    } else {
        Kind::Valued
    }
}
