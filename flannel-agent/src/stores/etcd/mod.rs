//! Leases in etcd.
