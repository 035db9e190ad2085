//! An image of 2 GiB to a node that has nothing of it, beside a download of the same disk as a plain file.
//!
//! Four processes, which are this program: a control node with the image and a node's copy of it, both with the code of
//! `bedplate-control` and `bedplate-node`; and a server and a client of one file with the same HTTP libraries, which
//! verify nothing. Both go over loopback, from the page cache, to files on a disk, and end when those are synced.
// A bench has nobody to report an error to.
#![allow(clippy::unwrap_used)]

mod lives;
mod process;

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use bedplate_api::Digest;
use bedplate_api::image::BootData;
use bedplate_benches::describe_machine;
use bedplate_images::Store;
use bedplate_images::import::{Options, import_disk};

use process::{Life, Took};

const MIB: u64 = 1 << 20;
/// With `--bench`; otherwise only a few, to see that it works.
const IMAGE_MIB: u64 = 2048;
const ROUNDS: usize = 5;

fn main() {
    if lives::lived() {
        return;
    }
    describe_machine();
    let measures = std::env::args().any(|argument| argument == "--bench");
    let (mib, rounds) = if measures { (IMAGE_MIB, ROUNDS) } else { (8, 1) };
    // Where cargo builds, which is on a disk; a machine's /tmp may be in its memory.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let bench = Bench::new(dir.path(), mib);
    println!(
        "a disk of {mib} MiB: half words, half noise, in turns of 1 MiB; its chunks take {} MiB",
        bench.stored_mib
    );
    let rounds: Vec<[Took; 4]> = (0..rounds).map(|round| bench.round(round)).collect();
    let take = |of: &dyn Fn(&[Took; 4]) -> f64| Spread::of(rounds.iter().map(of).collect());
    let (ours, bare) = (take(&|r| r[0].synced), take(&|r| r[1].synced));
    let (ready, written) = (take(&|r| r[0].written), take(&|r| r[1].written));
    let line =
        |what: &str, spread: &Spread| println!("  {what:40} {spread} s, {:.0} MiB/s", mib as f64 / spread.median);
    line("plain file, until it is synced", &bare);
    line("plain file, until it is written", &written);
    line("image, until it is whole and synced", &ours);
    println!("  {:40} {ready} s", "image, until a VM could start");
    let per_gib = |of: &dyn Fn(&[Took; 4]) -> f64| take(&|r| of(r) * 1024.0 / mib as f64);
    println!("processor time of a GiB of the disk, user and system:");
    println!("  {:40} {} s", "image: repository", per_gib(&|r| r[2].cpu));
    println!("  {:40} {} s", "image: node", per_gib(&|r| r[0].cpu));
    println!("  {:40} {} s", "plain file: server and client", per_gib(&|r| r[1].cpu + r[3].cpu));
    println!(
        "ratio  copy of an image to a node: {:.2} x the rate of a plain file that is synced too, {:.2} x of one that is only \
         written  (medians of {} alternating rounds)",
        bare.median / ours.median,
        written.median / ours.median,
        rounds.len()
    );
}

/// The repository with an image, the file that it was made from, and who serves them.
struct Bench {
    dir: PathBuf,
    image: Digest,
    stored_mib: u64,
    token: String,
    control: (Life, String),
    plain: (Life, String),
}

impl Bench {
    fn new(dir: &Path, mib: u64) -> Self {
        let (raw, state) = (dir.join("disk.raw"), dir.join("control"));
        write_disk(&raw, mib);
        fs::create_dir(&state).unwrap();
        let store = Store::create(state.join("images")).unwrap();
        let image = import(&store, &raw);
        let stored_mib = stored(&state.join("images/chunks")) / MIB;
        let serving = |arguments: &[&str]| {
            let mut life = Life::start(arguments);
            let address = life.line();
            (life, address)
        };
        let control = serving(&["control", state.to_str().unwrap()]);
        let plain = serving(&["plain-server", raw.to_str().unwrap()]);
        let token = fs::read_to_string(state.join("node.token")).unwrap();
        Self { dir: dir.to_owned(), image, stored_mib, token, control, plain }
    }

