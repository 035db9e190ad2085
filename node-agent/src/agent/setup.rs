//! Bringing an agent up over what an earlier one left: journal, processes, half-done steps.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bedplate_api::VmId;
use bedplate_api::node::Desired;
use bedplate_api::vmm::Exit;
use rustix::fs::FlockOperation;
use tokio::sync::{mpsc, watch};

use super::decide::Host;
use super::journal::{Entry, Journal, StateV1};
use super::model::{Process, Step, Vm};
use super::recover::{Found, recover};
use super::{Agent, AgentConfig, AgentHandle};
use crate::clock::{self, Millis};
use crate::files::{self, FileError};
use crate::host;
use crate::image::Images;
use crate::vm::capture;
use crate::vm::cgroup::Cgroups;
use crate::vm::dir::VmDir;
use crate::vm::outcome::Records;
use crate::vm::process;

/// Events that may wait. More only means that their senders wait.
const INBOX: usize = 64;

/// Why an agent cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The state directory cannot be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another agent uses it.
    #[error("{} is in use by another bedplate-node; end that one, or name another directory with --state", .0.display())]
    Busy(PathBuf),
    /// Sockets would have paths that no address can hold.
    #[error("{} is too long a path for a state directory: sockets below it must have paths of at most 107 bytes", .0.display())]
    TooDeep(PathBuf),
    /// The image store cannot be read.
    #[error(transparent)]
    Store(#[from] bedplate_images::StoreError),
}

impl Agent {
    /// An agent over the state directory, with every VM that is there found again, and a handle to it.
    ///
    /// # Errors
    /// See [`SetupError`].
    pub fn open(config: AgentConfig, images: Images) -> Result<(Self, AgentHandle), SetupError> {
        if !VmDir::fits(&config.state) {
            return Err(SetupError::TooDeep(config.state));
        }
        let lock = lock(&config.state)?;
        let boot_id = clock::boot_id();
        let journal = Journal::open(&config.state, &boot_id)?;
        let (events, inbox) = mpsc::channel(INBOX);
        let host = Host {
            slots: config.slots,
            memory_mib: host::memory_for_vms(&config.state),
            cpus: host::capacity(&config.state, config.slots).cpus,
            obstacle: None,
            not_yet: None,
            button_millis: config.button_millis,
        };
        let cgroups = Cgroups::open()
            .inspect_err(|why| tracing::warn!("VMs run without limits of their own, because {why}"))
            .ok();
        let mut agent = Self {
            desired: journal.desired()?,
            complete: images.complete()?,
            config,
            journal: journal.clone(),
            boot_id,
            images,
            cgroups,
            host,
            vms: BTreeMap::new(),
            states: BTreeMap::new(),
            bootable: BTreeMap::new(),
            copies: BTreeMap::new(),
            copies_begun: 0,
            watchers: BTreeMap::new(),
            supplies: BTreeMap::new(),
            network: None,
            network_wanted: None,
            network_trouble: None,
            network_again: None,
            leaving: false,
            events: events.clone(),
            inbox,
            status: watch::Sender::new(Arc::new(nothing())),
            network_named: watch::Sender::new(None),
            _lock: lock,
        };
        agent.look_at_host();
        agent.find_vms()?;
        agent.status.send_replace(Arc::new(agent.node_status()));
        let (status, network) = (agent.status.subscribe(), agent.network_named.subscribe());
        Ok((agent, AgentHandle { events, status, network, journal }))
    }

    /// Takes up every VM of the journal where it stands.
    fn find_vms(&mut self) -> Result<(), FileError> {
        let processes: BTreeMap<PathBuf, Process> = process::find_all().into_iter().collect();
        for Entry { id, spec, state } in self.journal.vms()? {
            let spec = spec.or_else(|| self.desired.vms.iter().find(|s| s.id == id).cloned());
            let dir = self.journal.vm_dir(id);
            let found = processes.get(&dir.config()).copied();
            let Some(spec) = spec else {
                orphan(id, &dir, found);
                continue;
            };
            let watched = found.and_then(|p| process::adopt(p, &dir.config()).ok().flatten());
            let process = watched.as_ref().map(|w| (w.process(), process::started_at(w.process())));
            let exit = files::read_json::<Exit>(&dir.exit()).ok().flatten();
            let journalled = state.as_ref().and_then(StateV1::process).filter(|_| process.is_none());
            let outcome = journalled.and_then(|p| Records::default().take(p));
            let found = Found { state, process, exit, outcome };
            let vm = recover(spec, found, &self.boot_id, Millis::now());
            self.vms.insert(id, vm);
            self.keep(id);
            if let Some(watched) = watched {
                tracing::info!("VM {id} goes on as process {}", watched.process().pid);
                self.watch(id, watched);
                // What its boot reads first was read already, or is lost.
                self.supply(id, false);
            }
            capture::abandon(&dir);
            // A removal that was cut short is done again.
            if self.vms.get(&id).is_some_and(|vm| vm.step == Step::Removing) {
                self.change(id, |vm: &mut Vm| vm.step = Step::Off);
            }
        }
        Ok(())
    }
}

/// A directory without a specification is what is left of a removal, or of an acceptance that never was acknowledged.
fn orphan(id: VmId, dir: &VmDir, process: Option<Process>) {
    if let Some(watched) = process.and_then(|p| process::adopt(p, &dir.config()).ok().flatten()) {
        tracing::warn!("process {} runs a VM {id} that nobody knows, and is killed", watched.process().pid);
        watched.kill();
    }
    if let Err(e) = files::remove_dir(dir.path()) {
        tracing::warn!("{e}");
    }
}

/// Makes the state directory and keeps other agents out of it.
fn lock(state: &Path) -> Result<File, SetupError> {
    fs::create_dir_all(state).map_err(FileError::io("create", state))?;
    let path = state.join("lock");
    let open = File::options().create(true).write(true).truncate(false).open(&path);
    let file = open.map_err(FileError::io("open", &path))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(SetupError::Busy(state.to_owned())),
        Err(e) => Err(FileError::io("lock", &path)(e.into()).into()),
    }
}

/// Stands in the status channel until the first real status, a moment later.
fn nothing() -> bedplate_api::node::NodeStatus {
    bedplate_api::node::NodeStatus {
        id: bedplate_api::NodeId::from_uuid(uuid::Uuid::nil()),
        boot_id: String::new(),
        version: String::new(),
        generation: Desired::default().generation,
        capacity: bedplate_api::node::Capacity { cpus: 0, memory_mib: 0, slots: 0, disk_free: 0 },
        vms: Vec::new(),
        images: Vec::new(),
    }
}
