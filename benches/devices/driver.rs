//! A driver of a disk that keeps a number of requests in flight, as a guest's block layer does.

use bedplate_devices::testing::{Driver, Piece};
use bedplate_devices::virtio::VirtioDevice;
use vm_memory::{Bytes, GuestAddress};

use crate::disks::Offsets;
use crate::flight::Flight;

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
    flight: Flight,
    load: Load,
    offsets: Offsets,
}

impl Pipeline {
    pub fn new(device: impl VirtioDevice + 'static, load: Load) -> Self {
        let flight = Flight::new(device, 0, load.depth);
        for slot in 0..load.depth {
            // type: IN 0, OUT 1.
            flight.driver.put(place(load, slot), &u32::from(load.write).to_le_bytes());
        }
        Self { flight, load, offsets: Offsets::new(load.len) }
    }

    /// Does `count` requests, at most `depth` at once.
    pub fn run(&mut self, count: u64) {
        let (load, offsets) = (self.load, &mut self.offsets);
        self.flight.run(count, |driver, slot| {
            let header = place(load, slot);
            let sector = offsets.pick() / SECTOR;
            driver.machine.memory.write_obj(sector, GuestAddress(header + 8)).unwrap();
            let mut chain = vec![Piece::Read(header, 16)];
            for at in (0..load.len).step_by(PIECE as usize) {
                let (address, len) = (header + PAGE + at, (load.len - at).min(PIECE) as u32);
                chain.push(if load.write { Piece::Read(address, len) } else { Piece::Write(address, len) });
            }
            chain.push(Piece::Write(header + STATUS, 1));
            chain
        });
    }

    /// Whether all requests of the last round succeeded.
    pub fn assert_success(&self) {
        for slot in 0..self.load.depth.min(self.flight.offered) {
            let status = self.flight.driver.get(place(self.load, slot) + STATUS, 1)[0];
            assert_eq!(status, 0, "the device has failed request {slot}");
        }
    }
}

/// Where the request in `slot` lies.
fn place(load: Load, slot: u64) -> u64 {
    Driver::BUFFERS + slot * (PAGE + load.len)
}
