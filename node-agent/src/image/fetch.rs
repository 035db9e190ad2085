//! Chunks from peers and from the repository into the node's store, for everybody on this node who wants some.
//!
//! A chunk is on its way once, however many want it. What a guest waits for goes before the rest of a copy: it is asked for
//! at once, and the next batch of a copy lets it pass. Memory is bounded by the frames in hand, [`STEP`] per request.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bedplate_api::client::{Client, Frames};
use bedplate_api::image::PeerChunks;
use bedplate_api::{Digest, NodeId};
use bedplate_images::{Store, StoreError, frame};
use bytes::Bytes;
use futures_util::{FutureExt, Stream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use super::peers::{Peers, wait_seconds};
use super::{DamagedChunk, ImageError, KEEP_FREE, blocking};

/// How long a batch of a copy lets what guests wait for go first: a source that does not answer must not stop copies, whose
/// failure says so.
const GIVE_WAY: Duration = Duration::from_secs(1);

/// Chunks that are kept in one step at most: with four batches in flight 4 MiB. A step is another thread's; with a chunk in each,
/// waking it and waiting for it took 8 in 100 of what a node does for a copy.
const STEP: usize = 16;

/// How much a node may copy at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyLimits {
    /// Batches in flight, of each image.
    pub parallel: usize,
    /// Bytes a second, as they are sent; none is no limit. What guests wait for counts, and does not wait.
    pub bytes_per_second: Option<u64>,
}

impl Default for CopyLimits {
    fn default() -> Self {
        Self { parallel: 4, bytes_per_second: None }
    }
}

/// Who wants chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Urgency {
    /// A guest waits, or the start of one.
    Guest,
    /// A copy goes on.
    Copy,
}

/// How long a guest waits for chunks that a copy is getting, perhaps from a slow peer.
const FLIGHT: Duration = Duration::from_secs(3);
/// How long a peer may take for a batch beyond what it waits for itself.
const PEER_SLOWNESS: Duration = Duration::from_secs(4);

/// Bytes that came, as they were sent.
#[derive(Debug, Default)]
struct Received {
    from_peers: AtomicU64,
    from_repository: AtomicU64,
}

/// The way from other nodes and from the repository into the store.
#[derive(Debug)]
pub(super) struct Fetcher {
    store: Store,
    source: Client,
    /// The same place by connections of their own, which run on the threads of copies.
    source_of_copies: Client,
    /// Other nodes, where this one may ask them.
    peers: Option<Peers>,
    received: Received,
    limits: CopyLimits,
    /// Chunks on their way; who waits for one is told when that is over, well or not. Never locked over an await.
    flights: Mutex<HashMap<Digest, watch::Receiver<()>>>,
    /// Requests under way for which a guest waits.
    urgent: watch::Sender<usize>,
    /// Counts requests for guests that were answered: then the source is there.
    answered: watch::Sender<u64>,
    /// The image that a guest lacked something of last, and why that cannot be had, if so.
    held_up: watch::Sender<(Digest, Option<String>)>,
    /// When the next batch of a copy may begin, by the rate.
    next: Mutex<Instant>,
}

impl Fetcher {
    pub(super) fn new(store: Store, source: Client, limits: CopyLimits) -> Self {
        let (flights, next) = (Mutex::default(), Mutex::new(Instant::now()));
        let (urgent, answered) = (watch::Sender::new(0), watch::Sender::new(0));
        let held_up = watch::Sender::new((Digest::ZERO, None));
        let (peers, received) = (None, Received::default());
        let source_of_copies = source.another();
        Self { store, source, source_of_copies, peers, received, limits, flights, urgent, answered, held_up, next }
    }

    /// From now on others are asked first, as node `id`.
    pub(super) fn share(&mut self, id: NodeId, token: String) {
        self.peers = Some(Peers::new(id, token));
    }

    /// MiB that have come from the repository and from other nodes since the start.
    pub(super) fn received_mib(&self) -> (u64, u64) {
        let mib = |bytes: &AtomicU64| bytes.load(Ordering::Relaxed) >> 20;
        (mib(&self.received.from_repository), mib(&self.received.from_peers))
    }

