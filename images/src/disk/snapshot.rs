//! A disk as it is at one moment: copied, sent to where its image is whole, and written out flat.
//!
//! The stream, all numbers little-endian:
//!
//! ```text
//! 8    "bpdisk1\n"
//! 32   digest of the image that it is a child of
//! 8    size of the disk in bytes
//! …    the map, as in the file
//! …    the clusters that the map says are in `data`, in order; the last of a disk may be short
//! 32   BLAKE3 of all that comes before
//! ```

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bedplate_api::Digest;

use super::map::{CLUSTER, Map, State};
use super::{Disk, DiskError, Mode, Spec, fork, io_at, make_files, write_spec};
use crate::import::Progress;
use crate::manifest::DISK;
use crate::store::{Store, need_space, sync_dir};
use crate::{CHUNK_SIZE, StoreError};

const MAGIC: &[u8; 8] = b"bpdisk1\n";
const HEAD_LEN: usize = 48;
/// A copy leaves so much of the file system free: the guests write there, too.
const KEEP_FREE: u64 = 64 << 20;
const SUM_LEN: usize = 32;

/// A sent disk that cannot be received.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The sender.
    #[error("the disk did not arrive whole: {0}")]
    Broken(io::Error),
    /// Not what it should be.
    #[error("what arrived is not the disk that was asked for: {0}")]
    Other(String),
    /// On the way.
    #[error("the disk was damaged on its way: try again")]
    Damaged,
    /// Here.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

impl From<StoreError> for ReceiveError {
    fn from(error: StoreError) -> Self {
        Self::Disk(error.into())
    }
}

impl Disk {
    /// Copies the disk in `of` as it is now to the new directory `dir`, and opens the copy, which is persistent. The disk
    /// may be open elsewhere, if no guest learns meanwhile that something was flushed: a VM must be paused. What its guest
    /// has not flushed may be missing, as after a power cut. `wanted` is asked from time to time whether to go on.
    pub fn snapshot(of: &Path, dir: &Path, wanted: impl Fn() -> bool) -> Result<Self, DiskError> {
        let spec = Self::spec_of(of)?;
        if spec.shared {
            return Err(DiskError::SharedSnapshot { dir: of.to_owned() });
        }
        fs::create_dir(dir).map_err(io_at("create", dir))?;
        let content = fork::path(of, "data", 0);
        let found = fork::no_links().read(true).open(&content).and_then(|file| file.metadata());
        let blocks = std::os::unix::fs::MetadataExt::blocks(&found.map_err(io_at("examine", &content))?);
        need_space("the copy of the disk", dir, blocks.saturating_mul(512).saturating_add(KEEP_FREE))?;
        fork::copy_map(&fork::path(of, "map", 0), &fork::path(dir, "map", 0), spec.size)?;
        fork::copy_data(&content, &fork::path(dir, "data", 0), spec.size, || match wanted() {
            true => Ok(()),
            false => Err(io_at("copy", &content)(io::Error::new(
                io::ErrorKind::Interrupted,
                "it took too long, or nobody waits",
            ))),
        })?;
        write_spec(&Spec { mode: Mode::Persistent, ..spec }, &dir.join("disk.json"))?;
        Self::open(dir)
    }

    /// Bytes that [`Disk::send`] writes.
    pub fn sent_len(&self) -> u64 {
        let tail = match self.size() % CLUSTER {
            // A short last cluster is sent as long as it is.
            rest @ 1.. if self.overlay.map().state(self.size() / CLUSTER) == State::Data => CLUSTER - rest,
            _ => 0,
        };
        (HEAD_LEN + SUM_LEN) as u64 + Map::file_len(self.size()) + self.written() - tail
    }

