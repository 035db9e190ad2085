//! The virtio console, which a Linux guest calls `hvc0`.

use serde::{Deserialize, Serialize};

/// `PUT /bedplate/console`. One of `socket` and `file` is named.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioConsole {
    /// A Unix socket to listen on: who connects gets the last 64 KiB, then everything, and what it sends is the guest's input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
    /// File or FIFO that output is appended to. There is no input.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Columns of the window that shows it. Absent, or 0: not known.
    #[serde(default)]
    pub columns: u16,
    /// Rows, likewise.
    #[serde(default)]
    pub rows: u16,
}

/// `PATCH /bedplate/console`: the window has another size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)]
pub struct ConsoleSize {
    pub columns: u16,
    pub rows: u16,
}
