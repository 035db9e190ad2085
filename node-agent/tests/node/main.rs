//! The node agent as a process, with the real VMM and guests of a few instructions.

// A panic is how a test reports.
#![allow(clippy::unwrap_used)]

mod api;
mod capture;
mod copy;
mod crash;
mod lazy;
mod lifecycle;
mod network;
mod peers;
mod support;
mod update;
