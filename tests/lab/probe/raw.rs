//! IPv4 packets sent exactly as given (raw(7), IP_HDRINCL), and raw datagrams from a chosen port.

use std::{
    net::{SocketAddrV4, UdpSocket},
    os::fd::AsRawFd as _,
    sync::Arc,
};

use anyhow::{Context as _, Result};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
};

use super::patiently;
use crate::namespace::Namespace;

/// Sends whole IPv4 packets from a namespace. The kernel fills in the checksum, and id and source where they are 0.
///
/// # Errors
/// Not permitted, no route, or a packet without a header.
pub fn send_packets(from: &Arc<Namespace>, packets: &[Vec<u8>]) -> Result<()> {
    from.run(|| {
        let socket = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw)
            .context("make a raw socket")?;
        for packet in packets {
            let to = packet.get(16..20).and_then(|b| b.first_chunk::<4>()).context("not an IPv4 packet")?;
            let to = SockaddrIn::new(to[0], to[1], to[2], to[3], 0);
            sendto(socket.as_raw_fd(), packet, &to, MsgFlags::empty())
                .with_context(|| format!("send a raw packet of {} bytes", packet.len()))?;
        }
        Ok(())
    })
}

/// Sends UDP payloads from `source` to `target`.
///
/// # Errors
/// The source is taken, or no route.
pub fn send_datagrams(
    from: &Arc<Namespace>,
    source: SocketAddrV4,
    target: SocketAddrV4,
    payloads: &[Vec<u8>],
) -> Result<()> {
    from.run(|| {
        let socket = patiently(|| UdpSocket::bind(source)).with_context(|| format!("bind UDP {source}"))?;
        for payload in payloads {
            socket.send_to(payload, target).with_context(|| format!("send to {target}"))?;
        }
        Ok(())
    })
}
