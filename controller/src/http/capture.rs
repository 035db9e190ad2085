//! `POST /v1/vms/{name}/capture`: a running VM's disk becomes an image of this repository.
//!
//! The way: the VM's node copies what was written to the disk while the guest stands still → that comes here, where the
//! image is whole → [`bedplate_images::capture`]. Who asked hears of each step, and hanging up ends it: what was made so
//! far lies in a scratch directory, which goes.

use std::convert::Infallible;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body as Stream;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bedplate_api::client::Client;
use bedplate_api::control::{Capture, CapturePhase, CaptureStep, Captured, LeftTrace};
use bedplate_api::error::ErrorKind;
use bedplate_images::capture::{CaptureError, Request};
use bedplate_images::disk::{Disk, ReceiveError};
use bedplate_images::store::is_tag_name;
use bytes::Bytes;
use futures_util::stream;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;
use tokio_util::io::{StreamReader, SyncIoBridge};

use super::Shared;
use super::answer::{Body, Path, Refusal};
use super::vms::{Found, find};
use crate::control::{Control, blocking};

/// Each takes the space of a whole disk, and both processors of a small machine.
static ONE: Semaphore = Semaphore::const_new(1);
/// Longest silence of a node: while it copies the disk it has nothing to say.
const PATIENCE: Duration = Duration::from_secs(600);
/// The last step is said again after this long, so that who listens knows that we are there.
const HEARTBEAT: Duration = Duration::from_secs(5);

type Steps = mpsc::Sender<CaptureStep>;

/// The handler.
pub async fn capture(
    State(control): Shared,
    Path(name): Path<String>,
    Body(request): Body<Capture>,
) -> Result<Response, Refusal> {
    if !is_tag_name(&request.image) {
        let message = format!("{:?} is not a name for an image", request.image.chars().take(140).collect::<String>());
        return Err(Refusal::new(ErrorKind::BadRequest, message));
    }
    let found = find(&control, name).await?;
    let (steps, listener) = mpsc::channel(16);
    tokio::spawn(async move {
        let left = steps.clone();
        tokio::select! {
            step = run(&control, found, request, steps) => drop(left.send(step).await),
            // Nobody listens. What is on a thread of its own notices by itself.
            () = left.closed() => {}
        }
    });
    let last = CaptureStep::Progress { phase: CapturePhase::Snapshot, done: 0, total: 0 };
    let lines = stream::unfold((listener, last), async |(mut listener, last)| {
        let step = match timeout(HEARTBEAT, listener.recv()).await {
            Ok(step) => step?,
            Err(_) => last,
        };
        let mut line = serde_json::to_vec(&step).unwrap_or_default();
        line.push(b'\n');
        Some((Ok::<_, Infallible>(Bytes::from(line)), (listener, step)))
    });
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], Stream::from_stream(lines)).into_response())
}

async fn run(control: &Arc<Control>, found: Found, request: Capture, steps: Steps) -> CaptureStep {
    match make(control, found, request, steps).await {
        Ok(captured) => CaptureStep::Captured(captured),
        Err(Refusal(error)) => CaptureStep::Failed(error),
    }
}

async fn make(control: &Arc<Control>, found: Found, request: Capture, steps: Steps) -> Result<Captured, Refusal> {
    let one = ONE.acquire().await;
    let Found { name, id, image, endpoint } = found;
    let client = Client::patient(endpoint, Some(control.token.clone()), PATIENCE)?;
    let (unfrozen, disk) = client.node_vm_capture(id).await?;
    let mut disk = SyncIoBridge::new(StreamReader::new(disk));
    let (shared, at_rest) = (Arc::clone(control), unfrozen.is_none());
    let (tag, vm) = (request.image.clone(), name.clone());
    let (imported, report, summary) = blocking(move || {
        // Until this thread has ended, also when nobody waits for it any more.
        let _one = one;
        let scratch = shared.images.scratch()?;
        let mut tell = |phase, done, total| tell(&steps, phase, done, total);
        let dir = scratch.path().join("disk");
        let mut disk = Disk::receive(&mut disk, &dir, &shared.images, &image, &mut |done, total| {
            tell(CapturePhase::Fetch, done, total)
        })?;
        let keep_identity = request.keep_identity;
        let request = Request { tag: &request.image, captured_from: &name, at_rest, keep_identity };
        let (imported, report) =
            bedplate_images::capture::capture(&shared.images, &mut disk, scratch.path(), request, &mut tell)?;
        let summary = shared.images.summary(request.tag)?;
        Ok::<_, Refusal>((imported, report, summary))
    })
    .await?;
    control.event(&tag, format!("image {tag} is {} now, captured from {vm}", summary.digest)).await;
    let left = report.left.into_iter().map(|left| LeftTrace { trace: left.trace, why: left.why }).collect();
    let (removed, mut notes) = (report.removed, report.notes);
    notes.extend(imported.report);
    let (chunks, reused) = (imported.chunks, imported.reused);
    Ok(Captured { image: summary, unfrozen, removed, left, notes, chunks, reused })
}

/// Says how far it is; a step that nobody has taken yet is enough.
fn tell(steps: &Steps, phase: CapturePhase, done: u64, total: u64) -> ControlFlow<()> {
    match steps.try_send(CaptureStep::Progress { phase, done, total }) {
        Err(mpsc::error::TrySendError::Closed(_)) => ControlFlow::Break(()),
        Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => ControlFlow::Continue(()),
    }
}

impl From<CaptureError> for Refusal {
    fn from(error: CaptureError) -> Self {
        let kind = match &error {
            error if error.is_full() => ErrorKind::NoSpace,
            CaptureError::Identity(_) => ErrorKind::BadRequest,
            CaptureError::Stopped => ErrorKind::Conflict,
            _ => ErrorKind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<ReceiveError> for Refusal {
    fn from(error: ReceiveError) -> Self {
        let kind = match &error {
            ReceiveError::Disk(error) if error.is_full() => ErrorKind::NoSpace,
            ReceiveError::Disk(_) => ErrorKind::Internal,
            _ => ErrorKind::Unavailable,
        };
        Self::new(kind, error.to_string())
    }
}
