//! `reservations`, `migrate` and `migrate-etcd`: subcommands about what a store has.
//!
//! Which store, they are told by the daemon's own flags and variables, behind their own words: the flags of a unit or a
//! manifest can be used as they are.

use std::path::PathBuf;

use super::etcd::EtcdSettings;
use super::settings::StoreSettings;
use super::{Environment, Parsed, Stream, daemon};
use crate::domain::etcd::EtcdApi;
use crate::domain::lease::{Reservation, Subnets};
use crate::domain::network_name::NetworkName;
use crate::domain::wording::quoted;

/// `reservations`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReservationsCommand {
    pub action: ReservationsAction,
    pub network: Option<NetworkName>,
    pub store: Box<StoreSettings>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReservationsAction {
    List { json: bool },
    Add(Reservation),
    Remove(Subnets),
}

/// `migrate`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrateCommand {
    pub from: Place,
    pub to: Place,
    pub dry_run: bool,
    /// How to reach etcd, wherever it is one of both.
    pub store: Box<StoreSettings>,
}

/// `migrate-etcd`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrateEtcdCommand {
    pub dry_run: bool,
    /// Keep both keyspaces alike until it is ended.
    pub follow: bool,
    pub etcd: EtcdSettings,
}

/// Where leases are moved from or to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    Etcd,
    Embedded(PathBuf),
}

const RESERVATIONS_HELP: &str = "\
Subnets that nodes have for good: honoured while the node is away, never given an end

Usage: flannel-agent reservations list [--json] [--network NAME] [STORE FLAGS]
       flannel-agent reservations add SUBNET PUBLIC_IP [--network NAME] [STORE FLAGS]
       flannel-agent reservations remove SUBNET [--network NAME] [STORE FLAGS]

  SUBNET       10.244.7.0/24, of the length that leases have; with IPv6 10.244.7.0/24&fd00:7::/64
  PUBLIC_IP    the address by which the node is known to the others
  --network    one of several networks
  STORE FLAGS  the daemon's: --etcd-endpoints, --etcd-prefix and so on, or --remote; variables count too

`add` on the lease a node has makes that a reservation. `remove` makes a reservation a lease like any other, which ends a
day later unless its node renews it.
";

const MIGRATE_HELP: &str = "\
Move configurations and leases of all networks to another store, with what they have left to live

Usage: flannel-agent migrate --from=PLACE --to=PLACE [--dry-run] [ETCD FLAGS]

  PLACE       etcd, or embedded:FILE, the file of a lease server that does not run
  --dry-run   only say what would be done
  ETCD FLAGS  the daemon's: --etcd-endpoints, --etcd-prefix and so on; variables count too

Nothing is overwritten: what is there already and the same is left, what is there and differs is named and makes the exit
code 1. It can be run again.
";

const MIGRATE_ETCD_HELP: &str = "\
Copy configurations and leases of all networks from etcd's v2 keyspace to v3's, with what they have left to live

Usage: flannel-agent migrate-etcd [--dry-run | --follow] [ETCD FLAGS]

  --dry-run   only say what would be done
  --follow    then keep both keyspaces alike, in both directions, until it is ended: nodes in either see those in the other
  ETCD FLAGS  the daemon's: --etcd-endpoints, --etcd-prefix and so on; variables count too

Nothing in v3 is overwritten: what is in the way is named, and then nothing is copied and the exit code is 1. It can be run
again. v2 stays as it is. README, \"From v2 to v3\", has the steps.
";

fn wrong(command: &str, text: &str) -> Parsed {
    let text = format!("{text}\nRun 'flannel-agent {command} --help' for how it is used.\n");
    Parsed::PrintAndExit { text, stream: Stream::Stderr, code: 2 }
}

fn help(text: &str) -> Parsed {
    Parsed::PrintAndExit { text: text.to_owned(), stream: Stream::Stdout, code: 0 }
}

/// The words of our own, taken out of a command line whose rest is the daemon's flags.
struct Words {
    rest: Vec<String>,
}

impl Words {
    /// Whether the flag without a value is there.
    fn flag(&mut self, name: &str) -> bool {
        let before = self.rest.len();
        self.rest.retain(|word| word != name);
        self.rest.len() != before
    }

    /// The value of `--name=value` or `--name value`, the last one.
    fn value(&mut self, name: &str) -> Result<Option<String>, String> {
        let mut value = None;
        while let Some(index) = self.rest.iter().position(|word| {
            word == name || word.strip_prefix(name).is_some_and(|rest| rest.starts_with('='))
        }) {
            let word = self.rest.remove(index);
            value = Some(match word.split_once('=') {
                Some((_, value)) => value.to_owned(),
                None if index < self.rest.len() => self.rest.remove(index),
                None => return Err(format!("{name} needs a value")),
            });
        }
        Ok(value)
    }

