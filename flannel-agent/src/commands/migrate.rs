//! `flannel-agent migrate`: configurations and leases of all networks from one store into another.

use std::process::ExitCode;

use super::open;
use crate::cli::{MigrateCommand, Place};
use crate::stores::etcd::EtcdApi;
use crate::stores::{Received, RegistryNetworks};

/// Exit code 0 when everything is there, 1 when something is not.
pub async fn run(command: &MigrateCommand) -> ExitCode {
    match perform(command).await {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(text) => {
            eprintln!("flannel-agent migrate: {text}");
            ExitCode::FAILURE
        }
    }
}

/// How many entries were not moved because something else is there.
async fn perform(command: &MigrateCommand) -> Result<u32, String> {
    if let Place::Embedded(path) = &command.from
        && !path.exists()
    {
        return Err(format!("--from names {}, and there is no such file", path.display()));
    }
    let from = place(command, &command.from, EtcdApi::Auto)?;
    let contents = from.contents().await.map_err(|error| error.to_string())?;
    if contents.is_empty() {
        return Err("there is nothing to move: --from holds no network and no lease".to_owned());
    }
    let to = match &command.to {
        // Looking makes no file.
        Place::Embedded(path) if command.dry_run && !path.exists() => None,
        // There may be no network yet by which the keyspace could be told.
        to => Some(place(command, to, EtcdApi::V3)?),
    };
    let (mut new, mut same, mut other) = (0_u32, 0_u32, 0_u32);
    // Configurations last: a node that asks the new store meanwhile finds no network yet, and not one without leases.
    let (configs, leases): (Vec<_>, Vec<_>) =
        contents.into_iter().partition(|content| content.key == "config" || content.key.ends_with("/config"));
    for content in leases.iter().chain(&configs) {
        let received = match &to {
            None => Ok(Received::New),
            Some(to) if command.dry_run => to.compare(content).await,
            Some(to) => to.receive(content).await,
        };
        match received.map_err(|error| error.to_string())? {
            Received::New => {
                new += 1;
                println!("{} {content}", if command.dry_run { "would move" } else { "moved" });
            }
            Received::Same => same += 1,
            Received::Other(value) => {
                other += 1;
                eprintln!("not moved: {content}: there it is {value}");
            }
        }
    }
    let doing = if command.dry_run { "to be moved" } else { "moved" };
    println!("{new} {doing}, {same} there already, {other} in conflict");
    Ok(other)
}

fn place(command: &MigrateCommand, place: &Place, api: EtcdApi) -> Result<RegistryNetworks, String> {
    match place {
        Place::Etcd => open::etcd(&command.store, api).map_err(|error| error.to_string()),
        Place::Embedded(path) => open::embedded(path).map_err(|error| error.to_string()),
    }
}
