//! Hosts many VMs on one node.
//!
//! ```text
//! control node ⇒ server → agent (decide, perform) → vm (start, process, end) ⇒ bedplate-vmm
//! repository ⇒ image (copy) → the node's store            agent → report ⇒ control node
//! PID 1: init (mounts, modules, network, clock, reaping) → agent as its child
//! ```
//!
//! Invariants: one task owns the state of all VMs ([`agent`]); every change is journalled before and after it is made;
//! a VM has one process at most, whatever is killed when. Absences: the agent never links the VMM; it starts it as a
//! process, and a guest that takes its VMM down takes down one process. PID 1 never runs the agent's code: it waits.

pub mod agent;
pub mod clock;
pub mod files;
pub mod host;
pub mod identity;
pub mod image;
pub mod init;
pub mod net;
pub mod report;
pub mod server;
pub mod service;
pub mod vm;
