//! Fixtures of the lab tests and of the demo: a control node on a private network, blank machines that it boots, and
//! single nodes that a test drives from inside.
//!
//! A suite whose work is done inside a node ([`suite`]) is one program with both halves: outside it starts an emulated
//! machine with itself as init; there, as process 1, it drives VMMs or an agent, and types on the consoles of guests.
//!
//! The tests themselves are in `tests/tests`. Each starts real machines (see the crate `lab`) and the real programs; what
//! they need is built by `cargo xtask test`, which tells them where it lies (see [`Artifacts`]).

pub mod artifacts;
pub mod cluster;
pub mod control;
pub mod http;
pub mod inside;
pub mod load;
pub mod patience;
pub mod suite;

pub use artifacts::Artifacts;
pub use cluster::Cluster;
pub use control::ControlNode;
