use std::time::{Duration, Instant};

use super::*;
use crate::testing::{Driver, DriverQueue, Piece};

/// Keeps what it is given. Clones are the same.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<u8>>>);

impl Kept {
    fn take(&self) -> Vec<u8> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl Write for Kept {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Rig {
    driver: Driver,
    queues: Vec<DriverQueue>,
    out: Kept,
    control: ConsoleControl,
    metrics: Arc<ConsoleMetrics>,
    common: Arc<DeviceMetrics>,
}

impl Rig {
    fn new() -> Self {
        let out = Kept::default();
        let console = Console::new(out.clone(), WindowSize { columns: 80, rows: 25 }).unwrap();
        let (control, metrics) = (console.control(), Arc::clone(console.console_metrics()));
        let common = Arc::clone(console.metrics());
        let mut driver = Driver::attach(console);
        let queues = driver.up();
        Self { driver, queues, out, control, metrics, common }
    }
}

#[test]
fn what_the_guest_writes_comes_out_in_order() {
    let mut rig = Rig::new();
    let (a, b) = (Driver::BUFFERS, Driver::BUFFERS + 0x1_0000);
    rig.driver.put(a, b"hello, ");
    rig.driver.put(b, b"world");
    let pieces = [Piece::Read(a, 7), Piece::Read(b, 5)];
    assert_eq!(rig.driver.run(&mut rig.queues[TRANSMIT], &pieces), 0);
    assert_eq!(rig.out.take(), b"hello, world");
    // Far more than a piece, and more than is taken of one request.
    rig.driver.put(a, &vec![b'x'; 0x8000]);
    let many: Vec<_> = (0..33).map(|_| Piece::Read(a, 0x8000)).collect();
    assert_eq!(rig.driver.run(&mut rig.queues[TRANSMIT], &many), 0);
    assert_eq!(rig.out.take().len(), MAX_OUTPUT);
    assert_eq!((rig.metrics.output_bytes.value(), rig.metrics.dropped_bytes.value()), (12 + (1 << 20), 0x8000));
}

#[test]
fn input_waits_for_buffers_and_buffers_for_input() {
    let mut rig = Rig::new();
    let at = Driver::BUFFERS;
    // Buffers first.
    rig.queues[RECEIVE].arm();
    rig.queues[RECEIVE].add(&[Piece::Write(at, 3), Piece::Write(at + 0x100, 100)]);
    rig.driver.kick(&rig.queues[RECEIVE]);
    assert_eq!(rig.control.push_input(b"abcdef"), 6);
    assert_eq!(rig.queues[RECEIVE].wait().1, 6);
    assert_eq!((rig.driver.get(at, 3), rig.driver.get(at + 0x100, 3)), (b"abc".to_vec(), b"def".to_vec()));
    // Input first, as much as there is room for; it signals when it is gone.
    let _ = rig.control.drained().read();
    assert_eq!(rig.control.push_input(&[b'y'; 5000]), MAX_INPUT);
    assert_eq!(rig.control.push_input(b"more"), 0);
    assert_eq!(rig.driver.run(&mut rig.queues[RECEIVE], &[Piece::Write(at, 4000)]), 4000);
    assert!(rig.control.drained().read().is_err(), "some is left");
    assert_eq!(rig.driver.run(&mut rig.queues[RECEIVE], &[Piece::Write(at, 4000)]), 96);
    assert_eq!(rig.control.drained().read().unwrap(), 1);
    assert_eq!(rig.metrics.input_bytes.value(), 6 + MAX_INPUT as u64);
    assert_eq!(rig.control.push_input(b"z"), 1);
}

#[test]
fn input_from_before_a_reset_is_there_after_it() {
    let mut rig = Rig::new();
    rig.queues[RECEIVE].add(&[Piece::Write(Driver::BUFFERS, 100)]);
    rig.driver.kick(&rig.queues[RECEIVE]);
    rig.driver.set_status(0);
    assert_eq!(rig.control.push_input(b"later"), 5);
    rig.queues = rig.driver.up();
    assert_eq!(rig.driver.run(&mut rig.queues[RECEIVE], &[Piece::Write(Driver::BUFFERS, 100)]), 5);
    assert_eq!(rig.driver.get(Driver::BUFFERS, 5), b"later");
}

#[test]
fn the_window_has_a_size_and_its_change_is_told() {
    let mut rig = Rig::new();
    let size = |rig: &Rig| rig.driver.machine.read::<4>(rig.driver.device_config(0));
    assert_eq!(size(&rig), [80, 0, 25, 0]);
    let vector = Arc::clone(&rig.driver.machine.host.vectors.lock().unwrap()[0]);
    vector.take();
    // With the first word, and not again.
    for told in [true, false] {
        assert_eq!(rig.driver.run(&mut rig.queues[TRANSMIT], &[Piece::Read(Driver::BUFFERS, 1)]), 0);
        let patience = if told { Duration::from_secs(20) } else { Duration::from_millis(20) };
        assert_eq!(vector.wait(Instant::now() + patience), told);
        vector.take();
    }
    rig.control.resize(WindowSize { columns: 132, rows: 43 });
    assert!(vector.wait(Instant::now() + Duration::from_secs(20)), "nobody told the driver");
    assert_eq!(size(&rig), [132, 0, 43, 0]);
}

#[test]
fn an_emergency_needs_no_queue() {
    let rig = Rig::new();
    rig.driver.set_status(0);
    rig.driver.machine.write(rig.driver.device_config(EMERG_WR), &u32::from(b'!').to_le_bytes());
    rig.driver.machine.write(rig.driver.device_config(EMERG_WR), b"?");
    assert_eq!(rig.driver.machine.read::<4>(rig.driver.device_config(EMERG_WR)), [0; 4]);
    rig.driver.machine.write(rig.driver.device_config(0), &[7; 4]);
    assert_eq!(rig.out.take(), b"!?");
}

#[test]
fn buffers_of_the_wrong_kind_are_returned_and_counted() {
    let mut rig = Rig::new();
    assert_eq!(rig.control.push_input(b"kept"), 4);
    assert_eq!(rig.driver.run(&mut rig.queues[RECEIVE], &[Piece::Read(Driver::BUFFERS, 8)]), 0);
    assert_eq!(rig.driver.run(&mut rig.queues[TRANSMIT], &[Piece::Write(Driver::BUFFERS, 8)]), 0);
    assert_eq!(rig.common.guest_faults.value(), 2);
    assert!(rig.out.take().is_empty());
    assert_eq!(rig.driver.run(&mut rig.queues[RECEIVE], &[Piece::Write(Driver::BUFFERS, 8)]), 4);
}
