//! Links, addresses and routes of one network namespace, spoken to the kernel directly.
//!
//! The typed builders of `rtnetlink` await one answer after the other and drop the kernel's own words, so requests
//! are made here from `netlink-packet-route` and sent over `netlink-proto`:
//!
//! * everything that comes in numbers goes out in batches of at most [`BATCH`] messages. The answers of a larger
//!   batch can overflow the socket's receive buffer, and then it would never complete;
//! * one exchange is under way at a time: the kernel refuses a second dump on a socket that is still dumping, and
//!   the connection sends one queued request per wake-up;
//! * every wait has an end ([`PATIENCE`]);
//! * extended acks are asked for, because "Nexthop has invalid gateway" says more than `ENETUNREACH`;
//! * strict checking is on, without which the kernel ignores the filter of a dump (kernel 4.20).
//!
//! What belongs to the agent is told apart by [`ROUTE_PROTOCOL`] alone; devices and networks are the caller's
//! knowledge (`host/linux.rs`).

mod addresses;
mod bridges;
mod events;
mod links;
mod routes;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use netlink_packet_core::{
    ErrorMessage, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_proto::ConnectionHandle;
use netlink_proto::sys::protocols::NETLINK_ROUTE;
use netlink_proto::sys::{AsyncSocket, SocketAddr, TokioSocket};
use nix::sys::socket::{setsockopt, sockopt};

use super::HostError;
use crate::domain::host_state::HostItem;

pub use addresses::AddressEntry;
pub use bridges::{Bridge, BridgePort, ForwardingEvents};
pub use events::Events;
pub use links::{LinkInfo, TunInfo, VethEnd, Vxlan};
pub use routes::{NextHop, ROUTE_PROTOCOL, RouteEntry, RouteLookup};

/// Messages in one batch. About 270 acks fill the 208 KiB a socket gets without `SO_RCVBUFFORCE`.
pub const BATCH: usize = 200;

/// How long the kernel may take for the next message of an answer. It answers in microseconds, but for a machine so busy that
/// somebody holds the lock of all network devices for seconds (an XDP link waits for an RCU grace period under it); what takes
/// this long is asked for again.
const PATIENCE: Duration = Duration::from_secs(5);

/// The kernel carries a batch out in the call that sends it. Where that takes longer than [`PATIENCE`], all it has to say
/// waits to be read, by the very thread that was in the call.
const READING: Duration = Duration::from_secs(1);

/// Receive buffer in bytes, beyond `net.core.rmem_max`: a route dump's or event storm's worth.
const RECEIVE_BUFFER: usize = 4 << 20;

/// A dump that was interrupted by a change is asked for this often, then taken as it is: the event that the change
/// caused brings the next one.
const DUMP_ATTEMPTS: u32 = 4;

/// A connection to the kernel's routing tables in the network namespace of the thread that made it. Clones share it.
#[derive(Clone)]
pub struct Netlink {
    connection: Arc<Connection>,
}

struct Connection {
    handle: ConnectionHandle<RouteNetlinkMessage>,
    /// Held for one exchange.
    turn: tokio::sync::Mutex<()>,
    /// The socket's port: notifications about our own changes carry it.
    port: u32,
}

type Message = NetlinkMessage<RouteNetlinkMessage>;

/// What the kernel said to one request: its messages, or why not.
type Answer = Result<Vec<Message>, Failure>;

/// Why a request failed, before it is known what it was for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Failure {
    /// The kernel refused, in its own words where it has some (extended ack).
    Refused { errno: i32, text: Option<String> },
    /// No answer in time; whether the change was made is unknown.
    Lost,
    /// The connection ended.
    Closed,
}

impl Netlink {
    /// Opens the connection in the calling thread's network namespace, and keeps that namespace whatever thread
    /// uses it later. The task that serves it runs on the current tokio runtime.
    ///
    /// # Errors
    /// No socket to be had (seccomp, file descriptors), or no tokio runtime.
    pub fn new() -> Result<Self, HostError> {
        let failed = |e: io::Error| HostError::new("open a netlink socket", describe_io(&e));
        let mut socket = open_socket().map_err(failed)?;
        let port = socket.socket_mut().bind_auto().map_err(failed)?.port_number();
        // Both are absent before kernel 4.12 and 4.20: errors are shorter then, and filters are ours alone.
        let _ = socket.socket_ref().set_ext_ack(true);
        let _ = socket.socket_ref().set_cap_ack(true);
        let _ = socket.socket_ref().set_netlink_get_strict_chk(true);
        let (mut connection, handle, unsolicited) = netlink_proto::from_socket_with_codec::<
            RouteNetlinkMessage,
            TokioSocket,
            netlink_proto::NetlinkCodec,
        >(socket);
        // An acknowledgement is what tells which messages of a batch were carried out.
        connection.set_forward_ack(true);
        connection.set_forward_done(true);
        drop(unsolicited);
        tokio::spawn(connection);
        Ok(Self { connection: Arc::new(Connection { handle, turn: tokio::sync::Mutex::new(()), port }) })
    }

