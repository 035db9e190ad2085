//! Images on this node: copied from the control node as far as they lack here, verified, made ready to boot.
//!
//! Way through the house: repository and [`peers`] ⇒ [`fetch`] → the node's store → disk of a VM. [`copy`] says what is
//! fetched, and [`supply`] what a guest waits for. Every byte is verified by the store when it lands and again when it is read.

mod background;
mod copy;
mod fetch;
mod order;
mod peers;
mod room;
pub mod supply;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::vec;

use bedplate_api::client::{Client, ClientError, Endpoint, FrameError, append_frame};
use bedplate_api::image::{FRAME_HEADER_LEN, ImageKind, MAX_FRAME_LEN, Manifest};
use bedplate_api::node::CopyProgress;
use bedplate_api::{Digest, NodeId};
use bedplate_images::trust::TrustError;
use bedplate_images::{Store, StoreError};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout_at};

use crate::files;

use fetch::Fetcher;

pub use fetch::CopyLimits;
pub use room::Sweep;

/// Never fill a disk to the last byte: others write there too.
const KEEP_FREE: u64 = 64 << 20;
/// Bytes of frames that are read for a peer in one step, about: as much as the control node's repository does.
const PIECE: usize = 192 << 10;
/// Name of the address space that is a disk image's disk.
const DISK_PART: &str = "disk";

/// Why an image is not ready.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The repository has no such image.
    #[error("image {0} is not in the repository; import it, or ask for another")]
    Unknown(Digest),
    /// It is not here, and there is nowhere to get it from.
    #[error("image {0} is not complete in this node's store, and the node has no control node to copy it from")]
    NoSource(Digest),
    /// It is not a disk image.
    #[error("image {0} is a hypervisor image or a suspended guest, not a disk image; VMs need a disk image")]
    NotADisk(Digest),
    /// It cannot be started directly.
    #[error(
        "image {0} holds no kernel that was found, so no node starts it; `bedplate run` does, by the disk's own boot loader"
    )]
    NotBootable(Digest),
    /// A part that the manifest should have is not there.
    #[error("the manifest of image {image} has no part {part:?}; import it again")]
    NoPart {
        /// Digest of the manifest.
        image: Digest,
        /// What it lacks.
        part: String,
    },
    /// The repository named a chunk and did not deliver it.
    #[error(
        "the repository did not send {missing} of {asked} chunks that it was asked for; is the image complete there?"
    )]
    NotSent {
        /// Chunks that did not come.
        missing: usize,
        /// Chunks asked for.
        asked: usize,
    },
    /// The repository or another node sent a chunk that was not asked for.
    #[error("chunk {0} was sent, which was not asked for")]
    NotAsked(Digest),
    /// Another node did not send in time what it was asked for.
    #[error("the node at {0} is too slow")]
    PeerSlow(SocketAddr),
    /// A chunk came that is not what it should be.
    #[error(transparent)]
    Damaged(Box<DamagedChunk>),
    /// The stream of chunks broke off.
    #[error("the copy was interrupted: {0}")]
    Frames(#[source] FrameError),
    /// The repository could not be talked to.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The node's store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Nobody signed it whom this node trusts.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The boot files could not be written.
    #[error(transparent)]
    File(#[from] files::FileError),
    /// A VM's disk does not say which image it needs.
    #[error(transparent)]
    Disk(#[from] bedplate_images::disk::DiskError),
    /// A task of ours was lost.
    #[error("a step of the copy was aborted")]
    Aborted,
}

/// A chunk that came and is not what it should be.
#[derive(Debug, thiserror::Error)]
#[error("image {image}: chunk {chunk} came damaged from {from} ({cause}); {found}")]
pub struct DamagedChunk {
    /// Digest of the manifest.
    image: Digest,
    /// Its name.
    chunk: Digest,
    /// Who sent it.
    from: Endpoint,
    /// What is wrong.
    cause: bedplate_images::frame::FrameError,
    /// What the sender found when it looked at its own copy.
    found: String,
}

impl ImageError {
    /// Whether trying again cannot help until somebody does something.
    pub fn is_final(&self) -> bool {
        match self {
            Self::Unknown(_) | Self::NoSource(_) | Self::NotADisk(_) | Self::NotBootable(_) | Self::NoPart { .. } => {
                true
            }
            Self::Store(e) => e.is_full() || matches!(e, StoreError::Manifest { .. } | StoreError::Index { .. }),
            Self::File(e) => e.is_no_space(),
            Self::NotSent { .. }
            | Self::Damaged(_)
            | Self::NotAsked(_)
            | Self::PeerSlow(_)
            | Self::Frames(_)
            | Self::Client(_)
            | Self::Disk(_)
            // It may be signed any time, and a key be added.
            | Self::Trust(_)
            | Self::Aborted => false,
        }
    }

    /// Whether there was too little room for it.
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::Store(e) => e.is_full(),
            Self::File(e) => e.is_no_space(),
            _ => false,
        }
    }
}

