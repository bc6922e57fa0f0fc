//! flannel-agent: leases come in, a backend says what the host should look like, the agent makes it so and keeps it
//! so.
//!
//! ```text
//!   stores/                 domain/                     backends/                  host/
//!    etcd · kube · …  ──►  LeaseEvent ─► Peers  ──►  desired(own, peers)  ──►  changes ──►  kernel, BPF maps
//!                                                      = HostState            in batches
//!                              ▲                                                   │
//!                              └──── agent/: the loop, the only owner of state ────┘
//! ```
//!
//! flanneld's backends handle *added* and *removed* themselves, so each needs repair code of its own, and most of its
//! known defects live there. Said as state, a deleted device, a flushed route, a crashed predecessor and a new peer
//! are one thing: a difference between what is and what should be.
//!
//! | folder | what it does | may use |
//! |---|---|---|
//! | [`domain`] | knows networks, leases, peers, host states; pure | nothing of ours, no IO |
//! | [`backends`] | say what the host should look like; pure | domain |
//! | [`stores`] | where leases live | domain |
//! | [`host`] | the only code that touches the kernel | domain, flannel-common |
//! | [`agent`], [`startup`] | the loop, and the steps before it | the traits of the three above |
//! | [`cli`], [`subnet_env`] | flags; subnet.env | domain |
//! | [`server`] | leases for other nodes over HTTP: `--listen` | stores, domain |
//! | [`health`], [`status`] | what others may ask | – |
//! | [`chance`] | random choices, which a test can repeat | – |
//! | [`commands`] | put the parts together; `status` and `top` for people | everything |
//!
//! `cargo xtask check` reads the `crate::` paths and fails when a row is broken.
//!
//! Five seams: [`backends::Backend`], [`stores::LeaseStore`] with [`stores::NetworkStores`] above it, [`host::Host`], and,
//! private to their folders, `stores::registry::Registry` (keys and values: etcd, our own file) and (to come) the clouds'
//! route tables. A new backend is one file in `backends/` and one arm in
//! [`backends::choose`]; a new thing on the host is a variant of [`domain::host_state::HostItem`], and the compiler
//! names every place that must know it.

pub mod agent;
pub mod backends;
pub mod chance;
pub mod cli;
pub mod commands;
pub mod domain;
pub mod health;
pub mod host;
pub mod server;
pub mod startup;
pub mod status;
pub mod stores;
pub mod subnet_env;
