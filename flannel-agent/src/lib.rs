//! flannel-agent: leases in, host state out.
pub mod agent;
pub mod backends;
pub mod cli;
pub mod commands;
pub mod domain;
pub mod health;
pub mod host;
pub mod startup;
pub mod status;
pub mod stores;
pub mod subnet_env;
