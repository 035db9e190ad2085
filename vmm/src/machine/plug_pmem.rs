//! Files in the guest's address space that come and go while it runs.
//!
//! ```text
//! comes   opened, mapped → vhost is told → watched → KVM's memory → the device is on the bus → the guest is told
//! goes    the guest is asked → lets go → the device is off the bus → not watched → not KVM's memory → vhost is told → unmapped
//! ```
//! From the second step on, what fails is undone as if the file went. All of this is the control thread's, but for letting go,
//! which is a vCPU's.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use super::devices::Devices;
use super::pci_devices::When;
use super::{BuildError, DeviceError, Machine};
use crate::config::PmemConfig;
use crate::memory::Room;
use crate::pmem::{PmemFile, Start, Watch, Watching};

/// How long a vCPU may take to start a thread. It does it at once, unless it has to wait for a processor or for a device that
/// it stops.
const THREAD_PATIENCE: Duration = Duration::from_secs(5);

/// The files in the guest's address space, and where others can be.
pub(super) struct PmemFiles {
    /// By the names of the devices in [`Devices`].
    present: BTreeMap<String, PmemFile>,
    room: Room,
    watch: Watch,
}

impl PmemFiles {
    /// Those that the guest starts with.
    pub fn new(files: Vec<PmemFile>, room: Room, watch: Watch) -> Self {
        let named = |file: PmemFile| (Devices::name_of_pmem(&file.config.id), file);
        Self { present: files.into_iter().map(named).collect(), room, watch }
    }

    /// Tells vhost of all of them.
    fn show(&self, devices: &Devices) -> Result<(), DeviceError> {
        devices.see(&self.present.values().map(PmemFile::seen).collect())
    }
}

/// That nobody waits for a file to become shorter, in words for people.
pub(super) fn unwatched(file: &PmemFile, error: &io::Error) -> String {
    let (id, path) = (&file.config.id, file.config.path.display());
    format!(
        "pmem {id}: {path} is not watched: {error}; the guest may stand still if it becomes shorter. Raise max_user_instances \
         and max_user_watches in /proc/sys/fs/inotify"
    )
}

impl Machine {
    /// Puts a file into the guest's address space, its device on the bus, and tells the guest.
    ///
    /// # Errors
    /// It cannot be opened or mapped, or there is no room for it. The machine is as it was.
    pub fn plug_pmem(&mut self, config: &PmemConfig) -> Result<(), BuildError> {
        let name = Devices::name_of_pmem(&config.id);
        let file = PmemFile::open(config, |len| self.pmem_files.room.take(len))?;
        self.pmem_files.present.insert(name.clone(), file);
        let attached = self.attach_pmem(&name);
        if attached.is_err() {
            self.release_pmem(&name);
        }
        attached
    }

    fn attach_pmem(&mut self, name: &str) -> Result<(), BuildError> {
        let Some(file) = self.pmem_files.present.get(name) else { return Ok(()) };
        self.pmem_files.show(&self.devices)?;
        self.life.add_file(file.witness());
        let (watch, life) = (&mut self.pmem_files.watch, &self.life);
        let start = |start: Start| -> io::Result<Watching> {
            // This thread may start none in its sandbox.
            let answer = life.ask(0, move |_| start()).recv_timeout(THREAD_PATIENCE);
            answer.map_err(|_| io::Error::other("no vCPU has had time to start a thread for it"))?
        };
        if let Err(error) = watch.add(file).and_then(|()| watch.start(life, start)) {
            self.devices.warnings.push(unwatched(file, &error));
        }
        // Nobody may have seen it since it was opened.
        self.life.check_files();
        let mut attach = self.plug.attach(When::Running, &self.pci, &self.ram.memory, &mut self.devices);
        let slot = attach.pmem(file, &mut self.vm, &self.buses.mmio)?;
        self.plug.signals.came(slot);
        Ok(())
    }

    /// Takes the file of the device `name` away from the guest, if it is a pmem device that is off the bus, and closes it.
    pub(super) fn release_pmem(&mut self, name: &str) {
        let Some(file) = self.pmem_files.present.remove(name) else { return };
        let id = &file.config.id;
        self.pmem_files.watch.remove(id);
        self.life.remove_file(id);
        if file.config.read_only {
            self.buses.mmio.remove(file.region.start);
        }
        match self.vm.remove_file(file.region.start) {
            Ok(()) => self.pmem_files.room.give(&file.region),
            // It stays mapped, and nothing else comes to its place.
            Err(error) => self.devices.warnings.push(format!("pmem {id}: the guest keeps the memory of it: {error}")),
        }
        // What vhost goes on with stays mapped.
        if let Err(error) = self.pmem_files.show(&self.devices) {
            self.devices.warnings.push(error.to_string());
        }
    }
}
