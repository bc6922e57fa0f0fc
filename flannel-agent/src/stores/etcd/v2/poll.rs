//! A watch of the v2 API: one long poll after the other, each for the next change.
//!
//! A poll in which nothing happens is silent for as long as that lasts, and a server that hangs is silent too. So it is
//! asked on another connection, every few seconds, whether it knows a leader, which it answers from memory; and a poll
//! does not last for ever.
//!
//! etcd remembers its last thousand changes, to whatever keys. Where a poll begins is therefore moved on while it waits:
//! the head of its answer, which comes at once, says up to where there was nothing for us.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::stream::{self, BoxStream, StreamExt};
use reqwest::{Client, StatusCode};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::wire::{Action, ApiError, INDEX_CLEARED, Place};
use super::{Etcd, Said, index, understand};
use crate::stores::back_off::jittered;
use crate::stores::http::Unanswered;
use crate::stores::registry::{Notice, RegistryError, WatchEnd};

/// How long a poll lasts at most, give or take a fifth.
const POLL: Duration = Duration::from_secs(300);
/// How often the server is asked whether it is alive.
const ALIVE: Duration = Duration::from_secs(5);
/// How long that answer may take.
const ALIVE_LIMIT: Duration = Duration::from_secs(3);
/// A server that ends its polls at once is not asked without pause.
const LEAST: Duration = Duration::from_secs(1);

pub(super) struct Poll {
    etcd: Arc<Etcd>,
    folder: Place,
    /// Everything up to here was seen.
    cursor: u64,
    /// The server that is asked, always the same: another one means another watch.
    server: usize,
}

/// What one poll came to.
enum Polled {
    Change(Box<Action>),
    Nothing,
}

impl Poll {
    pub(super) fn new(etcd: Arc<Etcd>, folder: Place, cursor: u64) -> Self {
        let server = etcd.servers.current();
        Self { etcd, folder, cursor, server }
    }

    pub(super) fn stream(self, era: CancellationToken) -> BoxStream<'static, Result<Vec<Notice>, WatchEnd>> {
        let notices = stream::unfold(Some(self), |poll| async {
            let mut poll = poll?;
            match poll.next().await {
                Ok(notices) => Some((Ok(notices), Some(poll))),
                Err(end) => {
                    if let WatchEnd::Broken(_) = end {
                        poll.etcd.servers.suspect(poll.server);
                    }
                    Some((Err(end), None))
                }
            }
        });
        let end = WatchEnd::Broken("its connection was made from this node's former address".into());
        notices.take_until(era.cancelled_owned()).chain(stream::once(async { Err(end) })).boxed()
    }

    async fn next(&mut self) -> Result<Vec<Notice>, WatchEnd> {
        loop {
            let asked = Instant::now();
            let mut head = None;
            let polled = tokio::select! {
                polled = self.ask(&mut head) => polled?,
                reason = self.hangs() => return Err(WatchEnd::Broken(reason)),
                () = sleep(jittered(POLL)) => Polled::Nothing,
            };
            match polled {
                Polled::Nothing => {
                    self.cursor = self.cursor.max(head.unwrap_or_default());
                    sleep(LEAST.saturating_sub(asked.elapsed())).await;
                }
                Polled::Change(change) => {
                    if change.node.modified_index <= self.cursor {
                        return Err(WatchEnd::Broken(format!(
                            "it told change {} to who waits for one behind {}",
                            change.node.modified_index, self.cursor
                        )));
                    }
                    self.cursor = change.node.modified_index;
                    // The change was a moment ago.
                    if let Some(notice) = notice(&self.folder, *change, Instant::now())? {
                        return Ok(vec![notice]);
                    }
                }
            }
        }
    }

    /// Waits for the next change. `head` is up to where there was none when the server began to wait.
    async fn ask(&self, head: &mut Option<u64>) -> Result<Polled, WatchEnd> {
        let path = self.folder.path();
        let wait = (self.cursor + 1).to_string();
        let request = |client: &Client, base: &str| {
            let query = [("recursive", "true"), ("wait", "true"), ("waitIndex", &wait)];
            self.etcd.with_user(client.get(format!("{base}{path}")).query(&query))
        };
        let broken = |error: Unanswered| WatchEnd::Broken(text(self.etcd.unanswered(error)));
        let begun = self.etcd.servers.begin(self.server, request).await.map_err(broken)?;
        if begun.status() == StatusCode::OK {
            *head = index(begun.headers());
        }
        let answer = begun.finish().await.map_err(broken)?;
        if answer.status.is_success() && answer.body.iter().all(u8::is_ascii_whitespace) {
            return Ok(Polled::Nothing);
        }
        match understand(answer) {
            Ok(Said::Done(change, _)) => Ok(Polled::Change(change)),
            Ok(Said::No(ApiError { error_code: INDEX_CLEARED, .. })) => Err(WatchEnd::Compacted),
            Ok(Said::No(error)) => Err(WatchEnd::Broken(error.text())),
            Err(error) => Err(WatchEnd::Broken(text(error))),
        }
    }

    /// Ends, with the reason, when the server does not answer any more or is cut off from the others.
    async fn hangs(&self) -> String {
        let request = |client: &Client, base: &str| {
            self.etcd.with_user(client.get(format!("{base}/v2/members/leader")))
        };
        loop {
            sleep(ALIVE).await;
            let asked = async { self.etcd.servers.begin(self.server, request).await?.finish().await };
            match timeout(ALIVE_LIMIT, asked).await {
                Ok(Ok(answer)) if answer.status.is_server_error() => {
                    return format!("it follows no leader: {}", answer.text());
                }
                // Whatever else it says, it is alive.
                Ok(Ok(_)) => {}
                Ok(Err(Unanswered { reason, .. })) => return reason,
                Err(_) => return format!("no answer within {} s", ALIVE_LIMIT.as_secs()),
            }
        }
    }
}

