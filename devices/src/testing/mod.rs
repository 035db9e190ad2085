//! The other side, for tests, fuzzing and benchmarks: a host made of plain event descriptors, and a driver that reaches a
//! device the way a guest does, through configuration space, BAR and rings.
//!
//! `virtio-queue`'s own mock driver is not used where rings are written from both sides: its used ring lies over its
//! available ring. Panics are the failure report here.
#![allow(clippy::unwrap_used)]

mod backends;
mod driver;
mod host;
mod hostile;
mod web;

pub use backends::{Nowhere, RamDisk, Wire};
pub use driver::{Driver, DriverQueue, Piece};
pub use host::{FakeHost, FakeVector, INTX, Machine, ram};
pub use hostile::{Hostile, configuration, honest};
pub use web::{Echo, SERVER, WebClient, disturb};
