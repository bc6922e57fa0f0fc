//! /run/flannel/subnet.env.
