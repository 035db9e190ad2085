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
use bedplate_api::client::Client;
use bedplate_api::vmm::chunks::{Arrival, MAX_WANTED, NOTED_SECONDS, Note};
use bedplate_images::frame;
use bedplate_images::store::PartReader;
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
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

/// How long a group is tried for. A guest has got its I/O error long before.
const GIVE_UP: Duration = Duration::from_secs(600);
/// How long a VMM may leave unread what it is told.
const PATIENCE: Duration = Duration::from_secs(5);
/// What a chunk costs the VM that wants it although it is here.
const PER_CHUNK_HERE: Duration = Duration::from_millis(10);

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
    ahead: Semaphore,
}

/// What became of a chunk that was wanted.
enum Outcome {
    Here(u64),
    /// It did not come for so long that nobody waits for it any more; it may be wanted again.
    GivenUp(u64),
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
    let mut shelf: Option<Arc<Shelf>> = None;
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
                    let (images, fetcher) = (images.clone(), fetcher.clone());
                    let (groups, ahead) = (Semaphore::new(GROUPS), Semaphore::new(1));
                    shelf = Some(Arc::new(Shelf { images, fetcher, image, part, groups, ahead }));
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
    /// Answers until the other end has gone, or says what makes no sense, or does not read what it is told.
    async fn converse(self: &Arc<Self>, mut stream: UnixStream, recording: &mut Option<Recording>) -> io::Result<()> {
        let (mut reader, mut writer) = stream.split();
        let mut buffer = [0; Note::LEN * MAX_WANTED];
        let mut held = 0;
        // On tasks of their own, which end with this: what they have claimed must not wait for a VMM that does not read.
        let mut deliveries = JoinSet::new();
        let (outcomes, mut arrived) = mpsc::unbounded_channel();
        // Wanted and not answered; with it the channel is bounded, too.
        let mut open = HashSet::new();
        let booted = Instant::now() + Duration::from_secs(NOTED_SECONDS);
        loop {
            tokio::select! {
                // Who wants too much is not listened to until some of it has come.
                count = reader.read(&mut buffer[held..]), if open.len() < 2 * MAX_WANTED => {
                    let count = count?;
                    held += count;
                    if count == 0 {
                        self.teach(recording);
                        return Ok(());
                    }
                }
                Some(outcome) = arrived.recv() => {
                    let (Outcome::Here(number) | Outcome::GivenUp(number)) = outcome;
                    open.remove(&number);
                    if matches!(outcome, Outcome::Here(_)) {
                        say(&mut writer, &Arrival::Here(number).encode()).await?;
                    }
                    continue;
                }
                Some(_ended) = deliveries.join_next() => continue,
                () = sleep_until(booted), if recording.is_some() => {
                    self.teach(recording);
                    continue;
                }
            }
            let (notes, rest) = buffer[..held].as_chunks();
            let notes: Option<Vec<Note>> = notes.iter().map(|bytes| Note::parse(*bytes)).collect();
            let notes = notes.ok_or(io::ErrorKind::InvalidData)?;
            let rest = rest.to_vec();
            buffer[..rest.len()].copy_from_slice(&rest);
            held = rest.len();
            let (mut wanted, mut refused) = (Vec::new(), Vec::new());
            for note in notes {
                let (Note::Wants(number) | Note::Read(number)) = note;
                if number >= self.part.count() {
                    refused.extend(Arrival::Refused(number).encode());
                    continue;
                }
                if let Some(recording) = recording {
                    recording.add(number);
                }
                if matches!(note, Note::Wants(_)) && open.insert(number) {
                    wanted.push(number);
                }
            }
            say(&mut writer, &refused).await?;
            if !wanted.is_empty() {
                deliveries.spawn(Arc::clone(self).deliver(wanted, outcomes.clone()));
            }
        }
    }

