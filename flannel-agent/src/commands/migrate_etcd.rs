//! `flannel-agent migrate-etcd`: a cluster's networks and leases from etcd's v2 keyspace into v3's, and both kept alike
//! while its nodes change over one by one.

use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};

use super::open;
use crate::cli::MigrateEtcdCommand;
use crate::stores::etcd::{Fate, FollowEnd, Mirror, Planned};

/// Exit code 0 when v3 has everything, or when following was ended; 1 when not.
pub async fn run(command: &MigrateEtcdCommand) -> ExitCode {
    let followed = async {
        let mirror = open::keyspaces(&command.etcd).map_err(|error| error.to_string())?;
        copy(&mirror, command).await?;
        if command.follow { follow(&mirror).await } else { Ok(()) }
    };
    match followed.await {
        Ok(()) => ExitCode::SUCCESS,
        Err(text) => {
            eprintln!("flannel-agent migrate-etcd: {text}");
            ExitCode::FAILURE
        }
    }
}

async fn copy(mirror: &Mirror, command: &MigrateEtcdCommand) -> Result<(), String> {
    let text = |error: crate::stores::StoreError| error.to_string();
    let plan = mirror.plan().await.map_err(text)?;
    if plan.is_empty() {
        return Err(format!("the v2 keyspace holds no network below {}", command.etcd.prefix));
    }
    let clashes: Vec<_> = plan
        .iter()
        .filter_map(|Planned { content, fate }| match fate {
            Fate::Clash(reason) => Some(format!("in the way of {content}: {reason}")),
            _ => None,
        })
        .collect();
    clashes.iter().for_each(|clash| eprintln!("{clash}"));
    let may_write = !command.dry_run && clashes.is_empty();
    let (mut copied, mut prolonged, mut there) = (0_u32, 0_u32, 0_u32);
    for planned in &plan {
        let fate = if may_write { mirror.copy(planned).await.map_err(text)? } else { planned.fate.clone() };
        let content = &planned.content;
        let (count, done, would) = match fate {
            Fate::Copy => (&mut copied, "copied", "would copy"),
            Fate::Prolong => (&mut prolonged, "prolonged", "would prolong"),
            Fate::There => (&mut there, "there already:", "there already:"),
            Fate::Clash(reason) if may_write => return Err(format!("in the way of {content}: {reason}")),
            Fate::Clash(_) => continue,
        };
        *count += 1;
        println!("{} {content}", if may_write { done } else { would });
    }
    let doing = if may_write { ("copied", "prolonged") } else { ("to copy", "to prolong") };
    println!(
        "{copied} {}, {prolonged} {}, {there} there already, {} in conflict",
        doing.0,
        doing.1,
        clashes.len()
    );
    match clashes.len() {
        0 => Ok(()),
        _ if command.dry_run => Err("nothing would be copied while something is in the way".into()),
        _ => Err("nothing was copied: something is in the way".into()),
    }
}

async fn follow(mirror: &Mirror) -> Result<(), String> {
    println!("following both keyspaces until it is ended (SIGINT, SIGTERM)");
    tokio::select! {
        () = told_to_end() => {
            println!("ended: from now on the keyspaces go their own ways");
            Ok(())
        }
        FollowEnd::ConfigDeleted(key) = mirror.follow(|text| println!("{text}")) => Err(format!(
            "{key} was deleted from one of the keyspaces, so that one is being taken away: ended, and the other left as it is"
        )),
    }
}

async fn told_to_end() {
    match (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) {
        (Ok(mut interrupt), Ok(mut terminate)) => tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        },
        // Then they end the process by themselves.
        _ => std::future::pending().await,
    }
}
