//! Flags and FLANNELD_* variables → Settings. Touches nothing.
