//! Chunks for peers, as they are stored.

use std::time::Duration;

use axum::body::Body;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use bedplate_api::image::{ChunkList, MAX_CHUNK_LIST};
use futures_util::stream;
use serde::Deserialize;
use tokio::time::Instant;

use super::error::{Refusal, bad_request, internal, no_such};
use crate::image::{ImageError, Images};

/// Longest wait for chunks that are on their way here, in seconds.
const MAX_WAIT: u64 = 30;

/// What a peer may say beside the list.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Patience {
    /// Seconds that it waits for what is on its way here.
    #[serde(default)]
    wait: u64,
}

/// Sends the chunks in the order asked. Those that are not here, nor come in time, are left out.
pub(super) fn send(images: Images, list: ChunkList, patience: &Patience) -> Result<Response, Refusal> {
    bounded(&list)?;
    let digests = list.digests;
    let deadline = Instant::now() + Duration::from_secs(patience.wait.min(MAX_WAIT));
    // Some frames at a time are in memory. Who gets one that is damaged has it checked, and asks elsewhere.
    let frames = stream::try_unfold(digests.into_iter(), move |rest| {
        let images = images.clone();
        async move { images.frames_by(rest, deadline).await }
    });
    Ok(Body::from_stream(frames).into_response())
}

/// Whether each of the chunks is here and whole.
pub(super) async fn check(images: Images, list: ChunkList) -> Result<StatusCode, Refusal> {
    bounded(&list)?;
    match images.check_chunks(list.digests).await {
        Ok(()) => Ok(StatusCode::NO_CONTENT),
        Err(ImageError::Store(e)) if e.is_missing() => {
            tracing::error!("a chunk that was asked about: {e}");
            Err(no_such(e.to_string()))
        }
        Err(e) => Err(internal(e.to_string())),
    }
}

fn bounded(list: &ChunkList) -> Result<(), Refusal> {
    match list.digests.len() {
        0..=MAX_CHUNK_LIST => Ok(()),
        many => Err(bad_request(format!("{many} chunks were asked for; at most {MAX_CHUNK_LIST} can be at once"))),
    }
}