    /// One answer per request, in their order. Requests go out [`BATCH`] at a time, the kernel carries them out in
    /// order, and one that fails does not stop the next.
    async fn exchange(&self, requests: Vec<Message>) -> Vec<Answer> {
        let mut answers = Vec::with_capacity(requests.len());
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() {
            let batch: Vec<Message> = requests.by_ref().take(BATCH).collect();
            answers.extend(self.exchange_batch(batch).await);
        }
        answers
    }

    async fn exchange_batch(&self, batch: Vec<Message>) -> Vec<Answer> {
        let expected = batch.len();
        // Without an acknowledgement or an end of dump, the one message of the answer is its end.
        let answered_by_message =
            batch.iter().all(|request| request.header.flags & (NLM_F_ACK | NLM_F_DUMP) == 0);
        let mut finished = 0;
        let _turn = self.connection.turn.lock().await;
        let Ok(mut stream) = self.connection.handle.request_batch(batch, SocketAddr::new(0, 0)) else {
            return vec![Err(Failure::Closed); expected];
        };
        // Sequence numbers of a batch are consecutive; with an answer to each, their order is the batch's.
        let mut by_sequence: BTreeMap<u32, Answer> = BTreeMap::new();
        let failure = loop {
            let said = match tokio::time::timeout(PATIENCE, stream.next()).await {
                Err(_) => tokio::time::timeout(READING, stream.next()).await,
                said => said,
            };
            match said {
                Err(_) => break Failure::Lost,
                Ok(None) => break Failure::Closed,
                Ok(Some(message)) => {
                    let slot = by_sequence.entry(message.header.sequence_number).or_insert(Ok(Vec::new()));
                    match &message.payload {
                        NetlinkPayload::Error(error) => {
                            finished += 1;
                            if error.code.is_some() {
                                *slot = Err(refusal(message.header.flags, error));
                            }
                        }
                        NetlinkPayload::Done(done) => {
                            finished += 1;
                            if done.code < 0 {
                                let text = extended_ack(&done.extended_ack);
                                *slot = Err(Failure::Refused { errno: -done.code, text });
                            }
                        }
                        _ => {
                            finished += usize::from(answered_by_message);
                            if let Ok(messages) = slot {
                                messages.push(message);
                            }
                        }
                    }
                }
            }
        };
        // The stream ends when each request had its last message, or with the connection: with fewer answers than
        // requests nobody can say which is whose, and what was carried out is carried out again.
        if by_sequence.len() == expected && finished == expected {
            by_sequence.into_values().collect()
        } else {
            vec![Err(failure); expected]
        }
    }

    /// One request that the kernel acknowledges.
    async fn execute(&self, message: RouteNetlinkMessage, flags: u16) -> Result<(), Failure> {
        self.exchange(vec![request(message, flags | NLM_F_ACK)])
            .await
            .pop()
            .unwrap_or(Err(Failure::Closed))
            .map(drop)
    }

    /// One request that is answered with one message.
    async fn get(&self, message: RouteNetlinkMessage) -> Result<RouteNetlinkMessage, Failure> {
        let answer = self.exchange(vec![request(message, 0)]).await.pop().unwrap_or(Err(Failure::Closed))?;
        answer.into_iter().find_map(inner).ok_or(Failure::Lost)
    }

