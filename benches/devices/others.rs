//! Devices whose work is one system call: the generator of random numbers, the console, persistent memory, the balloon.

use std::fs::File;
use std::io::Write;
use std::sync::Arc;

use bedplate_benches::{Pair, Unit, nanos};
use bedplate_devices::testing::{Driver, Piece};
use bedplate_devices::virtio::VirtioDevice;
use bedplate_devices::virtio::balloon::{Balloon, BalloonConfig};
use bedplate_devices::virtio::console::{Console, WindowSize};
use bedplate_devices::virtio::limiter::LimiterConfig;
use bedplate_devices::virtio::pmem::{Pmem, PmemConfig};
use bedplate_devices::virtio::rng::Rng;
use criterion::Criterion;
use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, ftruncate, memfd_create};
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress};

use crate::flight::Flight;

const PAGE: u64 = 4096;
/// Of a console: what is sent.
const TRANSMIT: usize = 1;
/// Pages that a balloon's driver names at once.
const BATCH: u64 = 256;

pub fn benchmark(c: &mut Criterion) {
    for depth in [1, 32] {
        random(c, depth);
        output(c, depth);
        flush(c, depth);
    }
    inflate(c);
}

/// 4 KiB at a time: guests ask for less, and hardly ever.
fn random(c: &mut Criterion, depth: u64) {
    let device = Rng::new(LimiterConfig::NONE).unwrap();
    let mut buffer = [0; PAGE as usize];
    let bare =
        |count| nanos(|| (0..count).for_each(|_| assert!(getrandom(&mut buffer, GetRandomFlags::empty()).is_ok())));
    each(
        c,
        &format!("4 KiB of random bytes, depth {depth}"),
        (device, 0, depth),
        Unit::Bytes(PAGE),
        ("getrandom", bare),
        |slot| vec![Piece::Write(at(slot), PAGE as u32)],
    );
}

fn output(c: &mut Criterion, depth: u64) {
    let sink = || Arc::new(File::options().write(true).open("/dev/null").unwrap());
    let device = Console::new(sink(), WindowSize { columns: 80, rows: 25 }).unwrap();
    let (mut file, line) = (sink(), [b'x'; 64]);
    let bare = |count| nanos(|| (0..count).for_each(|_| file.write_all(&line).unwrap()));
    each(
        c,
        &format!("a line of a console, depth {depth}"),
        (device, TRANSMIT, depth),
        Unit::Operations,
        ("write", bare),
        |slot| vec![Piece::Read(at(slot), line.len() as u32)],
    );
}

/// Of a file in memory, which has nothing to do.
fn flush(c: &mut Criterion, depth: u64) {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    let config = PmemConfig { address: 4 << 30, len: 2 << 20, flush_cost: 2 << 20, limits: LimiterConfig::NONE };
    let device = Pmem::new(config, Some(file.try_clone().unwrap())).unwrap();
    let bare = |count| nanos(|| (0..count).for_each(|_| file.sync_data().unwrap()));
    each(
        c,
        &format!("flush of persistent memory, depth {depth}"),
        (device, 0, depth),
        Unit::Operations,
        ("fdatasync", bare),
        |slot| {
            // Type 0 is what is there.
            vec![Piece::Read(at(slot), 4), Piece::Write(at(slot) + 16, 4)]
        },
    );
}

/// Pages of the host's, in one run; they are touched anew each time, which is not counted.
fn inflate(c: &mut Criterion) {
    let mut flight = Flight::new(Balloon::new(BalloonConfig::default()).unwrap(), 0, 1);
    let (list, first) = (Driver::BUFFERS, Driver::BUFFERS + (1 << 20));
    let numbers: Vec<u8> = (0..BATCH).flat_map(|page| ((first / PAGE + page) as u32).to_le_bytes()).collect();
    flight.driver.put(list, &numbers);
    let ours = |count| {
        (0..count)
            .map(|_| {
                (0..BATCH).for_each(|page| flight.driver.put(first + page * PAGE, &[1]));
                nanos(|| flight.run(1, |_, _| vec![Piece::Read(list, numbers.len() as u32)]))
            })
            .sum()
    };
    let file = File::from(memfd_create("bench", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, BATCH * PAGE).unwrap();
    let memory = vm_memory::GuestMemoryMmap::<()>::from_ranges_with_files([(
        GuestAddress(0),
        (BATCH * PAGE) as usize,
        Some(vm_memory::FileOffset::new(file.try_clone().unwrap(), 0)),
    )])
    .unwrap();
    let bare = |count| {
        (0..count)
            .map(|_| {
                (0..BATCH).for_each(|page| memory.write_obj(1u8, GuestAddress(page * PAGE)).unwrap());
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                nanos(|| fallocate(&file, flags, 0, BATCH * PAGE).unwrap())
            })
            .sum()
    };
    Pair { what: "a balloon takes 1 MiB", ours: "device", bare: "fallocate", unit: Unit::Bytes(BATCH * PAGE) }
        .run(c, ours, bare);
}

fn at(slot: u64) -> u64 {
    Driver::BUFFERS + slot * PAGE
}

/// The request that `chain` makes for a slot on a queue of a device, against what the device does for it.
fn each(
    c: &mut Criterion,
    what: &str,
    (device, queue, depth): (impl VirtioDevice + 'static, usize, u64),
    unit: Unit,
    (bare, plain): (&str, impl FnMut(u64) -> std::time::Duration),
    mut chain: impl FnMut(u64) -> Vec<Piece>,
) {
    let mut flight = Flight::new(device, queue, depth);
    Pair { what, ours: "device", bare, unit }.run_in_flight(
        c,
        depth,
        |count| nanos(|| flight.run(count, |_, slot| chain(slot))),
        plain,
    );
}
