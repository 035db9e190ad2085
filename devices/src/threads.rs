//! The threads of a VM's process.

use std::thread::Builder;

/// Bytes. As much as the standard library's 2 MiB would make each stack a huge page of its own where the host gives those
/// to everybody: memory, and the time to clear it at the start.
const STACK: usize = 512 << 10;

/// A thread that is to be started, with its name as the host shows it.
pub fn named(name: impl Into<String>) -> Builder {
    Builder::new().name(name.into()).stack_size(STACK)
}
