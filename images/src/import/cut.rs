//! Cutting a source into chunks and keeping them.
//!
//! The calling thread reads, some workers hash, compress and write. Buffers go round: no more are made than are under way.

use std::collections::HashMap;
use std::num::NonZero;
use std::ops::{ControlFlow, Range};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, Sender, channel, sync_channel};

use bedplate_api::Digest;
use bedplate_api::image::Part;

use super::source::Source;
use super::{ImportError, Progress};
use crate::frame::CHUNK_SIZE;
use crate::index::{Index, chunk_count, chunk_len};
use crate::{Store, StoreError};

/// More would wait for the disk.
const MAX_WORKERS: usize = 8;

/// A chunk on its way to a worker, or back.
struct Job {
    number: u64,
    plain: Vec<u8>,
}

struct Done {
    job: Job,
    digest: Result<Digest, StoreError>,
}

/// What came of a part, chunk by chunk.
struct Tally {
    digests: Vec<Digest>,
    /// Length of each distinct chunk.
    distinct: HashMap<Digest, u32>,
    under_way: usize,
}

impl Tally {
    fn take(&mut self, done: Done) -> Result<Vec<u8>, StoreError> {
        self.under_way -= 1;
        let digest = done.digest?;
        // The number is below the count, which is the length.
        self.digests[done.job.number as usize] = digest;
        if digest != Digest::ZERO {
            self.distinct.insert(digest, done.job.plain.len() as u32);
        }
        Ok(done.job.plain)
    }
}

/// Keeps the whole of `source` in `store` and returns it as a part. `stopped` makes the error for a caller that had enough.
pub(super) fn put_part(
    store: &Store,
    source: &mut dyn Source,
    progress: &mut Progress<'_>,
    stopped: impl Fn() -> ImportError,
) -> Result<Part, ImportError> {
    let size = source.size();
    let mut tally = Tally {
        // Zeroed pages cost nothing until they are written, so a huge empty disk does not cost a huge index here.
        digests: vec![Digest::ZERO; chunk_count(size) as usize],
        distinct: HashMap::new(),
        under_way: 0,
    };
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
        let mut next = 0;
        while let Some(range) = next_chunks(source, next)? {
            for number in range.clone() {
                while let Ok(done) = results.try_recv() {
                    spare.push(tally.take(done)?);
                }
                let mut plain = spare.pop().unwrap_or_default();
                plain.resize(chunk_len(size, number), 0);
                source.read_at(&mut plain, number * CHUNK_SIZE as u64)?;
                tally.under_way += 1;
                if to_workers.send(Job { number, plain }).is_err() {
                    break;
                }
                if progress((number * CHUNK_SIZE as u64).min(size), size).is_break() {
                    return Err(stopped());
                }
            }
            next = range.end;
        }
        while tally.under_way > 0 {
            // A worker that is gone panicked; the scope passes that on.
            let Ok(done) = results.recv() else { break };
            tally.take(done)?;
        }
        Ok(())
    })?;
    // Nobody is left to stop it.
    let _: ControlFlow<()> = progress(size, size);
    finish(store, size, tally)
}

fn finish(store: &Store, size: u64, tally: Tally) -> Result<Part, ImportError> {
    let content = tally.distinct.values().map(|len| u64::from(*len)).sum();
    let index = Index::new(size, tally.digests).map_err(|cause| StoreError::Index { digest: Digest::ZERO, cause })?;
    Ok(Part { size, index: store.put_blob(&index.encode())?, content })
}

/// The next run of chunks, from `first` on, that are not known to be zeros.
fn next_chunks(source: &mut dyn Source, first: u64) -> Result<Option<Range<u64>>, ImportError> {
    let chunk = CHUNK_SIZE as u64;
    let range = source.next_data(first.saturating_mul(chunk))?;
    Ok(range.map(|range| (range.start / chunk).max(first)..range.end.div_ceil(chunk)))
}

fn work(store: &Store, jobs: &Mutex<Receiver<Job>>, to_reader: &Sender<Done>) {
    loop {
        // The lock is held only while waiting for one job; a poisoned one means that another worker panicked.
        let Ok(Ok(job)) = jobs.lock().map(|jobs| jobs.recv()) else { return };
        let digest = store.put_chunk(&job.plain);
        if to_reader.send(Done { job, digest }).is_err() {
            return;
        }
    }
}
