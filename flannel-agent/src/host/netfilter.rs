//! What of netfilter the agent looks at, and never touches: whether nftables has tables of the bridge family.

use std::io;
use std::time::Duration;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};

// linux/netfilter/nfnetlink.h, nf_tables.h, linux/netfilter.h, linux/netlink.h
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_GETTABLE: u16 = 1;
const NFPROTO_BRIDGE: u8 = 7;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// Bytes of `struct nlmsghdr`.
const HEADER: usize = 16;

/// The kernel answers in microseconds; what takes this long was lost.
const PATIENCE: Duration = Duration::from_secs(1);

/// How many tables of the bridge family there are in the calling thread's network namespace. A kernel without nftables has
/// none.
///
/// # Errors
/// No socket to be had, or the kernel does not answer.
pub fn bridge_tables() -> io::Result<usize> {
    let mut socket = match Socket::new(NETLINK_NETFILTER) {
        Err(e) if e.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(0),
        socket => socket?,
    };
    socket.bind_auto()?;
    let patience = TimeVal::milliseconds(i64::try_from(PATIENCE.as_millis()).unwrap_or(1000));
    setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
    let mut request = Vec::with_capacity(HEADER + 4);
    request.extend((HEADER as u32 + 4).to_ne_bytes());
    request.extend((NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETTABLE).to_ne_bytes());
    request.extend((NLM_F_REQUEST | NLM_F_DUMP).to_ne_bytes());
    request.extend(1_u32.to_ne_bytes());
    request.extend(0_u32.to_ne_bytes());
    // struct nfgenmsg: family, version, resource id
    request.extend([NFPROTO_BRIDGE, 0, 0, 0]);
    socket.send_to(&request, &SocketAddr::new(0, 0), 0)?;
    let mut tables = 0;
    loop {
        let (answer, _) = socket.recv_from_full()?;
        match count(&answer)? {
            Counted::More(more) => tables += more,
            Counted::All(last) => return Ok(tables + last),
        }
    }
}

enum Counted {
    More(usize),
    All(usize),
}

/// Tables in one datagram of the answer.
fn count(mut messages: &[u8]) -> io::Result<Counted> {
    let mut tables = 0;
    while let Some((length, kind)) = header(messages) {
        match kind {
            NLMSG_DONE => return Ok(Counted::All(tables)),
            NLMSG_ERROR => {
                let code = messages.get(HEADER..HEADER + 4).and_then(|bytes| bytes.try_into().ok());
                return match -code.map_or(0, i32::from_ne_bytes) {
                    // What a kernel says that has no nftables.
                    libc::EINVAL | libc::EOPNOTSUPP | libc::EAFNOSUPPORT => Ok(Counted::All(tables)),
                    errno => Err(io::Error::from_raw_os_error(errno)),
                };
            }
            kind if kind == NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWTABLE => {
                tables += usize::from(messages.get(HEADER) == Some(&NFPROTO_BRIDGE));
            }
            _ => {}
        }
        // Messages are aligned to four bytes.
        messages = messages.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(Counted::More(tables))
}

/// Length and type of the first message.
fn header(messages: &[u8]) -> Option<(usize, u16)> {
    let length = u32::from_ne_bytes(messages.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(messages.get(4..6)?.try_into().ok()?);
    (HEADER..=messages.len()).contains(&length).then_some((length, kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let length = (HEADER + body.len()) as u32;
        let mut bytes = [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 10], body].concat();
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn only_tables_of_the_bridge_family_are_counted() {
        let table = |family| message(NFNL_SUBSYS_NFTABLES << 8, &[family, 0, 0, 0, 1]);
        let answer = [table(NFPROTO_BRIDGE), table(2), table(NFPROTO_BRIDGE)].concat();
        assert!(matches!(count(&answer), Ok(Counted::More(2))));
        let last = [answer, message(NLMSG_DONE, &[0; 4])].concat();
        assert!(matches!(count(&last), Ok(Counted::All(2))));
        assert!(matches!(count(&message(NLMSG_ERROR, &(-libc::EINVAL).to_ne_bytes())), Ok(Counted::All(0))));
        assert!(count(&message(NLMSG_ERROR, &(-libc::EPERM).to_ne_bytes())).is_err());
    }

    #[test]
    fn a_message_cut_short_ends_the_count() {
        let whole = message(NFNL_SUBSYS_NFTABLES << 8, &[NFPROTO_BRIDGE, 0, 0, 0]);
        for end in 0..whole.len() {
            assert!(matches!(count(&whole[..end]), Ok(Counted::More(0))), "{end}");
        }
    }
}
