//! An operator at etcd's v2 API: `curl`, as flanneld's documentation had it, without starting one.
//!
//! Blocks, for the milliseconds that a server on this machine takes.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(10);

/// The keys of one etcd.
#[derive(Clone)]
pub struct V2Keys {
    connect: Arc<dyn Fn() -> Result<TcpStream> + Send + Sync>,
    login: Option<(String, String)>,
}

/// A key with its value and what it has left to live, in seconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct V2Entry {
    pub key: String,
    pub value: String,
    pub ttl: Option<i64>,
    pub index: u64,
}

impl V2Keys {
    pub fn new(connect: impl Fn() -> Result<TcpStream> + Send + Sync + 'static) -> Self {
        Self { connect: Arc::new(connect), login: None }
    }

    /// The same as somebody who logs in.
    #[must_use]
    pub fn with_login(mut self, user: &str, password: &str) -> Self {
        self.login = Some((user.to_owned(), password.to_owned()));
        self
    }

    /// Writes a key, whatever is there. Without `ttl` it never ends.
    ///
    /// # Errors
    /// etcd is away, or refuses.
    pub fn put(&self, key: &str, value: &str, ttl: Option<Duration>) -> Result<()> {
        let mut form = format!("value={}", encoded(value));
        if let Some(ttl) = ttl {
            form = format!("{form}&ttl={}", ttl.as_secs());
        }
        self.call("PUT", &path(key), "application/x-www-form-urlencoded", &form).map(drop)
    }

    /// Deletes a key, or a folder with everything in it.
    ///
    /// # Errors
    /// etcd is away, or has none.
    pub fn delete(&self, key: &str) -> Result<()> {
        self.call("DELETE", &format!("{}?recursive=true", path(key)), "", "").map(drop)
    }

    /// Everything below a folder, by key; nothing where there is none.
    ///
    /// # Errors
    /// etcd is away.
    pub fn list(&self, folder: &str) -> Result<Vec<V2Entry>> {
        let (status, text) =
            self.raw("GET", &format!("{}?recursive=true&quorum=true", path(folder)), "", "")?;
        if status == 404 && text.contains("\"errorCode\":100") {
            return Ok(Vec::new());
        }
        ensure!(status == 200, "list {folder}: {status} {text}");
        let answer: Value = serde_json::from_str(&text)?;
        let (mut left, mut found) = (vec![&answer["node"]], Vec::new());
        while let Some(node) = left.pop() {
            left.extend(node["nodes"].as_array().into_iter().flatten());
            if let (Some(key), Some(value)) = (node["key"].as_str(), node["value"].as_str()) {
                let (ttl, index) = (node["ttl"].as_i64(), node["modifiedIndex"].as_u64());
                let index = index.context("a key has an index")?;
                found.push(V2Entry { key: key.to_owned(), value: value.to_owned(), ttl, index });
            }
        }
        found.sort_by(|one, other| one.key.cmp(&other.key));
        Ok(found)
    }

    /// One request with a JSON body, as for users.
    ///
    /// # Errors
    /// etcd is away, or refuses.
    pub fn put_json(&self, path: &str, body: &str) -> Result<String> {
        self.call("PUT", path, "application/json", body)
    }

    fn call(&self, method: &str, path: &str, kind: &str, body: &str) -> Result<String> {
        let (status, text) = self.raw(method, path, kind, body)?;
        if !(200..300).contains(&status) {
            bail!("{method} {path}: {status} {text}");
        }
        Ok(text)
    }

    fn raw(&self, method: &str, path: &str, kind: &str, body: &str) -> Result<(u16, String)> {
        let mut socket = (self.connect)()?;
        socket.set_read_timeout(Some(LIMIT))?;
        let login = self.login.as_ref().map_or_else(String::new, |(user, password)| {
            format!("Authorization: Basic {}\r\n", BASE64.encode(format!("{user}:{password}")))
        });
        // HTTP/1.0: the answer comes in one piece and ends with the connection.
        write!(
            socket,
            "{method} {path} HTTP/1.0\r\n{login}Content-Type: {kind}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        socket.take(1 << 26).read_to_string(&mut answer).with_context(|| format!("{method} {path}"))?;
        let (head, text) =
            answer.split_once("\r\n\r\n").with_context(|| format!("{method} {path}: {answer}"))?;
        let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
        Ok((status.with_context(|| format!("{method} {path}: {head}"))?, text.to_owned()))
    }
}

fn path(key: &str) -> String {
    format!("/v2/keys{}", encoded(key))
}

fn encoded(text: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte);
    text.bytes()
        .map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}