    /// Everything the kernel lists.
    async fn dump(&self, message: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, Failure> {
        let mut attempt = 1;
        loop {
            let last = attempt == DUMP_ATTEMPTS;
            attempt += 1;
            let requests = vec![request(message.clone(), NLM_F_DUMP)];
            let answer = match self.exchange(requests).await.pop().unwrap_or(Err(Failure::Closed)) {
                // A dump whose caller has gone is still under way.
                Err(failure) if failure.is(libc::EBUSY) && !last => {
                    tokio::time::sleep(Duration::from_millis(25)).await;
                    continue;
                }
                answer => answer?,
            };
            let interrupted = answer.iter().any(|m| m.header.flags & NLM_F_DUMP_INTR != 0);
            if !interrupted || last {
                return Ok(answer.into_iter().filter_map(inner).collect());
            }
        }
    }
}

/// What a batch does with its items.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verb {
    Put,
    Remove,
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Put => "put",
            Self::Remove => "remove",
        })
    }
}

/// An item that hangs on a device and vanishes with it.
trait OnDevice {
    fn device(&self) -> &str;

    /// For texts.
    fn item(&self) -> HostItem;

    /// The acknowledged request; `index` is the device's.
    fn request(&self, verb: Verb, index: u32) -> Message;

    /// A removal failed in this way because there is nothing to remove.
    fn says_gone(failure: &Failure) -> bool;

    /// The likely cause of a failure, when the kernel's words are not enough.
    fn cause(&self, failure: &Failure) -> Option<String>;
}

impl Netlink {
    /// Puts or removes each item and says for each how it went. To remove what is gone, or hung on a device that is
    /// gone, is a success.
    async fn change_all<T: OnDevice>(&self, verb: Verb, items: &[&T]) -> Vec<Result<(), HostError>> {
        let indexes = self.indexes(items.iter().map(|item| item.device())).await;
        let mut requests = Vec::with_capacity(items.len());
        let mut known = Vec::with_capacity(items.len());
        for item in items {
            let reason = match indexes.get(item.device()) {
                Some(Ok(Some(index))) => {
                    requests.push(item.request(verb, *index));
                    known.push(None);
                    continue;
                }
                Some(Err(reason)) => reason.clone(),
                Some(Ok(None)) | None if verb == Verb::Remove => {
                    known.push(Some(Ok(())));
                    continue;
                }
                Some(Ok(None)) | None => format!("there is no network device {}", item.device()),
            };
            known.push(Some(Err(HostError::new(format!("{verb} {}", item.item()), reason))));
        }
        let mut answers = self.exchange(requests).await.into_iter();
        items
            .iter()
            .zip(known)
            .map(|(item, known)| {
                known.unwrap_or_else(|| match answers.next().unwrap_or(Err(Failure::Closed)) {
                    Ok(_) => Ok(()),
                    Err(failure) if verb == Verb::Remove && T::says_gone(&failure) => Ok(()),
                    Err(failure) => {
                        let cause = item.cause(&failure);
                        Err(failure.because(format!("{verb} {}", item.item()), cause))
                    }
                })
            })
            .collect()
    }
}

/// A routing socket of the calling thread's namespace, registered with the current runtime.
fn open_socket() -> io::Result<TokioSocket> {
    if tokio::runtime::Handle::try_current().is_err() {
        return Err(io::Error::other("there is no tokio runtime to serve it"));
    }
    let socket = TokioSocket::new(NETLINK_ROUTE)?;
    // Needs CAP_NET_ADMIN in the first user namespace; without it the default has to do, which BATCH allows for.
    let _ = setsockopt(socket.socket_ref(), sockopt::RcvBufForce, &RECEIVE_BUFFER);
    Ok(socket)
}

fn request(message: RouteNetlinkMessage, flags: u16) -> Message {
    let mut message = NetlinkMessage::from(message);
    message.header.flags = NLM_F_REQUEST | flags;
    message
}

fn inner(message: Message) -> Option<RouteNetlinkMessage> {
    match message.payload {
        NetlinkPayload::InnerMessage(inner) => Some(inner),
        _ => None,
    }
}

/// The kernel's `NLMSG_ERROR` as a [`Failure`]. After the error code come the request's header, the request itself
/// unless `NLM_F_CAPPED`, and then the extended ack's attributes.
fn refusal(flags: u16, error: &ErrorMessage) -> Failure {
    let errno = error.raw_code().saturating_neg();
    let text = (flags & NLM_F_ACK_TLVS != 0).then_some(()).and_then(|()| {
        let request = if flags & NLM_F_CAPPED != 0 { 16 } else { request_length(&error.header)? };
        extended_ack(error.header.get(request..)?)
    });
    Failure::Refused { errno, text }
}

fn request_length(header: &[u8]) -> Option<usize> {
    let length = u32::from_ne_bytes(header.get(..4)?.try_into().ok()?);
    Some((usize::try_from(length).ok()? + 3) & !3)
}