    /// The next word that is not a flag.
    fn next(&mut self, what: &str) -> Result<String, String> {
        match self.rest.first() {
            Some(word) if !word.starts_with('-') => Ok(self.rest.remove(0)),
            _ => Err(format!("{what} is missing")),
        }
    }

    fn network(&mut self) -> Result<Option<NetworkName>, String> {
        self.value("--network")?
            .map(|name| name.parse().map_err(|error| format!("--network: {error}")))
            .transpose()
    }
}

/// The store that the daemon's flags name.
fn store(words: Words, env: &Environment) -> Result<Box<StoreSettings>, Box<Parsed>> {
    match daemon("flannel-agent", &words.rest, env) {
        Parsed::Daemon(settings) => Ok(Box::new(settings.store)),
        other => Err(Box::new(other)),
    }
}

fn subnets(text: &str) -> Result<Subnets, String> {
    text.replace('/', "-").parse().map_err(|error| format!("SUBNET {}: {error}", quoted(text)))
}

pub(super) fn reservations(words: &[String], env: &Environment) -> Parsed {
    const COMMAND: &str = "reservations";
    let mut words = Words { rest: words.to_vec() };
    if words.flag("--help") || words.flag("-h") || words.rest.is_empty() {
        return help(RESERVATIONS_HELP);
    }
    let own = (|| {
        let action = match words.next("list, add or remove")?.as_str() {
            "list" => ReservationsAction::List { json: words.flag("--json") },
            "add" => {
                let subnets = subnets(&words.next("SUBNET")?)?;
                let address = words.next("PUBLIC_IP")?;
                let public_ip = address.parse().map_err(|_| {
                    format!("PUBLIC_IP {} is no address, such as 192.0.2.1", quoted(&address))
                })?;
                ReservationsAction::Add(Reservation { subnets, public_ip })
            }
            "remove" => ReservationsAction::Remove(subnets(&words.next("SUBNET")?)?),
            other => return Err(format!("{} is none of list, add and remove", quoted(other))),
        };
        Ok((action, words.network()?))
    })();
    let (action, network) = match own {
        Ok(own) => own,
        Err(text) => return wrong(COMMAND, &text),
    };
    match store(words, env) {
        Ok(store) => {
            Parsed::Command(super::Command::Reservations(ReservationsCommand { action, network, store }))
        }
        Err(parsed) => *parsed,
    }
}

pub(super) fn migrate(words: &[String], env: &Environment) -> Parsed {
    const COMMAND: &str = "migrate";
    let mut words = Words { rest: words.to_vec() };
    if words.flag("--help") || words.flag("-h") || words.rest.is_empty() {
        return help(MIGRATE_HELP);
    }
    let own = (|| {
        let mut place = |flag: &str| match words.value(flag)? {
            None => Err(format!("{flag} is missing: etcd, or embedded:FILE")),
            Some(text) => match text.split_once(':') {
                None if text == "etcd" => Ok(Place::Etcd),
                Some(("embedded", path)) if path.starts_with('/') => Ok(Place::Embedded(path.into())),
                _ => Err(format!("{flag} is {}: must be etcd, or embedded:/path/of/a/file", quoted(&text))),
            },
        };
        let (from, to) = (place("--from")?, place("--to")?);
        if from == to {
            return Err("--from and --to are the same".to_owned());
        }
        Ok((from, to, words.flag("--dry-run")))
    })();
    let (from, to, dry_run) = match own {
        Ok(own) => own,
        Err(text) => return wrong(COMMAND, &text),
    };
    match store(words, env) {
        Ok(store) => Parsed::Command(super::Command::Migrate(MigrateCommand { from, to, dry_run, store })),
        Err(parsed) => *parsed,
    }
}

pub(super) fn migrate_etcd(words: &[String], env: &Environment) -> Parsed {
    const COMMAND: &str = "migrate-etcd";
    let mut words = Words { rest: words.to_vec() };
    if words.flag("--help") || words.flag("-h") {
        return help(MIGRATE_ETCD_HELP);
    }
    let (dry_run, follow) = (words.flag("--dry-run"), words.flag("--follow"));
    if dry_run && follow {
        return wrong(COMMAND, "--dry-run changes nothing, so there is nothing to --follow");
    }
    match store(words, env).map(|store| *store) {
        Ok(StoreSettings::Etcd(etcd)) if etcd.api == EtcdApi::Auto => {
            Parsed::Command(super::Command::MigrateEtcd(MigrateEtcdCommand { dry_run, follow, etcd }))
        }
        Ok(StoreSettings::Etcd(_)) => wrong(COMMAND, "leave out -etcd-api: both keyspaces are meant"),
        Ok(_) => wrong(COMMAND, "leave out what names another store: both keyspaces of an etcd are meant"),
        Err(parsed) => *parsed,
    }
}
