//! Cutting a source into chunks and keeping them.
//!
//! The calling thread reads, some workers hash, compress and write. Buffers go round: no more are made than are under way.

use std::collections::HashMap;
use std::io::Read;
use std::num::NonZero;
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};

use bedplate_api::Digest;
use bedplate_api::image::Part;

use super::format::Format;
use super::source::Source;
use super::unpack::{failed, read_full};
use super::{ImportError, MAX_IMPORT_SIZE, Progress};
use crate::frame::CHUNK_SIZE;
use crate::index::{Index, chunk_count, chunk_len};
use crate::{Store, StoreError};

/// More would wait for the disk.
const MAX_WORKERS: usize = 8;

/// Chunks between two looks at the free space: 64 MiB, which is less than what is kept free.
const LOOK_EVERY: u64 = 1024;

/// Never fill a disk to the last byte: others write there too.
pub(super) const KEEP_FREE: u64 = 128 << 20;

/// Where the chunks of a part come from, in order.
pub(super) trait Feed {
    /// Fills `plain` with the next chunk that may hold anything but zeros, and returns its number; `None` at the end.
    fn next(&mut self, plain: &mut Vec<u8>) -> Result<Option<u64>, ImportError>;
    /// Size of the part; known at the end at the latest.
    fn size(&self) -> u64;
    /// How far it has come, of how much; 0 where nobody knows.
    fn progress(&self) -> (u64, u64);
}

/// A source with holes, which are passed over.
pub(super) struct Holey<'a> {
    source: &'a mut dyn Source,
    left: Range<u64>,
}

impl<'a> Holey<'a> {
    pub(super) fn new(source: &'a mut dyn Source) -> Self {
        Self { source, left: 0..0 }
    }
}

impl Feed for Holey<'_> {
    fn next(&mut self, plain: &mut Vec<u8>) -> Result<Option<u64>, ImportError> {
        if self.left.is_empty() {
            match next_chunks(self.source, self.left.end)? {
                Some(chunks) => self.left = chunks,
                None => return Ok(None),
            }
        }
        let number = self.left.start;
        plain.resize(chunk_len(self.size(), number), 0);
        self.source.read_at(plain, number * CHUNK_SIZE as u64)?;
        self.left.start += 1;
        Ok(Some(number))
    }

    fn size(&self) -> u64 {
        self.source.size()
    }

    fn progress(&self) -> (u64, u64) {
        ((self.left.start * CHUNK_SIZE as u64).min(self.size()), self.size())
    }
}

/// The next run of chunks, from `first` on, that are not known to be zeros.
fn next_chunks(source: &mut dyn Source, first: u64) -> Result<Option<Range<u64>>, ImportError> {
    let chunk = CHUNK_SIZE as u64;
    let range = source.next_data(first.saturating_mul(chunk))?;
    Ok(range.map(|range| (range.start / chunk).max(first)..range.end.div_ceil(chunk)))
}

/// A stream, whose length is known when it ends.
pub(super) struct Flow<'a> {
    reader: &'a mut dyn Read,
    /// For errors.
    path: &'a Path,
    /// How it was packed, if it was.
    packing: Option<Format>,
    /// How far the reading has come.
    position: &'a dyn Fn() -> (u64, u64),
    /// Bytes that came so far.
    size: u64,
    /// The last 512 of them.
    tail: Vec<u8>,
}

impl<'a> Flow<'a> {
    pub(super) fn new(
        reader: &'a mut dyn Read,
        path: &'a Path,
        packing: Option<Format>,
        position: &'a dyn Fn() -> (u64, u64),
    ) -> Self {
        Self { reader, path, packing, position, size: 0, tail: Vec::new() }
    }

    /// The last 512 bytes.
    pub(super) fn tail(&self) -> &[u8] {
        &self.tail
    }
}

impl Feed for Flow<'_> {
    fn next(&mut self, plain: &mut Vec<u8>) -> Result<Option<u64>, ImportError> {
        let number = self.size / CHUNK_SIZE as u64;
        plain.resize(CHUNK_SIZE, 0);
        let len = read_full(self.reader, plain).map_err(failed(self.path, self.packing))?;
        plain.truncate(len);
        if len == 0 {
            return Ok(None);
        }
        self.size += len as u64;
        self.tail = plain[len.saturating_sub(512)..].to_vec();
        if self.size > MAX_IMPORT_SIZE {
            return Err(ImportError::TooLarge { path: self.path.to_owned(), size: self.size, most: MAX_IMPORT_SIZE });
        }
        Ok(Some(number))
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn progress(&self) -> (u64, u64) {
        (self.position)()
    }
}

