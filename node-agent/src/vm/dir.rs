//! A VM's directory, `DIR/vms/{id}/`: where everything of one VM stands, and the only place that spells the names.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use bedplate_api::VmId;

use crate::files::{self, FileError};

/// The longest path that a Unix socket's address holds, less the terminating zero.
const MAX_SOCKET_PATH: usize = 107;
/// The longest name below a VM's directory that is a socket.
const LONGEST_SOCKET: &str = "disk/chunks.sock";

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

    /// A copy of the disk, while it is captured.
    pub fn capture(&self) -> PathBuf {
        self.0.join("capture")
    }

    /// Where the VMM asks for what the disk's image lacks: beside the disk, where the VMM itself can make nothing.
    pub fn chunks(&self) -> PathBuf {
        self.disk().join("chunks.sock")
    }

    /// The VMM's configuration file. Its path in a process's arguments says whose process that is.
    pub fn config(&self) -> PathBuf {
        self.0.join("vmm.json")
    }

    /// What the VMM itself makes and changes while the guest runs. A guest that took its VMM over can put anything
    /// there: what is in it is looked at with care, see [`crate::files::open_plain`].
    pub fn vmm(&self) -> PathBuf {
        self.0.join("vmm")
    }

    /// The VMM's API.
    pub fn api(&self) -> PathBuf {
        self.vmm().join("api.sock")
    }

    /// Sockets between host and guest.
    pub fn vsock(&self) -> PathBuf {
        self.vmm().join("vsock.sock")
    }

    /// The serial console.
    pub fn serial(&self) -> PathBuf {
        self.vmm().join("serial.sock")
    }

    /// What the serial console said.
    pub fn serial_log(&self) -> PathBuf {
        self.vmm().join("serial.log")
    }

    /// Why the VM ended.
    pub fn exit(&self) -> PathBuf {
        self.vmm().join("exit.json")
    }

    /// Makes the VMM's own directory ready for a start, and `owner`'s if there is one: sockets that a killed VMM left go,
    /// and so does whatever is no file of its own. No process may write there meanwhile.
    ///
    /// # Errors
    /// The host refuses.
    pub fn prepare(&self, owner: Option<u32>) -> Result<(), FileError> {
        let vmm = self.vmm();
        fs::create_dir_all(&vmm).map_err(FileError::io("create", &vmm))?;
        for entry in fs::read_dir(&vmm).map_err(FileError::io("read", &vmm))? {
            let entry = entry.map_err(FileError::io("read", &vmm))?;
            let (path, found) = (entry.path(), entry.metadata().map_err(FileError::io("examine", &entry.path()))?);
            if found.is_dir() {
                files::remove_dir(&path)?;
            } else if !found.is_file() || found.nlink() > 1 {
                files::remove(&path)?;
            }
        }
        match owner {
            Some(id) => std::os::unix::fs::lchown(&vmm, Some(id), Some(id)).map_err(FileError::io("give away", &vmm)),
            None => Ok(()),
        }
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
    fn what_a_hostile_vmm_left_does_not_lead_anywhere() {
        let state = tempfile::tempdir().unwrap();
        let dir = VmDir::new(state.path(), VmId::random());
        let precious = state.path().join("precious");
        fs::write(&precious, "as it was").unwrap();
        dir.prepare(None).unwrap();
        fs::write(dir.serial_log(), "said before").unwrap();
        fs::create_dir_all(dir.api().join("deep")).unwrap();
        std::os::unix::fs::symlink(&precious, dir.exit()).unwrap();
        fs::hard_link(&precious, dir.serial_log().with_added_extension("old")).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(dir.serial()).unwrap();
        assert!(files::open_plain(&dir.exit()).is_err(), "a link is not followed");
        dir.prepare(None).unwrap();
        let left: Vec<_> = fs::read_dir(dir.vmm()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["serial.log"]);
        assert_eq!(fs::read_to_string(precious).unwrap(), "as it was");
    }

    #[test]
    fn a_state_directory_that_is_too_deep_is_noticed() {
        assert!(VmDir::fits(Path::new("/var/lib/bedplate")));
        assert!(!VmDir::fits(&Path::new("/").join("x".repeat(60))));
    }
}
