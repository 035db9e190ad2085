//! Reads and writes through the block device, against the same bytes moved on the caller's thread.
//!
//! Files go through the page cache on both sides: what is compared is the device's way to the host's system call, not the
//! host's disk.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bedplate_benches::{Pair, Unit, nanos};
use bedplate_devices::virtio::block::{Backend, Block, BlockConfig, Cache, Medium, RawFile};
use criterion::Criterion;

use crate::disks::{MemoryDisk, Offsets, contents, direct_file_in, file_in};
use crate::driver::{Load, Pipeline};

const PAGE: usize = 4096;

const LOADS: [(&str, Load); 6] = [
    ("random read of 4 KiB, depth 1", Load { depth: 1, len: 4 << 10, write: false }),
    ("random write of 4 KiB, depth 1", Load { depth: 1, len: 4 << 10, write: true }),
    ("random read of 4 KiB, depth 32", Load { depth: 32, len: 4 << 10, write: false }),
    ("random write of 4 KiB, depth 32", Load { depth: 32, len: 4 << 10, write: true }),
    ("read of 1 MiB, depth 4", Load { depth: 4, len: 1 << 20, write: false }),
    ("write of 1 MiB, depth 4", Load { depth: 4, len: 1 << 20, write: true }),
];

pub fn benchmark(c: &mut Criterion) {
    for (name, load) in LOADS {
        memory(c, &format!("memory disk, {name}"), load);
    }
    let places = [("file on tmpfs", Path::new("/dev/shm")), ("file on disk", Path::new(env!("CARGO_TARGET_TMPDIR")))];
    for (place, directory) in places {
        match file_in(directory) {
            Ok(disk) => {
                for (name, load) in LOADS {
                    file(c, &format!("{place}, {name}"), load, &disk, false);
                    file(c, &format!("{place}, io_uring, {name}"), load, &disk, true);
                }
            }
            Err(error) => println!("skipped: {place}: no file can be made in {}: {error}\n", directory.display()),
        }
    }
    direct(c, Path::new(env!("CARGO_TARGET_TMPDIR")));
}

/// Past the page cache, so that each request waits for the host's disk.
fn direct(c: &mut Criterion, directory: &Path) {
    let disk = match direct_file_in(directory) {
        Ok(disk) => disk,
        Err(error) => return println!("skipped: no file can be opened past the page cache: {error}\n"),
    };
    for (name, load) in LOADS {
        file(c, &format!("disk itself, {name}"), load, &disk, false);
        file(c, &format!("disk itself, io_uring, {name}"), load, &disk, true);
    }
}

fn memory(c: &mut Criterion, what: &str, load: Load) {
    let (mut disk, mut offsets) = (contents(), Offsets::new(load.len));
    let mut buffer = vec![0x5a; load.len as usize];
    let copy = |count| {
        nanos(|| {
            for _ in 0..count {
                let there = &mut disk[offsets.pick() as usize..][..buffer.len()];
                if load.write {
                    there.copy_from_slice(&buffer)
                } else {
                    buffer.copy_from_slice(there)
                }
                std::hint::black_box(&mut buffer);
            }
        })
    };
    through_device(c, what, load, MemoryDisk(contents()).into(), ("memcpy", copy));
}

fn file(c: &mut Criterion, what: &str, load: Load, disk: &File, uring: bool) {
    let mut offsets = Offsets::new(load.len);
    // On a page, as `O_DIRECT` wants it.
    let mut space = vec![0x5a; load.len as usize + PAGE];
    let start = space.as_ptr().align_offset(PAGE);
    let buffer = &mut space[start..][..load.len as usize];
    let call = |count| {
        nanos(|| {
            for _ in 0..count {
                let offset = offsets.pick();
                if load.write {
                    disk.write_all_at(buffer, offset).unwrap();
                } else {
                    disk.read_exact_at(buffer, offset).unwrap();
                }
            }
        })
    };
    let name = if load.write { "pwrite" } else { "pread" };
    let backend = RawFile::new(disk.try_clone().unwrap()).unwrap();
    let ring = match uring.then(|| backend.ring()).transpose() {
        Ok(ring) => ring,
        Err(error) => return println!("skipped: {what}: there is no io_uring here: {error}\n"),
    };
    through_device(c, what, load, Medium { backend, ring }, (name, call));
}

fn through_device(
    c: &mut Criterion,
    what: &str,
    load: Load,
    medium: Medium<impl Backend + 'static>,
    (bare, plain): (&str, impl FnMut(u64) -> std::time::Duration),
) {
    // Without the flush at the end of the device's life, which nobody measures.
    let config = BlockConfig { cache: Cache::Unsafe, ..BlockConfig::default() };
    let mut device = Pipeline::new(Block::over(medium, config).expect("descriptors are left"), load);
    Pair { what, ours: "block device", bare, unit: Unit::Bytes(load.len) }.run_in_flight(
        c,
        load.depth,
        |count| nanos(|| device.run(count)),
        plain,
    );
    device.assert_success();
}
