//! Taking note of what happened: one function per event.

use bedplate_api::error::ErrorKind;
use bedplate_api::node::{Desired, NodeStatus};
use bedplate_api::vmm::ExitReason;
use bedplate_api::{ApiError, Digest, VmId};
use tokio_util::task::AbortOnDropHandle;

use super::model::{End, ImageState, Process, Step};
use super::{Agent, Event, check};
use crate::clock::Millis;
use crate::image::Bootable;
use crate::net::tap;
use crate::net::vms::VmNetwork;
use crate::vm::process::{self, Watched};
use crate::vm::start::StartError;

/// The wait before a network that could not be set up is tried again.
const NETWORK_AGAIN: std::time::Duration = std::time::Duration::from_secs(10);

impl Agent {
    pub(super) async fn handle(&mut self, event: Event) {
        match event {
            Event::Desired(desired, answer) => {
                // Who asked may have gone; what was kept counts all the same.
                let _gone = answer.send(self.take_desired(desired));
            }
            Event::Asked(answer) => {
                let _gone = answer.send(self.desired.clone());
            }
            Event::Network(network, peer) => {
                self.network_wanted = Some((network, peer));
                self.network_named.send_replace(Some(network));
                self.set_up_network().await;
            }
            Event::NetworkAgain => self.set_up_network().await,
            Event::AddressTaken(mac) => self.take_address(mac),
            Event::Bootable(digest, number, bootable) => self.take_bootable(digest, number, bootable),
            Event::Image(digest, number, result) => self.take_image(digest, number, result),
            Event::Swept => self.take_swept(),
            Event::Progress => self.take_progress(),
            Event::Started(id, result) => self.take_started(id, result),
            Event::Ended(id, process, end) => self.take_end(id, process, &end),
            Event::Removed(id, result) => self.take_removed(id, result),
            Event::Leave => {
                tracing::info!("the machine goes down: every VM is stopped");
                self.leaving = true;
            }
        }
    }

    fn take_desired(&mut self, desired: Desired) -> Result<NodeStatus, ApiError> {
        let held = self.desired.generation;
        if desired.generation < held {
            let message = format!("generation {} is older than {held}, which this node works on", desired.generation);
            return Err(ApiError::new(ErrorKind::Conflict, message));
        }
        if desired.generation == held {
            if desired != self.desired {
                let message =
                    format!("generation {held} was handed over before with other VMs; count it up with each change");
                return Err(ApiError::new(ErrorKind::Conflict, message));
            }
            return Ok(self.node_status());
        }
        check(&desired, &self.vms).map_err(|why| ApiError::new(ErrorKind::BadRequest, why))?;
        self.journal.put_desired(&desired).map_err(|e| {
            let kind = if e.is_no_space() { ErrorKind::NoSpace } else { ErrorKind::Internal };
            ApiError::new(kind, e.to_string())
        })?;
        tracing::info!("generation {} asks for {} VMs", desired.generation, desired.vms.len());
        self.desired = desired;
        self.look_at_host();
        Ok(self.node_status())
    }

    /// Sets up the network that is wanted now, whatever was wanted when this try was planned.
    async fn set_up_network(&mut self) {
        let Some((network, peer)) = self.network_wanted else { return };
        self.network_again = None;
        self.network_trouble = None;
        if self.network.as_ref().is_none_or(|held| held.network() != network) {
            // The old one's DHCP server has to let go of its port first.
            self.network = None;
            let (taken, mut takers) = tokio::sync::mpsc::channel(16);
            match VmNetwork::open(self.config.id, network, taken).await {
                Ok(opened) => self.network = Some(std::sync::Arc::new(opened)),
                Err(e) => return self.network_failed(e.to_string()),
            }
            let events = self.events.clone();
            tokio::spawn(async move {
                while let Some(mac) = takers.recv().await {
                    let _ended = events.send(Event::AddressTaken(mac)).await;
                }
            });
            tracing::info!("VMs are on bridge bp0 with {}/{}", network.address, network.prefix);
        }
        if let Some(held) = &self.network {
            let keep = self.vms.keys().copied().collect();
            if let Err(e) = held.sweep(&keep).await {
                tracing::warn!("{e}");
            }
            if let Some(peer) = peer
                && let Err(e) = held.forward_from_peer(peer).await
            {
                tracing::warn!("VMs cannot be reached from other machines: {e}");
            }
        }
        self.reattach().await;
        self.serve_addresses();
        self.look_at_host();
    }

    /// VMs that run already keep their taps; one that was lost meanwhile is made again, though its VM must be restarted
    /// to use it.
    async fn reattach(&self) {
        let Some(network) = &self.network else { return };
        for vm in self.vms.values().filter(|vm| vm.is_active()) {
            if let Some(address) = vm.address
                && let Err(e) = network.attach(vm.spec.id, vm.spec.cpus, address).await
            {
                tracing::warn!("VM {}: {e}", vm.spec.name);
            }
        }
    }

    fn network_failed(&mut self, why: String) {
        tracing::error!("the VMs' network cannot be set up: {why}");
        self.network_trouble = Some(why);
        self.look_at_host();
        let events = self.events.clone();
        let again = tokio::spawn(async move {
            tokio::time::sleep(NETWORK_AGAIN).await;
            let _ended = events.send(Event::NetworkAgain).await;
        });
        self.network_again = Some(AbortOnDropHandle::new(again));
    }

