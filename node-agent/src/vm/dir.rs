//! A VM's directory, `DIR/vms/{id}/`: where everything of one VM stands, and the only place that spells the names.

use std::path::{Path, PathBuf};

use bedplate_api::VmId;

/// The longest path that a Unix socket's address holds, less the terminating zero.
const MAX_SOCKET_PATH: usize = 107;
/// The longest name below a VM's directory that is a socket.
const LONGEST_SOCKET: &str = "serial.sock";

/// One VM's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmDir(PathBuf);

impl VmDir {
    /// The directory of VM `id` under the state directory `state`.
    pub fn new(state: &Path, id: VmId) -> Self {
        Self(state.join("vms").join(id.to_string()))
    }

    /// Whether sockets in VMs' directories under `state` have paths that an address can hold.
    pub fn fits(state: &Path) -> bool {
        let longest = Self::new(state, VmId::from_uuid(uuid::Uuid::nil())).0.join(LONGEST_SOCKET);
        longest.as_os_str().len() <= MAX_SOCKET_PATH
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// What was asked for.
    pub fn spec(&self) -> PathBuf {
        self.0.join("spec.json")
    }

    /// The journal: where it stands.
    pub fn state(&self) -> PathBuf {
        self.0.join("state.json")
    }

    /// Its disk.
    pub fn disk(&self) -> PathBuf {
        self.0.join("disk")
    }

    /// The VMM's configuration file. Its path in a process's arguments says whose process that is.
    pub fn config(&self) -> PathBuf {
        self.0.join("vmm.json")
    }

    /// The VMM's API.
    pub fn api(&self) -> PathBuf {
        self.0.join("vmm.sock")
    }

    /// The serial console.
    pub fn serial(&self) -> PathBuf {
        self.0.join(LONGEST_SOCKET)
    }

    /// What the serial console said.
    pub fn serial_log(&self) -> PathBuf {
        self.0.join("serial.log")
    }

    /// Why the VM ended.
    pub fn exit(&self) -> PathBuf {
        self.0.join("exit.json")
    }

    /// What the VMM said on stderr since it was started last.
    pub fn stderr(&self) -> PathBuf {
        self.0.join("vmm.log")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_directory_that_is_too_deep_is_noticed() {
        assert!(VmDir::fits(Path::new("/var/lib/bedplate")));
        assert!(!VmDir::fits(&Path::new("/").join("x".repeat(60))));
    }
}
