//! Conversations recorded between flanneld 0.7.0 and its server, held again with ours (contract §5.2).
//!
//! The client's bytes are sent as they were recorded, with subnets and cursors put in that this server gave out. What
//! comes back must be the recorded answer but for these and for times. What other nodes and operators did meanwhile is
//! read from the answers that tell of it, and done.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use flannel_agent::domain::config::SubnetRange;
use flannel_agent::domain::lease::{LeaseAttrs, LeaseEvent};
use flannel_agent::server::{self, ListenAddress, Listener};
use flannel_agent::stores::embedded::Embedded;
use flannel_agent::stores::remote::{RemoteNetworks, RemoteOptions};
use flannel_agent::stores::{LeaseRequest, NetworkStores};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use crate::ground::{network, next, subnets};

/// One message of a recording.
struct Message {
    connection: u32,
    from_client: bool,
    text: String,
}

/// `#1 +0.0001s C->S 84 bytes` and what follows it; connections opening and closing have no bytes.
fn messages(recording: &str) -> Result<Vec<Message>> {
    let mut all: Vec<Message> = Vec::new();
    let mut open = false;
    for line in recording.lines() {
        if let Some(rest) = line.strip_prefix('#') {
            let parts: Vec<_> = rest.split(' ').collect();
            open = parts.last() == Some(&"bytes");
            if open {
                let connection = parts.first().context("a number")?.parse()?;
                all.push(Message {
                    connection,
                    from_client: parts.get(2) == Some(&"C->S"),
                    text: String::new(),
                });
            }
        } else if open && let Some(message) = all.last_mut() {
            message.text.push_str(line);
            message.text.push_str("\r\n");
        }
    }
    Ok(all)
}

/// What this server said where the recorded one said something else.
#[derive(Default)]
struct Ours {
    subnets: HashMap<String, String>,
    cursors: HashMap<String, String>,
}

impl Ours {
    fn put_into(&self, request: &str) -> String {
        let mut text = request.to_owned();
        for (recorded, ours) in &self.subnets {
            text = text.replace(recorded, ours).replace(&recorded.replace('/', "-"), &ours.replace('/', "-"));
        }
        let Some((before, after)) = text.split_once("?next=") else { return text };
        let (cursor, rest) = after.split_once(' ').unwrap_or((after, ""));
        let cursor = self.cursors.get(cursor).cloned().unwrap_or_else(|| cursor.to_owned());
        format!("{before}?next={cursor} {rest}")
    }

    /// Compares an answer with the recorded one and learns what differs and may.
    fn compare(&mut self, recorded: &Value, ours: &Value) -> Result<()> {
        match (recorded, ours) {
            (Value::Object(recorded), Value::Object(ours)) => {
                let keys: (Vec<_>, Vec<_>) = (recorded.keys().collect(), ours.keys().collect());
                ensure!(keys.0 == keys.1, "fields {:?} where {:?} were recorded", keys.1, keys.0);
                for ((key, recorded), ours) in recorded.iter().zip(ours.values()) {
                    match (key.as_str(), recorded, ours) {
                        ("Subnet", Value::String(recorded), Value::String(ours)) => {
                            let known = self.subnets.entry(recorded.clone()).or_insert_with(|| ours.clone());
                            ensure!(known == ours, "subnet {ours} where {known} is");
                        }
                        ("cursor", Value::String(recorded), Value::String(ours)) => {
                            ours.parse::<u64>().context("a cursor is a number")?;
                            self.cursors.insert(recorded.clone(), ours.clone());
                        }
                        ("Expiration", Value::String(recorded), Value::String(ours)) => {
                            let endless = "0001-01-01T00:00:00Z";
                            ensure!((recorded == endless) == (ours == endless), "{ours} for {recorded}");
                            ensure!(ours.ends_with('Z') && ours.len() >= endless.len(), "{ours}");
                        }
                        (_, recorded, ours) => self.compare(recorded, ours)?,
                    }
                }
            }
            (Value::Array(recorded), Value::Array(ours)) => {
                ensure!(recorded.len() == ours.len(), "{ours:?} where {recorded:?} was recorded");
                for (recorded, ours) in recorded.iter().zip(ours) {
                    self.compare(recorded, ours)?;
                }
            }
            (recorded, ours) => ensure!(recorded == ours, "{ours} where {recorded} was recorded"),
        }
        Ok(())
    }
}

/// An answer without the headers in which a date or a length stands.
struct Answer {
    status: String,
    content_type: String,
    body: String,
}

impl Answer {
    fn parse(text: &str) -> Result<Self> {
        let (head, body) = text.split_once("\r\n\r\n").context("a head and a body")?;
        let mut lines = head.lines();
        let status = lines.next().context("a status line")?.to_owned();
        let content_type = lines
            .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-type: ").map(str::to_owned))
            .unwrap_or_default();
        Ok(Self { status, content_type, body: body.to_owned() })
    }

    fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body).with_context(|| self.body.clone())
    }
}