/// `NLMSGERR_ATTR_MSG` of an extended ack.
fn extended_ack(attributes: &[u8]) -> Option<String> {
    const NLMSGERR_ATTR_MSG: u16 = 1;
    let text = attributes_of(attributes).find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG)?.1;
    let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
    Some(String::from_utf8_lossy(text).trim_end_matches('.').to_owned()).filter(|text| !text.is_empty())
}

/// Type and value of each attribute (RFC 3549 §2.3.2.2's TLVs); ends at the first that is not whole.
fn attributes_of(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    const TYPE_MASK: u16 = 0x3fff;
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?) & TYPE_MASK;
        let value = rest.get(4..length)?;
        rest = rest.get((length + 3) & !3..).unwrap_or_default();
        Some((kind, value))
    })
}

impl Failure {
    fn is(&self, errno: i32) -> bool {
        matches!(self, Self::Refused { errno: e, .. } if *e == errno)
    }

    /// Says what was being done.
    fn while_doing(self, doing: impl Into<String>) -> HostError {
        HostError::new(doing, self.to_string())
    }

    /// As [`Failure::while_doing`], with the likely cause.
    fn because(self, doing: impl Into<String>, cause: Option<String>) -> HostError {
        match cause {
            Some(cause) => HostError::new(doing, format!("{self}: {cause}")),
            None => self.while_doing(doing),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused { errno, text } => {
                f.write_str(&describe_io(&io::Error::from_raw_os_error(*errno)))?;
                match text {
                    Some(text) => write!(f, " (the kernel says: {text})"),
                    None => Ok(()),
                }
            }
            Self::Lost => write!(f, "the kernel did not answer within {} s", PATIENCE.as_secs()),
            Self::Closed => f.write_str("the netlink connection has ended"),
        }
    }
}

/// An OS error as part of a sentence, with the remedy where there is only one.
pub(super) fn describe_io(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EPERM) => "operation not permitted: needs CAP_NET_ADMIN".to_owned(),
        Some(errno) => nix::errno::Errno::from_raw(errno).desc().to_lowercase(),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = u16::try_from(value.len() + 4).unwrap().to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize((bytes.len() + 3) & !3, 0);
        bytes
    }

    #[test]
    fn the_kernels_words_are_found_behind_the_request_it_echoes() {
        let words = [attribute(2, &[8, 0, 0, 0]), attribute(1, b"Nexthop has invalid gateway.\0")].concat();
        let header = |length: u32| [length.to_ne_bytes().to_vec(), vec![0; 12]].concat();
        let rows = [
            ("capped", NLM_F_ACK_TLVS | NLM_F_CAPPED, [header(60), words.clone()].concat(), true),
            ("whole", NLM_F_ACK_TLVS, [header(21), vec![0; 8], words.clone()].concat(), true),
            ("none", 0, header(60), false),
            ("cut in the request", NLM_F_ACK_TLVS, header(60), false),
            (
                "cut in the words",
                NLM_F_ACK_TLVS | NLM_F_CAPPED,
                [header(60), words[..20].to_vec()].concat(),
                false,
            ),
        ];
        for (name, flags, bytes, found) in rows {
            let mut error = ErrorMessage::default();
            error.code = std::num::NonZeroI32::new(-libc::ENETUNREACH);
            error.header = bytes;
            let text = found.then(|| "Nexthop has invalid gateway".to_owned());
            assert_eq!(refusal(flags, &error), Failure::Refused { errno: libc::ENETUNREACH, text }, "{name}");
        }
    }

    #[test]
    fn a_missing_capability_is_named() {
        let failure = Failure::Refused { errno: libc::EPERM, text: None };
        assert_eq!(
            failure.while_doing("put route 10.1.2.0/24 dev flannel0").to_string(),
            "put route 10.1.2.0/24 dev flannel0: operation not permitted: needs CAP_NET_ADMIN"
        );
    }

    #[test]
    fn attributes_end_at_the_first_that_is_not_whole() {
        let good = attribute(3, b"flannel0\0");
        for cut in 0..good.len() {
            let whole = cut >= 13;
            assert_eq!(attributes_of(&good[..cut]).count(), usize::from(whole), "{cut} bytes");
        }
        assert_eq!(attributes_of(&[0, 0, 0, 0, 0, 0]).count(), 0, "a length below the header's own");
    }
}
