//! Getting a VM what its image lacks here, while it runs: the agent's end of [`bedplate_api::vmm::chunks`].
//!
//! One socket for each VM, in a directory that only its VMM sees, so that who asks is known by the socket. A VMM may have been
//! taken over by its guest: all that it can say are numbers of chunks of its own image, a bounded number at a time, and all
//! that it gets is that these come into the store, each once. It may be gone any time and connect again, and so may we.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bedplate_api::Digest;
use bedplate_api::vmm::chunks::{Arrival, MAX_WANTED, NOTED_SECONDS, Note};
use bedplate_images::frame;
use bedplate_images::store::PartReader;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::task::AbortOnDropHandle;

use super::fetch::{Fetcher, Urgency};
use super::order::Recording;
use super::{DISK_PART, ImageError, Images, blocking};
use crate::files::FileError;

/// Waits between two attempts to get what a guest waits for: short at first, since a guest stands still.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const MAX_WAIT: Duration = Duration::from_secs(2);
/// Chunks after one that is wanted that are got with it: guests read files from front to back.
const READ_AHEAD: u64 = 4;
/// Groups of chunks that are being got for one VM at a time. More wait: one VM shall not have all of the line.
const GROUPS: usize = 4;

/// Serves one VM while it lives.
#[derive(Debug)]
pub struct Supply {
    _task: AbortOnDropHandle<()>,
}

/// What one VM is served from.
struct Shelf {
    images: Images,
    fetcher: Arc<Fetcher>,
    image: Digest,
    part: PartReader,
    groups: Semaphore,
}

impl Supply {
    /// Serves chunks of the disk of `image` on `socket`, which only `owner` may connect to. With `records`, what the boot
    /// reads is learned. None where there is nowhere to get chunks from.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn open(
        images: &Images,
        image: Digest,
        socket: &Path,
        owner: Option<u32>,
        records: bool,
    ) -> Result<Option<Self>, FileError> {
        let Some(fetcher) = images.fetcher.clone() else { return Ok(None) };
        if let Some(dir) = socket.parent() {
            fs::create_dir_all(dir).map_err(FileError::io("create", dir))?;
        }
        crate::files::remove(socket)?;
        let listener = UnixListener::bind(socket).map_err(FileError::io("listen on", socket))?;
        let give = || -> io::Result<()> {
            fs::set_permissions(socket, fs::Permissions::from_mode(0o600))?;
            // Last: then it is the other's.
            owner.map_or(Ok(()), |id| std::os::unix::fs::lchown(socket, Some(id), Some(id)))
        };
        give().map_err(FileError::io("give away", socket))?;
        let task = tokio::spawn(serve(listener, images.clone(), fetcher, image, records));
        Ok(Some(Self { _task: AbortOnDropHandle::new(task) }))
    }
}

/// Serves one connection after the other: a VMM needs one, and makes another when its disk is exchanged.
async fn serve(listener: UnixListener, images: Images, fetcher: Arc<Fetcher>, image: Digest, records: bool) {
    let store = images.store.clone();
    let mut recording = records.then(Recording::default);
    let mut stream: Option<UnixStream> = None;
    let mut shelf: Option<Shelf> = None;
    loop {
        let Some(connected) = stream.take() else {
            match listener.accept().await {
                Ok((accepted, _)) => stream = Some(accepted),
                // Out of descriptors, which passes.
                Err(_) => sleep(FIRST_WAIT).await,
            }
            continue;
        };
        if shelf.is_none() {
            let store = store.clone();
            match blocking(move || Ok(store.part(&image, DISK_PART)?)).await {
                Ok(part) => {
                    let (images, fetcher, groups) = (images.clone(), fetcher.clone(), Semaphore::new(GROUPS));
                    shelf = Some(Shelf { images, fetcher, image, part, groups });
                }
                Err(e) => {
                    tracing::warn!("image {}: no chunks can be got for a VM: {e}", image.short());
                    sleep(MAX_WAIT).await;
                    continue;
                }
            }
        }
        if let Some(shelf) = &shelf {
            tokio::select! {
                _gone = shelf.converse(connected, &mut recording) => {}
                // A newer connection takes the older one's place: there is one VMM.
                Ok((accepted, _)) = listener.accept() => stream = Some(accepted),
            }
        }
    }
}

