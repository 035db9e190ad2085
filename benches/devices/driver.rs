//! A driver that keeps a number of requests in flight, as a guest's block layer does.

use std::sync::atomic::Ordering;

use bedplate_devices::testing::{Driver, DriverQueue, Piece};
use bedplate_devices::virtio::VirtioDevice;
use vm_memory::{Bytes, GuestAddress};

use crate::disks::Offsets;

/// A buffer's largest piece of contiguous memory: what guests merge their pages to.
const PIECE: u64 = 64 << 10;
/// Header and status of a request lie in one page before its data.
const PAGE: u64 = 0x1000;
const STATUS: u64 = 0x100;
const SECTOR: u64 = 512;

/// One kind of load.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    /// Requests in flight.
    pub depth: u64,
    /// Bytes of a request.
    pub len: u64,
    /// Or a read.
    pub write: bool,
}

pub struct Pipeline {
    driver: Driver,
    queue: DriverQueue,
    load: Load,
    offsets: Offsets,
    /// Requests that were offered so far.
    offered: u64,
}

impl Pipeline {
    pub fn new(device: impl VirtioDevice + 'static, load: Load) -> Self {
        let mut driver = Driver::attach(device);
        let queue = driver.up().remove(0);
        for slot in 0..load.depth {
            // type: IN 0, OUT 1.
            driver.put(Self::slot(load, slot), &u32::from(load.write).to_le_bytes());
        }
        Self { driver, queue, load, offsets: Offsets::new(load.len), offered: 0 }
    }

    fn slot(load: Load, slot: u64) -> u64 {
        Driver::BUFFERS + slot * (PAGE + load.len)
    }

    /// Does `count` requests, at most `depth` at once.
    pub fn run(&mut self, count: u64) {
        let (mut left, mut flying) = (count, 0);
        loop {
            let more = (self.load.depth - flying).min(left);
            if more > 0 {
                self.offer(more);
                (left, flying) = (left - more, flying + more);
            }
            if flying == 0 {
                return;
            }
            self.queue.wait();
            flying -= 1;
            while self.queue.take().is_some() {
                flying -= 1;
            }
        }
    }

    fn offer(&mut self, count: u64) {
        let before = self.offered as u16;
        for _ in 0..count {
            let header = Self::slot(self.load, self.offered % self.load.depth);
            let sector = self.offsets.pick() / SECTOR;
            self.driver.machine.memory.write_obj(sector, GuestAddress(header + 8)).unwrap();
            let mut chain = vec![Piece::Read(header, 16)];
            for at in (0..self.load.len).step_by(PIECE as usize) {
                let (address, len) = (header + PAGE + at, (self.load.len - at).min(PIECE) as u32);
                chain.push(if self.load.write { Piece::Read(address, len) } else { Piece::Write(address, len) });
            }
            chain.push(Piece::Write(header + STATUS, 1));
            self.queue.add(&chain);
            self.offered += 1;
        }
        if self.wants_notification(before, self.offered as u16) {
            self.driver.kick(&self.queue);
        }
    }

    /// Virtio 1.2, 2.7.10: whether the device's `avail_event` was passed.
    fn wants_notification(&self, before: u16, now: u16) -> bool {
        let at = GuestAddress(self.queue.used + 4 + 8 * u64::from(self.queue.size));
        let event: u16 = self.driver.machine.memory.load(at, Ordering::SeqCst).unwrap();
        now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
    }

    /// Whether all requests of the last round succeeded.
    pub fn assert_success(&self) {
        for slot in 0..self.load.depth.min(self.offered) {
            let status = self.driver.get(Self::slot(self.load, slot) + STATUS, 1)[0];
            assert_eq!(status, 0, "the device has failed request {slot}");
        }
    }
}