/// The next message on a connection, head and body; `None` when the other side hangs up.
async fn read_message(stream: &mut TcpStream) -> Result<Option<String>> {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head
                .lines()
                .find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
            if body.len() >= length.unwrap_or(0) {
                return Ok(Some(text.into_owned()));
            }
        }
        let mut chunk = [0; 4096];
        match stream.read(&mut chunk).await? {
            0 => {
                ensure!(bytes.is_empty(), "hung up after {text:?}");
                return Ok(None);
            }
            count => bytes.extend_from_slice(&chunk[..count]),
        }
    }
}

async fn read_answer(stream: &mut TcpStream) -> Result<Answer> {
    Answer::parse(&read_message(stream).await?.context("the server hung up without an answer")?)
}

struct Stage {
    address: String,
    store: Embedded,
    ours: Ours,
    /// Whose recording it is.
    client: String,
}

impl Stage {
    async fn ask(&self, request: String) -> Result<Answer> {
        let mut stream = TcpStream::connect(&self.address).await?;
        stream.write_all(request.as_bytes()).await?;
        read_answer(&mut stream).await
    }

    /// Does what an answer will tell of, unless the recorded client did it.
    async fn cause(&self, network: &str, event: &Value) -> Result<()> {
        let lease = &event["lease"];
        let added = event["type"] == "added";
        if let Some(name) = event["network"].as_str() {
            let config = added.then_some(r#"{"Network":"10.3.0.0/16"}"#);
            self.store.configure(Some(&name.parse()?), config).await?;
        } else if added && lease["Attrs"]["PublicIP"] != self.client.as_str() {
            let body = lease["Attrs"].to_string();
            let length = body.len();
            let answer = self
                .ask(format!(
                    "POST /v1/{network}/leases HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}"
                ))
                .await?;
            ensure!(answer.status.contains("200"), "{}", answer.body);
        } else if !added {
            let subnet = lease["Subnet"].as_str().context("a subnet")?;
            let ours =
                self.ours.subnets.get(subnet).context("a subnet that was told before")?.replace('/', "-");
            let answer =
                self.ask(format!("DELETE /v1/{network}/leases/{ours} HTTP/1.1\r\nHost: x\r\n\r\n")).await?;
            ensure!(answer.status.contains("200") && answer.body.is_empty(), "{}", answer.body);
        }
        Ok(())
    }
}

async fn replay(folder: &str, client: &str, networks: &[(Option<&str>, &str)]) -> Result<()> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/v0.7.0");
    let recording = std::fs::read_to_string(fixtures.join(folder).join("h2-http.txt"))?;
    let files = tempfile::tempdir()?;
    let store = Embedded::open(&files.path().join("leases.redb"))?;
    for (name, config) in networks {
        let name = name.map(str::parse).transpose()?;
        store.configure(name.as_ref(), Some(config)).await?;
    }
    let listener = Listener::bind(&ListenAddress::Tcp("127.0.0.1:0".into()), None).await?;
    let address = listener.address()?.to_string();
    let stop = CancellationToken::new();
    let _stop = stop.clone().drop_guard();
    tokio::spawn(server::serve(listener, Arc::new(store.networks()), stop));

    let mut stage = Stage { address, store, ours: Ours::default(), client: client.to_owned() };
    let mut connections: HashMap<u32, (TcpStream, String)> = HashMap::new();
    let (mut asked, mut compared) = (0, 0);
    for message in messages(&recording)? {
        if message.from_client {
            let (head, body) = message.text.split_once("\r\n\r\n").unwrap_or((&message.text, ""));
            let body = stage.ours.put_into(body.trim());
            let head = stage.ours.put_into(head);
            let head: Vec<_> = head.lines().filter(|line| !line.starts_with("Content-Length")).collect();
            let request = format!("{}\r\nContent-Length: {}\r\n\r\n{body}", head.join("\r\n"), body.len());
            let (stream, network) = match connections.entry(message.connection) {
                Entry::Occupied(open) => open.into_mut(),
                Entry::Vacant(new) => new.insert((TcpStream::connect(&stage.address).await?, String::new())),
            };
            *network = request.split('/').nth(2).unwrap_or_default().to_owned();
            stream.write_all(request.as_bytes()).await?;
            asked += 1;
        } else {
            let wanted = Answer::parse(message.text.trim_end())?;
            let said = wanted.json()?;
            let (stream, network) = connections.get_mut(&message.connection).context("it asked")?;
            for event in said["events"].as_array().into_iter().flatten() {
                stage.cause(network, event).await?;
            }
            let answer = read_answer(stream).await?;
            ensure!(answer.status == wanted.status, "{} for {}", answer.status, wanted.status);
            ensure!(answer.content_type == wanted.content_type, "{}", answer.content_type);
            ensure!(answer.body.ends_with('\n'), "Go's encoder ends with a newline");
            stage.ours.compare(&said, &answer.json()?).with_context(|| answer.body.clone())?;
            compared += 1;
        }
    }
    // The last polls were not answered in the recording either.
    ensure!(asked > 10 && compared > 8, "{asked} requests, {compared} answers");
    Ok(())
}

