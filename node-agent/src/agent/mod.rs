//! The agent: makes what runs here what shall run here.
//!
//! Way through the house: node server → [`Agent`] → [`decide`] → `vm` or `image` → VM process. One task owns all state
//! and takes events one by one; after each it decides, and does what was decided. What takes long runs in a task of its
//! own, whose end is an event. Every change of a VM is journalled before and after it is made.

mod copy;
pub mod decide;
mod events;
pub mod journal;
pub mod model;
mod perform;
pub mod recover;
mod setup;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use bedplate_api::node::{Desired, Ipv4Net, NodeStatus, Power};
use bedplate_api::{ApiError, Digest, NodeId, VmId};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Duration, sleep};
use tokio_util::task::AbortOnDropHandle;

use crate::clock::Millis;
use crate::host;
use crate::image::supply::Supply;
use crate::image::{Bootable, Images};
use crate::net::tap;
use crate::net::vms::VmNetwork;
use crate::vm::cgroup::Cgroups;
use crate::vm::process::Watched;
use crate::vm::start::StartError;
use decide::{Host, World, decide};
use journal::Journal;
use model::{End, ImageState, Process, Vm};

pub use setup::SetupError;

/// Decisions in a row without an event between them. Each changes a state that leads to the next; more than this means
/// that two rules undo each other.
const MAX_ROUNDS: usize = 64;

/// How an agent was configured.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// The state directory.
    pub state: PathBuf,
    /// This node.
    pub id: NodeId,
    /// The VMM's program.
    pub vmm: PathBuf,
    /// How many VMs to provide.
    pub slots: u32,
    /// A network of VMs will be named, by the control node if not at the start, so that VMs must wait for it.
    pub network_follows: bool,
    /// Milliseconds that a guest gets to power off.
    pub button_millis: u64,
    /// Seconds that a guest's request waits for what the image lacks.
    pub chunk_wait_seconds: u32,
}

/// What happens to an agent.
#[derive(Debug)]
pub enum Event {
    /// Somebody says what shall run here. Answered once it is kept.
    Desired(Desired, oneshot::Sender<Result<NodeStatus, ApiError>>),
    /// Somebody asks what was asked for last.
    Asked(oneshot::Sender<Desired>),
    /// The network of VMs is known; the address is the control node's, if that named it.
    Network(Ipv4Net, Option<std::net::SocketAddr>),
    /// The network that is wanted could not be set up a while ago.
    NetworkAgain,
    /// The guest with this MAC address has taken its address.
    AddressTaken([u8; 6]),
    /// The copy with this number has got what a start needs; the rest follows.
    Bootable(Digest, u64, Bootable),
    /// The copy with this number has ended: its image is here whole, or cannot be had.
    Image(Digest, u64, Result<(), String>),
    /// The copy of an image has moved on, or is held up.
    Progress,
    /// Images may have been removed to make room.
    Swept,
    /// A VM's vCPUs run, or it was not started.
    Started(VmId, Result<Watched, StartError>),
    /// A VM's process has ended.
    Ended(VmId, Process, End),
    /// A VM's files are gone.
    Removed(VmId, Result<(), String>),
    /// The machine goes down: stop every VM, then end.
    Leave,
}

/// A handle to a running agent. Cheap to clone.
#[derive(Debug, Clone)]
pub struct AgentHandle {
    events: mpsc::Sender<Event>,
    status: watch::Receiver<Arc<NodeStatus>>,
    network: watch::Receiver<Option<Ipv4Net>>,
    journal: Journal,
}

impl AgentHandle {
    /// Hands an event to the agent. Lost when the agent has ended, as is everything then.
    pub async fn send(&self, event: Event) {
        // Whoever waits for an answer notices by the answer's channel.
        let _ended = self.events.send(event).await;
    }

    /// The node's status now.
    pub fn status(&self) -> Arc<NodeStatus> {
        self.status.borrow().clone()
    }

    /// Follows the node's status.
    pub fn watch(&self) -> watch::Receiver<Arc<NodeStatus>> {
        self.status.clone()
    }

    /// Follows the network of VMs that was named last.
    pub fn network(&self) -> watch::Receiver<Option<Ipv4Net>> {
        self.network.clone()
    }

