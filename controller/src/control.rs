//! The control node's shared parts, and the two ways to its memory for async code.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bedplate_api::Digest;
use bedplate_api::image::Swept;
use bedplate_api::node::Ipv4Net;
use tokio::sync::Notify;

use crate::netboot::files::Written;
use crate::observed::Observed;
use crate::planner::{Node, World};
use crate::records::NodeRecord;
use crate::sharing::Sharing;
use crate::shelf::Shelf;
use crate::store::{Change, FAILURES, NODES, Read, Snapshot, Store, StoreError, TIERS, VMS};

/// How a control node is set up; see `bedplate-control --help` for each.
#[derive(Debug, Clone)]
pub struct Options {
    /// State directory.
    pub state: PathBuf,
    /// Where nodes reach this control node, if they do.
    pub node_listen: Option<SocketAddr>,
    /// Interface of the provisioning network, where blank machines are booted.
    pub netboot: Option<String>,
    /// Addresses for machines on the provisioning network.
    pub node_network: Ipv4Net,
    /// Where the nodes' VM networks are taken from.
    pub vm_network: Ipv4Net,
    /// Tag of the image that blank machines boot.
    pub vmm_image: String,
    /// Slots that a machine booted from here is told to provide.
    pub slots_per_node: u32,
    /// Added to the kernel command line of such a machine.
    pub node_cmdline: String,
    /// Seconds that a machine may take from its boot script to its registration.
    pub boot_deadline: u64,
    /// Seconds that a node may be silent.
    pub lost_after: u64,
}