    /// Ends when chunk `digest`, if it is on its way here, has landed or failed to.
    pub(super) async fn landing(&self, digest: &Digest) {
        let flight = self.flights().get(digest).cloned();
        if let Some(mut flight) = flight {
            // The end of the flight closes the channel.
            let _over = flight.changed().await;
        }
    }

    /// For what a start of a guest waits for.
    pub(super) const fn source(&self) -> &Client {
        self.source_for(Urgency::Guest)
    }

    pub(super) const fn source_for(&self, urgency: Urgency) -> &Client {
        match urgency {
            Urgency::Guest => &self.source,
            Urgency::Copy => &self.source_of_copies,
        }
    }

    pub(super) const fn limits(&self) -> CopyLimits {
        self.limits
    }

    /// Returns when something comes for a guest: who waits for a source that failed may try again.
    pub(super) async fn answers(&self) {
        // The sender lives as long as this.
        let _changed = self.answered.subscribe().changed().await;
    }

    /// A guest waits for something of `image` that cannot be had, and why; or it has got it.
    pub(super) fn hold_up(&self, image: Digest, why: Option<String>) {
        self.held_up.send_replace((image, why));
    }

    /// Follows what [`Fetcher::hold_up`] says.
    pub(super) fn held_up(&self) -> watch::Receiver<(Digest, Option<String>)> {
        self.held_up.subscribe()
    }

    /// Returns when all of `wanted`, a batch at most of chunks of `image`, is in the store, or some of it cannot be had
    /// now. What has landed stays.
    pub(super) async fn get(&self, image: Digest, wanted: &[Digest], urgency: Urgency) -> Result<(), ImageError> {
        loop {
            if urgency == Urgency::Copy {
                self.give_way().await;
            }
            let (store, list) = (self.store.clone(), wanted.to_vec());
            let missing = blocking(move || Ok(store.missing(&list))).await?;
            if missing.is_empty() {
                return Ok(());
            }
            let (claim, others) = self.claim(&missing);
            if !claim.mine.is_empty() {
                self.fetch(claim, image, urgency).await?;
            }
            if others.is_empty() {
                // All that was missing was ours to fetch, and has landed.
                return Ok(());
            }
            let land = async {
                for mut other in others {
                    // The end of the flight closes the channel. If it failed, the next round tries it here.
                    let _over = other.changed().await;
                }
            };
            match urgency {
                Urgency::Copy => land.await,
                Urgency::Guest => {
                    if timeout(FLIGHT, land).await.is_err() {
                        self.overtake(image, wanted).await?;
                    }
                }
            }
        }
    }

    /// Waits until a copy may go on.
    async fn give_way(&self) {
        let mut urgent = self.urgent.subscribe();
        // After that time it goes on all the same.
        let _passed = timeout(GIVE_WAY, urgent.wait_for(|count| *count == 0)).await.is_ok();
        let next = *self.next();
        sleep_until(next).await;
    }

    async fn fetch(&self, mut claim: Claim<'_>, image: Digest, urgency: Urgency) -> Result<(), ImageError> {
        let _urgent = (urgency == Urgency::Guest).then(|| Urgent::begin(&self.urgent));
        self.store.need_space("copying the image", KEEP_FREE)?;
        let asked = claim.mine.len();
        if let Some(peers) = &self.peers {
            let located = peers.locate(self.source_for(urgency), image, &claim.order).await;
            let elsewhere: HashSet<Digest> = located.iter().flat_map(|peer| &peer.digests).copied().collect();
            // First what only the repository has: others may wait for it here.
            self.ask_repository(&mut claim, image, urgency, |digest| !elsewhere.contains(digest)).await?;
            for peer in located {
                let address = peer.address;
                if let Err(e) = self.ask_peer(&mut claim, image, peers, peer, urgency).await {
                    tracing::debug!("the node at {address} does not give chunks: {e}");
                    if !e.is_no_space() {
                        peers.rest(address);
                    }
                }
            }
        }
        self.ask_repository(&mut claim, image, urgency, |_| true).await?;
        match claim.mine.len() {
            0 => {
                if urgency == Urgency::Guest {
                    self.answered.send_modify(|count| *count = count.wrapping_add(1));
                }
                Ok(())
            }
            missing => Err(ImageError::NotSent { missing, asked }),
        }
    }

