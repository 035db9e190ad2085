//! Directories of the host that a guest mounts.

use serde::{Deserialize, Serialize};

/// `PUT /bedplate/filesystems/{tag}`: what a vhost-user backend such as virtiofsd shares, which a Linux guest mounts by
/// `mount -t virtiofs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSystem {
    /// By this name the guest mounts it: 1 to 36 letters, digits, underscores and hyphens.
    pub tag: String,
    /// Unix socket on which the backend listens when the VM is started.
    pub socket: String,
}
