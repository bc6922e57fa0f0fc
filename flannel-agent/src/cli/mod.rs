//! The command line: flanneld's flags and `FLANNELD_*` variables become [`Settings`]; the subcommands have flags of
//! their own. Nothing here reads a file, a variable or an interface: `-help` works on a broken machine.
//!
//! Three steps, one file each. `go` splits argv by Go's rules. `flags` says which flags there are and of what type;
//! clap reads the values and prints the help. `settings` resolves what they mean together.
//!
//! Where flanneld is silent about a mistake, this is not (contract §14, T2, T3): an unknown flag, a stray word, a
//! bad variable or a feature that is not built yet ends with code 2 and a sentence that names it.

mod etcd;
mod flags;
mod go;
mod kube;
mod leases;
mod server;
mod settings;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::error::Error;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, FromArgMatches};

pub use self::etcd::{EtcdSettings, Login};
use self::flags::{BPFFS_PATH, Flags, STATUS_SOCKET};
use self::go::{Given, Stop};
pub use self::kube::KubeSettings;
use self::kube::PodVariables;
pub use self::leases::{MigrateCommand, MigrateEtcdCommand, Place, ReservationsAction, ReservationsCommand};
pub use self::server::{EmbeddedSettings, NetworksSettings, RemoteSettings, ServeSettings};
use self::settings::Origins;
pub use self::settings::{ClientCertificate, Secret, Settings, StoreSettings, Verbosity};
use crate::domain::network_name::NetworkName;
use crate::domain::wording::{nearest, quoted, shown};

/// The name under which the binary is the daemon and nothing else.
const DAEMON_NAME: &str = "flanneld";

const ENVIRONMENT_PREFIX: &str = "FLANNELD_";

/// As `-version` prints it. A release build sets it to its tag.
pub const VERSION: &str = match option_env!("FLANNEL_AGENT_VERSION") {
    Some(version) => version,
    None => concat!("v", env!("CARGO_PKG_VERSION")),
};

/// What was asked for.
#[derive(Clone, Debug, PartialEq)]
pub enum Parsed {
    Daemon(Box<Settings>),
    Command(Command),
    /// Nothing to run: help, the version, or what is wrong.
    PrintAndExit {
        /// Ends with a newline.
        text: String,
        stream: Stream,
        code: u8,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

/// What is asked for by the first word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    Status(StatusCommand),
    Top(TopCommand),
    Cleanup(CleanupCommand),
    Reservations(ReservationsCommand),
    Migrate(MigrateCommand),
    MigrateEtcd(MigrateEtcdCommand),
}

/// First words that are subcommands.
const SUBCOMMANDS: [&str; 8] =
    ["status", "top", "cleanup", "reservations", "migrate", "migrate-etcd", "version", "help"];

/// What the running agent is doing
///
/// Without an agent, what the kernel goes on doing by the pinned programs and maps, which takes root. Exit code 0: an
/// agent answered. 3: none did, and tunnels or routes carry on without it. 1: neither.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct StatusCommand {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub at: LookAt,
}

/// Where there is something to be seen.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct LookAt {
    /// Socket of the agent, its --status-socket
    #[arg(long, value_name = "PATH", default_value = STATUS_SOCKET)]
    pub socket: PathBuf,
    /// The network to look at, of an agent that has several
    #[arg(long, value_name = "NAME")]
    pub network: Option<NetworkName>,
    /// Where it pinned programs and maps, its --bpffs-path: looked at while no agent answers
    #[arg(long, value_name = "DIR", default_value = BPFFS_PATH)]
    pub bpffs_path: PathBuf,
}

