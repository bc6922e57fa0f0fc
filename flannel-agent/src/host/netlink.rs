//! Links, addresses, routes.
