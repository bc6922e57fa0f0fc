//! etcd as operators name it: its servers, and which of its keyspaces is meant.

use std::net::Ipv6Addr;

/// Which of etcd's two keyspaces the leases are in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EtcdApi {
    /// v3, or v2 where only that holds a network configuration.
    #[default]
    Auto,
    /// flanneld's up to 0.17.
    V2,
    V3,
}

/// One server: `host:port`, or a URL of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint<'a> {
    /// Without one the presence of TLS files decides.
    pub scheme: Option<Scheme>,
    /// `host:port`
    pub authority: &'a str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    Http,
    Https,
}

impl<'a> Endpoint<'a> {
    /// Takes it apart.
    ///
    /// # Errors
    /// What is wrong with it, as the end of a sentence that begins with it. It may hold a password.
    pub fn parse(text: &'a str) -> Result<Self, &'static str> {
        if text.is_empty() {
            return Err("is empty");
        }
        if text.contains(|letter: char| letter.is_whitespace() || letter.is_control()) {
            return Err("contains a space");
        }
        let (scheme, rest) = match text.split_once("://") {
            None => (None, text),
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("http") => (Some(Scheme::Http), rest),
            Some((scheme, rest)) if scheme.eq_ignore_ascii_case("https") => (Some(Scheme::Https), rest),
            Some(_) => return Err("is neither http nor https"),
        };
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        if authority.contains('@') {
            return Err("holds a user name, which belongs in --etcd-username and --etcd-password");
        }
        if authority.contains(['/', '?', '#']) {
            return Err("has a path, which etcd's API does not take");
        }
        const NO_PORT: &str = "has no port from 1 to 65535";
        // An IPv6 address is in brackets; its colons are not the port's.
        let port = if let Some(rest) = authority.strip_prefix('[') {
            let (host, port) = rest.split_once(']').ok_or("has no closing bracket")?;
            host.parse::<Ipv6Addr>().map_err(|_| "has no IPv6 address between its brackets")?;
            port.strip_prefix(':').ok_or(NO_PORT)?
        } else {
            let (host, port) = authority.rsplit_once(':').unwrap_or((authority, ""));
            if host.is_empty() {
                return Err("names no host");
            }
            if !host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_')) {
                return Err("has no valid host name or address");
            }
            port
        };
        let is_number = !port.is_empty() && port.bytes().all(|digit| digit.is_ascii_digit());
        if !is_number || !port.parse::<u16>().is_ok_and(|port| port != 0) {
            return Err(NO_PORT);
        }
        Ok(Self { scheme, authority })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoint_is_taken_apart_or_said_to_be_wrong() {
        for (text, scheme, authority) in [
            ("http://10.0.0.1:2379/", Some(Scheme::Http), "10.0.0.1:2379"),
            ("HTTPS://etcd-1.example:443", Some(Scheme::Https), "etcd-1.example:443"),
            ("10.0.0.2:2379", None, "10.0.0.2:2379"),
            ("http://[fd00::1]:2379", Some(Scheme::Http), "[fd00::1]:2379"),
        ] {
            assert_eq!(Endpoint::parse(text), Ok(Endpoint { scheme, authority }), "{text}");
        }
        for (text, reason) in [
            ("", "is empty"),
            (" http://a:1", "contains a space"),
            ("http:// 10.0.0.1:2379", "contains a space"),
            ("unix:///run/etcd", "is neither http nor https"),
            ("http://10.0.0.1", "has no port from 1 to 65535"),
            ("http://10.0.0.1:", "has no port from 1 to 65535"),
            ("http://10.0.0.1:99999", "has no port from 1 to 65535"),
            ("http://10.0.0.1:0", "has no port from 1 to 65535"),
            ("http://10.0.0.1:+80", "has no port from 1 to 65535"),
            ("http://[fd00::1]", "has no port from 1 to 65535"),
            ("http://:2379", "names no host"),
            ("http://", "names no host"),
            ("http://a_b!:2379", "has no valid host name or address"),
            ("http://10.0.0.1:2379/v3", "has a path, which etcd's API does not take"),
            ("http://[fd00::1:2379", "has no closing bracket"),
            ("http://[nonsense]:2379", "has no IPv6 address between its brackets"),
            ("http://u:p@a:1", "holds a user name, which belongs in --etcd-username and --etcd-password"),
        ] {
            assert_eq!(Endpoint::parse(text), Err(reason), "{text}");
        }
    }
}