/// Everything about an image that a start needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bootable {
    /// The manifest's digest.
    pub image: Digest,
    /// Kernel file.
    pub kernel: PathBuf,
    /// Initial RAM disk file.
    pub initrd: Option<PathBuf>,
    /// Command line as found in the image.
    pub cmdline: String,
    /// Size of the disk in bytes.
    pub disk_size: u64,
}

/// The images of one node.
#[derive(Debug, Clone)]
pub struct Images {
    store: Store,
    /// `DIR/boot`: kernels and initial RAM disks as files, per image.
    boot: PathBuf,
    /// The state directory.
    state: PathBuf,
    /// Where what lacks is had from, if from anywhere.
    fetcher: Option<Arc<Fetcher>>,
}

impl Images {
    /// The images in `store`, completed from `source` within `limits`, with boot files under the state directory `state`.
    pub fn new(store: Store, state: &Path, source: Option<Client>, limits: CopyLimits) -> Self {
        let fetcher = source.map(|source| Arc::new(Fetcher::new(store.clone(), source, limits)));
        Self { store, boot: state.join("boot"), state: state.to_owned(), fetcher }
    }

    /// From now on other nodes are asked before the repository, which says whom: as node `id`, showing `token`.
    /// To be called before anything else has a copy of this.
    #[must_use]
    pub fn share(mut self, id: NodeId, token: String) -> Self {
        if let Some(fetcher) = self.fetcher.as_mut().and_then(Arc::get_mut) {
            fetcher.share(id, token);
        }
        self
    }

    /// The next of the chunks `rest` for a peer, one or more, as they are stored and go over the wire; and what is left of
    /// `rest`. One that is on its way here is waited for until `deadline`; those that are not here then are left out.
    ///
    /// # Errors
    /// The store fails.
    pub async fn frames_by(
        &self,
        mut rest: vec::IntoIter<Digest>,
        deadline: Instant,
    ) -> Result<Option<(Vec<u8>, vec::IntoIter<Digest>)>, ImageError> {
        let mut waited = false;
        while let Some(first) = rest.as_slice().first().copied() {
            let store = self.store.clone();
            let wire;
            (wire, rest) = blocking(move || frames_here(&store, rest)).await?;
            if !wire.is_empty() {
                return Ok(Some((wire, rest)));
            }
            if !waited && let Some(fetcher) = &self.fetcher {
                waited = timeout_at(deadline, fetcher.landing(&first)).await.is_ok();
                if waited {
                    continue;
                }
            }
            waited = false;
            rest.next();
        }
        Ok(None)
    }

    /// Verifies the chunks `digests`, for a peer that got one that is not what it should be.
    ///
    /// # Errors
    /// The first that is damaged, and was set aside, or is not here; or the store fails.
    pub async fn check_chunks(&self, digests: Vec<Digest>) -> Result<(), ImageError> {
        // One at a time: it costs far more than asking for it does, and guests want the processor, too.
        static TURN: Semaphore = Semaphore::const_new(1);
        let _turn = TURN.acquire().await;
        let store = self.store.clone();
        blocking(move || Ok(digests.iter().try_for_each(|digest| store.check_chunk(digest))?)).await
    }

    /// Whether what is missing can be copied from somewhere, and copied images have names therefore.
    pub const fn has_source(&self) -> bool {
        self.fetcher.is_some()
    }

    /// The store.
    pub const fn store(&self) -> &Store {
        &self.store
    }

    /// Digests of the images that are complete here.
    ///
    /// # Errors
    /// The store cannot be read.
    pub fn complete(&self) -> Result<Vec<Digest>, StoreError> {
        let mut digests: Vec<Digest> = self.store.tags()?.into_iter().map(|(_, digest)| digest).collect();
        digests.sort_unstable();
        digests.dedup();
        Ok(digests)
    }