    /// The directory of VM `id`.
    pub fn vm_dir(&self, id: VmId) -> crate::vm::dir::VmDir {
        self.journal.vm_dir(id)
    }
}

/// A copy under way.
struct Copy {
    /// An earlier copy of the same image may still be heard of.
    number: u64,
    progress: watch::Receiver<Option<bedplate_api::node::CopyProgress>>,
    trouble: watch::Receiver<Option<String>>,
    _task: AbortOnDropHandle<()>,
}

/// See the module.
pub struct Agent {
    config: AgentConfig,
    journal: Journal,
    boot_id: String,
    images: Images,
    cgroups: Option<Cgroups>,
    desired: Desired,
    host: Host,
    vms: BTreeMap<VmId, Vm>,
    states: BTreeMap<Digest, ImageState>,
    bootable: BTreeMap<Digest, Bootable>,
    complete: Vec<Digest>,
    copies: BTreeMap<Digest, Copy>,
    /// Copies begun so far.
    copies_begun: u64,
    /// The watchers of VM processes.
    watchers: BTreeMap<VmId, Watcher>,
    /// Who gets VMs that run what their images lack.
    supplies: BTreeMap<VmId, Supply>,
    network: Option<Arc<VmNetwork>>,
    /// The network that was named last, and the control node's address.
    network_wanted: Option<(Ipv4Net, Option<std::net::SocketAddr>)>,
    /// Why that could not be set up, while it could not.
    network_trouble: Option<String>,
    /// Waits to try again.
    network_again: Option<AbortOnDropHandle<()>>,
    leaving: bool,
    events: mpsc::Sender<Event>,
    inbox: mpsc::Receiver<Event>,
    status: watch::Sender<Arc<NodeStatus>>,
    /// Who serves must know guests from others.
    network_named: watch::Sender<Option<Ipv4Net>>,
    /// The state directory is locked while this lives.
    _lock: std::fs::File,
}

/// One VM process that is watched.
struct Watcher {
    watched: Arc<Watched>,
    _task: AbortOnDropHandle<()>,
}

