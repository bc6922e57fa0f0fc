//! host-gw.