    /// Makes the image `digest` ready to start VMs from, copying what lacks for that. One attempt; what has landed stays
    /// for the next one.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub async fn begin(
        &self,
        digest: Digest,
        progress: &watch::Sender<Option<CopyProgress>>,
    ) -> Result<(Bootable, Manifest), ImageError> {
        let manifest = copy::begin(self, digest, progress).await?;
        let this = self.clone();
        blocking(move || Ok((this.prepare(digest, &manifest)?, manifest))).await
    }

    /// Completes the image `digest`, which [`Images::begin`] made ready; likewise one attempt.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub async fn finish(
        &self,
        digest: Digest,
        manifest: &Manifest,
        progress: &watch::Sender<Option<CopyProgress>>,
    ) -> Result<(), ImageError> {
        let (images, manifest, progress) = (self.clone(), manifest.clone(), progress.clone());
        let copy = async move { copy::finish(&images, digest, &manifest, &progress).await };
        background::run(copy).await?
    }

    /// Returns when a guest got something that lacked here, so that the source is there; never without a source.
    pub async fn source_answers(&self) {
        match &self.fetcher {
            Some(fetcher) => fetcher.answers().await,
            None => std::future::pending().await,
        }
    }

    /// Follows which image guests wait for something of that cannot be had, and why, or that they have got it; none without
    /// a source.
    pub fn guests_held_up(&self) -> Option<watch::Receiver<(Digest, Option<String>)>> {
        self.fetcher.as_ref().map(|fetcher| fetcher.held_up())
    }

    /// Where this node's store has keys, an image starts only when one of them has signed it.
    async fn check_trust(&self, digest: Digest) -> Result<(), ImageError> {
        let store = self.store.clone();
        let asked = blocking(move || Ok(!store.keys()?.is_empty())).await?;
        // An image may be signed after it was copied, and by somebody else than before.
        if let (true, Some(fetcher)) = (asked, &self.fetcher)
            && let Some(signature) = fetcher.source().signature(&digest).await?
        {
            let store = self.store.clone();
            blocking(move || Ok(store.put_signature(&digest, &signature)?)).await?;
        }
        let store = self.store.clone();
        blocking(move || Ok(store.check_trust(&digest).map(drop)?)).await
    }

    /// Writes out kernel and initial RAM disk. Also over those that an earlier agent wrote: what is verified in the store
    /// may have been damaged outside of it since, and this is done once per image and start of the agent.
    fn prepare(&self, digest: Digest, manifest: &Manifest) -> Result<Bootable, ImageError> {
        let boot = manifest.boot.as_ref().ok_or(ImageError::NotBootable(digest))?;
        let disk = manifest.parts.get(DISK_PART);
        let disk = disk.ok_or_else(|| ImageError::NoPart { image: digest, part: DISK_PART.to_owned() })?;
        let dir = self.boot.join(digest.hex());
        fs::create_dir_all(&dir).map_err(files::FileError::io("create", &dir))?;
        let write_out = |part: &str, name: &str| -> Result<PathBuf, ImageError> {
            let path = dir.join(name);
            // It replaces the old one in one step: a VM that starts meanwhile sees one or the other, whole.
            self.store.materialise(&digest, part, &path)?;
            Ok(path)
        };
        Ok(Bootable {
            image: digest,
            kernel: write_out(&boot.kernel, "kernel")?,
            initrd: boot.initrd.as_deref().map(|part| write_out(part, "initrd")).transpose()?,
            cmdline: boot.cmdline.clone(),
            disk_size: disk.size,
        })
    }
}

/// The frames of the chunks at the front of `rest` that are here, back to back and so many that it is worth the while, and
/// what is left of `rest`.
fn frames_here(store: &Store, mut rest: vec::IntoIter<Digest>) -> Result<(Vec<u8>, vec::IntoIter<Digest>), ImageError> {
    let mut wire = Vec::with_capacity(PIECE + FRAME_HEADER_LEN + MAX_FRAME_LEN);
    while wire.len() < PIECE
        && let Some(digest) = rest.as_slice().first()
    {
        match append_frame(&mut wire, digest, |wire| store.append_frame(digest, wire)) {
            Ok(()) => drop(rest.next()),
            Err(e) if e.is_missing() => break,
            // What was read before it goes first; the next call says this.
            Err(_) if !wire.is_empty() => break,
            Err(e) => return Err(e.into()),
        }
    }
    Ok((wire, rest))
}

/// Refuses what no VM can be made from, before much is copied for it.
fn check(digest: Digest, manifest: &Manifest) -> Result<(), ImageError> {
    if manifest.kind != ImageKind::Disk {
        return Err(ImageError::NotADisk(digest));
    }
    let boot = manifest.boot.as_ref().ok_or(ImageError::NotBootable(digest))?;
    let named = [Some(DISK_PART), Some(boot.kernel.as_str()), boot.initrd.as_deref()];
    match named.into_iter().flatten().find(|part| !manifest.parts.contains_key(*part)) {
        Some(part) => Err(ImageError::NoPart { image: digest, part: part.to_owned() }),
        None => Ok(()),
    }
}

/// Runs what blocks on the disk beside the asynchronous tasks.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ImageError> + Send + 'static,
) -> Result<T, ImageError> {
    tokio::task::spawn_blocking(work).await.map_err(|_| ImageError::Aborted)?
}