pub(crate) async fn a_recorded_client_hears_what_it_heard_from_flanneld() -> Result<()> {
    let config = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
    replay("client-server", "10.97.0.12", &[(None, config)]).await
}

pub(crate) async fn a_recorded_client_of_several_networks_hears_what_it_heard_from_flanneld() -> Result<()> {
    let blue = r#"{"Network":"10.1.0.0/16","Backend":{"Type":"vxlan","VNI":1}}"#;
    let green = r#"{"Network":"10.2.0.0/16","Backend":{"Type":"host-gw"}}"#;
    replay("client-server-multi", "10.96.0.12", &[(Some("blue"), blue), (Some("green"), green)]).await
}

/// Requests of a recording by method and path, each with the answers it got, in order.
fn answers(recording: &str) -> Result<HashMap<String, VecDeque<String>>> {
    let mut waiting: HashMap<u32, String> = HashMap::new();
    let mut answers: HashMap<String, VecDeque<String>> = HashMap::new();
    for message in messages(recording)? {
        if message.from_client {
            let line = message.text.lines().next().context("a request line")?;
            waiting.insert(message.connection, line.trim_end_matches(" HTTP/1.1").to_owned());
        } else if let Some(request) = waiting.remove(&message.connection) {
            answers.entry(request).or_default().push_back(message.text.trim_end().to_owned());
        }
    }
    Ok(answers)
}

/// Our client at the recorded server, which is silent where nothing happens, whatever a client would like.
pub(crate) async fn our_client_understands_flannelds_server() -> Result<()> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/v0.7.0/client-server");
    let recording = std::fs::read_to_string(fixtures.join("h2-http.txt"))?;
    let said = Arc::new(Mutex::new(answers(&recording)?));
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let servers = vec![listener.local_addr()?.to_string()];
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let said = said.clone();
            tokio::spawn(async move {
                while let Ok(Some(request)) = read_request(&mut stream).await {
                    let answer = {
                        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
                        said.get_mut(&request).and_then(VecDeque::pop_front)
                    };
                    let Some(answer) = answer else {
                        std::future::pending::<()>().await;
                        return;
                    };
                    // The newline that Go's encoder puts behind it is counted in the recorded length.
                    if stream.write_all(format!("{answer}\n").as_bytes()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    let store = RemoteNetworks::open(&RemoteOptions { servers, ..RemoteOptions::default() })?.network(None);
    let text = store.network_config().await?;
    ensure!(text.contains(r#""Network":"10.244.0.0/16""#), "{text}");
    let mut config = network("10.244.255.0");
    config.v4 = config.v4.map(|range| SubnetRange { network: "10.244.0.0/16".parse().unwrap(), ..range });
    let attrs = LeaseAttrs::from_json(
        r#"{"PublicIP":"10.97.0.12","BackendType":"vxlan","BackendData":{"VtepMAC":"fa:d7:19:f1:9c:34"}}"#,
    )?;
    let request = LeaseRequest { config, attrs, previous: None, previous_only: false };
    let lease = store.acquire(&request).await?;
    ensure!(lease.subnets == subnets("10.244.5.0-24"), "{lease:?}");
    let left = lease.expires.context("an end")?.duration_since(std::time::Instant::now()).as_secs();
    ensure!((86390..=86400).contains(&left), "{left} s, by the server's clock and not by ours");

    let mut events = store.watch();
    let mut heard = Vec::new();
    while heard.len() < 6 {
        heard.push(match next(&mut events).await? {
            LeaseEvent::Snapshot(leases, _) => {
                let all: Vec<_> = leases.iter().map(|lease| lease.subnets.to_string()).collect();
                format!("all: {}", all.join(" "))
            }
            LeaseEvent::Added(lease) => format!("added {} of {}", lease.subnets, lease.attrs.public_ip),
            LeaseEvent::Removed(subnets) => format!("removed {subnets}"),
            other => bail!("{other:?}"),
        });
    }
    assert_eq!(
        heard,
        [
            "all: 10.244.5.0-24",
            "added 10.244.3.0-24 of 10.97.0.13",
            "added 10.244.66.0-24 of 10.97.0.14",
            "added 10.244.5.0-24 of 10.97.0.12",
            "removed 10.244.66.0-24",
            "added 10.244.89.0-24 of 10.97.0.14",
        ]
    );
    let renewed = store.renew(&lease).await?;
    ensure!(renewed.subnets == lease.subnets, "{renewed:?}");
    Ok(())
}

/// Method and path of the next request; `None` when the client hangs up.
async fn read_request(stream: &mut TcpStream) -> Result<Option<String>> {
    let Some(request) = read_message(stream).await? else { return Ok(None) };
    let line = request.lines().next().context("a request line")?;
    Ok(Some(line.trim_end_matches(" HTTP/1.1").to_owned()))
}