/// The traffic with each peer, again and again, busiest first
///
/// On a terminal until `q` or Ctrl-C; else one page after the other. Goes on without an agent as `status` does.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct TopCommand {
    /// Seconds between two looks, 0.1 to 3600
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    pub interval: Duration,
    /// End after this many pages
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub count: Option<u32>,
    #[command(flatten)]
    pub at: LookAt,
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "a number of seconds is wanted, such as 0.5".to_owned())?;
    if !(0.1..=3600.0).contains(&seconds) {
        return Err("from 0.1 to 3600 seconds are possible".to_owned());
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// Remove from this host what the agent has put there: routes, programs, maps, devices
///
/// The agent leaves all of it in place when it ends, so that traffic flows on. For a node that leaves the overlay or goes
/// back to flanneld. subnet.env stays.
#[derive(Clone, Debug, PartialEq, Eq, Args)]
pub struct CleanupCommand {
    /// Only list what would be removed
    #[arg(long)]
    pub dry_run: bool,
    /// Socket of the agent, its --status-socket: nothing is removed while one answers
    #[arg(long, value_name = "PATH", default_value = STATUS_SOCKET)]
    pub socket: PathBuf,
    /// Where it pinned programs and maps, its --bpffs-path
    #[arg(long, value_name = "DIR", default_value = BPFFS_PATH)]
    pub bpffs_path: PathBuf,
}

/// Reads a command line and its environment.
///
/// `args` begins with the program's name: as `flanneld` it is the daemon in every case, else the first word may be a
/// subcommand.
pub fn parse(
    args: impl IntoIterator<Item = OsString>,
    env: impl IntoIterator<Item = (OsString, OsString)>,
) -> Parsed {
    let mut args = args.into_iter();
    let program = args.next().map(|name| program_name(&name)).unwrap_or_else(|| DAEMON_NAME.to_owned());
    let words: Result<Vec<String>, OsString> = args.map(OsString::into_string).collect();
    let words = match words {
        Ok(words) => words,
        Err(word) => {
            let word = quoted(&word.to_string_lossy());
            return usage_error(&program, &format!("argument {word} is not text in UTF-8"));
        }
    };
    let env: Vec<_> = env.into_iter().collect();
    let env = Environment { pod: PodVariables::of(&env), own: environment(env) };
    if program != DAEMON_NAME
        && let Some(parsed) = subcommand(&program, &words, &env)
    {
        return parsed;
    }
    daemon(&program, &words, &env)
}

/// The variables that are looked at.
struct Environment {
    /// `FLANNELD_*`
    own: BTreeMap<String, OsString>,
    pod: PodVariables,
}

/// The last part of the path it was called by.
fn program_name(argv0: &OsString) -> String {
    Path::new(argv0)
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_else(|| DAEMON_NAME.to_owned())
}

/// The variables that may be ours. Empty ones are unset, as Go programs have it; the rest is not looked at.
fn environment(env: impl IntoIterator<Item = (OsString, OsString)>) -> BTreeMap<String, OsString> {
    env.into_iter()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
        .filter(|(name, value)| name.starts_with(ENVIRONMENT_PREFIX) && !value.is_empty())
        .collect()
}

/// `None` when the words are the daemon's.
fn subcommand(program: &str, words: &[String], env: &Environment) -> Option<Parsed> {
    let print = |text: String| Parsed::PrintAndExit { text, stream: Stream::Stdout, code: 0 };
    match words.first()?.as_str() {
        "version" if words.len() == 1 => Some(print(format!("flannel-agent {VERSION}\n"))),
        "help" if words.len() == 1 => Some(print(help(program))),
        "reservations" => Some(leases::reservations(words.get(1..).unwrap_or_default(), env)),
        "migrate" => Some(leases::migrate(words.get(1..).unwrap_or_default(), env)),
        "migrate-etcd" => Some(leases::migrate_etcd(words.get(1..).unwrap_or_default(), env)),
        "help" if words.len() == 2 && words.last().is_some_and(|word| word == "reservations") => {
            Some(leases::reservations(&[], env))
        }
        "help" if words.len() == 2 && words.last().is_some_and(|word| word == "migrate-etcd") => {
            Some(leases::migrate_etcd(&["--help".to_owned()], env))
        }
        "help" if words.len() == 2 && words.last().is_some_and(|word| word == "migrate") => {
            Some(leases::migrate(&[], env))
        }
        // `help status` is `status --help`.
        word if SUBCOMMANDS.contains(&word) => {
            let all = std::iter::once(program).chain(words.iter().map(String::as_str));
            Some(match subcommands(program).try_get_matches_from(all) {
                Ok(matches) => match command(&matches) {
                    Some(command) => Parsed::Command(command),
                    None => usage_error(program, &format!("name a subcommand: {}", listed("or"))),
                },
                Err(error) => Parsed::PrintAndExit {
                    text: error.render().to_string(),
                    stream: if error.use_stderr() { Stream::Stderr } else { Stream::Stdout },
                    code: if error.use_stderr() { 2 } else { 0 },
                },
            })
        }
        _ => None,
    }
}

/// "status, cleanup, version and help"
fn listed(last: &str) -> String {
    let [first @ .., end] = SUBCOMMANDS;
    format!("{} {last} {end}", first.join(", "))
}

fn command(matches: &clap::ArgMatches) -> Option<Command> {
    let (name, matches) = matches.subcommand()?;
    match name {
        "status" => StatusCommand::from_arg_matches(matches).ok().map(Command::Status),
        "top" => TopCommand::from_arg_matches(matches).ok().map(Command::Top),
        "cleanup" => CleanupCommand::from_arg_matches(matches).ok().map(Command::Cleanup),
        _ => None,
    }
}

fn subcommands(program: &str) -> clap::Command {
    clap::Command::new(program.to_owned())
        .term_width(100)
        .subcommand(StatusCommand::augment_args(clap::Command::new("status")))
        .subcommand(TopCommand::augment_args(clap::Command::new("top")))
        .subcommand(CleanupCommand::augment_args(clap::Command::new("cleanup")))
        .subcommand(clap::Command::new("version").about("Print the version"))
}

fn daemon(program: &str, words: &[String], env: &Environment) -> Parsed {
    let command = flags::command();
    let given = match go::split(words, |name| flags::kind_of(&command, name)) {
        Ok(given) => given,
        Err(Stop::Help) => {
            return Parsed::PrintAndExit { text: help(program), stream: Stream::Stderr, code: 0 };
        }
        Err(stop) => return usage_error(program, &stopped(&command, program, stop)),
    };
    let on_command_line = given.iter().map(|flag| (format!("-{}", flag.name), flag));
    for (origin, flag) in on_command_line.clone() {
        if let Err(reason) = check(&command, flag) {
            return usage_error(
                program,
                &format!("invalid value {} for {origin}: {reason}", shown_value(flag)),
            );
        }
    }
    // Like Go's, `-version` is answered before the environment is looked at.
    if given
        .iter()
        .rev()
        .find(|flag| flag.name == "version")
        .is_some_and(|flag| go::boolean(&flag.value) == Ok(true))
    {
        return Parsed::PrintAndExit { text: format!("{VERSION}\n"), stream: Stream::Stderr, code: 0 };
    }

    let (variables, mut warnings) = match from_environment(&command, &given, &env.own) {
        Ok(found) => found,
        Err(text) => return usage_error(program, &text),
    };
    let from_variables = variables.iter().map(|flag| (variable(&flag.name), flag));
    let origins: Origins =
        on_command_line.chain(from_variables).map(|(origin, flag)| (flag.name.clone(), origin)).collect();

    let values = given.iter().chain(&variables).map(|flag| format!("--{}={}", flag.name, flag.value));
    let matches = command.try_get_matches_from(std::iter::once(program.to_owned()).chain(values));
    let settings = matches
        .and_then(|matches| Flags::from_arg_matches(&matches))
        .map_err(|error| settings::SettingsError { text: reason(&error), code: 2 })
        .and_then(|flags| Settings::resolve(flags, &origins, &env.pod));
    match settings {
        Ok(mut settings) => {
            settings.warnings.append(&mut warnings);
            Parsed::Daemon(Box::new(settings))
        }
        Err(error) if error.code == 2 => usage_error(program, &error.text),
        Err(error) => Parsed::PrintAndExit {
            text: format!("{}\n", error.text),
            stream: Stream::Stderr,
            code: error.code,
        },
    }
}

/// The flags that variables set, and a warning for each variable that is nearly one of ours. Only flags that are not
/// on the command line: command line over environment over default.
fn from_environment(
    command: &clap::Command,
    given: &[Given],
    env: &BTreeMap<String, OsString>,
) -> Result<(Vec<Given>, Vec<String>), String> {
    let names: BTreeMap<String, &str> =
        command.get_arguments().filter_map(|arg| arg.get_long()).map(|name| (variable(name), name)).collect();
    let mut flags = Vec::new();
    let mut warnings = Vec::new();
    for (variable, value) in env {
        let Some(name) = names.get(variable) else {
            // Kubernetes sets FLANNELD_SERVICE_HOST and such for a service of that name: only typing errors count.
            if let Some(near) = near_variable(variable, names.keys()) {
                warnings.push(format!("variable {} is not known (did you mean {near}?)", shown(variable)));
            }
            continue;
        };
        if *name == "version" || given.iter().any(|flag| flag.name == *name) {
            continue;
        }
        let Some(value) = value.to_str() else {
            return Err(format!("{variable} is not text in UTF-8"));
        };
        let flag = Given { name: (*name).to_owned(), value: value.to_owned() };
        check(command, &flag)
            .map_err(|reason| format!("invalid value {} for {variable}: {reason}", shown_value(&flag)))?;
        flags.push(flag);
    }
    Ok((flags, warnings))
}

/// Compared without the prefix, which would make every two variables alike.
fn near_variable<'a>(variable: &str, known: impl Iterator<Item = &'a String>) -> Option<String> {
    let own = |name: &'a String| name.strip_prefix(ENVIRONMENT_PREFIX);
    nearest(variable.strip_prefix(ENVIRONMENT_PREFIX)?, known.filter_map(own))
        .map(|near| format!("{ENVIRONMENT_PREFIX}{near}"))
}

