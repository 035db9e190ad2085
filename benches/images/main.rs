//! Images: importing, reading and copying chunks, beside a plain copy or read of the same bytes.
//!
//! Everything lies in memory where the machine has a tmpfs, so that the figures are the work's own and not a disk's, and
//! syncing is free on both sides. The disk image is 4 MiB: half compressible, a quarter noise, a quarter zeros.
// A bench has nobody to report an error to.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bedplate_api::Digest;
use bedplate_benches::{Pair, Unit, describe_machine, nanos};
use bedplate_images::disk::{Disk, Mode};
use bedplate_images::import::{Options, import_disk};
use bedplate_images::{CHUNK_SIZE, Store, frame};
use criterion::Criterion;

const IMAGE_LEN: u64 = 4 << 20;

/// A store with one image, the file that it was made from, and room beside them.
struct Bench {
    dir: tempfile::TempDir,
    raw: PathBuf,
    store: Store,
    image: Digest,
}

fn main() {
    describe_machine();
    let mut criterion = Criterion::default()
        .without_plots()
        .sample_size(12)
        .nresamples(5_000)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_millis(600))
        .configure_from_args();
    let bench = Bench::new();
    bench.import(&mut criterion);
    bench.verify(&mut criterion);
    bench.copy(&mut criterion);
    bench.disk(&mut criterion);
    criterion.final_summary();
}

/// What a disk looks like to a compressor, roughly.
fn contents() -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    let words: Vec<Vec<u8>> = (0..200).map(|_| (0..3 + next() % 9).map(|_| b'a' + next() % 26).collect()).collect();
    let mut bytes = Vec::with_capacity(IMAGE_LEN as usize);
    while bytes.len() < IMAGE_LEN as usize / 2 {
        bytes.extend_from_slice(&words[usize::from(next()) % words.len()]);
        bytes.push(b' ');
    }
    bytes.resize_with(IMAGE_LEN as usize / 4 * 3, next);
    bytes.resize(IMAGE_LEN as usize, 0);
    bytes
}

fn run_import(store: &Store, raw: &Path) -> Digest {
    import_disk(store, raw, Options::default(), &mut |_, _| ControlFlow::Continue(())).unwrap().digest
}

impl Bench {
    fn new() -> Self {
        let shm = Path::new("/dev/shm");
        let dir = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() }.unwrap();
        let raw = dir.path().join("disk.raw");
        fs::write(&raw, contents()).unwrap();
        let store = Store::create(dir.path().join("store")).unwrap();
        let image = run_import(&store, &raw);
        Self { dir, raw, store, image }
    }

    /// Times `work` with a store that is empty each time; making and removing it is left out.
    fn with_empty_store(&self, count: u64, work: impl Fn(&Store)) -> Duration {
        let path = self.dir.path().join("fresh");
        let mut took = Duration::ZERO;
        for _ in 0..count {
            let store = Store::create(&path).unwrap();
            took += nanos(|| work(&store));
            fs::remove_dir_all(&path).unwrap();
        }
        took
    }

    fn plain_copy(&self, count: u64) -> Duration {
        let path = self.dir.path().join("copy");
        let mut took = Duration::ZERO;
        for _ in 0..count {
            took += nanos(|| assert_eq!(fs::copy(&self.raw, &path).unwrap(), IMAGE_LEN));
            fs::remove_file(&path).unwrap();
        }
        took
    }

    fn import(&self, c: &mut Criterion) {
        Pair { what: "import a raw disk", ours: "import_disk", bare: "file copy", unit: Unit::Bytes(IMAGE_LEN) }.run(
            c,
            |count| self.with_empty_store(count, |store| assert_eq!(run_import(store, &self.raw), self.image)),
            |count| self.plain_copy(count),
        );
    }

    /// The distinct chunks of the image.
    fn chunks(&self) -> Vec<Digest> {
        let mut chunks = Vec::new();
        let part = self.store.part(&self.image, "disk").unwrap();
        part.index()
            .each(|_, digest| {
                chunks.push(digest);
                Ok::<_, std::io::Error>(())
            })
            .unwrap();
        chunks
    }

    fn verify(&self, c: &mut Criterion) {
        let chunks = self.chunks();
        let file = fs::File::open(&self.raw).unwrap();
        let mut plain = frame::chunk_buffer();
        let mut buffer = frame::chunk_buffer();
        Pair { what: "verify a chunk", ours: "read_chunk", bare: "pread", unit: Unit::Bytes(CHUNK_SIZE as u64) }.run(
            c,
            |count| {
                nanos(|| {
                    for digest in chunks.iter().cycle().take(count as usize) {
                        self.store.read_chunk(digest, &mut plain).unwrap();
                    }
                })
            },
            |count| {
                nanos(|| {
                    for number in (0..chunks.len() as u64).cycle().take(count as usize) {
                        file.read_exact_at(&mut buffer[..], number * CHUNK_SIZE as u64).unwrap();
                    }
                })
            },
        );
    }

    fn copy(&self, c: &mut Criterion) {
        let chunks = self.chunks();
        let manifest = self.store.manifest(&self.image).unwrap();
        let index = self.store.blob(&manifest.parts["disk"].index).unwrap();
        let copy = |store: &Store| {
            let mut scratch = frame::chunk_buffer();
            for digest in store.missing(&chunks) {
                store.put_frame_with(&digest, &self.store.frame(&digest).unwrap(), &mut scratch).unwrap();
            }
            store.put_blob(&index).unwrap();
            store.put_manifest(&manifest).unwrap();
        };
        let what = "copy an image to an empty store";
        Pair { what, ours: "verified chunks", bare: "file copy", unit: Unit::Bytes(IMAGE_LEN) }.run(
            c,
            |count| self.with_empty_store(count, copy),
            |count| self.plain_copy(count),
        );
    }

    /// A guest that reads on where it has read: the image is smaller than what a disk keeps in memory of it. What the first
    /// read in a chunk costs is `verify`'s business.
    fn disk(&self, c: &mut Criterion) {
        let path = self.dir.path().join("disk");
        let mut disk = Disk::create(&path, &self.store, &self.image, Mode::Persistent).unwrap();
        let file = fs::File::open(&self.raw).unwrap();
        let blocks = IMAGE_LEN / 4096;
        let offsets = move |count: u64| (0..blocks).cycle().take(count as usize).map(|block| block * 4096);
        let mut ours = [0; 4096];
        let mut bare = [0; 4096];
        Pair { what: "read what a disk has kept of its image", ours: "Disk", bare: "pread", unit: Unit::Bytes(4096) }
            .run(
                c,
                |count| nanos(|| offsets(count).for_each(|at| disk.read_at(&mut ours, at).unwrap())),
                |count| nanos(|| offsets(count).for_each(|at| file.read_exact_at(&mut bare, at).unwrap())),
            );
    }
}
