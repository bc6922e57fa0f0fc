//! The socket: where it comes from, TLS, and what is held against clients that don't behave.
//!
//! - a request's head must be there within [`HEAD_LIMIT`], its body within the time the endpoint gives;
//! - a TLS handshake is made beside the accept loop, with the same limit;
//! - of connections whose peer is gone the kernel tells us ([`GONE`]), also in a long poll;
//! - at most [`MAX_CONNECTIONS`] are open, and of one that is too much nothing is read.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::sys::socket::{Backlog, listen, setsockopt, sockopt};
use rustls::server::WebPkiClientVerifier;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::stores::pem::{self, PemError};

/// How long a client may take to say what it wants, and how long a connection may be idle.
const HEAD_LIMIT: Duration = Duration::from_secs(15);

/// Bytes of a request's head; a real one has two hundred.
const MAX_HEAD: usize = 16 * 1024;

/// A peer that acknowledges nothing for this long is gone (`TCP_USER_TIMEOUT`, RFC 5482).
const GONE: Duration = Duration::from_secs(30);

/// A node has about three.
const MAX_CONNECTIONS: usize = 16_384;

/// How long requests may finish after the end was asked for.
const FAREWELL: Duration = Duration::from_secs(2);

/// First descriptor that systemd hands over (sd_listen_fds(3)).
const FIRST_DESCRIPTOR: i32 = 3;

/// `--listen` (contract §5.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListenAddress {
    /// `host:port`; without a host, every address of this one.
    Tcp(String),
    /// A descriptor handed over by systemd.
    Descriptor(i32),
}

/// `--remote-certfile`, `--remote-keyfile`, `--remote-cafile`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerTlsFiles {
    pub cert_file: PathBuf,
    pub key_file: PathBuf,
    /// Clients must show a certificate that one of these signed.
    pub ca_file: Option<PathBuf>,
}

/// Why there is nothing to listen on.
#[derive(Debug, thiserror::Error)]
pub enum ListenerError {
    #[error("--listen {address:?}: {reason}; write it like 0.0.0.0:8888 or fd://3")]
    Address { address: String, reason: String },
    #[error("can't listen on {address}: {source}")]
    Bind { address: String, source: io::Error },
    #[error("fd {descriptor} was not socket activated: {reason}")]
    NotActivated { descriptor: i32, reason: String },
    #[error(transparent)]
    Pem(#[from] PemError),
    #[error("--remote-cafile: no client could be verified: {0}")]
    Verifier(String),
}

impl ListenAddress {
    /// Reads `[tcp://]host:port`, `fd://` or `fd://5`.
    ///
    /// # Errors
    /// It is none of these.
    pub fn parse(text: &str) -> Result<Self, ListenerError> {
        let wrong =
            |reason: &str| ListenerError::Address { address: text.to_owned(), reason: reason.to_owned() };
        let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
        match scheme {
            "" | "tcp" => {
                let (_, port) = rest.rsplit_once(':').ok_or_else(|| wrong("has no :port"))?;
                port.parse::<u16>().map_err(|_| wrong("has no port from 0 to 65535"))?;
                Ok(Self::Tcp(rest.to_owned()))
            }
            "fd" if rest.is_empty() => Ok(Self::Descriptor(FIRST_DESCRIPTOR)),
            "fd" => match rest.parse() {
                Ok(descriptor) if descriptor >= FIRST_DESCRIPTOR => Ok(Self::Descriptor(descriptor)),
                Ok(_) => Err(wrong("is below fd://3, the first that systemd hands over")),
                Err(_) => Err(wrong("fd index is not a number")),
            },
            _ => Err(wrong("bad listener scheme")),
        }
    }
}

/// A socket that listens already.
pub struct Listener {
    socket: TcpListener,
    tls: Option<TlsAcceptor>,
}

impl Listener {
    /// # Errors
    /// The address is in use or not ours, or a file can't be used.
    pub async fn bind(
        address: &ListenAddress,
        files: Option<&ServerTlsFiles>,
    ) -> Result<Self, ListenerError> {
        let tls = files.map(acceptor).transpose()?;
        let socket = match address {
            ListenAddress::Tcp(address) => {
                // `:8080` is every address, as in Go.
                let all = if address.starts_with(':') { format!("[::]{address}") } else { address.clone() };
                let bound = match TcpListener::bind(&all).await {
                    // Where IPv6 is off.
                    Err(_) if address.starts_with(':') => {
                        TcpListener::bind(format!("0.0.0.0{address}")).await
                    }
                    bound => bound,
                };
                let failed = |source| ListenerError::Bind { address: address.clone(), source };
                let socket = bound.map_err(failed)?;
                // All nodes come back at once when a server does. The kernel drops who finds the usual queue full, and they
                // knock again a second later, and three: as many may wait as it allows (net.core.somaxconn).
                listen(&socket, Backlog::MAXALLOWABLE).map_err(|errno| failed(errno.into()))?;
                socket
            }
            ListenAddress::Descriptor(descriptor) => activated(*descriptor)?,
        };
        Ok(Self { socket, tls })
    }

