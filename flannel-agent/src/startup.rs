//! The steps before the loop.
