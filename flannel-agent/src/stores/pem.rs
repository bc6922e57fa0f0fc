//! Certificates and keys in files: read and checked before anything is sent, with errors that name the flag.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// A file that a flag names and that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum PemError {
    #[error("{flag}: can't read {path}: {source}")]
    Unreadable { flag: &'static str, path: PathBuf, source: io::Error },
    #[error("{flag}: {path} {reason}")]
    Unfit { flag: &'static str, path: PathBuf, reason: String },
    #[error("{key_flag} {key} does not belong to {cert_flag} {cert}: {reason}")]
    Mismatch { cert_flag: &'static str, cert: PathBuf, key_flag: &'static str, key: PathBuf, reason: String },
}

/// A certificate with its key, PEM, that belong together.
pub(crate) struct IdentityPem {
    pub(crate) cert: Vec<u8>,
    pub(crate) key: Vec<u8>,
    chain: Vec<CertificateDer<'static>>,
    private: PrivateKeyDer<'static>,
}

impl Clone for IdentityPem {
    fn clone(&self) -> Self {
        let Self { cert, key, chain, private } = self;
        Self { cert: cert.clone(), key: key.clone(), chain: chain.clone(), private: private.clone_key() }
    }
}

impl IdentityPem {
    /// The chain and the key as rustls takes them.
    pub(crate) fn parts(self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        (self.chain, self.private)
    }
}

fn read(flag: &'static str, path: &Path) -> Result<Vec<u8>, PemError> {
    std::fs::read(path).map_err(|source| PemError::Unreadable { flag, path: path.into(), source })
}

fn certificates(
    flag: &'static str,
    path: &Path,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, PemError> {
    let bad = |reason: String| PemError::Unfit { flag, path: path.into(), reason };
    let list: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| bad(format!("is not PEM: {error}")))?;
    match list.is_empty() {
        true => {
            Err(bad("holds no certificate (a PEM block that begins with -----BEGIN CERTIFICATE-----)".into()))
        }
        false => Ok(list),
    }
}

/// The PEM of certificate authorities, each of which can be used.
pub(crate) fn authorities(flag: &'static str, path: &Path) -> Result<Vec<u8>, PemError> {
    read_roots(flag, path).map(|(pem, _)| pem)
}

/// The same as rustls takes them.
pub(crate) fn roots(flag: &'static str, path: &Path) -> Result<rustls::RootCertStore, PemError> {
    read_roots(flag, path).map(|(_, roots)| roots)
}

fn read_roots(flag: &'static str, path: &Path) -> Result<(Vec<u8>, rustls::RootCertStore), PemError> {
    let pem = read(flag, path)?;
    let mut roots = rustls::RootCertStore::empty();
    for certificate in certificates(flag, path, &pem)? {
        roots.add(certificate).map_err(|error| PemError::Unfit {
            flag,
            path: path.into(),
            reason: format!("holds a certificate that can't be used: {error}"),
        })?;
    }
    Ok((pem, roots))
}

/// A certificate and its key.
pub(crate) fn identity(
    cert_flag: &'static str,
    cert_path: &Path,
    key_flag: &'static str,
    key_path: &Path,
) -> Result<IdentityPem, PemError> {
    let cert = read(cert_flag, cert_path)?;
    let key = read(key_flag, key_path)?;
    let chain = certificates(cert_flag, cert_path, &cert)?;
    let private = PrivateKeyDer::from_pem_slice(&key).map_err(|error| PemError::Unfit {
        flag: key_flag,
        path: key_path.into(),
        reason: format!("holds no unencrypted private key in PEM: {error}"),
    })?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| {
            builder
                .with_root_certificates(rustls::RootCertStore::empty())
                .with_client_auth_cert(chain.clone(), private.clone_key())
        })
        .map_err(|error| PemError::Mismatch {
            cert_flag,
            cert: cert_path.into(),
            key_flag,
            key: key_path.into(),
            reason: error.to_string(),
        })?;
    Ok(IdentityPem { cert, key, chain, private })
}