fn variable(flag: &str) -> String {
    format!("{ENVIRONMENT_PREFIX}{}", flag.to_uppercase().replace('-', "_"))
}

/// Reads the one value by itself, so that an error is about it and can name where it came from.
fn check(command: &clap::Command, flag: &Given) -> Result<(), String> {
    let value = format!("--{}={}", flag.name, flag.value);
    let words = [command.get_name(), &value];
    command.clone().try_get_matches_from(words).map(|_| ()).map_err(|error| reason(&error))
}

/// The sentence of a value's own parser, without clap's frame around it.
fn reason(error: &clap::Error) -> String {
    match error.source() {
        Some(source) => source.to_string(),
        None => error.render().to_string().lines().next().unwrap_or_default().to_owned(),
    }
}

/// The value as an error may show it.
fn shown_value(flag: &Given) -> String {
    if flag.name == "etcd-password" { "(not shown)".to_owned() } else { quoted(&flag.value) }
}

/// Go's sentence where there is one, then the likely cause.
fn stopped(command: &clap::Command, program: &str, stop: Stop) -> String {
    match stop {
        Stop::Help => String::new(),
        Stop::BadSyntax(word) => format!("bad flag syntax: {}", shown(&word)),
        Stop::NeedsArgument(name) => format!("flag needs an argument: -{name}"),
        Stop::Unknown(name) => {
            let known = command.get_arguments().filter_map(|arg| arg.get_long());
            let near =
                nearest(&name, known).map(|near| format!(" (did you mean -{near}?)")).unwrap_or_default();
            format!("flag provided but not defined: -{}{near}", shown(&name))
        }
        Stop::Positional { word, after_boolean: Some(flag) } => {
            let word = shown(&word);
            format!(
                "unexpected argument {word} after -{flag}: a boolean takes its value behind an equals sign, -{flag}={word}"
            )
        }
        Stop::Positional { word, after_boolean: None } => {
            let hint = if program == DAEMON_NAME {
                "there are only flags, each with its value behind it".to_owned()
            } else if let Some(near) = nearest(&word, SUBCOMMANDS) {
                format!("did you mean the subcommand {near}, as the first word?")
            } else {
                format!("there are only flags, and the subcommands {} as the first word", listed("and"))
            };
            format!("unexpected argument {}: {hint}", quoted(&word))
        }
    }
}