/// Why no garbage was collected.
#[derive(Debug, thiserror::Error)]
pub enum GarbageError {
    /// The images cannot be gone through, or are being used.
    #[error(transparent)]
    Images(#[from] bedplate_images::StoreError),
    /// Nobody can say what is needed.
    #[error(transparent)]
    Records(#[from] StoreError),
}

/// The control node. Shared by the HTTP handlers, the executor, the pushes and the boot service.
pub struct Control {
    /// How it was set up.
    pub options: Options,
    /// The image repository.
    pub images: bedplate_images::Store,
    /// The registry's files beside it.
    pub shelf: Shelf,
    /// What nodes reported to this process.
    pub observed: Observed,
    /// Which node has which chunk.
    pub sharing: Sharing,
    /// Shown by nodes to us and by us to nodes.
    pub token: String,
    /// Where machines that boot reach us, once netboot has found out.
    pub boot_address: OnceLock<SocketAddr>,
    /// The image whose files machines fetch.
    pub boot_files: Written,
    said: Mutex<BTreeMap<String, String>>,
    store: Store,
    plan: Notify,
    push: Notify,
    routes: Notify,
}

impl Control {
    /// Puts the parts together; makes the nodes' token at the first start.
    pub fn new(options: Options, store: Store, images: bedplate_images::Store) -> Result<Arc<Self>, StoreError> {
        let token = store.change(|change| match change.setting("token")?.as_ref().and_then(|t| t.as_str()) {
            Some(token) => Ok::<_, StoreError>(token.to_owned()),
            None => {
                let token = random_token();
                change.set("token", &token.as_str().into())?;
                Ok(token)
            }
        })?;
        Ok(Arc::new(Self {
            shelf: Shelf::new(options.state.join("oci"), images.clone()),
            options,
            images,
            observed: Observed::default(),
            sharing: Sharing::default(),
            token,
            boot_address: OnceLock::new(),
            boot_files: Written::default(),
            said: Mutex::default(),
            store,
            plan: Notify::new(),
            push: Notify::new(),
            routes: Notify::new(),
        }))
    }

    /// Reads on a thread that may block.
    pub async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        act: impl FnOnce(&Snapshot) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let control = Arc::clone(self);
        blocking(move || control.store.read(act)).await
    }

    /// Changes in one transaction, on a thread that may block. Whatever reads the store is woken by the caller.
    pub async fn change<T: Send + 'static, E: From<StoreError> + Send + 'static>(
        self: &Arc<Self>,
        act: impl FnOnce(&Change) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E> {
        let control = Arc::clone(self);
        blocking(move || control.store.change(act)).await
    }

    /// Removes images, and parts of images, that no name, no tier and no VM needs and that are older than `grace`.
    ///
    /// # Errors
    /// An image is being taken into use, or something that is needed cannot be read: then nothing was removed.
    pub async fn collect_garbage(self: &Arc<Self>, grace: Duration) -> Result<Swept, GarbageError> {
        let control = Arc::clone(self);
        blocking(move || control.images.gc_with(grace, || Ok(control.store.read(images_in_use)?))).await
    }

    /// Appends to the log of decisions. A log that cannot be written must not stop what it tells of.
    pub async fn event(self: &Arc<Self>, subject: impl ToString, message: impl Into<String>) {
        let (subject, message) = (subject.to_string(), message.into());
        if let Err(error) = self.change(move |change| change.event(now(), subject, message)).await {
            tracing::error!("an event is lost: {error}");
        }
    }

    /// The same, but nothing where this was the last that was said in this way about `subject`: for what a machine does
    /// again and again.
    pub async fn event_once(self: &Arc<Self>, subject: impl ToString, message: impl Into<String>) {
        let (subject, message) = (subject.to_string(), message.into());
        let before = {
            let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
            said.insert(subject.clone(), message.clone())
        };
        if before.as_ref() != Some(&message) {
            self.event(subject, message).await;
        }
    }

    /// Something that a plan depends on has changed.
    pub fn wake_planner(&self) {
        self.plan.notify_one();
    }

    /// A desired set has changed, or a node is behind.
    pub fn wake_pushes(&self) {
        self.push.notify_one();
    }

    /// A node has registered.
    pub fn wake_routes(&self) {
        self.routes.notify_one();
    }

    /// Completes when a plan should be made.
    pub async fn planner_woken(&self) {
        self.plan.notified().await;
    }

    /// Completes when desired sets should be looked through.
    pub async fn pushes_woken(&self) {
        self.push.notified().await;
    }

    /// Completes when routes should be looked through.
    pub async fn routes_woken(&self) {
        self.routes.notified().await;
    }

    /// Everything that a plan depends on, as of now.
    pub fn world(&self, read: &impl Read) -> Result<World, StoreError> {
        let now = now();
        let node = |record: NodeRecord| Node {
            report: self.observed.report(record.number),
            silent: self.observed.silent(record.number).as_secs(),
            booting: record.booting_since.map(|since| now.saturating_sub(since)),
            record,
        };
        Ok(World {
            tiers: read.all(&TIERS)?,
            nodes: read.all(&NODES)?.into_iter().map(node).collect(),
            assignments: read.all(&VMS)?,
            failures: read
                .all(&FAILURES)?
                .into_iter()
                .map(|f| (now.saturating_sub(f.at), f))
                .map(|(s, f)| (f, s))
                .collect(),
            lost_after: self.options.lost_after,
            boot_deadline: self.options.boot_deadline,
        })
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

/// Runs `act` on a thread that may block.
pub async fn blocking<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(act).await {
        Ok(answer) => answer,
        // It is never cancelled, so it has panicked; that goes on here.
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

pub(crate) fn random_token() -> String {
    let mut bytes = [0; 32];
    // Only a kernel without the system call fails here, and such a one does not run this program.
    if let Err(error) = getrandom::fill(&mut bytes) {
        panic!("the kernel gives no random bytes: {error}");
    }
    bedplate_api::Digest::from_bytes(bytes).hex()
}

/// What tiers will boot, and what nodes boot now or may still ask for.
fn images_in_use(read: &Snapshot) -> Result<Vec<Digest>, StoreError> {
    let tiers = read.all(&TIERS)?.into_iter().map(|tier| tier.digest);
    let vms = read.all(&VMS)?.into_iter().map(|assignment| assignment.vm.image);
    Ok(tiers.chain(vms).collect())
}