    fn take_address(&mut self, mac: [u8; 6]) {
        let vm = self.vms.values().find(|vm| tap::guest_mac(vm.spec.id) == mac && !vm.address_taken);
        let Some(id) = vm.filter(|vm| vm.is_active()).map(|vm| vm.spec.id) else { return };
        self.change(id, |vm| vm.address_taken = true);
    }

    fn take_bootable(&mut self, digest: Digest, number: u64, bootable: Bootable) {
        let Some(copy) = self.copies.get(&digest).filter(|copy| copy.number == number) else { return };
        tracing::info!("image {} can be started from", digest.short());
        self.bootable.insert(digest, bootable);
        self.states.insert(digest, ImageState::Partial { progress: *copy.progress.borrow(), trouble: None });
    }

    fn take_image(&mut self, digest: Digest, number: u64, result: Result<(), String>) {
        // Dropped meanwhile, and perhaps begun anew: nobody waits for this one.
        if self.copies.get(&digest).is_none_or(|copy| copy.number != number) {
            return;
        }
        self.copies.remove(&digest);
        let state = match result {
            Ok(()) => {
                tracing::info!("image {} is here whole", digest.short());
                if let Err(at) = self.complete.binary_search(&digest) {
                    self.complete.insert(at, digest);
                }
                ImageState::Ready
            }
            Err(detail) => {
                tracing::error!("image {}: {detail}", digest.short());
                ImageState::Failed { detail, generation: self.desired.generation }
            }
        };
        self.states.insert(digest, state);
    }

    /// What was removed is no longer ready; who asks for it again gets it copied again.
    fn take_swept(&mut self) {
        match self.images.complete() {
            Ok(complete) => self.complete = complete,
            Err(e) => return tracing::warn!("{e}"),
        }
        if !self.images.has_source() {
            return;
        }
        let complete = &self.complete;
        self.states.retain(|digest, state| *state != ImageState::Ready || complete.binary_search(digest).is_ok());
        let states = &self.states;
        self.bootable.retain(|digest, _| {
            let partial = matches!(states.get(digest), Some(ImageState::Partial { .. }));
            partial || complete.binary_search(digest).is_ok()
        });
    }

    fn take_progress(&mut self) {
        for (digest, copy) in &self.copies {
            let (progress, trouble) = (*copy.progress.borrow(), copy.trouble.borrow().clone());
            let state = match self.states.get(digest) {
                Some(ImageState::Partial { .. }) => ImageState::Partial { progress, trouble },
                _ => ImageState::Copying { progress, trouble },
            };
            self.states.insert(*digest, state);
        }
    }

    fn take_started(&mut self, id: VmId, result: Result<Watched, StartError>) {
        let now = Millis::now();
        match result {
            Ok(watched) => {
                let process = watched.process();
                tracing::info!("VM {id} runs as process {}", process.pid);
                self.change(id, |vm| {
                    vm.step = Step::Running { process, since: process::started_at(process) };
                    vm.detail = None;
                });
                self.watch(id, watched);
            }
            // It ran, and had ended by itself before anybody looked.
            Err(StartError::Ended(end)) if end.reason != ExitReason::HostFault => {
                tracing::info!("VM {id} has ended at once: {}", end.detail);
                self.supplies.remove(&id);
                self.change(id, |vm| vm.ended(&end, 0, now));
            }
            Err(error) => {
                tracing::warn!("VM {id} was not started: {error}");
                self.supplies.remove(&id);
                self.doubt_image(id);
                self.change(id, |vm| vm.start_failed(error.to_string(), now));
            }
        }
    }

    fn take_end(&mut self, id: VmId, process: Process, end: &End) {
        let now = Millis::now();
        // An earlier process of the same VM is no news.
        let Some(vm) = self.vms.get(&id).filter(|vm| vm.process() == Some(process)) else { return };
        let level_is_calm =
            matches!(end.reason, ExitReason::GuestPowerOff | ExitReason::GuestReset | ExitReason::Stopped);
        if level_is_calm {
            tracing::info!("VM {} has ended: {}", vm.spec.name, end.detail);
        } else {
            tracing::warn!("VM {} has ended: {}", vm.spec.name, end.detail);
        }
        if end.reason == ExitReason::HostFault {
            self.doubt_image(id);
        }
        self.watchers.remove(&id);
        self.supplies.remove(&id);
        let ran = now.since(process::started_at(process));
        self.change(id, |vm| vm.ended(end, ran, now));
    }

    /// The image of VM `id` may be damaged here: the next start makes sure of it first. That is quick where it is whole,
    /// and a chunk that was found to be damaged counts as missing and is copied again.
    fn doubt_image(&mut self, id: VmId) {
        let Some(image) = self.vms.get(&id).map(|vm| vm.spec.image) else { return };
        if self.states.get(&image) == Some(&ImageState::Ready) {
            self.states.remove(&image);
            self.bootable.remove(&image);
        }
    }

    fn take_removed(&mut self, id: VmId, result: Result<(), String>) {
        match result {
            Ok(()) => {
                tracing::info!("VM {id} is removed");
                self.vms.remove(&id);
                self.serve_addresses();
            }
            Err(why) => {
                tracing::error!("VM {id} cannot be removed: {why}");
                self.change(id, |vm| {
                    vm.step = Step::Off;
                    vm.detail = Some(why);
                });
            }
        }
    }
}
