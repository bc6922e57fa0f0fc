//! Leases in this process.
