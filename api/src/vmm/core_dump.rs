//! A guest's memory and registers in a file.

use serde::{Deserialize, Serialize};

/// `PUT /bedplate/core-dump`. The VM stands still until it is written, then does what it did before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CoreDump {
    /// The file, which is replaced when the dump is whole. In the sandbox, below a directory that `--visible` names.
    pub path: String,
}
