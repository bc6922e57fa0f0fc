//! `flannel-agent reservations`: subnets that nodes have for good, listed, made and ended in the store itself.

use std::process::ExitCode;

use super::open;
use crate::cli::{ReservationsAction, ReservationsCommand, StoreSettings};
use crate::domain::lease::{Reservation, Subnets};
use crate::stores::{LeaseStore, StoreError};

/// Exit code 0 when it is done, 1 when not.
pub async fn run(command: &ReservationsCommand) -> ExitCode {
    match perform(command).await {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(text) => {
            eprintln!("flannel-agent reservations: {text}");
            ExitCode::FAILURE
        }
    }
}

async fn perform(command: &ReservationsCommand) -> Result<String, String> {
    match *command.store {
        StoreSettings::Embedded(_) => {
            return Err("the file belongs to a server: ask that one with --remote".to_owned());
        }
        StoreSettings::Kube(_) => return Err(StoreError::NoReservations.to_string()),
        _ => {}
    }
    let store = match &command.network {
        None => open::store(&command.store).await.map_err(|error| error.to_string())?,
        Some(name) => open::networks(&command.store).map_err(|error| error.to_string())?.network(Some(name)),
    };
    let done = |text: String| Ok(text + "\n");
    match command.action {
        ReservationsAction::List { json } => list(store.as_ref(), json).await,
        ReservationsAction::Add(reservation) => {
            store.reserve(&reservation).await.map_err(|error| error.to_string())?;
            done(format!("{} is reserved for {}", shown(reservation.subnets), reservation.public_ip))
        }
        ReservationsAction::Remove(subnets) => {
            store.unreserve(subnets).await.map_err(|error| error.to_string())?;
            done(format!("{} is a lease like any other", shown(subnets)))
        }
    }
}

async fn list(store: &dyn LeaseStore, json: bool) -> Result<String, String> {
    let all = store.reservations().await.map_err(|error| error.to_string())?;
    if json {
        let all: Vec<_> = all
            .iter()
            .map(|Reservation { subnets, public_ip }| {
                serde_json::json!({ "subnet": shown(*subnets), "public_ip": public_ip })
            })
            .collect();
        return serde_json::to_string_pretty(&all).map(|text| text + "\n").map_err(|error| error.to_string());
    }
    Ok(match all.as_slice() {
        [] => "no subnet is reserved\n".to_owned(),
        all => all
            .iter()
            .map(|Reservation { subnets, public_ip }| format!("{} {public_ip}\n", shown(*subnets)))
            .collect(),
    })
}

/// As an operator writes it.
fn shown(subnets: Subnets) -> String {
    let v4 = subnets.v4.map(|net| net.to_string());
    let v6 = subnets.v6.map(|net| net.to_string());
    v4.into_iter().chain(v6).collect::<Vec<_>>().join("&")
}