fn text(error: RegistryError) -> String {
    let (RegistryError::Unreachable(reason) | RegistryError::Refused(reason)) = error;
    reason
}

/// What a change means for a folder.
///
/// A directory that goes takes its keys along and is told alone, also one that the folder lies in.
fn notice(folder: &Place, change: Action, at: Instant) -> Result<Option<Notice>, WatchEnd> {
    let Action { action, node, previous } = change;
    let is_gone = matches!(action.as_str(), "delete" | "expire" | "compareAndDelete");
    let was_dir = previous.map(|previous| previous.dir);
    if node.dir || was_dir == Some(true) {
        let took_keys_along = is_gone || was_dir == Some(!node.dir);
        return if took_keys_along { Err(WatchEnd::Compacted) } else { Ok(None) };
    }
    let Some(key) = folder.key_inside(&node.key) else { return Ok(None) };
    Ok(Some(match is_gone {
        true => Notice::Deleted { key, revision: node.modified_index },
        false => Notice::Put(node.entry(key, at)),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(action: &str, node: &str, previous: Option<&str>) -> String {
        let previous = previous.map(|node| format!(r#","prevNode":{node}"#)).unwrap_or_default();
        let text = format!(r#"{{"action":"{action}","node":{node}{previous}}}"#);
        let change = serde_json::from_str(&text).unwrap();
        match notice(&Place::new("/n/subnets/"), change, Instant::now()) {
            Ok(None) => "nothing".into(),
            Ok(Some(Notice::Put(entry))) => {
                format!("put {} {} {:?}", entry.key, entry.revision, String::from_utf8(entry.value).unwrap())
            }
            Ok(Some(Notice::Deleted { key, revision })) => format!("deleted {key} {revision}"),
            Err(end) => format!("{end:?}"),
        }
    }

    #[test]
    fn every_action_is_a_write_or_a_removal() {
        let key = r#"{"key":"/n/subnets/a","value":"v","modifiedIndex":7,"createdIndex":5}"#;
        let gone = r#"{"key":"/n/subnets/a","modifiedIndex":8,"createdIndex":5}"#;
        for action in ["set", "create", "update", "compareAndSwap"] {
            assert_eq!(told(action, key, Some(key)), "put /n/subnets/a 7 \"v\"");
        }
        for action in ["delete", "expire", "compareAndDelete"] {
            assert_eq!(told(action, gone, Some(key)), "deleted /n/subnets/a 8");
        }
        let other = r#"{"key":"/n/config","value":"v","modifiedIndex":7,"createdIndex":5}"#;
        assert_eq!(told("set", other, None), "nothing");
    }

    #[test]
    fn a_directory_that_goes_takes_its_keys_along() {
        let dir = r#"{"key":"/n/subnets/d","dir":true,"modifiedIndex":7,"createdIndex":5}"#;
        let above = r#"{"key":"/n","dir":true,"modifiedIndex":7,"createdIndex":5}"#;
        let file = r#"{"key":"/n/subnets/d","value":"v","modifiedIndex":6,"createdIndex":5}"#;
        for (action, node, previous, wanted) in [
            ("set", dir, None, "nothing"),
            ("create", dir, None, "nothing"),
            ("update", dir, Some(dir), "nothing"),
            ("delete", dir, Some(dir), "Compacted"),
            ("expire", above, Some(above), "Compacted"),
            ("set", dir, Some(file), "Compacted"),
        ] {
            assert_eq!(told(action, node, previous), wanted, "{action} {node}");
        }
    }
}
