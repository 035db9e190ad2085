//! A small OCI registry over the image store (OCI distribution 1.1: pull, push, content discovery). The image NAME is
//! `NAME:latest` here: a repository has one tag, since names of images are flat.

#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::sync::Arc;

use axum::Json;
use axum::body::Body as Stream;
use axum::extract::{Query, Request, State};
use axum::http::{HeaderMap, HeaderName, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bedplate_api::image::MAX_BLOB_LEN;
use bedplate_images::StoreError;
use bedplate_images::pack::oci::{MAX_OCI_MANIFEST_LEN, OCI_MANIFEST};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use serde::Deserialize;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

use super::Shared;
use super::answer::{Path, whole};
use crate::control::{Control, blocking};
use crate::shelf::{Blob, Shelf, ShelfError};

/// The one tag of a repository.
const TAG: &str = "latest";
/// Pieces read ahead of the network.
const READ_AHEAD: usize = 8;
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// An error as the specification words it.
pub struct OciRefusal {
    status: StatusCode,
    code: &'static str,
    message: String,
}

impl OciRefusal {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into() }
    }
}

impl IntoResponse for OciRefusal {
    fn into_response(self) -> Response {
        if self.status.is_server_error() {
            tracing::error!("registry: {}", self.message);
        }
        (self.status, Json(json!({"errors": [{"code": self.code, "message": self.message}]}))).into_response()
    }
}

impl From<ShelfError> for OciRefusal {
    fn from(error: ShelfError) -> Self {
        use ShelfError as E;
        use StatusCode as S;
        let (status, code) = match &error {
            E::Unknown(_) => (S::NOT_FOUND, "BLOB_UNKNOWN"),
            E::Digest(_) | E::Mismatch { .. } => (S::BAD_REQUEST, "DIGEST_INVALID"),
            E::UnknownUpload => (S::NOT_FOUND, "BLOB_UPLOAD_UNKNOWN"),
            E::TooLarge => (S::PAYLOAD_TOO_LARGE, "SIZE_INVALID"),
            E::Oci(_) | E::Trust(_) => (S::BAD_REQUEST, "MANIFEST_INVALID"),
            E::Store(StoreError::TagName(_)) => (S::BAD_REQUEST, "NAME_INVALID"),
            E::Store(StoreError::TagMissing { .. } | StoreError::BlobMissing { .. }) => (S::NOT_FOUND, "NAME_UNKNOWN"),
            E::Store(StoreError::FrameRefused { .. } | StoreError::BlobRefused { .. }) => {
                (S::BAD_REQUEST, "DIGEST_INVALID")
            }
            E::Store(StoreError::Incomplete { .. }) => (S::BAD_REQUEST, "MANIFEST_BLOB_UNKNOWN"),
            E::Store(error) if error.is_full() => (S::INSUFFICIENT_STORAGE, "DENIED"),
            E::Store(_) | E::Io { .. } => (S::INTERNAL_SERVER_ERROR, "UNKNOWN"),
        };
        Self::new(status, code, error.to_string())
    }
}

async fn ask<T: Send + 'static>(
    control: &Arc<Control>,
    act: impl FnOnce(&Shelf) -> Result<T, ShelfError> + Send + 'static,
) -> Result<T, OciRefusal> {
    let shelf = control.shelf.clone();
    Ok(blocking(move || act(&shelf)).await?)
}

/// `GET /v2/`.
pub async fn version() -> Json<serde_json::Value> {
    Json(json!({}))
}

/// `GET /v2/_catalog`.
pub async fn catalog(State(control): Shared) -> Result<Json<serde_json::Value>, OciRefusal> {
    let images = control.images.clone();
    let tags = blocking(move || images.each_tag()).await.map_err(ShelfError::from)?;
    let names: Vec<String> = tags.into_iter().map(|(name, _)| name).collect();
    Ok(Json(json!({ "repositories": names })))
}

/// `GET /v2/{name}/tags/list`.
pub async fn tags(State(control): Shared, Path(name): Path<String>) -> Result<Json<serde_json::Value>, OciRefusal> {
    let (images, asked) = (control.images.clone(), name.clone());
    blocking(move || images.tag(&asked)).await.map_err(ShelfError::from)?;
    Ok(Json(json!({ "name": name, "tags": [TAG] })))
}

