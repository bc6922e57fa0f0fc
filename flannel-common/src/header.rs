//! Pure functions over headers.
