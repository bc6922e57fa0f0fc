//! A TCP port that stays ours while nobody listens on it.
//!
//! A server that is killed and comes back wants its port again. A port that merely was free a moment ago is given to
//! whoever asks for any: with several servers at once, one of them sooner or later answers in another's place, and a
//! test reads a stranger's data (seen once, and at will in a namespace with 250 ports to give). Here a socket is bound
//! and never listens. Linux gives the port to no bind to port 0 and to no outgoing connection meanwhile, and to a
//! server that names it, since both set `SO_REUSEADDR` (socket(7)); whoever connects while no server listens is refused.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, SockaddrIn6, SockaddrLike as _, SockaddrStorage, bind,
    getsockname, setsockopt, socket, sockopt::ReuseAddr,
};

/// Held until it is dropped.
#[derive(Debug)]
pub struct Port {
    address: SocketAddr,
    _held: OwnedFd,
}

impl Port {
    /// Any of `address` that is free.
    ///
    /// # Errors
    /// This namespace has no such address, or no port left.
    pub fn hold(address: IpAddr) -> Result<Self> {
        let any = SockaddrStorage::from(SocketAddr::new(address, 0));
        let family = any.family().unwrap_or(AddressFamily::Inet);
        let held = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).context("a socket")?;
        setsockopt(&held, ReuseAddr, &true).context("SO_REUSEADDR")?;
        bind(held.as_raw_fd(), &any).with_context(|| format!("a port of {address}"))?;
        let port = match family {
            AddressFamily::Inet6 => getsockname::<SockaddrIn6>(held.as_raw_fd())?.port(),
            _ => getsockname::<SockaddrIn>(held.as_raw_fd())?.port(),
        };
        Ok(Self { address: SocketAddr::new(address, port), _held: held })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }
}