    /// Gets chunks from the repository although they are on their way here already: too slowly.
    async fn overtake(&self, image: Digest, wanted: &[Digest]) -> Result<(), ImageError> {
        let (store, list) = (self.store.clone(), wanted.to_vec());
        let mut missing = blocking(move || Ok(store.missing(&list))).await?;
        if missing.is_empty() {
            return Ok(());
        }
        let _urgent = Urgent::begin(&self.urgent);
        let mut frames = self.source.open_chunks(missing.clone()).await?;
        while let Some((digest, frame)) = next(&mut frames).await? {
            let at = missing.iter().position(|other| *other == digest).ok_or(ImageError::NotAsked(digest))?;
            missing.swap_remove(at);
            if let Err(e) = self.put(vec![(digest, frame)], &self.received.from_repository).await?.1 {
                return Err(examined(e, image, &self.source).await);
            }
        }
        Ok(())
    }

    /// Gets those of the claim that are `wanted` from the repository.
    async fn ask_repository(
        &self,
        claim: &mut Claim<'_>,
        image: Digest,
        urgency: Urgency,
        wanted: impl Fn(&Digest) -> bool,
    ) -> Result<(), ImageError> {
        let list = claim.open(wanted);
        if list.is_empty() {
            return Ok(());
        }
        let source = self.source_for(urgency);
        let mut frames = source.open_chunks(list).await?;
        match self.keep(claim, &mut frames, &self.received.from_repository).await {
            Err(e) => Err(examined(e, image, source).await),
            Ok(()) => Ok(()),
        }
    }

    /// Gets what `peer` has of the claim. A peer that sends less than it was asked for has not failed.
    async fn ask_peer(
        &self,
        claim: &mut Claim<'_>,
        image: Digest,
        peers: &Peers,
        peer: PeerChunks,
        urgency: Urgency,
    ) -> Result<(), ImageError> {
        let list = claim.open(|digest| peer.digests.contains(digest));
        if list.is_empty() {
            return Ok(());
        }
        let wait = wait_seconds(urgency);
        let patience = Duration::from_secs(wait) + PEER_SLOWNESS;
        let all = async {
            let client = peers.client(peer.address, urgency)?;
            let mut frames = client.open_peer_chunks(list, wait).await?;
            match self.keep(claim, &mut frames, &self.received.from_peers).await {
                Err(e) => Err(examined(e, image, &client).await),
                Ok(()) => Ok(()),
            }
        };
        timeout(patience, all).await.unwrap_or(Err(ImageError::PeerSlow(peer.address)))
    }

    /// Keeps the chunks of the claim that come, until no more do or one is not what was asked for or what it says it is.
    async fn keep<S, E>(
        &self,
        claim: &mut Claim<'_>,
        frames: &mut Frames<S>,
        counter: &AtomicU64,
    ) -> Result<(), ImageError>
    where
        S: Stream<Item = Result<Bytes, E>> + Unpin,
        E: std::fmt::Display,
    {
        loop {
            let (mut step, mut end) = arrived(frames).await;
            if let Some(at) = step.iter().position(|(digest, _)| !claim.mine.contains_key(digest)) {
                end = Some(Err(ImageError::NotAsked(step[at].0)));
                step.truncate(at);
            }
            // Whatever ends it, what came before that has landed.
            let (landed, kept) = self.put(step, counter).await?;
            landed.iter().for_each(|digest| claim.landed(digest));
            kept?;
            if let Some(end) = end {
                return end;
            }
        }
    }

    /// Verifies chunks and puts them into the store, up to the first that cannot be: those that are in, and why not the others.
    async fn put(
        &self,
        step: Vec<(Digest, Bytes)>,
        counter: &AtomicU64,
    ) -> Result<(Vec<Digest>, Result<(), ImageError>), ImageError> {
        let bytes = step.iter().map(|(_, frame)| frame.len()).sum();
        self.pay(bytes);
        counter.fetch_add(bytes as u64, Ordering::Relaxed);
        let store = self.store.clone();
        blocking(move || {
            let mut scratch = frame::chunk_buffer();
            let mut landed = Vec::with_capacity(step.len());
            for (digest, frame) in step {
                if let Err(e) = store.put_frame_with(&digest, &frame, &mut scratch) {
                    return Ok((landed, Err(e.into())));
                }
                landed.push(digest);
            }
            Ok((landed, Ok(())))
        })
        .await
    }

