//! Which subnet a node takes (contract §3.5).
