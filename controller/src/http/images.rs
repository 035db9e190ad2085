//! The repository: what [`bedplate_api::image`] describes, over the image store. Chunks pass through one by one, so an
//! image of any size takes a bounded amount of memory here.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body as Stream;
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use bedplate_api::client::{FrameError, Frames, append_frame};
use bedplate_api::error::ErrorKind;
use bedplate_api::image::{
    BootOrder, ChunkList, FRAME_HEADER_LEN, ImageKind, ImageSummary, MAX_BLOB_LEN, MAX_BOOT_ORDER, MAX_CHUNK_LIST,
    MAX_FRAME_LEN, Sweep, Swept, Tag,
};
use bedplate_api::{ApiError, Digest};
use bedplate_images::trust::TrustError;
use bedplate_images::{Store, StoreError};
use bytes::Bytes;
use futures_util::stream;
use tokio::sync::{Semaphore, mpsc};

use super::Shared;
use super::answer::{Body, Path, Refusal, whole};
use crate::control::{Control, GarbageError, blocking};

/// An index is held in memory until its digest is known. One at a time, because one may have [`MAX_BLOB_LEN`] bytes.
static LARGE_BODY: Semaphore = Semaphore::const_new(1);
/// Who has chunks verified here, one at a time.
static CHECKING: Semaphore = Semaphore::const_new(1);
/// Frames are read and sent together up to about so many bytes: with a piece for each, waking the other thread took a
/// good part of the time. Not more, so that they are in the processor's cache still when they are sent.
const PIECE: usize = 192 << 10;
/// Pieces read ahead of the network.
const READ_AHEAD: usize = 2;

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        use StoreError as E;
        let kind = match &error {
            E::TagName(_) | E::Ambiguous { .. } | E::BlobRefused { .. } | E::FrameRefused { .. } => {
                ErrorKind::BadRequest
            }
            E::Manifest { .. } | E::Index { .. } | E::IndexSize { .. } | E::ChunkLength { .. } => ErrorKind::BadRequest,
            E::TagMissing { .. } | E::BlobMissing { .. } | E::ChunkMissing { .. } => ErrorKind::NotFound,
            // Damaged content was set aside, so it is not there any more.
            E::BlobCorrupt { .. } | E::ChunkCorrupt { .. } => ErrorKind::NotFound,
            E::Incomplete { .. } => ErrorKind::Conflict,
            E::Busy { .. } => ErrorKind::Unavailable,
            error if error.is_full() => ErrorKind::NoSpace,
            _ => ErrorKind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<TrustError> for Refusal {
    fn from(error: TrustError) -> Self {
        match error {
            TrustError::Store(error) => error.into(),
            error @ TrustError::NotAKey { .. } => Self::new(ErrorKind::Internal, error.to_string()),
            error => Self::new(ErrorKind::BadRequest, error.to_string()),
        }
    }
}

impl From<GarbageError> for Refusal {
    fn from(error: GarbageError) -> Self {
        match error {
            GarbageError::Images(error) => error.into(),
            GarbageError::Records(error) => error.into(),
        }
    }
}

async fn ask<T: Send + 'static>(
    control: &Arc<Control>,
    act: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Refusal> {
    let images = control.images.clone();
    Ok(blocking(move || act(&images)).await?)
}

/// The digest of an image that a tier can boot, or why `name` is none. The caller holds a lease of the images until the
/// tier is kept: the name may go meanwhile, and with it what kept the image.
pub async fn bootable_disk(control: &Arc<Control>, name: &str) -> Result<Digest, Refusal> {
    let asked = name.to_owned();
    let summary = ask(control, move |images| images.summary(&asked)).await.map_err(|refusal| match refusal.0.kind {
        // The tier is not what was not found.
        ErrorKind::NotFound => {
            Refusal::new(ErrorKind::BadRequest, format!("image {name:?} cannot be used: {}", refusal.0))
        }
        _ => refusal,
    })?;
    let unusable =
        |why: &str| Err(Refusal::new(ErrorKind::BadRequest, format!("image {name:?} cannot be used: {why}")));
    match summary {
        ImageSummary { kind: ImageKind::Vmm, .. } => {
            unusable("it is of kind \"vmm\", a tier needs one of kind \"disk\"")
        }
        ImageSummary { kind: ImageKind::Suspended, .. } => {
            unusable("it is of kind \"suspended\", a tier needs one of kind \"disk\"")
        }
        ImageSummary { direct_boot: false, firmware: Some(_), .. } => unusable(
            "it starts by its own boot loader under firmware, and VMs here are started from a kernel, which was not found in it",
        ),
        ImageSummary { direct_boot: false, .. } => {
            unusable("no kernel was found in it when it was imported, so there is no way to start it")
        }
        ImageSummary { digest, .. } => {
            let images = control.images.clone();
            blocking(move || images.check_trust(&digest)).await?;
            Ok(digest)
        }
    }
}

/// `GET /v1/images`.
pub async fn list(State(control): Shared) -> Result<Json<Vec<ImageSummary>>, Refusal> {
    // One that is damaged must not hide the others; who asks for it by name is told what is wrong.
    let summary = |images: &Store, name: &str| {
        images.summary(name).inspect_err(|error| tracing::error!("image {name}: {error}")).ok()
    };
    let list = move |images: &Store| {
        let tags = images.each_tag()?;
        Ok(tags.iter().filter_map(|(name, _)| summary(images, name)).collect())
    };
    Ok(Json(ask(&control, list).await?))
}

/// `GET /v1/images/{name}`.
pub async fn show(State(control): Shared, Path(name): Path<String>) -> Result<Json<ImageSummary>, Refusal> {
    Ok(Json(ask(&control, move |images| images.summary(&name)).await?))
}

/// `PUT /v1/images/{name}`.
pub async fn tag(
    State(control): Shared,
    Path(name): Path<String>,
    Body(tag): Body<Tag>,
) -> Result<Json<ImageSummary>, Refusal> {
    let asked = name.clone();
    let (summary, changed) = ask(&control, move |images| {
        let before = images.tag(&asked).ok();
        if let Some(signature) = &tag.signature {
            // It is of a manifest that must be there.
            images.manifest(&tag.digest)?;
            if let Err(error) = images.put_signature(&tag.digest, signature) {
                return Ok(Err(error));
            }
        }
        images.set_tag(&asked, &tag.digest)?;
        Ok(Ok((images.summary(&asked)?, before != Some(tag.digest))))
    })
    .await??;
    if changed {
        control.event(&name, format!("image {name} is {} now", summary.digest)).await;
    }
    Ok(Json(summary))
}

/// `GET /v1/signatures/{digest}`.
pub async fn signature(State(control): Shared, Path(name): Path<String>) -> Result<String, Refusal> {
    let digest = digest(&name)?;
    let text = ask(&control, move |images| images.signature(&digest)).await?;
    text.ok_or_else(|| Refusal::new(ErrorKind::NotFound, format!("image {digest} is not signed")))
}

/// `GET /v1/orders/{digest}`.
pub async fn boot_order(State(control): Shared, Path(name): Path<String>) -> Result<Json<BootOrder>, Refusal> {
    let digest = digest(&name)?;
    Ok(Json(BootOrder { chunks: ask(&control, move |images| images.boot_order(&digest)).await? }))
}

/// `PUT /v1/orders/{digest}`. A hint from a node, which nobody vouches for: what the image does not have is left out.
pub async fn put_boot_order(
    State(control): Shared,
    Path(name): Path<String>,
    Body(order): Body<BootOrder>,
) -> Result<StatusCode, Refusal> {
    let digest = digest(&name)?;
    if order.chunks.len() > MAX_BOOT_ORDER {
        let message = format!("{} chunks are too many: at most {MAX_BOOT_ORDER} are an order", order.chunks.len());
        return Err(Refusal::new(ErrorKind::BadRequest, message));
    }
    ask(&control, move |images| images.put_boot_order(&digest, &order.chunks)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `DELETE /v1/images/{name}`.
pub async fn untag(State(control): Shared, Path(name): Path<String>) -> Result<StatusCode, Refusal> {
    let asked = name.clone();
    ask(&control, move |images| images.remove_tag(&asked)).await?;
    control.event(&name, format!("image name {name} removed; its content stays")).await;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /v1/gc`.
pub async fn gc(State(control): Shared, Body(sweep): Body<Sweep>) -> Result<Json<Swept>, Refusal> {
    let swept = control.collect_garbage(Duration::from_secs(sweep.grace_seconds)).await?;
    if swept.removed > 0 {
        let message = format!("{} objects that nothing needs were removed, {} bytes", swept.removed, swept.bytes);
        control.event("images", message).await;
    }
    Ok(Json(swept))
}

fn digest(text: &str) -> Result<Digest, Refusal> {
    text.parse().map_err(|e| Refusal::new(ErrorKind::BadRequest, format!("{e}")))
}

/// `GET /v1/blobs/{digest}`.
pub async fn blob(State(control): Shared, Path(name): Path<String>) -> Result<Response, Refusal> {
    let digest = digest(&name)?;
    let bytes = ask(&control, move |images| images.blob(&digest)).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], bytes).into_response())
}

/// `PUT /v1/blobs/{digest}`.
pub async fn put_blob(
    State(control): Shared,
    Path(name): Path<String>,
    request: Request,
) -> Result<StatusCode, Refusal> {
    let digest = digest(&name)?;
    let _one = LARGE_BODY.acquire().await;
    let bytes = whole(request, MAX_BLOB_LEN).await?;
    ask(&control, move |images| images.put_blob_as(&digest, &bytes)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Refuses a longer list than one request may have.
pub(super) fn check(digests: &[Digest]) -> Result<(), Refusal> {
    if digests.len() > MAX_CHUNK_LIST {
        let message = format!("{} digests are too many: at most {MAX_CHUNK_LIST} in one request", digests.len());
        return Err(Refusal::new(ErrorKind::BadRequest, message));
    }
    Ok(())
}

/// `POST /v1/chunks/missing`.
pub async fn missing_chunks(State(control): Shared, Body(list): Body<ChunkList>) -> Result<Json<ChunkList>, Refusal> {
    check(&list.digests)?;
    let digests = ask(&control, move |images| Ok(images.missing(&list.digests))).await?;
    Ok(Json(ChunkList { digests }))
}

/// `POST /v1/chunks`.
pub async fn put_chunks(State(control): Shared, request: Request) -> Result<StatusCode, Refusal> {
    let mut frames = Frames::new(request.into_body().into_data_stream());
    loop {
        match frames.next().await {
            Ok(Some((digest, frame))) => ask(&control, move |images| images.put_frame(&digest, &frame)).await?,
            Ok(None) => return Ok(StatusCode::NO_CONTENT),
            Err(error @ FrameError::TooLong(_)) => return Err(Refusal::new(ErrorKind::TooLarge, error.to_string())),
            Err(error) => return Err(Refusal::new(ErrorKind::BadRequest, error.to_string())),
        }
    }
}

/// `POST /v1/chunks/fetch`. What is missing is said before the first byte is sent. Chunks are sent as they are stored: to
/// verify them here as well cost this end more than sending them, and who gets one that is damaged has it checked.
pub async fn fetch_chunks(State(control): Shared, Body(list): Body<ChunkList>) -> Result<Response, Refusal> {
    check(&list.digests)?;
    let wanted = list.digests.clone();
    let missing = ask(&control, move |images| Ok(images.missing(&wanted))).await?;
    if let Some(first) = missing.first() {
        let message = format!("{} of {} chunks are not here, the first is {first}", missing.len(), list.digests.len());
        return Err(Refusal(ApiError::new(ErrorKind::NotFound, message)));
    }
    let (sender, receiver) = mpsc::channel::<Result<Bytes, StoreError>>(READ_AHEAD);
    let shared = Arc::clone(&control);
    tokio::task::spawn_blocking(move || {
        let mut rest = list.digests.iter().filter(|digest| **digest != Digest::ZERO).peekable();
        while rest.peek().is_some() {
            let (wire, broken) = piece(&shared.images, &mut rest);
            // The reader has gone.
            if !wire.is_empty() && sender.blocking_send(Ok(wire)).is_err() {
                return;
            }
            if let Err(error) = broken {
                tracing::error!("a chunk could not be sent: {error}");
                // Or will be told.
                let _gone = sender.blocking_send(Err(error));
                return;
            }
        }
    });
    let stream = stream::unfold(receiver, async |mut receiver| Some((receiver.recv().await?, receiver)));
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], Stream::from_stream(stream)).into_response())
}

/// The frames of the next chunks back to back, up to one that cannot be read, and why it cannot.
fn piece<'a>(images: &Store, rest: &mut impl Iterator<Item = &'a Digest>) -> (Bytes, Result<(), StoreError>) {
    let mut wire = Vec::with_capacity(PIECE + FRAME_HEADER_LEN + MAX_FRAME_LEN);
    while wire.len() < PIECE
        && let Some(digest) = rest.next()
    {
        if let Err(error) = append_frame(&mut wire, digest, |wire| images.append_frame(digest, wire)) {
            return (wire.into(), Err(error));
        }
    }
    (wire.into(), Ok(()))
}

/// `POST /v1/chunks/check`.
pub async fn check_chunks(State(control): Shared, Body(list): Body<ChunkList>) -> Result<StatusCode, Refusal> {
    check(&list.digests)?;
    // It costs far more than asking for it does.
    let _turn = CHECKING.acquire().await;
    let checked = ask(&control, move |images| list.digests.iter().try_for_each(|digest| images.check_chunk(digest)));
    checked.await.inspect_err(|refusal| tracing::error!("a chunk that was asked about: {}", refusal.0))?;
    Ok(StatusCode::NO_CONTENT)
}
