//! /proc/sys.
