//! One VM in one process.
//!
//! The ways through this crate:
//! - configuration: [`config`] (Spec → Config) → [`machine::builder`] → a running [`machine::Machine`];
//! - guest exit: [`kvm`] → [`machine::vcpu`] → `devices::bus` → device;
//! - control: [`control`] (HTTP on a Unix socket, signals) → session → machine.
//!
//! Threads: the main thread is the control thread; one thread per vCPU; one for the console, one for a debugger; devices have
//! workers of their own. Only [`kvm`] names kvm-ioctls. No async runtime.

pub mod acpi;
pub mod block;
pub mod boot;
pub mod chunks;
pub mod config;
pub mod console;
pub mod control;
pub mod core_dump;
pub mod debugger;
pub mod exit_file;
mod files;
pub mod firmware;
pub mod json;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod metadata;
pub mod mp_table;
pub mod pmem;
pub mod residence;
pub mod sandbox;