/// `GET /v2/{name}/manifests/{reference}`.
pub async fn manifest(
    State(control): Shared,
    Path((name, reference)): Path<(String, String)>,
) -> Result<Response, OciRefusal> {
    let images = control.images.clone();
    let image = blocking(move || images.tag(&name)).await.map_err(ShelfError::from)?;
    let unknown = format!("a repository here has the tag {TAG:?} alone: {reference:?} is not there");
    let unknown = OciRefusal::new(StatusCode::NOT_FOUND, "MANIFEST_UNKNOWN", unknown);
    if reference != TAG && !reference.starts_with("sha256:") {
        return Err(unknown);
    }
    let (digest, bytes) = ask(&control, move |shelf| shelf.manifest_of(&image)).await?;
    if reference != TAG && reference != digest {
        return Err(unknown);
    }
    let kind = OCI_MANIFEST.to_owned();
    Ok(([(header::CONTENT_TYPE, kind), (CONTENT_DIGEST, digest)], bytes).into_response())
}

/// `PUT /v2/{name}/manifests/{reference}`.
pub async fn put_manifest(
    State(control): Shared,
    Path((name, reference)): Path<(String, String)>,
    request: Request,
) -> Result<Response, OciRefusal> {
    if reference != TAG {
        let message = format!("images here have one tag, {TAG:?}: push to {name}-{reference}:{TAG}, say");
        return Err(OciRefusal::new(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", message));
    }
    let bytes = whole(request, MAX_OCI_MANIFEST_LEN)
        .await
        .map_err(|refusal| OciRefusal::new(StatusCode::BAD_REQUEST, "MANIFEST_INVALID", refusal.0.to_string()))?;
    let tag = name.clone();
    let (image, digest) = ask(&control, move |shelf| shelf.accept(&tag, &bytes)).await?;
    control.event(&name, format!("image {name} is {image} now")).await;
    let location = format!("/v2/{name}/manifests/{digest}");
    Ok((StatusCode::CREATED, [(header::LOCATION, location), (CONTENT_DIGEST, digest)]).into_response())
}

/// `GET /v2/{name}/blobs/{digest}`, whole or one range.
pub async fn blob(
    State(control): Shared,
    Path((_, digest)): Path<(String, String)>,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, OciRefusal> {
    let asked = digest.clone();
    let blob = ask(&control, move |shelf| shelf.blob(&asked)).await?;
    let total = blob.size();
    let range =
        headers.get(header::RANGE).and_then(|value| value.to_str().ok()).and_then(|text| parse_range(text, total));
    let (status, start, end) = match range {
        None => (StatusCode::OK, 0, total),
        Some(Ok((start, end))) => (StatusCode::PARTIAL_CONTENT, start, end),
        Some(Err(())) => {
            let message = format!("the blob has {total} bytes");
            return Err(OciRefusal::new(StatusCode::RANGE_NOT_SATISFIABLE, "SIZE_INVALID", message));
        }
    };
    let body = if method == Method::HEAD { Stream::empty() } else { sending(&control, blob, start, end) };
    let mut answer = Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, "application/octet-stream")
        .header(header::CONTENT_LENGTH, end - start)
        .header(header::ACCEPT_RANGES, "bytes")
        .header(CONTENT_DIGEST, digest);
    if status == StatusCode::PARTIAL_CONTENT {
        answer = answer.header(header::CONTENT_RANGE, format!("bytes {start}-{}/{total}", end - 1));
    }
    answer.body(body).map_err(|e| OciRefusal::new(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", e.to_string()))
}

/// First byte and the one behind the last, of `bytes=A-B` or `bytes=A-`. `None` for what may be ignored, an error for
/// what lies behind the end.
fn parse_range(text: &str, total: u64) -> Option<Result<(u64, u64), ()>> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let first: u64 = first.parse().ok()?;
    let end = if last.is_empty() { total } else { last.parse::<u64>().ok()?.checked_add(1)?.min(total) };
    Some(if first < end { Ok((first, end)) } else { Err(()) })
}

/// The blob's bytes, read on a thread that may block. One that is damaged ends early, which the reader sees.
fn sending(control: &Arc<Control>, blob: Blob, start: u64, end: u64) -> Stream {
    let (sender, receiver) = mpsc::channel::<io::Result<Bytes>>(READ_AHEAD);
    let shelf = control.shelf.clone();
    tokio::task::spawn_blocking(move || {
        let mut pieces = Pieces { sender: sender.clone(), gone: false };
        if let Err(error) = shelf.send(&blob, start, end, &mut pieces)
            && !pieces.gone
        {
            tracing::error!("a blob could not be sent: {error}");
            // The reader has gone, or will be told.
            let _ = sender.blocking_send(Err(io::Error::other(error.to_string())));
        }
    });
    Stream::from_stream(stream::unfold(receiver, async |mut receiver| Some((receiver.recv().await?, receiver))))
}

/// Hands what is written to the connection.
struct Pieces {
    sender: mpsc::Sender<io::Result<Bytes>>,
    gone: bool,
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.sender.blocking_send(Ok(Bytes::copy_from_slice(bytes))).is_err() {
            self.gone = true;
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What an upload is finished with.
#[derive(Deserialize)]
pub struct Finish {
    digest: Option<String>,
}

/// `POST /v2/{name}/blobs/uploads/`. A mount from another repository is answered as a new upload, which clients expect.
pub async fn begin(State(control): Shared, Path(name): Path<String>) -> Result<Response, OciRefusal> {
    if !bedplate_images::store::is_tag_name(&name) {
        return Err(ShelfError::from(StoreError::TagName(name.chars().take(140).collect())).into());
    }
    let upload = ask(&control, |shelf| shelf.begin()).await?;
    Ok(accepted(&name, &upload, 0))
}

fn accepted(name: &str, upload: &str, len: u64) -> Response {
    let location = format!("/v2/{name}/blobs/uploads/{upload}");
    let range = format!("0-{}", len.saturating_sub(1));
    let id = (HeaderName::from_static("docker-upload-uuid"), upload.to_owned());
    (StatusCode::ACCEPTED, [(header::LOCATION, location), (header::RANGE, range), id]).into_response()
}

/// `PATCH /v2/{name}/blobs/uploads/{upload}`.
pub async fn append(
    State(control): Shared,
    Path((name, upload)): Path<(String, String)>,
    request: Request,
) -> Result<Response, OciRefusal> {
    let len = receive(&control, &upload, request).await?;
    Ok(accepted(&name, &upload, len))
}

/// `PUT /v2/{name}/blobs/uploads/{upload}?digest=…`.
pub async fn finish(
    State(control): Shared,
    Path((name, upload)): Path<(String, String)>,
    Query(finish): Query<Finish>,
    request: Request,
) -> Result<Response, OciRefusal> {
    let digest = finish.digest.unwrap_or_default();
    receive(&control, &upload, request).await?;
    let asked = digest.clone();
    ask(&control, move |shelf| shelf.finish(&upload, &asked)).await?;
    let location = format!("/v2/{name}/blobs/{digest}");
    Ok((StatusCode::CREATED, [(header::LOCATION, location), (CONTENT_DIGEST, digest)]).into_response())
}

/// Appends a body to an upload; returns how long it is now.
async fn receive(control: &Arc<Control>, upload: &str, request: Request) -> Result<u64, OciRefusal> {
    let path = control.shelf.upload(upload)?;
    let failed = |cause: io::Error| match cause.kind() {
        io::ErrorKind::NotFound => ShelfError::UnknownUpload,
        _ => ShelfError::Io { what: "write", path: path.clone(), cause },
    };
    let mut file = tokio::fs::OpenOptions::new().append(true).open(&path).await.map_err(failed)?;
    let mut len = file.metadata().await.map_err(failed)?.len();
    // What says where it begins must begin where the last one ended.
    let from =
        request.headers().get(header::CONTENT_RANGE).and_then(|v| v.to_str().ok()?.split('-').next()?.parse().ok());
    if from.is_some_and(|from: u64| from != len) {
        let message = format!("the upload has {len} bytes");
        return Err(OciRefusal::new(StatusCode::RANGE_NOT_SATISFIABLE, "BLOB_UPLOAD_INVALID", message));
    }
    let mut body = request.into_body().into_data_stream();
    while let Some(bytes) = body.next().await {
        let bytes = bytes.map_err(|e| {
            let message = format!("the body did not arrive whole: {e}");
            OciRefusal::new(StatusCode::BAD_REQUEST, "BLOB_UPLOAD_INVALID", message)
        })?;
        len += bytes.len() as u64;
        if len > MAX_BLOB_LEN as u64 {
            let _ = tokio::fs::remove_file(&path).await;
            return Err(ShelfError::TooLarge.into());
        }
        file.write_all(&bytes).await.map_err(failed)?;
    }
    file.flush().await.map_err(failed)?;
    Ok(len)
}