/// A chunk on its way to a worker, or back.
struct Job {
    number: u64,
    plain: Vec<u8>,
}

struct Done {
    job: Job,
    /// And whether the chunk was not there before.
    kept: Result<(Digest, bool), StoreError>,
}

/// What came of a part, chunk by chunk.
#[derive(Default)]
struct Tally {
    digests: Vec<Digest>,
    /// Length of each distinct chunk, and whether it was not there before.
    distinct: HashMap<Digest, (u32, bool)>,
    under_way: usize,
}

impl Tally {
    fn take(&mut self, done: Done) -> Result<Vec<u8>, StoreError> {
        self.under_way -= 1;
        let (digest, new) = done.kept?;
        if digest != Digest::ZERO {
            // Below 2^48, the chunks of the largest part.
            let number = done.job.number as usize;
            if self.digests.len() <= number {
                self.digests.resize(number + 1, Digest::ZERO);
            }
            self.digests[number] = digest;
            // The same chunk may come twice, and the second be reported before the first, which wrote it.
            let entry = self.distinct.entry(digest).or_insert((done.job.plain.len() as u32, new));
            entry.1 |= new;
        }
        Ok(done.job.plain)
    }
}

/// A part that is in the store.
pub(super) struct Kept {
    pub(super) part: Part,
    /// Its distinct chunks.
    pub(super) chunks: u64,
    /// Those of them that were in the store before.
    pub(super) reused: u64,
}

/// Keeps all that `feed` gives in `store`. `stopped` makes the error for a caller that had enough.
pub(super) fn put_part(
    store: &Store,
    feed: &mut dyn Feed,
    progress: &mut Progress<'_>,
    stopped: impl Fn() -> ImportError,
) -> Result<Kept, ImportError> {
    let mut tally = Tally::default();
    let workers = std::thread::available_parallelism().map_or(1, NonZero::get).min(MAX_WORKERS);
    let (to_workers, jobs) = sync_channel::<Job>(2 * workers);
    let (to_reader, results) = channel::<Done>();
    let jobs = Mutex::new(jobs);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            let (jobs, to_reader) = (&jobs, to_reader.clone());
            scope.spawn(move || work(store, jobs, &to_reader));
        }
        // With its own sender gone, the reader hears when no worker is left; and the workers end when `to_workers`, moved
        // in below, is dropped, which happens on every way out.
        drop(to_reader);
        let to_workers = to_workers;
        let mut spare: Vec<Vec<u8>> = Vec::new();
        for count in 0_u64.. {
            if count.is_multiple_of(LOOK_EVERY) {
                store.need_space("the import", KEEP_FREE)?;
            }
            while let Ok(done) = results.try_recv() {
                spare.push(tally.take(done)?);
            }
            let mut plain = spare.pop().unwrap_or_default();
            let Some(number) = feed.next(&mut plain)? else { break };
            tally.under_way += 1;
            if to_workers.send(Job { number, plain }).is_err() {
                break;
            }
            let (done, total) = feed.progress();
            if progress(done, total).is_break() {
                return Err(stopped());
            }
        }
        while tally.under_way > 0 {
            // A worker that is gone panicked; the scope passes that on.
            let Ok(done) = results.recv() else { break };
            tally.take(done)?;
        }
        Ok(())
    })?;
    let (done, total) = feed.progress();
    // Nobody is left to stop it.
    let _: ControlFlow<()> = progress(total.max(done), total);
    finish(store, feed.size(), tally)
}

fn finish(store: &Store, size: u64, mut tally: Tally) -> Result<Kept, ImportError> {
    let (content, new) =
        tally.distinct.values().fold((0, 0), |(sum, new), (len, is)| (sum + u64::from(*len), new + u64::from(*is)));
    let chunks = tally.distinct.len() as u64;
    drop(tally.distinct);
    tally.digests.resize(chunk_count(size) as usize, Digest::ZERO);
    let index = Index::new(size, tally.digests).map_err(|cause| StoreError::Index { digest: Digest::ZERO, cause })?;
    let part = Part { size, index: store.put_blob(&index.encode())?, content };
    Ok(Kept { part, chunks, reused: chunks - new })
}

fn work(store: &Store, jobs: &Mutex<Receiver<Job>>, to_reader: &Sender<Done>) {
    loop {
        // The lock is held only while waiting for one job; a poisoned one means that another worker panicked.
        let Ok(Ok(job)) = jobs.lock().map(|jobs| jobs.recv()) else { return };
        let kept = store.keep_chunk(&job.plain);
        if to_reader.send(Done { job, kept }).is_err() {
            return;
        }
    }
}
