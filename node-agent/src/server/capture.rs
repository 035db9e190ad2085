//! A VM's disk, copied and sent.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::body::Body;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use bedplate_api::error::ErrorKind;
use bedplate_api::node::UNFROZEN;
use bytes::Bytes;
use futures_util::stream;
use tokio::sync::mpsc;

use super::error::{Refusal, refusal};
use crate::vm::capture::{self, CaptureError};
use crate::vm::dir::VmDir;

/// Pieces read ahead of the network, each 64 KiB at most.
const READ_AHEAD: usize = 16;

impl From<CaptureError> for Refusal {
    fn from(error: CaptureError) -> Self {
        let kind = match &error {
            CaptureError::Busy | CaptureError::Moved => ErrorKind::Conflict,
            CaptureError::Pause(_) => ErrorKind::Unavailable,
            CaptureError::Disk(error) if error.is_full() => ErrorKind::NoSpace,
            _ => ErrorKind::Internal,
        };
        refusal(kind, format!("the disk cannot be captured: {error}"))
    }
}

/// Copies the disk of the VM in `dir` and answers with the copy.
pub(super) async fn send(dir: VmDir) -> Result<Response, Refusal> {
    // On a task of its own: when the client leaves, the guest must go on all the same.
    let unwanted = Arc::new(AtomicBool::new(false));
    let _left = Left(Arc::clone(&unwanted));
    let taking = tokio::spawn(async move { capture::take(&dir, unwanted).await });
    let taken = taking.await.map_err(|_| CaptureError::Aborted)??;
    let unfrozen = taken.unfrozen.as_ref().map(ToString::to_string).unwrap_or_default();
    let headers = [
        (CONTENT_TYPE.as_str(), "application/octet-stream".to_owned()),
        (CONTENT_LENGTH.as_str(), taken.disk.sent_len().to_string()),
        (UNFROZEN, unfrozen),
    ];
    let (sender, receiver) = mpsc::channel(READ_AHEAD);
    tokio::task::spawn_blocking(move || {
        let mut out = Pieces(sender);
        if let Err(error) = taken.disk.send(&mut out) {
            // The client has gone, or is told by the length that is missing.
            tracing::warn!("a captured disk was not sent whole: {error}");
        }
    });
    let pieces =
        stream::unfold(receiver, async |mut receiver| Some((Ok::<_, io::Error>(receiver.recv().await?), receiver)));
    Ok((headers, Body::from_stream(pieces)).into_response())
}

/// Dropped, nobody wants the copy any more, or it is made.
struct Left(Arc<AtomicBool>);

impl Drop for Left {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Hands on what is written.
struct Pieces(mpsc::Sender<Bytes>);

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.0.blocking_send(Bytes::copy_from_slice(bytes));
        sent.map(|()| bytes.len()).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