    /// Writes what the guest has written, see the head of this file, to `out`. Chunks of the image are not read.
    pub fn send(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut out = Outgoing { out, hasher: blake3::Hasher::new() };
        out.put(MAGIC)?;
        out.put(self.spec.image.as_bytes())?;
        out.put(&self.size().to_le_bytes())?;
        self.overlay.map().each_sector(|sector| out.put(sector))?;
        let mut bytes = vec![0; CHUNK_SIZE];
        each_data(self.overlay.map(), self.size(), |mut at, end| {
            while at < end {
                // At most a chunk.
                let piece = &mut bytes[..(end - at).min(CHUNK_SIZE as u64) as usize];
                self.overlay.data().read_exact_at(piece, at)?;
                out.put(piece)?;
                at += piece.len() as u64;
            }
            Ok::<_, io::Error>(())
        })?;
        let sum = out.hasher.finalize();
        out.out.write_all(sum.as_bytes())
    }

    /// Makes the new directory `dir` the disk that `input` brings, a child of the image `image` of `store`; anything else
    /// is refused. `progress` is told the bytes of the disk that have arrived, and how many are expected.
    pub fn receive(
        input: &mut dyn Read,
        dir: &Path,
        store: &Store,
        image: &Digest,
        progress: &mut Progress<'_>,
    ) -> Result<Self, ReceiveError> {
        let size = store.part(image, DISK)?.size();
        let mut input = Incoming { input, hasher: blake3::Hasher::new() };
        let mut head = [0; HEAD_LEN];
        input.fill(&mut head)?;
        if head[..8] != *MAGIC {
            return Err(ReceiveError::Other("it does not begin as a disk does".to_owned()));
        }
        if head[8..40] != *image.as_bytes() || head[40..] != size.to_le_bytes() {
            return Err(ReceiveError::Other(format!("it is not a child of the image {image}")));
        }
        fs::create_dir(dir).map_err(io_at("create", dir))?;
        make_files(dir, store, image, size, Mode::Persistent, false)?;
        let map = receive_map(&mut input, dir, size)?;
        let total = map.data_clusters() * CLUSTER;
        need_space("the disk", dir, total).map_err(DiskError::from)?;
        receive_data(&mut input, dir, &map, size, &mut |done| progress(done, total))?;
        let sum = input.hasher.finalize();
        let mut sent = [0; SUM_LEN];
        input.input.read_exact(&mut sent).map_err(ReceiveError::Broken)?;
        if *sum.as_bytes() != sent {
            return Err(ReceiveError::Damaged);
        }
        sync_dir(dir)?;
        Ok(Self::open(dir)?)
    }

    /// Writes the whole disk to the new file `path`, zeros as holes. Chunks of the image that are missing or damaged end
    /// it with an error that names them. `progress` is told the bytes of the disk that are done, and its size.
    pub fn write_raw(&mut self, path: &Path, progress: &mut Progress<'_>) -> Result<File, DiskError> {
        let size = self.size();
        let failed = || io_at("write", path);
        let file = File::options().read(true).write(true).create_new(true).open(path).map_err(failed())?;
        file.set_len(size).map_err(failed())?;
        let reader = Store::open(&self.spec.store)?.part(&self.spec.image, DISK)?;
        let chunk = CHUNK_SIZE as u64;
        let mut bytes = vec![0; CHUNK_SIZE];
        for number in 0..size.div_ceil(chunk) {
            let (start, end) = (number * chunk, ((number + 1) * chunk).min(size));
            if progress(start, size).is_break() {
                return Err(failed()(io::ErrorKind::Interrupted.into()));
            }
            let clusters = end.div_ceil(CLUSTER);
            let nothing = match self.overlay.map().run(start / CLUSTER, clusters) {
                (State::Zero, last) => last == clusters,
                (State::Base, last) => last == clusters && reader.digest(number)? == Digest::ZERO,
                (State::Data, _) => false,
            };
            if nothing {
                continue;
            }
            // At most a chunk.
            let bytes = &mut bytes[..(end - start) as usize];
            self.read_at(bytes, start).map_err(io_at("read", &self.dir))?;
            if bytes.iter().any(|byte| *byte != 0) {
                file.write_all_at(bytes, start).map_err(failed())?;
            }
        }
        // Whoever asked has gone, or has all that there is; nothing is left to stop.
        let _done = progress(size, size);
        Ok(file)
    }
}

