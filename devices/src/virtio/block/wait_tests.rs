//! A backend that lacks parts of its contents for a while.

use std::os::fd::BorrowedFd;
use std::sync::Mutex;

use vmm_sys_util::eventfd::EventFd;

use super::tests::{DATA, IN, OUT};
use super::*;
use crate::testing::{Driver, DriverQueue, Piece};

/// Sectors below `absent` are not here; each sector is full of its number.
struct Lacking {
    absent: u64,
    broken: bool,
}

#[derive(Clone)]
struct Lazy(Arc<(Mutex<Lacking>, EventFd)>);

impl Lazy {
    fn new(absent: u64) -> Self {
        let event = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        Self(Arc::new((Mutex::new(Lacking { absent, broken: false }), event)))
    }

    fn change(&self, change: impl FnOnce(&mut Lacking)) {
        change(&mut self.0.0.lock().unwrap());
        self.0.1.write(1).unwrap();
    }

    fn check(&self, offset: u64) -> io::Result<()> {
        let lacking = self.0.0.lock().unwrap();
        match offset / SECTOR < lacking.absent {
            true if lacking.broken => Err(io::Error::new(io::ErrorKind::TimedOut, "it never came")),
            true => Err(io::ErrorKind::WouldBlock.into()),
            false => Ok(()),
        }
    }
}

impl Backend for Lazy {
    fn size(&self) -> u64 {
        1 << 20
    }
    fn progress(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the descriptor is open as long as the event that is borrowed with it.
        Some(unsafe { BorrowedFd::borrow_raw(self.0.1.as_raw_fd()) })
    }
    fn proceed(&mut self) -> bool {
        self.0.1.read().is_ok()
    }
    fn read_at(&mut self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.check(offset)?;
        data.fill((offset / SECTOR) as u8);
        Ok(())
    }
    fn write_at(&mut self, offset: u64, _data: &[u8]) -> io::Result<()> {
        self.check(offset)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
    fn discard(&mut self, offset: u64, _len: u64) -> io::Result<()> {
        self.check(offset)
    }
    fn write_zeroes(&mut self, offset: u64, _len: u64, _unmap: bool) -> io::Result<()> {
        self.check(offset)
    }
}

/// A request with a header, a buffer and a status of its own; its head.
fn add(driver: &Driver, queue: &mut DriverQueue, slot: u64, kind: u32, sector: u64) -> u32 {
    let base = DATA + slot * 0x1000;
    driver.put(base, &kind.to_le_bytes());
    driver.put(base + 8, &sector.to_le_bytes());
    driver.put(base + 16, &[0xee]);
    let data = if kind == IN { Piece::Write(base + 0x200, 512) } else { Piece::Read(base + 0x200, 512) };
    queue.add_indirect(base + 0x100, &[Piece::Read(base, 16), data, Piece::Write(base + 16, 1)]).into()
}

fn answer(driver: &Driver, slot: u64) -> (u8, u8) {
    let base = DATA + slot * 0x1000;
    (driver.get(base + 16, 1)[0], driver.get(base + 0x200, 1)[0])
}

#[test]
fn requests_wait_for_what_is_absent_and_others_go_past_them() {
    let lazy = Lazy::new(10);
    let block = Block::new(lazy.clone(), BlockConfig::default()).unwrap();
    let (metrics, counts) = (Arc::clone(block.metrics()), Arc::clone(block.block_metrics()));
    let mut driver = Driver::attach(block);
    let mut queue = driver.up().remove(0);
    let first = add(&driver, &mut queue, 0, IN, 7);
    let second = add(&driver, &mut queue, 1, OUT, 3);
    let third = add(&driver, &mut queue, 2, IN, 20);
    driver.kick(&queue);
    assert_eq!(queue.wait().0, third, "what is here is answered first");
    assert_eq!(answer(&driver, 2), (0, 20));
    assert_eq!((answer(&driver, 0).0, answer(&driver, 1).0), (0xee, 0xee));
    lazy.change(|lacking| lacking.absent = 5);
    assert_eq!(queue.wait(), (first, 513));
    assert_eq!(answer(&driver, 0), (0, 7));
    lazy.change(|lacking| lacking.broken = true);
    assert_eq!(queue.wait().0, second);
    assert_eq!(answer(&driver, 1).0, 1, "an I/O error");
    assert_eq!(metrics.first_host_fault(), Some("cannot write a disk: it never came"));
    assert_eq!((counts.reads.value(), counts.failures.value(), metrics.guest_faults.value()), (2, 1, 0));
}

#[test]
fn more_may_wait_than_is_put_aside_and_a_reset_waits_for_nobody() {
    let lazy = Lazy::new(100);
    let block = Block::new(lazy.clone(), BlockConfig::default()).unwrap();
    let metrics = Arc::clone(block.metrics());
    let mut driver = Driver::attach(block);
    let mut queue = driver.up().remove(0);
    let count = request::MAX_PARKED as u64 + 10;
    let heads: Vec<u32> = (0..count).map(|slot| add(&driver, &mut queue, slot, IN, slot)).collect();
    driver.kick(&queue);
    lazy.change(|lacking| lacking.absent = 0);
    let mut done: Vec<u32> = heads.iter().map(|_| queue.wait().0).collect();
    done.sort_unstable();
    assert_eq!(done, heads);
    assert!((0..count).all(|slot| answer(&driver, slot) == (0, slot as u8)));

    lazy.change(|lacking| lacking.absent = 100);
    add(&driver, &mut queue, 0, IN, 7);
    driver.kick(&queue);
    let mut queue = driver.up().remove(0);
    assert_eq!(metrics.host_faults.value(), 0, "nobody is to blame");
    let head = add(&driver, &mut queue, 1, IN, 200);
    driver.kick(&queue);
    assert_eq!(queue.wait().0, head);
    assert_eq!(answer(&driver, 1), (0, 200), "the device works after the reset");
}
