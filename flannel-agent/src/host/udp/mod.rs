//! The udp tunnel.

use std::path::PathBuf;

use crate::domain::host_state::{HostItem, Tunnel, TunnelPeer};
use crate::host::HostError;
use crate::host::netlink::Netlink;

pub mod object;
pub mod userspace;

pub struct TunnelReport;

pub struct Tunnels;

impl Tunnels {
    pub fn new(_netlink: Netlink, _bpffs: PathBuf) -> Self {
        Self
    }
    pub async fn put(&mut self, tunnel: &Tunnel) -> Result<(), HostError> {
        Err(HostError::new(format!("put {}", HostItem::Tunnel(tunnel.clone())), "not merged"))
    }
    pub async fn remove(&mut self, _tunnel: &Tunnel) -> Result<(), HostError> {
        Ok(())
    }
    pub async fn put_peers(&mut self, peers: &[TunnelPeer]) -> Vec<Result<(), HostError>> {
        vec![Ok(()); peers.len()]
    }
    pub async fn remove_peers(&mut self, peers: &[TunnelPeer]) -> Vec<Result<(), HostError>> {
        vec![Ok(()); peers.len()]
    }
    pub async fn observe(&mut self) -> Vec<HostItem> {
        Vec::new()
    }
    pub async fn disturbed(&mut self) {
        std::future::pending().await
    }
    pub fn reports(&self) -> Vec<TunnelReport> {
        Vec::new()
    }
}