    /// The node, the plain client, the repository and the plain server, the last two with their processor time alone.
    fn round(&self, number: usize) -> [Took; 4] {
        // Each node stays until all rounds are over. ext4 does not give out an inode anew for minutes after its file was
        // removed, and looks at all of those, one by one, whenever a file is made: a round after 32768 files were removed
        // took three times as long.
        let (node, file) = (self.dir.join(format!("node-{number}")), self.dir.join("copy.raw"));
        let image = self.image.to_string();
        let ours = ["node", &self.control.1, self.token.trim(), &image, node.to_str().unwrap()];
        let bare = ["plain-client", &self.plain.1, file.to_str().unwrap()];
        let run = |server: &Life, client: &[&str]| {
            // What was written and removed before is nobody's work here.
            rustix::fs::sync();
            let before = server.cpu_seconds();
            let took = process::run(client);
            (took, Took { written: 0.0, synced: 0.0, cpu: server.cpu_seconds() - before })
        };
        let take = |first: bool| if first { run(&self.control.0, &ours) } else { run(&self.plain.0, &bare) };
        let first = number.is_multiple_of(2);
        let (one, other) = (take(first), take(!first));
        let ((ours, control), (bare, plain)) = if first { (one, other) } else { (other, one) };
        fs::remove_file(&file).unwrap();
        [ours, bare, control, plain]
    }
}

/// Median, and the whole spread.
struct Spread {
    median: f64,
    least: f64,
    most: f64,
}

impl Spread {
    fn of(mut figures: Vec<f64>) -> Self {
        figures.sort_by(f64::total_cmp);
        Self { median: figures[figures.len() / 2], least: figures[0], most: figures[figures.len() - 1] }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.2} ({:.2} to {:.2})", self.median, self.least, self.most)
    }
}

/// What a disk looks like to a compressor, roughly: words, which shrink to less than half, and noise.
fn write_disk(path: &Path, mib: u64) {
    let mut state = 1_u64;
    let mut next = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 32
    };
    let words: Vec<Vec<u8>> =
        (0..4096).map(|_| (0..2 + next() % 9).map(|_| b'a' + (next() % 26) as u8).collect()).collect();
    let mut file = BufWriter::with_capacity(MIB as usize, File::create(path).unwrap());
    let mut piece = Vec::with_capacity(MIB as usize + 16);
    for number in 0..mib {
        piece.clear();
        while piece.len() < MIB as usize {
            if number.is_multiple_of(2) {
                piece.extend_from_slice(&words[next() as usize % words.len()]);
                piece.push(b' ');
            } else {
                piece.extend_from_slice(&(next() as u32).to_le_bytes());
            }
        }
        file.write_all(&piece[..MIB as usize]).unwrap();
    }
    file.flush().unwrap();
}

/// The disk as an image. A node copies only what could start, so a page of the disk is taken for its kernel.
fn import(store: &Store, raw: &Path) -> Digest {
    let mut manifest =
        import_disk(store, raw, Options::default(), &mut |_, _| ControlFlow::Continue(())).unwrap().manifest;
    let kernel = raw.with_file_name("kernel");
    fs::write(&kernel, vec![1; 1 << 20]).unwrap();
    let part = import_disk(store, &kernel, Options::default(), &mut |_, _| ControlFlow::Continue(())).unwrap();
    manifest.parts.insert("kernel".to_owned(), part.manifest.parts["disk"].clone());
    manifest.boot = Some(BootData { kernel: "kernel".to_owned(), initrd: None, cmdline: String::new() });
    store.put_manifest(&manifest).unwrap()
}

/// Bytes of all files under `dir`.
fn stored(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries
        .map(|entry| {
            let meta = entry.metadata().unwrap();
            if meta.is_dir() { stored(&entry.path()) } else { meta.len() }
        })
        .sum()
}
