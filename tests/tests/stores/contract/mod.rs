//! The contract of a lease store (contract §3.4–3.9), one sentence per case.

mod keeping;
mod reservations;
mod taking;
mod telling;

pub(crate) use self::{keeping::*, reservations::*, taking::*, telling::*};

const ALL: &str = "10.5.255.0";
