//! A queue with a number of requests in flight.

use std::sync::atomic::Ordering;

use bedplate_devices::testing::{Driver, DriverQueue, Piece};
use bedplate_devices::virtio::VirtioDevice;
use vm_memory::{Bytes, GuestAddress};

/// A driver that does the same thing over and over on one queue of its device.
pub struct Flight {
    /// The driver.
    pub driver: Driver,
    queue: DriverQueue,
    /// Requests in flight, at most.
    depth: u64,
    /// Requests that were offered so far.
    pub offered: u64,
}

impl Flight {
    /// Brings `device` up; requests go to its queue `index`.
    pub fn new(device: impl VirtioDevice + 'static, index: usize, depth: u64) -> Self {
        let mut driver = Driver::attach(device);
        let queue = driver.up().swap_remove(index);
        Self { driver, queue, depth, offered: 0 }
    }

    /// Does `count` requests; `chain` makes the one in a slot, of which there are as many as can be in flight.
    pub fn run(&mut self, count: u64, mut chain: impl FnMut(&Driver, u64) -> Vec<Piece>) {
        let (mut left, mut flying) = (count, 0);
        loop {
            let more = (self.depth - flying).min(left);
            if more > 0 {
                let before = self.offered as u16;
                for _ in 0..more {
                    self.queue.add(&chain(&self.driver, self.offered % self.depth));
                    self.offered += 1;
                }
                if self.wants_notification(before, self.offered as u16) {
                    self.driver.kick(&self.queue);
                }
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

    /// Virtio 1.2, 2.7.10: whether the device's `avail_event` was passed.
    fn wants_notification(&self, before: u16, now: u16) -> bool {
        let at = GuestAddress(self.queue.used + 4 + 8 * u64::from(self.queue.size));
        let event: u16 = self.driver.machine.memory.load(at, Ordering::SeqCst).unwrap();
        now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
    }
}