fn receive_map(input: &mut Incoming<'_>, dir: &Path, size: u64) -> Result<Map, ReceiveError> {
    let path = fork::path(dir, "map", 0);
    let file = File::options().read(true).write(true).open(&path).map_err(io_at("open", &path))?;
    let (mut at, len) = (0, Map::file_len(size));
    let mut bytes = vec![0; CHUNK_SIZE];
    while at < len {
        let piece = &mut bytes[..(len - at).min(CHUNK_SIZE as u64) as usize];
        input.fill(piece)?;
        // What is zeros is a hole already.
        if piece.iter().any(|byte| *byte != 0) {
            file.write_all_at(piece, at).map_err(io_at("write", &path))?;
        }
        at += piece.len() as u64;
    }
    let map = Map::load(&file, size).map_err(io_at("read", &path))?;
    map.map_err(|_| ReceiveError::Damaged)
}

fn receive_data(
    input: &mut Incoming<'_>,
    dir: &Path,
    map: &Map,
    size: u64,
    arrived: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<(), ReceiveError> {
    let path = fork::path(dir, "data", 0);
    let file = File::options().write(true).open(&path).map_err(io_at("open", &path))?;
    let mut bytes = vec![0; CHUNK_SIZE];
    let mut done = 0;
    each_data(map, size, |mut at, end| {
        while at < end {
            let piece = &mut bytes[..(end - at).min(CHUNK_SIZE as u64) as usize];
            input.fill(piece)?;
            file.write_all_at(piece, at).map_err(io_at("write", &path))?;
            at += piece.len() as u64;
            done += piece.len() as u64;
            if arrived(done).is_break() {
                return Err(ReceiveError::Broken(io::ErrorKind::Interrupted.into()));
            }
        }
        Ok::<_, ReceiveError>(())
    })
}

/// Calls `visit` with each run of bytes, from and up to, that is in `data`.
fn each_data<E>(map: &Map, size: u64, mut visit: impl FnMut(u64, u64) -> Result<(), E>) -> Result<(), E> {
    let end = size.div_ceil(CLUSTER);
    let mut at = 0;
    while at < end {
        let (state, run_end) = map.run(at, end);
        if state == State::Data {
            visit(at * CLUSTER, (run_end * CLUSTER).min(size))?;
        }
        at = run_end;
    }
    Ok(())
}

struct Outgoing<'a> {
    out: &'a mut dyn Write,
    hasher: blake3::Hasher,
}

impl Outgoing<'_> {
    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.out.write_all(bytes)
    }
}

struct Incoming<'a> {
    input: &'a mut dyn Read,
    hasher: blake3::Hasher,
}