impl Agent {
    /// Runs until the machine goes down and every VM has ended.
    pub async fn run(mut self) {
        loop {
            let wake = self.settle();
            self.publish();
            if self.leaving && !self.vms.values().any(Vm::is_active) {
                return;
            }
            let due = async {
                match wake {
                    Some(at) => sleep(Duration::from_millis(at.since(Millis::now()))).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // The agent holds a sender itself, so that there is always a next event.
                Some(event) = self.inbox.recv() => self.handle(event).await,
                () = due => {}
            }
        }
    }

    /// Decides and acts until there is nothing left to do now. Returns when to decide again.
    fn settle(&mut self) -> Option<Millis> {
        for _ in 0..MAX_ROUNDS {
            let decision = decide(&World {
                desired: &self.desired,
                vms: &self.vms,
                images: &self.states,
                complete: &self.complete,
                host: &self.host,
                now: Millis::now(),
                leaving: self.leaving,
            });
            if decision.actions.is_empty() {
                return decision.wake;
            }
            for action in decision.actions {
                self.perform(action);
            }
        }
        tracing::error!("decisions do not come to rest; the next try is in a second");
        Some(Millis::now().plus(1_000))
    }

    fn node_status(&self) -> NodeStatus {
        let vms = self.vms.values().map(|vm| vm.status(self.states.get(&vm.spec.image)));
        NodeStatus {
            id: self.config.id,
            boot_id: self.boot_id.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            generation: self.desired.generation,
            capacity: host::capacity(&self.config.state, self.config.slots),
            vms: vms.collect(),
            images: self.complete.clone(),
        }
    }

    fn publish(&self) {
        let status = self.node_status();
        self.status.send_if_modified(|held| {
            // Free space moves all the time; it is told with the next change or report.
            let mut same_space = status.clone();
            same_space.capacity.disk_free = held.capacity.disk_free;
            let changed = **held != same_space;
            *held = Arc::new(status);
            changed
        });
    }

    /// Journals VM `id` as it is now.
    fn keep(&self, id: VmId) {
        let Some(vm) = self.vms.get(&id) else { return };
        if let Err(e) = self.journal.put_state(vm) {
            // Going on is right: a VM that runs shall not end because a disk is full, and a restarted agent finds its
            // process all the same.
            tracing::error!("the journal of VM {} could not be written: {e}", vm.spec.name);
        }
    }

    /// Tells the DHCP server about the VMs as they are now.
    fn serve_addresses(&self) {
        if let Some(network) = &self.network {
            let known = self.vms.values().filter_map(|vm| Some((vm.spec.id, vm.spec.name.clone(), vm.address?)));
            network.serve(known);
        }
    }

    /// What there is to run VMs on may have changed: somebody may have loaded a module.
    fn look_at_host(&mut self) {
        self.host.obstacle = host::obstacle(&self.config.vmm);
        self.host.not_yet = match (&self.network, &self.network_trouble) {
            (Some(_), _) => None,
            (None, Some(why)) => Some(format!("the VMs' network cannot be set up: {why}")),
            (None, None) if self.config.network_follows => {
                Some("waits for the control node to name the VMs' network".to_owned())
            }
            (None, None) => None,
        };
    }
}

/// Refuses what can never be made so, before it is kept.
fn check(desired: &Desired, vms: &BTreeMap<VmId, Vm>) -> Result<(), String> {
    // Others keep it in signed numbers.
    if i64::try_from(desired.generation).is_err() {
        return Err(format!("generation {} is too large; count generations up by one", desired.generation));
    }
    check_ids(desired, vms)?;
    let mut ids = std::collections::BTreeSet::new();
    let mut names = std::collections::BTreeSet::new();
    for spec in &desired.vms {
        let name = &spec.name;
        if !is_host_name(name) {
            return Err(format!(
                "{name:?} is not a name for a VM: use 1 to 63 letters, digits and hyphens, no hyphen at an end"
            ));
        }
        if !ids.insert(spec.id) {
            return Err(format!("VM {name} has the id {} of another one", spec.id));
        }
        if !names.insert(name) && spec.power == Power::Running {
            return Err(format!("two VMs are called {name}; names must differ"));
        }
        if !(1..=8).contains(&spec.cpus) {
            return Err(format!("VM {name} asks for {} vCPUs; 1 to 8 can be given", spec.cpus));
        }
        if !(16..=1 << 20).contains(&spec.memory_mib) {
            return Err(format!("VM {name} asks for {} MiB of RAM; 16 to {} can be given", spec.memory_mib, 1 << 20));
        }
        if spec.cmdline.len() > 1024 || spec.cmdline.chars().any(char::is_control) {
            return Err(format!(
                "VM {name} has a command line that is longer than 1024 bytes or holds control characters"
            ));
        }
        if let Some(vm) = vms.get(&spec.id)
            && (vm.spec.image != spec.image || vm.spec.disk != spec.disk)
        {
            return Err(format!("VM {name} cannot get another image or kind of disk; make a new VM with a new id"));
        }
    }
    Ok(())
}

/// Names of taps and guests' MAC addresses are made of the first digits of ids, which must differ therefore, also from
/// those of VMs that are on their way out.
fn check_ids(desired: &Desired, vms: &BTreeMap<VmId, Vm>) -> Result<(), String> {
    let mut taps: BTreeMap<String, VmId> = vms.keys().map(|id| (tap::name(*id), *id)).collect();
    let mut macs: BTreeMap<[u8; 6], VmId> = vms.keys().map(|id| (tap::guest_mac(*id), *id)).collect();
    for spec in &desired.vms {
        let by_tap = taps.insert(tap::name(spec.id), spec.id);
        let by_mac = macs.insert(tap::guest_mac(spec.id), spec.id);
        if let Some(other) = by_tap.or(by_mac).filter(|other| *other != spec.id) {
            return Err(format!(
                "VM {} has an id that begins like {other}'s, so that both would have the same network interface; \
                 give it a random id",
                spec.name
            ));
        }
    }
    Ok(())
}

fn is_host_name(name: &str) -> bool {
    let bytes = name.as_bytes();
    let ends_well = |b: Option<&u8>| b.is_some_and(u8::is_ascii_alphanumeric);
    bytes.len() <= 63
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'-')
        && ends_well(bytes.first())
        && ends_well(bytes.last())
}

#[cfg(test)]
mod tests;
