//! Chunks for peers, as they are stored.

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bedplate_api::client::encode_frame;
use bedplate_api::image::{ChunkList, MAX_CHUNK_LIST};
use bedplate_images::Store;
use futures_util::stream;

use super::error::{Refusal, bad_request, internal, no_such};

/// Sends the chunks in the order asked, or refuses when one is not here.
pub(super) async fn send(store: Store, list: ChunkList) -> Result<Response, Refusal> {
    let digests = list.digests;
    if digests.len() > MAX_CHUNK_LIST {
        return Err(bad_request(format!(
            "{} chunks were asked for; at most {MAX_CHUNK_LIST} can be at once",
            digests.len()
        )));
    }
    let (all, here) = (digests.clone(), store.clone());
    let missing = tokio::task::spawn_blocking(move || here.missing(&all)).await;
    if let Some(first) = missing.map_err(|e| internal(e.to_string()))?.first() {
        return Err(no_such(format!("chunk {first} is not on this node; ask the repository")));
    }
    // One frame at a time is in memory. One that turns out damaged breaks the stream off, and who asked asks elsewhere.
    let frames = stream::unfold(digests.into_iter(), move |mut rest| {
        let store = store.clone();
        async move {
            let digest = rest.next()?;
            let read = tokio::task::spawn_blocking(move || store.frame(&digest)).await;
            let frame = read.map_err(std::io::Error::other).and_then(|r| r.map_err(std::io::Error::other));
            Some((frame.map(|frame| encode_frame(&digest, &frame)), rest))
        }
    });
    Ok(Body::from_stream(frames).into_response())
}
