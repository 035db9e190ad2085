//! Doing what was decided: one function per action. None of them waits.

use bedplate_api::{Digest, VmId};
use tokio::sync::watch;
use tokio::time::{Duration, sleep};
use tokio_util::task::AbortOnDropHandle;

use super::decide::Action;
use super::model::{Asked, ImageState, Step, Vm};
use super::{Agent, Copy, Event, copy};
use crate::clock::Millis;
use crate::files;
use crate::host;
use crate::image::Sweep;
use crate::image::supply::Supply;
use crate::net::addresses;
use crate::vm::start::Start;
use crate::vm::{api, process, user};

/// The wait before a VM that could not be removed is removed again.
const REMOVE_AGAIN: Duration = Duration::from_secs(10);

impl Agent {
    pub(super) fn perform(&mut self, action: Action) {
        match action {
            Action::Accept(spec) => self.accept(Vm::new(spec)),
            Action::Respec(spec) => self.respec(spec),
            Action::Fetch(digest) => self.fetch(digest),
            Action::Drop(digest) => {
                self.copies.remove(&digest);
                self.states.remove(&digest);
                let wanted = self.desired.vms.iter().any(|spec| spec.image == digest);
                // The next attempt at one that is wanted goes on from what has landed; so does one that waits.
                if !wanted && self.copies.is_empty() {
                    self.make_room(Sweep::Leftovers);
                }
            }
            Action::Start(id) => self.start(id),
            Action::Stop(id, asked) => self.stop(id, asked),
            Action::TurnOff(id) => self.change(id, |vm| {
                vm.step = Step::Off;
                vm.failures = 0;
            }),
            Action::Rouse(id) => self.change(id, |vm| {
                // What a back-off waited for stays to be seen until the next start says something new.
                if !matches!(vm.step, Step::BackOff { .. }) {
                    vm.detail = None;
                }
                vm.step = Step::Ready;
            }),
            Action::Hold(id, why) => self.change(id, |vm| vm.detail = Some(why)),
            Action::Refuse(id, why) => {
                let generation = self.desired.generation;
                tracing::warn!("VM {id} cannot run here: {why}");
                self.change(id, |vm| {
                    vm.step = Step::Refused { generation };
                    vm.detail = Some(why);
                });
            }
            Action::Remove(id) => self.remove(id),
        }
    }

    /// Changes VM `id` and journals it.
    pub(super) fn change(&mut self, id: VmId, change: impl FnOnce(&mut Vm)) {
        if let Some(vm) = self.vms.get_mut(&id) {
            change(vm);
            self.keep(id);
        }
    }

    fn accept(&mut self, mut vm: Vm) {
        let id = vm.spec.id;
        tracing::info!("VM {} ({id}) is accepted", vm.spec.name);
        if let Err(e) = self.journal.put_spec(&vm.spec) {
            vm.step = Step::Refused { generation: self.desired.generation };
            vm.detail = Some(e.to_string());
        }
        self.vms.insert(id, vm);
        self.keep(id);
    }

    fn respec(&mut self, spec: bedplate_api::node::VmSpec) {
        if let Err(e) = self.journal.put_spec(&spec) {
            tracing::error!("{e}");
        }
        self.change(spec.id, |vm| vm.spec = spec);
        self.serve_addresses();
    }

    fn fetch(&mut self, digest: Digest) {
        let (progress, progressed) = watch::channel(None);
        let (trouble, troubled) = watch::channel(None);
        let (images, events) = (self.images.clone(), self.events.clone());
        let keep = self.images_to_keep();
        self.copies_begun += 1;
        let number = self.copies_begun;
        let task = tokio::spawn(async move {
            let copy = copy::Attempts { images, digest, number, keep, progress, trouble, events };
            copy.run().await;
        });
        self.states.insert(digest, ImageState::Copying { progress: None, trouble: None });
        let task = AbortOnDropHandle::new(task);
        self.copies.insert(digest, Copy { number, progress: progressed, trouble: troubled, _task: task });
    }

    /// Images that can be started from and that VMs ask for.
    fn images_to_keep(&self) -> Vec<Digest> {
        let wanted = self.desired.vms.iter().map(|spec| spec.image);
        let mut keep: Vec<_> = wanted.filter(|d| self.states.get(d).is_some_and(ImageState::is_bootable)).collect();
        keep.dedup();
        keep
    }

    fn make_room(&self, sweep: Sweep) {
        let (images, events, keep) = (self.images.clone(), self.events.clone(), self.images_to_keep());
        tokio::spawn(async move { copy::make_room(&images, keep, sweep, &events).await });
    }

    /// From now on VM `id` gets what its image lacks here; with `records`, its boot is learned from. False where there is
    /// nowhere to get it from.
    pub(super) fn supply(&mut self, id: VmId, records: bool) -> bool {
        let Some(vm) = self.vms.get(&id) else { return false };
        let socket = self.journal.vm_dir(id).chunks();
        match Supply::open(&self.images, vm.spec.image, &socket, user::of(id), records) {
            Ok(Some(supply)) => {
                self.supplies.insert(id, supply);
                true
            }
            Ok(None) => false,
            Err(e) => {
                tracing::warn!("VM {} gets nothing that its image lacks: {e}", vm.spec.name);
                false
            }
        }
    }

