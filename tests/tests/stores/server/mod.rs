//! What only a server can get wrong: many clients, bad ones, TLS, its own death.

mod behind;
mod clients;
mod disk;
mod file;
mod process;

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Result;
use flannel_agent::stores::remote::{RemoteNetworks, RemoteOptions};
use flannel_agent::stores::{LeaseRequest, LeaseStore, NetworkStores};

use crate::ground::{network, request};

pub(crate) use self::{behind::*, clients::*, disk::*, file::*, process::*};

const CONFIG: &str = r#"{"Network":"10.5.0.0/16"}"#;

fn node(servers: &[SocketAddr]) -> Result<Arc<dyn LeaseStore>> {
    let servers = servers.iter().map(ToString::to_string).collect();
    Ok(RemoteNetworks::open(&RemoteOptions { servers, ..RemoteOptions::default() })?.network(None))
}

fn asking(ip: &str) -> LeaseRequest {
    request(&network("10.5.255.0"), ip)
}
