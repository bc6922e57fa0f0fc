//! The lab: what the tests of this package share.

pub mod privilege;
pub mod programs;
