//! The journal: what a restarted agent needs to go on where the last one was killed.
//!
//! `spec.json` and `state.json` of a VM are written before a step begins and again when it has ended. Both are replaced
//! whole, so that what is read is the state before or after a step, never half of one.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use bedplate_api::VmId;
use bedplate_api::node::{Desired, VmSpec};
use serde::{Deserialize, Serialize};

use super::model::{Process, Step, Vm};
use crate::files::{self, FileError};
use crate::vm::dir::VmDir;

/// `state.json`. A field that is added later gets a default, so that an agent reads its predecessor's files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateV1 {
    /// 1.
    version: u32,
    /// The boot of the machine in which this was written: processes and times are of that boot.
    pub boot_id: String,
    /// Where the VM stands.
    pub state: Step,
    /// Why.
    pub detail: Option<String>,
    /// Its address.
    pub address: Option<Ipv4Addr>,
    /// Its guest has taken it.
    pub address_taken: bool,
    /// Restarts so far.
    pub restarts: u32,
    /// Failures in a row.
    pub failures: u32,
}

impl StateV1 {
    /// What is kept of `vm`.
    pub fn of(vm: &Vm, boot_id: &str) -> Self {
        // Destructured, so that a new field is not forgotten here.
        let Vm { spec: _, step, detail, address, address_taken, restarts, failures } = vm.clone();
        Self {
            version: 1,
            boot_id: boot_id.to_owned(),
            state: step,
            detail,
            address,
            address_taken,
            restarts,
            failures,
        }
    }

    /// The process that it had.
    pub const fn process(&self) -> Option<Process> {
        self.state.process()
    }

    /// The VM that this was kept of.
    pub fn into_vm(self, spec: VmSpec) -> Vm {
        let Self { version: _, boot_id: _, state, detail, address, address_taken, restarts, failures } = self;
        Vm { spec, step: state, detail, address, address_taken, restarts, failures }
    }
}

/// What the journal holds of one VM, as far as it is there and whole.
#[derive(Debug)]
pub struct Entry {
    /// Which.
    pub id: VmId,
    /// As asked for.
    pub spec: Option<VmSpec>,
    /// Where it stands.
    pub state: Option<StateV1>,
}

/// The journal in a state directory.
#[derive(Debug, Clone)]
pub struct Journal {
    dir: PathBuf,
    boot_id: String,
}

impl Journal {
    /// Opens the journal in `dir` during the boot `boot_id`, making the directories where they lack.
    ///
    /// # Errors
    /// The directories cannot be made.
    pub fn open(dir: &Path, boot_id: &str) -> Result<Self, FileError> {
        let vms = dir.join("vms");
        fs::create_dir_all(&vms).map_err(FileError::io("create", &vms))?;
        Ok(Self { dir: dir.to_owned(), boot_id: boot_id.to_owned() })
    }

    /// The directory of VM `id`.
    pub fn vm_dir(&self, id: VmId) -> VmDir {
        VmDir::new(&self.dir, id)
    }

    /// What was asked for last.
    ///
    /// # Errors
    /// The file cannot be read or is damaged.
    pub fn desired(&self) -> Result<Desired, FileError> {
        Ok(files::read_json(&self.dir.join("desired.json"))?.unwrap_or_default())
    }

    /// Keeps what is asked for.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn put_desired(&self, desired: &Desired) -> Result<(), FileError> {
        files::write_json(&self.dir.join("desired.json"), desired)
    }

    /// Keeps a VM's spec, making its directory.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn put_spec(&self, spec: &VmSpec) -> Result<(), FileError> {
        let dir = self.vm_dir(spec.id);
        fs::create_dir_all(dir.path()).map_err(FileError::io("create", dir.path()))?;
        files::sync_parent(dir.path()).map_err(FileError::io("sync the parent of", dir.path()))?;
        files::write_json(&dir.spec(), spec)
    }

    /// Keeps where a VM stands.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn put_state(&self, vm: &Vm) -> Result<(), FileError> {
        files::write_json(&self.vm_dir(vm.spec.id).state(), &StateV1::of(vm, &self.boot_id))
    }

    /// Every VM that has a directory, by its directory's name.
    ///
    /// # Errors
    /// The directory of directories cannot be read.
    pub fn vms(&self) -> Result<Vec<Entry>, FileError> {
        let vms = self.dir.join("vms");
        let entries = fs::read_dir(&vms).map_err(FileError::io("read", &vms))?;
        let ids = entries.filter_map(|e| e.ok()?.file_name().to_str()?.parse::<VmId>().ok());
        Ok(ids
            .map(|id| {
                let dir = self.vm_dir(id);
                let state = whole::<StateV1>(&dir.state()).filter(|s| s.version == 1);
                Entry { id, spec: whole(&dir.spec()), state }
            })
            .collect())
    }
}

/// A damaged file of one VM must not keep the agent from serving the others: it counts as missing, and is named.
fn whole<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    files::read_json(path).unwrap_or_else(|e| {
        tracing::error!("{e}; it is taken for missing");
        None
    })
}