    /// Gets all of `wanted`, together if that goes, and tells of each when it is in the store and whole.
    async fn deliver(self: Arc<Self>, mut wanted: Vec<u64>, outcomes: mpsc::UnboundedSender<Outcome>) {
        let begun = Instant::now();
        let mut wait = FIRST_WAIT;
        loop {
            let failed = {
                // The semaphore is never closed.
                let _group = self.groups.acquire().await;
                self.deliver_once(&mut wanted, &outcomes).await
            };
            let Some(error) = failed else { break };
            tracing::debug!("image {}: a guest waits for chunk {}: {error}", self.image.short(), wanted[0]);
            self.fetcher.hold_up(self.image, Some(format!("a guest waits for a part of the image: {error}")));
            if begun.elapsed() > GIVE_UP {
                wanted.iter().for_each(|number| drop(outcomes.send(Outcome::GivenUp(*number))));
                break;
            }
            sleep(wait).await;
            wait = (wait * 2).min(MAX_WAIT);
        }
        if wait > FIRST_WAIT {
            self.fetcher.hold_up(self.image, None);
        }
    }

    /// One attempt. What has come is told and taken out of `wanted`; why the rest, if there is any, has not.
    async fn deliver_once(
        &self,
        wanted: &mut Vec<u64>,
        outcomes: &mpsc::UnboundedSender<Outcome>,
    ) -> Option<ImageError> {
        let here = |number: &u64| drop(outcomes.send(Outcome::Here(*number)));
        let mut error = match self.try_deliver(wanted).await {
            Ok(()) => {
                wanted.iter().for_each(here);
                self.read_ahead(wanted).await;
                return None;
            }
            Err(error) => error,
        };
        // One that cannot be had must not keep the others. Where the source is away, or the disk full, none can be had.
        let some_can_be_had = match &error {
            ImageError::Client(error) => Client::is_not_found(error),
            error => !error.is_no_space(),
        };
        if some_can_be_had && wanted.len() > 1 {
            let mut left = Vec::new();
            for number in wanted.drain(..) {
                match self.try_deliver(&[number]).await {
                    Ok(()) => here(&number),
                    Err(e) => {
                        error = e;
                        left.push(number);
                    }
                }
            }
            *wanted = left;
        }
        if wanted.is_empty() { None } else { Some(error) }
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
        let read = blocking(move || {
            let mut plain = frame::chunk_buffer();
            let mut read = 0;
            for digest in here.iter().filter(|digest| store.has_chunk(digest)) {
                read += 1;
                match store.read_chunk(digest, &mut plain) {
                    Err(e) if !e.is_missing() => return Err(e.into()),
                    _ => {}
                }
            }
            Ok(read)
        })
        .await?;
        // An honest VMM seldom wants what is here; another one shall not have our processor for it.
        sleep(PER_CHUNK_HERE * read).await;
        self.fetcher.get(self.image, &digests, Urgency::Guest).await
    }

    /// Gets what a guest probably wants next, one group at a time for each VM.
    async fn read_ahead(&self, wanted: &[u64]) {
        let Ok(_turn) = self.ahead.try_acquire() else { return };
        let Some(last) = wanted.iter().max() else { return };
        let next = (last + 1..self.part.count()).take(READ_AHEAD as usize);
        let digests: Vec<Digest> = next.filter_map(|number| self.part.digest(number).ok()).collect();
        // Should it fail, it is fetched when it is wanted.
        let _hint = self.fetcher.get(self.image, &digests, Urgency::Guest).await;
    }

    /// Tells the control node what the boot has read, once. Not waited for: it may be away.
    fn teach(&self, recording: &mut Option<Recording>) {
        let Some(recording) = recording.take() else { return };
        let (images, image) = (self.images.clone(), self.image);
        tokio::spawn(async move {
            if let Err(e) = images.learned(image, recording).await {
                tracing::info!("image {}: what its boot reads was not told on: {e}", image.short());
            }
        });
    }
}

/// Writes to a VMM, which must read.
async fn say(writer: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> io::Result<()> {
    timeout(PATIENCE, writer.write_all(bytes)).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
