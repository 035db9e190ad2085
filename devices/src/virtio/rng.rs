//! The entropy device, Virtio 1.2, 5.4: the guest offers buffers, the host's generator fills them.

use std::io;
use std::sync::Arc;

use event_manager::EventSet;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::limiter::{Limiter, LimiterConfig};
use super::{Active, Answer, Chain, Handler, Session, VirtioDevice, Virtqueue, Worker};
use crate::metrics::{Counter, DeviceMetrics};

const QUEUE_SIZE: u16 = 64;
/// One request gets at most this much: a driver that asks for more asks again, and cannot keep the worker for long.
const MAX_LEN: usize = 64 << 10;
/// The limiter's timer.
const CREDIT: u32 = 0;
/// As much as the kernel hands out without being interruptible.
const PIECE_LEN: usize = 256;

/// A virtio entropy device.
pub struct Rng {
    bytes: Arc<Counter>,
    worker: Worker<RngHandler>,
}

impl Rng {
    /// A device that draws from the kernel's generator, as much as `limits` let it.
    ///
    /// # Errors
    /// The host has no descriptors left.
    pub fn new(limits: LimiterConfig) -> io::Result<Self> {
        let bytes = Arc::<Counter>::default();
        let handler = RngHandler { bytes: Arc::clone(&bytes), limiter: Limiter::open(limits)? };
        Ok(Self { bytes, worker: Worker::new("rng", handler, Arc::default()) })
    }

    /// How many bytes the guest has been given.
    pub fn bytes(&self) -> &Arc<Counter> {
        &self.bytes
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, active: Active) -> io::Result<()> {
        self.worker.start(active)
    }

    fn stop(&mut self) -> Vec<Virtqueue> {
        self.worker.stop()
    }

    fn metrics(&self) -> &Arc<DeviceMetrics> {
        self.worker.metrics()
    }
}

struct RngHandler {
    bytes: Arc<Counter>,
    limiter: Limiter,
}

impl RngHandler {
    fn serve(&mut self, chain: &Chain, metrics: &DeviceMetrics) -> Answer {
        if chain.fault.is_some() {
            return Answer::Used(0);
        }
        if chain.writable.is_empty() {
            metrics.guest_faults.increment();
        }
        let mut rest = chain.writable.view();
        if !self.limiter.admit(rest.len().min(MAX_LEN) as u64) {
            return Answer::Wait;
        }
        let mut written = 0;
        while !rest.is_empty() && written < MAX_LEN {
            let mut piece = [0; PIECE_LEN];
            let len = rest.len().min(piece.len());
            if let Err(error) = fill(&mut piece[..len]) {
                metrics.host_fault(|| format!("cannot draw random bytes: {error}"));
                break;
            }
            rest.copy_from(&piece[..len]);
            written += len;
            rest = rest.split_at(len).map_or(rest, |(_, rest)| rest);
        }
        self.bytes.add(written as u64);
        Answer::Used(written as u32)
    }
}

fn fill(piece: &mut [u8]) -> io::Result<()> {
    // SAFETY: the pointer is valid for writes of that many bytes.
    let drawn = unsafe { libc::getrandom(piece.as_mut_ptr().cast(), piece.len(), 0) };
    // Up to 256 bytes come whole once the generator is seeded, which it is when a VM can run.
    if usize::try_from(drawn) == Ok(piece.len()) { Ok(()) } else { Err(io::Error::last_os_error()) }
}

impl Handler for RngHandler {
    fn started(&mut self, session: &mut Session<'_, '_>) {
        if let Err(error) = session.watch(&self.limiter, CREDIT, EventSet::IN) {
            session.metrics.host_fault(|| format!("cannot watch a timer: {error}"));
        }
    }

    fn ready(&mut self, _token: u32, _events: EventSet, session: &mut Session<'_, '_>) {
        self.limiter.expired();
        self.notified(0, session);
    }

    fn notified(&mut self, queue: usize, session: &mut Session<'_, '_>) {
        let metrics = session.metrics;
        if let Some(queue) = session.queue(queue) {
            queue.drain(|chain| self.serve(chain, metrics));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::limiter::BucketConfig;
    use super::*;
    use crate::testing::{Driver, Piece};

    #[test]
    fn buffers_are_filled_to_their_end_and_no_further() {
        let rng = Rng::new(LimiterConfig::NONE).unwrap();
        let metrics = Arc::clone(rng.metrics());
        let mut driver = Driver::attach(rng);
        let mut queue = driver.up().remove(0);
        let (a, b) = (Driver::BUFFERS, Driver::BUFFERS + 0x1000);
        assert_eq!(driver.run(&mut queue, &[Piece::Write(a, 700), Piece::Write(b, 33)]), 733);
        // 16 zeroes in a row do not happen.
        for (start, end, filled) in [(a, 700, true), (a + 700, 16, false), (b, 33, true), (b + 33, 16, false)] {
            let bytes = driver.get(start, end);
            assert_eq!(bytes.chunks_exact(16).all(|c| c.iter().any(|b| *b != 0)), filled);
        }
        assert_eq!(driver.run(&mut queue, &[Piece::Write(a, 1 << 20)]), 64 << 10);
        assert_eq!(driver.run(&mut queue, &[Piece::Read(a, 64)]), 0);
        assert_eq!(metrics.guest_faults.value(), 1);
    }

    #[test]
    fn a_limit_makes_requests_wait() {
        let bucket = BucketConfig { size: 1000, one_time_burst: 0, refill_time: Duration::from_millis(200) };
        let limits = LimiterConfig { bandwidth: Some(bucket), operations: None };
        let mut driver = Driver::attach(Rng::new(limits).unwrap());
        let mut queue = driver.up().remove(0);
        let start = Instant::now();
        (0..3).for_each(|_| assert_eq!(driver.run(&mut queue, &[Piece::Write(Driver::BUFFERS, 1000)]), 1000));
        assert!(start.elapsed() > Duration::from_millis(150), "two of three requests have to be earned");
    }
}
