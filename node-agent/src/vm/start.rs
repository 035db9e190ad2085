//! Starting a VM: disk, network, configuration, cgroup, process; and the word that its vCPUs run.
//!
//! Every step may be done again after a crash in the middle of it. Called with the journal saying `Starting`; what it
//! returns is journalled by the caller.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use bedplate_api::node::{DiskMode, VmSpec};
use bedplate_api::vmm::ChunkSource;
use bedplate_images::Store;
use bedplate_images::disk::{Disk, DiskError, Mode};
use tokio::time::{Instant, sleep, timeout_at};

use super::cgroup::{Cgroup, Cgroups};
use super::config::vm_config;
use super::dir::VmDir;
use super::process::{self, Watched};
use super::{api, end, user};
use crate::agent::model::End;
use crate::files::{self, FileError};
use crate::host::VMM_MIB;
use crate::image::Bootable;
use crate::net::link::NetError;
use crate::net::vms::Nic;

/// How long a VMM may take from its start until its vCPUs run.
const DEADLINE: Duration = Duration::from_secs(30);
/// How often it is asked meanwhile. It has no way to tell us before its socket is there.
const POLL: Duration = Duration::from_millis(20);

/// Why a VM was not started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A file of its directory could not be written.
    #[error(transparent)]
    File(#[from] FileError),
    /// It could not be put on the network.
    #[error(transparent)]
    Net(#[from] NetError),
    /// Its disk could not be made.
    #[error("cannot make the disk: {0}")]
    Disk(#[from] DiskError),
    /// The program could not be started.
    #[error("cannot start the VMM {program}: {source}")]
    Spawn {
        /// The VMM.
        program: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Its process ended before its vCPUs ran.
    #[error("{}", .0.detail)]
    Ended(End),
    /// Its vCPUs did not run in time.
    #[error("the VMM did not get its vCPUs running within {} seconds and was killed", DEADLINE.as_secs())]
    Slow,
    /// Our own step was aborted.
    #[error("the start was aborted")]
    Aborted,
}

/// Everything that a start needs.
#[derive(Debug, Clone)]
pub struct Start {
    /// What to start.
    pub spec: VmSpec,
    /// Where.
    pub dir: VmDir,
    /// From what.
    pub boot: Bootable,
    /// Where the image is.
    pub store: Store,
    /// Seconds that its guest waits for what the image lacks, where somebody serves that.
    pub chunk_wait: Option<u32>,
    /// Its network interface, if there is a network.
    pub nic: Option<Nic>,
    /// The VMM's program.
    pub vmm: PathBuf,
    /// Where its cgroup goes, if there are cgroups.
    pub cgroups: Option<Cgroups>,
    /// Its disk lives in RAM, which then counts as memory that the VMM takes.
    pub disk_in_memory: bool,
}

impl Start {
    /// Starts the VM and waits until its vCPUs run.
    ///
    /// # Errors
    /// See [`StartError`]; no process is left then.
    pub async fn run(self) -> Result<Watched, StartError> {
        let this = self.clone();
        tokio::task::spawn_blocking(move || this.prepare()).await.map_err(|_| StartError::Aborted)??;
        let cgroup = self.make_cgroup();
        let spawned = process::spawn(&self.vmm, self.spec.id, &self.dir, cgroup.as_ref());
        let watched = spawned.map_err(|source| StartError::Spawn { program: self.vmm.clone(), source })?;
        let deadline = Instant::now() + DEADLINE;
        let up = tokio::select! {
            up = timeout_at(deadline, running(&self.dir)) => up.map_err(|_| StartError::Slow),
            status = watched.ended() => Err(StartError::Ended(end::read(&self.dir, status, cgroup.as_ref()))),
        };
        match up {
            Ok(()) => Ok(watched),
            Err(error) => {
                watched.kill();
                watched.ended().await;
                Err(error)
            }
        }
    }

    /// The disk as the guest shall find it, and the configuration.
    fn prepare(&self) -> Result<(), StartError> {
        let disk = self.dir.disk();
        // A disk that is not persistent starts from its image by itself whenever it is opened.
        if !disk.join("disk.json").exists() {
            let mode = match self.spec.disk {
                DiskMode::Persistent => Mode::Persistent,
                DiskMode::NonPersistent => Mode::NonPersistent,
            };
            Disk::create(&disk, &self.store, &self.boot.image, mode)?;
        }
        self.dir.prepare(user::of(self.spec.id))?;
        let chunk_source = self
            .chunk_wait
            .map(|wait_seconds| ChunkSource { socket: self.dir.chunks().to_string_lossy().into_owned(), wait_seconds });
        let config = vm_config(&self.spec, &self.boot, &disk, &self.dir.vsock(), self.nic.as_ref(), chunk_source);
        Ok(files::write_json(&self.dir.config(), &config)?)
    }

    /// A cgroup is a safety net: a VM that has none runs all the same.
    fn make_cgroup(&self) -> Option<Cgroup> {
        let disk_mib = if self.disk_in_memory { self.boot.disk_size >> 20 } else { 0 };
        // Beside the guest's RAM and the VMM's own, its page cache counts; what is clean of that the kernel takes back.
        let limit = self.spec.memory_mib + VMM_MIB + self.spec.memory_mib / 16 + disk_mib;
        match self.cgroups.as_ref()?.create(self.spec.id, limit) {
            Ok(cgroup) => Some(cgroup),
            Err(e) => {
                tracing::warn!("VM {} runs without limits, its cgroup cannot be made: {e}", self.spec.name);
                None
            }
        }
    }
}

/// Returns when the VMM says that the vCPUs run.
async fn running(dir: &VmDir) {
    let socket = dir.api();
    while !api::is_running(&socket).await.unwrap_or(false) {
        sleep(POLL).await;
    }
}
