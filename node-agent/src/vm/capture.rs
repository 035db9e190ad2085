//! A running VM's disk as it is at one moment.
//!
//! The way: the guest's file systems come to rest, where it has an agent → its vCPUs stop → what was written is copied
//! aside → both go on. The copy is in the VM's directory, and while it is there, the guest may be waiting: a restarted agent
//! lets it go on. Devices may still finish what the guest asked for while the copy is made. The guest has not been told so,
//! so the copy is what a power cut could have left; of file systems at rest, all is flushed before.

use std::fs;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bedplate_api::vmm::RunState;
use bedplate_images::disk::{Disk, DiskError};
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep};

use super::api::{self, VmmError};
use super::dir::VmDir;
use super::guest_agent::{GuestAgent, GuestAgentError};
use crate::files::{self, FileError};

/// A guest that stands still for longer than this is missed more than a copy.
const MAX_PAUSE: Duration = Duration::from_secs(300);
/// What did not work is tried again after this long.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a guest's agent is asked to thaw: it may still be freezing, and hears nothing meanwhile.
const MAX_THAW: Duration = Duration::from_secs(120);

/// Why there is no copy.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    /// One at a time.
    #[error("it is being captured already")]
    Busy,
    /// The VMM does not stop its vCPUs.
    #[error("it cannot be paused: {0}")]
    Pause(#[from] VmmError),
    /// It ended, or somebody else let it go on.
    #[error("it did not stand still while its disk was copied: is it running? Try again")]
    Moved,
    /// The copy.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The directory of the copy.
    #[error(transparent)]
    File(#[from] FileError),
    /// Our own step was aborted.
    #[error("the capture was aborted")]
    Aborted,
}

/// A copy, which goes when this is dropped.
#[derive(Debug)]
pub struct Capture {
    /// It.
    pub disk: Disk,
    /// Why the file systems on it are as after a power cut, where they were not brought to rest.
    pub unfrozen: Option<GuestAgentError>,
    _place: Place,
}

/// The directory of a copy.
#[derive(Debug)]
struct Place(VmDir);

impl Place {
    fn make(dir: &VmDir) -> Result<Self, CaptureError> {
        match fs::create_dir(dir.capture()) {
            Ok(()) => Ok(Self(dir.clone())),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Err(CaptureError::Busy),
            Err(e) => Err(FileError::io("create", &dir.capture())(e).into()),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(e) = files::remove_dir(&self.0.capture()) {
            tracing::warn!("the copy of a disk stays behind: {e}");
        }
    }
}

/// Copies the disk of the VM in `dir`, which runs; given up when `unwanted` becomes true. To be awaited to its end: until then
/// the guest may be held.
///
/// # Errors
/// See [`CaptureError`]; the guest goes on then.
pub async fn take(dir: &VmDir, unwanted: Arc<AtomicBool>) -> Result<Capture, CaptureError> {
    let place = Place::make(dir)?;
    let (asked, unfrozen) = freeze(dir).await;
    let copied = paused_copy(dir, unwanted).await;
    go_on(dir, asked).await;
    Ok(Capture { disk: copied?, unfrozen, _place: place })
}

/// Whether the guest's agent was asked to freeze, and why it has not.
async fn freeze(dir: &VmDir) -> (bool, Option<GuestAgentError>) {
    // The connection ends here: an agent serves one at a time, and remembers what it froze.
    match GuestAgent::connect(&dir.vsock()).await {
        Ok(mut agent) => (true, agent.freeze().await.err()),
        Err(why) => (false, Some(why)),
    }
}

async fn paused_copy(dir: &VmDir, unwanted: Arc<AtomicBool>) -> Result<Disk, CaptureError> {
    api::pause(&dir.api()).await?;
    let this = dir.clone();
    let deadline = std::time::Instant::now() + MAX_PAUSE;
    let wanted = move || !unwanted.load(Ordering::Relaxed) && std::time::Instant::now() < deadline;
    let copy = move || Disk::snapshot(&this.disk(), &this.capture().join("disk"), wanted);
    let copied = tokio::task::spawn_blocking(copy).await.map_err(|_| CaptureError::Aborted)??;
    // A VMM that ended meanwhile may have been started anew, and have changed what was being copied.
    match api::state(&dir.api()).await {
        Ok(RunState::Paused) => Ok(copied),
        _ => Err(CaptureError::Moved),
    }
}

/// Lets the guest go on, whatever became of what was asked before: an answer that came too late is no answer. With `thaw`
/// its file systems too. Returns when it goes on, or has ended.
async fn go_on(dir: &VmDir, thaw: bool) {
    while let Err(error) = api::resume(&dir.api()).await {
        // One that says no is not held.
        if matches!(error, VmmError::Refused(_)) || has_ended(dir).await {
            break;
        }
        tracing::warn!("a guest that was held does not go on yet: {error}");
        sleep(AGAIN).await;
    }
    let deadline = Instant::now() + MAX_THAW;
    if !thaw {
        return;
    }
    loop {
        let thawed = match GuestAgent::connect(&dir.vsock()).await {
            Ok(mut agent) => agent.thaw().await,
            Err(error) => Err(error),
        };
        match thawed {
            Ok(()) => return,
            Err(_) if has_ended(dir).await => return,
            Err(error) if Instant::now() > deadline => {
                tracing::error!("a guest's file systems may be frozen, and it has to be told so by hand: {error}");
                return;
            }
            Err(error) => tracing::warn!("a guest's file systems are not thawed yet: {error}"),
        }
        sleep(AGAIN).await;
    }
}

/// Nobody listens where its VMM did.
async fn has_ended(dir: &VmDir) -> bool {
    !files::is_socket(&dir.api()) || UnixStream::connect(dir.api()).await.is_err()
}

/// Ends what an agent that was killed may have begun: the guest of the VM in `dir` goes on, soon. Called before anything
/// can be captured; what was begun is in the way until it is ended.
pub fn abandon(dir: &VmDir) {
    if dir.capture().exists() {
        let place = Place(dir.clone());
        tokio::spawn(async move {
            tracing::info!("a capture was cut short: its guest goes on");
            go_on(&place.0, false).await;
            // Nobody knows any more whether it was frozen; to thaw what is not is harmless. A guest that stood still has not
            // answered before.
            let has_agent = GuestAgent::connect(&place.0.vsock()).await.is_ok();
            go_on(&place.0, has_agent).await;
        });
    }
}
