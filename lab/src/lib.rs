//! Emulated machines: whole nodes, with hardware virtualization of their own, on a machine that may have none.
//!
//! `bedplate run --lab`, the demo and the lab tests run nodes in these. A [`MachineSpec`] starts as a [`Machine`], one QEMU
//! process whose serial console is a [`Console`]; several machines meet on a [`Network`], a bridge in a network namespace
//! of its own; an [`Archive`] is the initramfs that a machine boots. Nothing here knows what Bedplate is.
//!
//! Everything ends with its owner: on drop, and when this process dies, however it dies (see [`process`]).

pub mod accel;
pub mod console;
pub mod error;
pub mod forward;
pub mod initramfs;
pub mod machine;
pub mod modules;
pub mod network;
pub mod process;

pub use accel::Accel;
pub use console::Console;
pub use error::{Error, Result};
pub use forward::Forward;
pub use initramfs::Archive;
pub use machine::{Firmware, Machine, MachineSpec};
pub use modules::Modules;
pub use network::Network;
pub use process::Process;