    /// Takes note of bytes that were sent.
    fn pay(&self, bytes: usize) {
        if let Some(rate) = self.limits.bytes_per_second {
            let takes = Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
            let mut next = self.next();
            *next = (*next).max(Instant::now()) + takes;
        }
    }

    /// Takes those of `missing` that are not on their way yet; the others come with what says when they are over.
    fn claim(&self, missing: &[Digest]) -> (Claim<'_>, Vec<watch::Receiver<()>>) {
        let mut claim = Claim { fetcher: self, mine: HashMap::new(), order: Vec::new() };
        let mut others = Vec::new();
        let mut flights = self.flights();
        for digest in missing {
            match flights.get(digest) {
                Some(flight) => others.push(flight.clone()),
                None => {
                    let (over, flight) = watch::channel(());
                    flights.insert(*digest, flight);
                    claim.mine.insert(*digest, over);
                    claim.order.push(*digest);
                }
            }
        }
        (claim, others)
    }

    fn flights(&self) -> MutexGuard<'_, HashMap<Digest, watch::Receiver<()>>> {
        // Nothing is done under it that could leave it half changed.
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> MutexGuard<'_, Instant> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn next<S, E>(frames: &mut Frames<S>) -> Result<Option<(Digest, Bytes)>, ImageError>
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
    E: std::fmt::Display,
{
    frames.next().await.map_err(ImageError::Frames)
}

/// The next chunk and those that have come with it, [`STEP`] at most: one that a guest waits for does not wait for others. Also
/// how the stream ended, if it did.
async fn arrived<S, E>(frames: &mut Frames<S>) -> (Vec<(Digest, Bytes)>, Option<Result<(), ImageError>>)
where
    S: Stream<Item = Result<Bytes, E>> + Unpin,
    E: std::fmt::Display,
{
    let mut step = Vec::new();
    let mut frame = Some(next(frames).await);
    loop {
        match frame {
            Some(Ok(Some(frame))) => step.push(frame),
            Some(Ok(None)) => return (step, Some(Ok(()))),
            Some(Err(e)) => return (step, Some(Err(e))),
            None => return (step, None),
        }
        if step.len() == STEP {
            return (step, None);
        }
        // What has come of a frame so far stays with `frames` when this gives up.
        frame = next(frames).now_or_never();
    }
}

/// What a failure was due to: who sent a chunk that is damaged is asked to look at its own copy, since chunks are sent as
/// they are stored.
async fn examined(error: ImageError, image: Digest, from: &Client) -> ImageError {
    let ImageError::Store(StoreError::FrameRefused { digest: chunk, cause }) = error else { return error };
    let found = match from.check_chunks(vec![chunk]).await {
        Ok(()) => "it is whole there now: it was damaged on the way, or another copy of it was".to_owned(),
        Err(e) => format!("asked to check it, that end says: {e}"),
    };
    ImageError::Damaged(Box::new(DamagedChunk { image, chunk, from: from.endpoint().clone(), cause, found }))
}

/// Chunks that this request fetches, and nobody else meanwhile.
struct Claim<'a> {
    fetcher: &'a Fetcher,
    mine: HashMap<Digest, watch::Sender<()>>,
    /// As they are to be sent.
    order: Vec<Digest>,
}

impl Claim<'_> {
    /// What has not landed and is `wanted`, in order.
    fn open(&self, wanted: impl Fn(&Digest) -> bool) -> Vec<Digest> {
        self.order.iter().filter(|digest| self.mine.contains_key(*digest) && wanted(digest)).copied().collect()
    }

    fn landed(&mut self, digest: &Digest) {
        self.fetcher.flights().remove(digest);
        self.mine.remove(digest);
    }
}

impl Drop for Claim<'_> {
    /// What has not landed is anybody's again.
    fn drop(&mut self) {
        let mut flights = self.fetcher.flights();
        self.mine.keys().for_each(|digest| drop(flights.remove(digest)));
    }
}

/// A request for which a guest waits, while it lives.
struct Urgent<'a>(&'a watch::Sender<usize>);

impl<'a> Urgent<'a> {
    fn begin(count: &'a watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count)
    }
}

impl Drop for Urgent<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}