fn usage_error(program: &str, text: &str) -> Parsed {
    let text = format!("{text}\nUsage: {program} [OPTION]...\nRun '{program} -help' for the options.\n");
    Parsed::PrintAndExit { text, stream: Stream::Stderr, code: 2 }
}

/// The full help, flags in groups.
fn help(program: &str) -> String {
    let commands = if program == DAEMON_NAME {
        String::new()
    } else {
        format!(
            "\nCommands, as the first word:\n  \
             {program} status [--json] [--socket PATH]   what the running agent is doing\n  \
             {program} top [--interval SECONDS]          the traffic with each peer, again and again\n  \
             {program} cleanup [--dry-run]               remove what the agent put on this host\n  \
             {program} reservations list|add|remove      subnets that nodes have for good\n  \
             {program} migrate --from=… --to=…           move leases to another store\n  \
             {program} migrate-etcd [--follow]           move leases from etcd's v2 keyspace to v3's\n  \
             {program} version                           print the version\n  \
             {program} help [COMMAND]                    this text, or a command's\n"
        )
    };
    let flags = flags::command().help_template("{all-args}").render_help();
    format!(
        "Usage: {program} [OPTION]...\n\n\
         Leases a subnet of the cluster's network for this node and carries packets between the nodes.\n\
         {commands}\n\
         One dash or two; the value behind an equals sign or, except for booleans, as the next word. Every\n\
         option can be set by a variable: -subnet-file by {ENVIRONMENT_PREFIX}SUBNET_FILE. The command line wins; an\n\
         empty variable counts as unset.\n\n{flags}"
    )
}