impl Shelf {
    /// Answers until the other end has gone, or says what makes no sense.
    async fn converse(&self, mut stream: UnixStream, recording: &mut Option<Recording>) -> io::Result<()> {
        let (mut reader, mut writer) = stream.split();
        let mut buffer = [0; Note::LEN * MAX_WANTED];
        let mut held = 0;
        let mut deliveries = FuturesUnordered::new();
        // Wanted and not answered.
        let mut open = HashSet::new();
        let booted = Instant::now() + Duration::from_secs(NOTED_SECONDS);
        loop {
            tokio::select! {
                // Who wants too much is not listened to until some of it has come.
                count = reader.read(&mut buffer[held..]), if open.len() < 2 * MAX_WANTED => {
                    let count = count?;
                    held += count;
                    if count == 0 {
                        self.teach(recording).await;
                        return Ok(());
                    }
                }
                Some(delivered) = deliveries.next() => {
                    let delivered: Vec<u64> = delivered;
                    open.retain(|number| !delivered.contains(number));
                    let answers: Vec<u8> =
                        delivered.iter().flat_map(|number| Arrival::Here(*number).encode()).collect();
                    writer.write_all(&answers).await?;
                    continue;
                }
                () = sleep_until(booted), if recording.is_some() => {
                    self.teach(recording).await;
                    continue;
                }
            }
            let (notes, rest) = buffer[..held].as_chunks();
            let notes: Option<Vec<Note>> = notes.iter().map(|bytes| Note::parse(*bytes)).collect();
            let notes = notes.ok_or(io::ErrorKind::InvalidData)?;
            let rest = rest.to_vec();
            buffer[..rest.len()].copy_from_slice(&rest);
            held = rest.len();
            let mut wanted = Vec::new();
            for note in notes {
                let (Note::Wants(number) | Note::Read(number)) = note;
                if number >= self.part.count() {
                    writer.write_all(&Arrival::Refused(number).encode()).await?;
                    continue;
                }
                if let Some(recording) = recording {
                    recording.add(number);
                }
                if matches!(note, Note::Wants(_)) && open.insert(number) {
                    wanted.push(number);
                }
            }
            if !wanted.is_empty() {
                deliveries.push(self.deliver(wanted));
            }
        }
    }

    /// Returns `wanted` when all of it is in the store and whole, however long that takes.
    async fn deliver(&self, wanted: Vec<u64>) -> Vec<u64> {
        // The semaphore is never closed.
        let _group = self.groups.acquire().await;
        let mut wait = FIRST_WAIT;
        while let Err(e) = self.try_deliver(&wanted).await {
            tracing::debug!("image {}: a guest waits for chunk {}: {e}", self.image.short(), wanted[0]);
            self.fetcher.hold_up(self.image, Some(format!("a guest waits for a part of the image: {e}")));
            sleep(wait).await;
            wait = (wait * 2).min(MAX_WAIT);
        }
        if wait > FIRST_WAIT {
            self.fetcher.hold_up(self.image, None);
        }
        wanted
    }

    async fn try_deliver(&self, wanted: &[u64]) -> Result<(), ImageError> {
        let mut digests = Vec::with_capacity(wanted.len());
        for number in wanted {
            let digest = self.part.digest(*number)?;
            if digest != Digest::ZERO {
                digests.push(digest);
            }
        }
        // What is here and still wanted may be damaged: reading it sets it aside.
        let (store, here) = (self.images.store.clone(), digests.clone());
        blocking(move || {
            let mut plain = frame::chunk_buffer();
            for digest in here.iter().filter(|digest| store.has_chunk(digest)) {
                match store.read_chunk(digest, &mut plain) {
                    Err(e) if !e.is_missing() => return Err(e.into()),
                    _ => {}
                }
            }
            Ok(())
        })
        .await?;
        self.fetcher.get(&digests, Urgency::Guest).await?;
        self.read_ahead(wanted);
        Ok(())
    }

    /// Gets what a guest probably wants next, in the background.
    fn read_ahead(&self, wanted: &[u64]) {
        let Some(last) = wanted.iter().max() else { return };
        let next = (last + 1..self.part.count()).take(READ_AHEAD as usize);
        let digests: Vec<Digest> = next.filter_map(|number| self.part.digest(number).ok()).collect();
        let fetcher = self.fetcher.clone();
        tokio::spawn(async move {
            // Should it fail, it is fetched when it is wanted.
            let _hint = fetcher.get(&digests, Urgency::Guest).await;
        });
    }

    async fn teach(&self, recording: &mut Option<Recording>) {
        if let Some(recording) = recording.take()
            && let Err(e) = self.images.learned(self.image, recording).await
        {
            tracing::info!("image {}: what its boot reads was not told on: {e}", self.image.short());
        }
    }
}