impl Incoming<'_> {
    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), ReceiveError> {
        self.input.read_exact(bytes).map_err(ReceiveError::Broken)?;
        self.hasher.update(bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::{flip, image, noise, store};

    const SIZE: usize = 5 * CHUNK_SIZE + 512;

    /// A disk on which base, data and zeros meet in one chunk and in others, to its short last cluster; and its content.
    fn written(dir: &Path, store: &Store, mode: Mode) -> (Disk, Vec<u8>) {
        let mut content = noise(1, SIZE);
        content[CHUNK_SIZE..2 * CHUNK_SIZE].fill(0);
        let mut disk = Disk::create(dir, store, &image(store, &content), mode).unwrap();
        let news = noise(2, 9000);
        for at in [100, 3 * CHUNK_SIZE - 4096, SIZE - 300] {
            let len = news.len().min(SIZE - at);
            disk.write_at(&news[..len], at as u64).unwrap();
            content[at..at + len].copy_from_slice(&news[..len]);
        }
        disk.discard(4 * CHUNK_SIZE as u64, 8192).unwrap();
        content[4 * CHUNK_SIZE..][..8192].fill(0);
        disk.flush().unwrap();
        (disk, content)
    }

    fn go_on(_: u64, _: u64) -> ControlFlow<()> {
        ControlFlow::Continue(())
    }

    fn bytes(disk: &mut Disk) -> Vec<u8> {
        let mut bytes = vec![0; disk.size() as usize];
        disk.read_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn a_snapshot_is_taken_beside_the_owner_and_stays_as_it_was() {
        let (dir, store) = store();
        let (of, copy) = (dir.path().join("of"), dir.path().join("copy"));
        let (mut disk, content) = written(&of, &store, Mode::NonPersistent);
        let mut taken = Disk::snapshot(&of, &copy, || true).unwrap();
        disk.write_at(&[9; 512], 0).unwrap();
        disk.flush().unwrap();
        assert!(bytes(&mut taken) == content);
        drop(taken);
        assert!(bytes(&mut Disk::open(&copy).unwrap()) == content, "it is persistent");
        assert!(Disk::snapshot(&of, &copy, || true).is_err(), "there is one already");
        // Where the file system copies by reference, there is nothing to stop.
        let _ = Disk::snapshot(&of, &dir.path().join("unwanted"), || false);
    }

    #[test]
    fn a_disk_is_sent_and_received_as_it_is() {
        let (dir, store) = store();
        let (disk, content) = written(&dir.path().join("of"), &store, Mode::Persistent);
        let mut sent = Vec::new();
        disk.send(&mut sent).unwrap();
        assert_eq!(sent.len() as u64, disk.sent_len());
        let image = disk.spec().image;
        let to = dir.path().join("to");
        let mut last = (0, 0);
        let mut progress = |done, total| {
            last = (done, total);
            ControlFlow::Continue(())
        };
        let mut disk = Disk::receive(&mut &sent[..], &to, &store, &image, &mut progress).unwrap();
        assert!(bytes(&mut disk) == content);
        let written = disk.written();
        assert_eq!(last, (written - (4096 - 512), written));
    }

    #[test]
    fn whatever_is_wrong_with_a_sent_disk_is_found() {
        let (dir, store) = store();
        let (disk, _) = written(&dir.path().join("of"), &store, Mode::Persistent);
        let (mut sent, image) = (Vec::new(), disk.spec().image);
        disk.send(&mut sent).unwrap();
        let receive = |sent: &[u8]| {
            let to = tempfile::tempdir_in(dir.path()).unwrap();
            Disk::receive(&mut &*sent, &to.path().join("to"), &store, &image, &mut go_on).map(drop)
        };
        for cut in [0, 7, HEAD_LEN, HEAD_LEN + 5, sent.len() - SUM_LEN, sent.len() - 1] {
            assert!(matches!(receive(&sent[..cut]), Err(ReceiveError::Broken(_))), "cut at {cut}");
        }
        let path = dir.path().join("stream");
        for bit in (0..sent.len() * 8).step_by(4099) {
            std::fs::write(&path, &sent).unwrap();
            flip(&path, bit);
            assert!(receive(&std::fs::read(&path).unwrap()).is_err(), "bit {bit}");
        }
        assert!(receive(&sent).is_ok());
    }

    #[test]
    fn a_flat_copy_has_every_byte_and_no_zeros() {
        use std::os::unix::fs::MetadataExt;
        let (dir, store) = store();
        let (mut disk, content) = written(&dir.path().join("of"), &store, Mode::Persistent);
        let raw = dir.path().join("raw");
        disk.write_raw(&raw, &mut go_on).unwrap();
        assert!(std::fs::read(&raw).unwrap() == content);
        assert!(
            std::fs::metadata(&raw).unwrap().blocks() * 512 < SIZE as u64 - CHUNK_SIZE as u64 / 2,
            "zeros are holes"
        );
    }
}
