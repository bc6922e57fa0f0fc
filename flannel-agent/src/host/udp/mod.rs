//! The udp tunnel.

use std::path::PathBuf;

use crate::domain::host_state::{HostItem, Tunnel, TunnelPeer};
use crate::host::HostError;
use crate::host::netlink::Netlink;

pub mod object;

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

pub mod userspace {
    use std::os::fd::AsRawFd;

    use crate::host::HostError;

    pub fn ensure_device(name: &str) -> Result<(), HostError> {
        let failed = |e: std::io::Error| HostError::new(format!("create {name}"), e.to_string());
        let file = std::fs::File::options().read(true).write(true).open("/dev/net/tun").map_err(failed)?;
        let mut request = [0_u8; 40];
        for (to, from) in request.iter_mut().zip(name.bytes().take(15)) {
            *to = from;
        }
        let flags = libc::IFF_TUN | libc::IFF_NO_PI | libc::IFF_VNET_HDR | libc::IFF_MULTI_QUEUE;
        for (to, from) in request.iter_mut().skip(16).zip(u16::try_from(flags).unwrap_or(0).to_ne_bytes()) {
            *to = from;
        }
        // SAFETY: the request is as long as struct ifreq and lives during the call.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) } < 0 {
            return Err(failed(std::io::Error::last_os_error()));
        }
        // SAFETY: takes a number.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST, 1) } < 0 {
            return Err(failed(std::io::Error::last_os_error()));
        }
        Ok(())
    }
}
