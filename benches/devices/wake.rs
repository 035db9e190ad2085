//! What it costs to have another thread do something: the part of a request that a device which does not work on the
//! vCPU's own thread cannot avoid.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use bedplate_benches::{Pair, Unit, nanos};
use bedplate_devices::virtio::block::{Block, BlockConfig};
use criterion::Criterion;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::disks::NoDisk;
use crate::driver::{Load, Pipeline};

/// A request of a disk that does nothing, against two event descriptors with a `poll` on each side.
pub fn benchmark(c: &mut Criterion) {
    for (depth, name) in [(1, "one in flight"), (32, "32 in flight")] {
        let load = Load { depth, len: 4096, write: false };
        let mut device = Pipeline::new(Block::new(NoDisk, BlockConfig::default()).expect("descriptors are left"), load);
        let echo = Echo::start();
        Pair {
            what: &format!("request of a disk that does nothing, {name}"),
            ours: "block device",
            bare: "eventfd there and back",
            unit: Unit::Operations,
        }
        .run_in_flight(
            c,
            depth,
            |count| nanos(|| device.run(count)),
            |count| nanos(|| (0..count).for_each(|_| echo.call())),
        );
        device.assert_success();
        echo.stop();
    }
}

/// A thread that answers every signal with one.
struct Echo {
    there: Arc<EventFd>,
    back: Arc<EventFd>,
    stopping: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Echo {
    fn start() -> Self {
        let event = || Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let (there, back, stopping) = (event(), event(), Arc::<AtomicBool>::default());
        let (inbox, outbox, stop) = (Arc::clone(&there), Arc::clone(&back), Arc::clone(&stopping));
        let thread = thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                await_signal(&inbox);
                outbox.write(1).unwrap();
            }
        });
        Self { there, back, stopping, thread }
    }

    fn call(&self) {
        self.there.write(1).unwrap();
        await_signal(&self.back);
    }

    fn stop(self) {
        self.stopping.store(true, Ordering::SeqCst);
        // Not a call: a thread that has just answered one sees the order and answers no more.
        self.there.write(1).unwrap();
        self.thread.join().unwrap();
    }
}

fn await_signal(event: &EventFd) {
    let mut poll = libc::pollfd { fd: event.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // Whoever is quick enough finds the signal without going to sleep, as the device does.
    while event.read().is_err() {
        // SAFETY: one valid `pollfd`.
        unsafe { libc::poll(&mut poll, 1, -1) };
    }
}
