//! The control node: it decides what runs where, and makes it so.
//!
//! The way of a command through this crate: a person asks for a tier ([`http`]) → it is remembered ([`store`]) → the
//! [`planner`], a pure function, says what follows → the [`executor`] does that in one transaction → [`push`] hands each
//! node what shall run there → the nodes report ([`reports`]), which is what the next plan starts from.
//!
//! A machine's way here: [`netboot`] gives it an address and a hypervisor to boot → it registers ([`reports`]) → its slots
//! are in the free pool.
//!
//! Invariants: only the executor changes assignments and generations, in one transaction per plan. What was observed is
//! never stored; what is stored was decided. The planner does no I/O and has no clock.

pub mod control;
pub mod executor;
pub mod http;
pub mod listen;
pub mod netboot;
pub mod observed;
pub mod page;
pub mod planner;
pub mod push;
pub mod records;
pub mod reports;
pub mod routes;
pub mod serve;
pub mod sharing;
pub mod shelf;
pub mod store;
#[cfg(test)]
mod testing;
