//! What pods send each other, compared byte for byte.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, ensure};

use crate::rig::Node;

const PATIENCE: Duration = Duration::from_secs(5);

/// Bytes that repeat nowhere near, so that a lost, repeated or exchanged packet shows.
fn pattern(length: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_ne_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// One connection from pod to pod that carries `length` bytes.
pub(crate) fn tcp(from: &Node, to: &Node, length: usize) -> Result<()> {
    let (source, address) = (from.pod(), (to.pod(), 0));
    let listener = to.run(move |_| TcpListener::bind(address))?;
    let address = listener.local_addr()?;
    let sent = pattern(length);
    let receiving = thread::spawn(move || -> Result<Vec<u8>> {
        let (mut stream, peer) = listener.accept()?;
        ensure!(peer.ip() == source, "connected from {peer}");
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut data = Vec::new();
        stream.read_to_end(&mut data)?;
        Ok(data)
    });
    // The pod's address is the source: the route's own would be the tunnel device's.
    let mut stream = from.run(move |_| -> Result<TcpStream> {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket};
        let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        bind(socket.as_raw_fd(), &SockaddrIn::from(std::net::SocketAddrV4::new(source, 0)))?;
        let stream = TcpStream::from(socket);
        stream.set_write_timeout(Some(PATIENCE))?;
        let std::net::SocketAddr::V4(address) = address else { anyhow::bail!("{address} is not IPv4") };
        connect(stream.as_raw_fd(), &SockaddrIn::from(address)).context("connect")?;
        Ok(stream)
    })?;
    stream.write_all(&sent)?;
    drop(stream);
    let received = receiving.join().map_err(|_| anyhow!("the receiver panicked"))??;
    ensure!(received.len() == length, "{} of {length} bytes", received.len());
    ensure!(received == sent, "bytes differ");
    Ok(())
}

/// Datagrams that the sender's kernel gets as one (`UDP_SEGMENT`), the last one shorter; with `size` as their payload.
pub(crate) fn udp_segments(from: &Node, to: &Node, size: usize) -> Result<()> {
    const AT_ONCE: usize = 20;
    let (sender, receiver) = (from.pod_socket(0)?, to.pod_socket(0)?);
    receiver.set_read_timeout(Some(Duration::from_secs(1)))?;
    let option = libc::c_int::try_from(size)?;
    // SAFETY: UDP_SEGMENT reads one int.
    let set = unsafe {
        libc::setsockopt(
            sender.as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw const option).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    ensure!(set == 0, "UDP_SEGMENT: {}", std::io::Error::last_os_error());
    let sent = pattern(size * AT_ONCE - size / 3);
    let mut buffer = [0; 2000];
    for round in 0..20 {
        sender.send_to(&sent, receiver.local_addr()?)?;
        for (i, expected) in sent.chunks(size).enumerate() {
            let length =
                receiver.recv(&mut buffer).with_context(|| format!("datagram {i} of round {round}"))?;
            ensure!(&buffer[..length] == expected, "datagram {i} of round {round}: {length} bytes");
        }
    }
    Ok(())
}