    fn start(&mut self, id: VmId) {
        let Some(vm) = self.vms.get(&id) else { return };
        let spec = vm.spec.clone();
        let Some(boot) = self.bootable.get(&spec.image).cloned() else { return };
        let dir = self.journal.vm_dir(id);
        // Before the journal says that a start is under way: what lies there from then on is this start's.
        if let Err(e) = files::remove(&dir.exit()) {
            tracing::warn!("{e}");
        }
        let address = match self.address_for(id) {
            Ok(address) => address,
            Err(why) => return self.perform(Action::Refuse(id, why)),
        };
        self.change(id, |vm| {
            vm.step = Step::Starting;
            vm.address = address;
            vm.address_taken = false;
        });
        self.serve_addresses();
        let chunk_wait = self.supply(id, true).then_some(self.config.chunk_wait_seconds);
        let disk_in_memory = host::in_memory(dir.path());
        let mut start = Start {
            spec,
            dir,
            boot,
            store: self.images.store().clone(),
            chunk_wait,
            nic: None,
            vmm: self.config.vmm.clone(),
            cgroups: self.cgroups.clone(),
            disk_in_memory,
        };
        let (network, events) = (self.network.clone(), self.events.clone());
        tokio::spawn(async move {
            let attached = match (network, address) {
                (Some(network), Some(address)) => network.attach(id, start.spec.cpus, address).await.map(Some),
                _ => Ok(None),
            };
            let result = match attached {
                Ok(nic) => {
                    start.nic = nic;
                    start.run().await
                }
                Err(e) => Err(e.into()),
            };
            let _ended = events.send(Event::Started(id, result)).await;
        });
    }

    /// The address of VM `id`: the one it had if that still is one of this network, else a free one.
    fn address_for(&self, id: VmId) -> Result<Option<std::net::Ipv4Addr>, String> {
        let Some(network) = &self.network else { return Ok(None) };
        let network = network.network();
        let held = self.vms.get(&id).and_then(|vm| vm.address).filter(|a| addresses::is_for_vm(network, *a));
        let taken: Vec<_> = self.vms.values().filter(|vm| vm.spec.id != id).filter_map(|vm| vm.address).collect();
        let address = held.filter(|a| !taken.contains(a)).or_else(|| addresses::allocate(network, &taken));
        address.map(Some).ok_or_else(|| {
            format!(
                "every address of the VMs' network {}/{} is taken; give the node a larger one",
                network.address, network.prefix
            )
        })
    }

    fn stop(&mut self, id: VmId, asked: Asked) {
        let Some(process) = self.vms.get(&id).and_then(Vm::process) else { return };
        self.change(id, |vm| vm.step = Step::Stopping { process, asked, since: Millis::now() });
        let socket = self.journal.vm_dir(id).api();
        match asked {
            Asked::Kill => {
                if let Some(watcher) = self.watchers.get(&id) {
                    watcher.watched.kill();
                }
            }
            Asked::Button | Asked::Stop => {
                tokio::spawn(async move {
                    let told = match asked {
                        Asked::Button => api::power_button(&socket).await,
                        _ => api::stop(&socket).await,
                    };
                    if let Err(e) = told {
                        tracing::warn!("VM {id} could not be told to end: {e}");
                    }
                });
            }
        }
    }

    fn remove(&mut self, id: VmId) {
        let address = self.vms.get(&id).and_then(|vm| vm.address);
        self.change(id, |vm| vm.step = Step::Removing);
        self.watchers.remove(&id);
        self.supplies.remove(&id);
        let dir = self.journal.vm_dir(id).path().to_owned();
        let cgroup = self.cgroups.as_ref().map(|c| c.existing(id));
        let (network, events) = (self.network.clone(), self.events.clone());
        tokio::spawn(async move {
            if let Some(network) = network
                && let Err(e) = network.detach(id, address).await
            {
                tracing::warn!("{e}");
            }
            let removed = tokio::task::spawn_blocking(move || {
                if let Some(cgroup) = cgroup {
                    cgroup.remove();
                }
                // Cut short, it leaves a directory that says `Removing`, or one without a specification. A restarted agent
                // ends both.
                files::remove_dir(&dir)
            });
            let result = removed.await.map_err(|e| e.to_string()).and_then(|r| r.map_err(|e| e.to_string()));
            if result.is_err() {
                // The failure leads to another try.
                sleep(REMOVE_AGAIN).await;
            }
            let _ended = events.send(Event::Removed(id, result)).await;
        });
    }

    /// Watches a VM's process; its end is an event.
    pub(super) fn watch(&mut self, id: VmId, watched: process::Watched) {
        let watched = std::sync::Arc::new(watched);
        let (dir, events) = (self.journal.vm_dir(id), self.events.clone());
        let cgroup = self.cgroups.as_ref().map(|c| c.existing(id));
        let watching = watched.clone();
        let task = tokio::spawn(async move {
            let status = watching.ended().await;
            let end = crate::vm::end::read(&dir, status, cgroup.as_ref());
            let _ended = events.send(Event::Ended(id, watching.process(), end)).await;
        });
        self.watchers.insert(id, super::Watcher { watched, _task: AbortOnDropHandle::new(task) });
    }
}
