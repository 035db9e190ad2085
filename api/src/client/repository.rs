//! Calls of [`crate::image`]: the repository of the control node, and chunks from a peer.

use bytes::Bytes;
use futures_util::Stream;
use reqwest::Method;

use super::{Client, ClientError, Frames, blob_path, segment};
use crate::Digest;
use crate::error::ErrorKind;
use crate::image::{
    BootOrder, ChunkList, ImageSummary, Locate, Located, MAX_BLOB_LEN, MAX_SIGNATURE_LEN, Sweep, Swept, Tag,
};

impl Client {
    /// Every tag of the repository.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn images(&self) -> Result<Vec<ImageSummary>, ClientError> {
        self.fetch("/v1/images").await
    }

    /// What `name`, a tag or a digest, stands for.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn image(&self, name: &str) -> Result<ImageSummary, ClientError> {
        self.fetch(&format!("/v1/images/{}", segment(name))).await
    }

    /// Lets `name` point to the manifest `digest`, all of whose content has been sent.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn tag_image(&self, name: &str, digest: Digest) -> Result<ImageSummary, ClientError> {
        self.tag_signed_image(name, digest, None).await
    }

    /// The same, and keeps the signature of the manifest with it.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn tag_signed_image(
        &self,
        name: &str,
        digest: Digest,
        signature: Option<String>,
    ) -> Result<ImageSummary, ClientError> {
        self.put(&format!("/v1/images/{}", segment(name)), &Tag { digest, signature }).await
    }

    /// The signature of the manifest `digest`, if it has one. Not verified here.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn signature(&self, digest: &Digest) -> Result<Option<String>, ClientError> {
        let path = format!("/v1/signatures/{digest}");
        let mut response = match self.send(self.request(Method::GET, &path)).await {
            Err(e) if Self::is_not_found(&e) => return Ok(None),
            answer => answer?,
        };
        let mut text = Vec::new();
        while let Some(bytes) = response.chunk().await.map_err(|e| self.answer_error(&path, &e))? {
            text.extend_from_slice(&bytes);
            // Too long for a signature, which who keeps it will say.
            if text.len() > MAX_SIGNATURE_LEN {
                break;
            }
        }
        Ok(Some(String::from_utf8_lossy(&text).into_owned()))
    }

    /// In which order a boot reads the disk of the image `digest`, as far as that is known there.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn boot_order(&self, digest: &Digest) -> Result<BootOrder, ClientError> {
        self.fetch(&format!("/v1/orders/{digest}")).await
    }

    /// Tells it to those who copy the image next.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn put_boot_order(&self, digest: &Digest, order: &BootOrder) -> Result<(), ClientError> {
        self.send(self.request(Method::PUT, &format!("/v1/orders/{digest}")).json(order)).await.map(drop)
    }

    /// Removes the name; the content goes with the next garbage collection.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn untag_image(&self, name: &str) -> Result<(), ClientError> {
        self.delete(&format!("/v1/images/{}", segment(name))).await
    }

    /// Removes what no name, no tier and no VM needs, and is older than `grace_seconds`.
    ///
    /// # Errors
    /// See [`ClientError`]; "unavailable" while an image is being taken into use: ask again.
    pub async fn collect_garbage(&self, grace_seconds: u64) -> Result<Swept, ClientError> {
        self.post("/v1/gc", &Sweep { grace_seconds }).await
    }

    /// A manifest or an index. Not verified here: the caller's store does that when it keeps the bytes.
    ///
    /// # Errors
    /// See [`ClientError`]; a blob larger than any of ours is refused while it arrives.
    pub async fn blob(&self, digest: &Digest) -> Result<Vec<u8>, ClientError> {
        let path = blob_path(digest);
        let mut response = self.send(self.request(Method::GET, &path)).await?;
        let mut body = Vec::new();
        while let Some(bytes) = response.chunk().await.map_err(|e| self.answer_error(&path, &e))? {
            if body.len() + bytes.len() > MAX_BLOB_LEN {
                return Err(ClientError::Answer {
                    endpoint: self.endpoint().clone(),
                    what: path,
                    cause: format!("more than {MAX_BLOB_LEN} bytes, which no manifest or index has"),
                });
            }
            body.extend_from_slice(&bytes);
        }
        Ok(body)
    }

    /// Sends a manifest or an index.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn put_blob(&self, digest: &Digest, bytes: Vec<u8>) -> Result<(), ClientError> {
        self.send(self.request(Method::PUT, &blob_path(digest)).body(bytes)).await.map(drop)
    }

    /// Which of `digests` (at most [`crate::image::MAX_CHUNK_LIST`]) the repository lacks.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn missing_chunks(&self, digests: Vec<Digest>) -> Result<Vec<Digest>, ClientError> {
        let missing: ChunkList = self.post("/v1/chunks/missing", &ChunkList { digests }).await?;
        Ok(missing.digests)
    }

    /// Which peers to ask for chunks first.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn locate_chunks(&self, locate: &Locate) -> Result<Located, ClientError> {
        self.post("/v1/chunks/locate", locate).await
    }

    /// Asks a node for those of `digests` (at most [`crate::image::MAX_CHUNK_LIST`]) that it has, or gets within
    /// `wait_seconds`; otherwise as [`Client::open_chunks`].
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn open_peer_chunks(
        &self,
        digests: Vec<Digest>,
        wait_seconds: u64,
    ) -> Result<Frames<impl Stream<Item = Result<Bytes, reqwest::Error>> + Send + Unpin + use<>>, ClientError> {
        let path = format!("/v1/chunks/fetch?wait={wait_seconds}");
        let request = self.request(Method::POST, &path).json(&ChunkList { digests });
        Ok(Frames::new(Box::pin(self.send(request).await?.bytes_stream())))
    }

    /// Asks for `digests` (at most [`crate::image::MAX_CHUNK_LIST`]) and returns the chunks as they arrive, as claimed and
    /// compressed: who keeps them verifies them.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn open_chunks(
        &self,
        digests: Vec<Digest>,
    ) -> Result<Frames<impl Stream<Item = Result<Bytes, reqwest::Error>> + Send + Unpin + use<>>, ClientError> {
        let request = self.request(Method::POST, "/v1/chunks/fetch").json(&ChunkList { digests });
        Ok(Frames::new(Box::pin(self.send(request).await?.bytes_stream())))
    }

    /// Asks for `digests` (at most [`crate::image::MAX_CHUNK_LIST`]) and hands each chunk, as claimed and compressed, to
    /// `keep`, which verifies it. Stops at the first refusal.
    ///
    /// # Errors
    /// See [`ClientError`]. When `keep` refuses a chunk that turns out to be damaged at the other end, what that end says of
    /// it; otherwise the refusal as the cause of [`ClientError::Answer`].
    pub async fn fetch_chunks(
        &self,
        digests: Vec<Digest>,
        mut keep: impl AsyncFnMut(Digest, Bytes) -> Result<(), String>,
    ) -> Result<(), ClientError> {
        let mut frames = self.open_chunks(digests).await?;
        let broken = |source| ClientError::Frames { endpoint: self.endpoint().clone(), source };
        while let Some((digest, compressed)) = frames.next().await.map_err(broken)? {
            if let Err(cause) = keep(digest, compressed).await {
                // Another answer than about this chunk says nothing of why it was refused here.
                if let Err(ClientError::Api(damaged)) = self.check_chunks(vec![digest]).await
                    && damaged.message.contains(&digest.to_string())
                {
                    return Err(damaged.into());
                }
                let what = "/v1/chunks/fetch".to_owned();
                return Err(ClientError::Answer { endpoint: self.endpoint().clone(), what, cause });
            }
        }
        Ok(())
    }

    /// Lets the other end verify its own copies of `digests` (at most [`crate::image::MAX_CHUNK_LIST`]): it sends chunks as
    /// they are stored.
    ///
    /// # Errors
    /// See [`ClientError`]; "not found" names the first that is damaged there, or is not there.
    pub async fn check_chunks(&self, digests: Vec<Digest>) -> Result<(), ClientError> {
        self.send(self.request(Method::POST, "/v1/chunks/check").json(&ChunkList { digests })).await.map(drop)
    }

    /// Sends frames made by [`super::encode_frame`].
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn put_chunks(&self, frames: Vec<Bytes>) -> Result<(), ClientError> {
        let stream = futures_util::stream::iter(frames.into_iter().map(Ok::<_, std::convert::Infallible>));
        let body = reqwest::Body::wrap_stream(stream);
        self.send(self.request(Method::POST, "/v1/chunks").body(body)).await.map(drop)
    }

    /// Whether the server says that it has no such thing.
    pub fn is_not_found(error: &ClientError) -> bool {
        error.kind() == Some(ErrorKind::NotFound)
    }
}