    /// # Errors
    /// The kernel does not say.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    pub(super) async fn serve(self, router: Router, stop: CancellationToken) {
        let (places, tasks) = (Arc::new(Semaphore::new(MAX_CONNECTIONS)), TaskTracker::new());
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                accepted = self.socket.accept() => accepted,
            };
            let stream = match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Mostly too many open files: those that are open must end first.
                    tracing::warn!("can't accept a connection: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let Ok(place) = places.clone().try_acquire_owned() else {
                tracing::debug!("more than {MAX_CONNECTIONS} connections, one is closed");
                continue;
            };
            let (router, tls, stop) = (router.clone(), self.tls.clone(), stop.clone());
            tasks.spawn(async move {
                let _place = place;
                if let Err(error) = converse(stream, tls, router, stop).await {
                    tracing::debug!("a connection ended: {error}");
                }
            });
        }
        tasks.close();
        if tokio::time::timeout(FAREWELL, tasks.wait()).await.is_err() {
            tracing::debug!("{} connections are cut", tasks.len());
        }
    }
}

async fn converse(
    stream: TcpStream,
    tls: Option<TlsAcceptor>,
    router: Router,
    stop: CancellationToken,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    stream.set_nodelay(true)?;
    setsockopt(&stream, sockopt::KeepAlive, &true)?;
    setsockopt(&stream, sockopt::TcpKeepIdle, &10)?;
    setsockopt(&stream, sockopt::TcpKeepInterval, &5)?;
    setsockopt(&stream, sockopt::TcpUserTimeout, &(GONE.as_millis() as u32))?;
    match tls {
        None => speak(stream, router, stop).await,
        Some(tls) => {
            let stream = tokio::time::timeout(HEAD_LIMIT, tls.accept(stream)).await??;
            speak(stream, router, stop).await
        }
    }
}

async fn speak<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    router: Router,
    stop: CancellationToken,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_LIMIT)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    tokio::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => return Ok(ended?),
        () = stop.cancelled() => {}
    }
    connection.as_mut().graceful_shutdown();
    Ok(tokio::time::timeout(FAREWELL, connection).await.unwrap_or(Ok(()))?)
}

fn acceptor(files: &ServerTlsFiles) -> Result<TlsAcceptor, ListenerError> {
    let identity = pem::identity("--remote-certfile", &files.cert_file, "--remote-keyfile", &files.key_file)?;
    let (chain, key) = identity.parts();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let unfit = |error: rustls::Error| ListenerError::Verifier(error.to_string());
    let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(unfit)?;
    let builder = match &files.ca_file {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let roots = Arc::new(pem::roots("--remote-cafile", path)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider)
                .build()
                .map_err(|error| ListenerError::Verifier(error.to_string()))?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    let mut config = builder.with_single_cert(chain, key).map_err(unfit)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// The socket that systemd made for us (sd_listen_fds(3)).
fn activated(descriptor: i32) -> Result<TcpListener, ListenerError> {
    let not = |reason: String| ListenerError::NotActivated { descriptor, reason };
    let variable = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<i64>().ok());
    let (pid, count) = (variable("LISTEN_PID"), variable("LISTEN_FDS").unwrap_or(0));
    if pid != Some(std::process::id().into()) {
        return Err(not("LISTEN_PID is not this process: start it by a systemd socket unit".into()));
    }
    let index = i64::from(descriptor - FIRST_DESCRIPTOR);
    if index >= count {
        return Err(not(format!("fd {descriptor} is out of range ({count} were handed over)")));
    }
    // SAFETY: systemd opened it for this process and nothing else here takes it; its owner is made once.
    let owned = unsafe { OwnedFd::from_raw_fd(descriptor) };
    let socket = std::net::TcpListener::from(owned);
    socket.set_nonblocking(true).map_err(|error| not(error.to_string()))?;
    // What is no listening TCP socket says so here.
    socket.local_addr().map_err(|error| not(format!("it is no TCP socket: {error}")))?;
    TcpListener::from_std(socket).map_err(|error| not(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_flanneld_reads_them() {
        let tcp = |text: &str| ListenAddress::Tcp(text.to_owned());
        for (text, wanted) in [
            ("0.0.0.0:8888", tcp("0.0.0.0:8888")),
            (":8080", tcp(":8080")),
            ("tcp://[::1]:80", tcp("[::1]:80")),
            ("fd://", ListenAddress::Descriptor(3)),
            ("fd://5", ListenAddress::Descriptor(5)),
        ] {
            assert_eq!(ListenAddress::parse(text).unwrap(), wanted, "{text}");
        }
        for (text, reason) in [
            ("8888", "has no :port"),
            ("host:", "has no port from"),
            ("fd://x", "fd index is not a number"),
            ("fd://2", "below fd://3"),
            ("unix:///run/x", "bad listener scheme"),
        ] {
            let error = ListenAddress::parse(text).unwrap_err().to_string();
            assert!(error.contains(reason) && error.contains(&format!("{text:?}")), "{error}");
        }
    }
}
