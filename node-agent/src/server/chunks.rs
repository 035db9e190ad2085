//! Chunks for peers, as they are stored.

use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bedplate_api::client::encode_frame;
use bedplate_api::image::{ChunkList, MAX_CHUNK_LIST};
use futures_util::stream;
use serde::Deserialize;
use tokio::time::Instant;

use super::error::{Refusal, bad_request};
use crate::image::Images;

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
    let digests = list.digests;
    if digests.len() > MAX_CHUNK_LIST {
        return Err(bad_request(format!(
            "{} chunks were asked for; at most {MAX_CHUNK_LIST} can be at once",
            digests.len()
        )));
    }
    let deadline = Instant::now() + Duration::from_secs(patience.wait.min(MAX_WAIT));
    // One frame at a time is in memory. One that turns out damaged breaks the stream off, and who asked asks elsewhere.
    let frames = stream::unfold(digests.into_iter(), move |mut rest| {
        let images = images.clone();
        async move {
            loop {
                let digest = rest.next()?;
                match images.frame_by(digest, deadline).await {
                    Ok(Some(frame)) => return Some((Ok(encode_frame(&digest, &frame)), rest)),
                    Ok(None) => {}
                    Err(e) => return Some((Err(std::io::Error::other(e)), rest)),
                }
            }
        }
    });
    Ok(Body::from_stream(frames).into_response())
}
