use std::sync::mpsc::{Receiver, Sender, channel};

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Says each time when it is raised.
struct Line(Sender<Instant>);

impl IrqLine for Line {
    fn set(&self, asserted: bool) {
        if asserted {
            let _ = self.0.send(Instant::now());
        }
    }
}

/// How long a test waits for what comes at once.
const PATIENCE: Duration = Duration::from_secs(20);

fn pit() -> (Pit, Receiver<Instant>) {
    let (raised, seen) = channel();
    (Pit::new(Box::new(Line(raised))), seen)
}

/// A counter in `mode` with `count`, begun at moment 0.
fn counter(mode: u8, count: u16, gate: bool) -> Counter {
    let mut counter = Counter::new(gate);
    assert!(counter.control(3 << 4 | mode << 1, 0));
    assert!(!counter.write(count as u8, 0), "half a count");
    assert!(counter.write((count >> 8) as u8, 0));
    counter
}

fn count_of(counter: &mut Counter, now: u64) -> u16 {
    u16::from_le_bytes([counter.read(now), counter.read(now)])
}

/// Outputs in the first ticks, a digit for each.
fn outputs(counter: &Counter, ticks: u64) -> String {
    (0..ticks).map(|now| if counter.output(now) { '1' } else { '0' }).collect()
}

#[test]
fn outputs_are_those_of_the_data_sheet() {
    assert_eq!(outputs(&counter(0, 4, true), 8), "00001111");
    assert_eq!(outputs(&counter(2, 3, true), 9), "110110110");
    assert_eq!(outputs(&counter(3, 4, true), 9), "110011001");
    assert_eq!(outputs(&counter(3, 5, true), 10), "1110011100");
    assert_eq!(outputs(&counter(4, 3, true), 6), "111011");
    // These wait for their gate to rise.
    let mut one_shot = counter(1, 3, true);
    assert_eq!(outputs(&one_shot, 5), "11111");
    one_shot.set_gate(false, 0);
    one_shot.set_gate(true, 0);
    assert_eq!(outputs(&one_shot, 5), "00011");
    let mut strobe = counter(5, 3, false);
    strobe.set_gate(true, 0);
    assert_eq!(outputs(&strobe, 5), "11101");
    // Without a count.
    let mut idle = Counter::new(true);
    idle.control(3 << 4, 0);
    assert!(!idle.output(5));
    idle.control(3 << 4 | 2 << 1, 0);
    assert!(idle.output(5));
}

#[test]
fn modes_6_and_7_are_2_and_3() {
    for (written, mode) in [(6, 2), (7, 3)] {
        let mut counter = counter(written, 10, true);
        counter.latch_status(0);
        assert_eq!(counter.read(0) >> 1 & 7, mode);
    }
}

#[test]
fn a_count_goes_down_to_nothing_and_begins_again() {
    let mut once = counter(0, 0x1234, true);
    assert_eq!(
        [0, 1, 0x34, 0x1233, 0x1234, 0x1235].map(|now| count_of(&mut once, now)),
        [0x1234, 0x1233, 0x1200, 1, 0, 0xffff]
    );
    let mut rate = counter(2, 5, true);
    assert_eq!([0, 1, 4, 5, 9].map(|now| count_of(&mut rate, now)), [5, 4, 1, 5, 1]);
    let mut square = counter(3, 6, true);
    assert_eq!([0, 1, 2, 3, 4, 5, 6].map(|now| count_of(&mut square, now)), [6, 4, 2, 6, 4, 2, 6]);
    // 0 is the most that there is.
    let mut most = counter(2, 0, true);
    assert_eq!([0, 1, 0xffff, 0x1_0000].map(|now| count_of(&mut most, now)), [0, 0xffff, 1, 0]);
    assert_eq!(most.rises(), Some(Rises { first: 0x1_0000, period: Some(0x1_0000) }));
}

#[test]
fn decimal_counts_are_decimal() {
    let mut counter = Counter::new(true);
    counter.control(3 << 4 | 1, 0);
    counter.write(0x50, 0);
    assert!(counter.write(0x12, 0));
    assert_eq!([0, 1, 51, 1250, 1251].map(|now| count_of(&mut counter, now)), [0x1250, 0x1249, 0x1199, 0, 0x9999]);
    assert_eq!(counter.rises(), Some(Rises { first: 1250, period: None }));
    // Digits that there are not.
    counter.write(0xff, 0);
    counter.write(0xff, 0);
    assert_eq!(counter.rises(), Some(Rises { first: 10_000, period: None }));
}

#[test]
fn one_byte_of_a_count_is_enough_where_it_was_said() {
    for (access, first) in [(1, 0x12), (2, 0x1200)] {
        let mut counter = Counter::new(true);
        counter.control(access << 4, 0);
        assert!(counter.write(0x12, 0));
        assert_eq!(counter.rises(), Some(Rises { first, period: None }));
        assert_eq!([counter.read(0), counter.read(0)], [0x12, 0x12]);
    }
}

#[test]
fn a_latched_count_stays_until_it_is_read() {
    let mut counter = counter(2, 1000, true);
    // A latch command: no access.
    assert!(!counter.control(0, 100));
    assert!(!counter.control(0, 200), "the first one counts");
    assert_eq!(count_of(&mut counter, 300), 900);
    assert_eq!(count_of(&mut counter, 300), 700);
    // The status comes first.
    counter.latch_count(400);
    counter.latch_status(400);
    assert_eq!(counter.read(500), 1 << 7 | 3 << 4 | 2 << 1);
    assert_eq!(count_of(&mut counter, 500), 600);
    // A control word forgets it, and half a read, and has no count.
    counter.latch_count(500);
    counter.read(500);
    counter.control(3 << 4 | 2 << 1, 600);
    counter.latch_status(600);
    assert_eq!(counter.read(600), 1 << 7 | 1 << 6 | 3 << 4 | 2 << 1);
    assert_eq!(count_of(&mut counter, 600), 0);
}

#[test]
fn a_gate_that_is_low_holds_the_count() {
    let mut delay = counter(0, 10, true);
    delay.set_gate(false, 4);
    assert_eq!((count_of(&mut delay, 1000), delay.output(1000)), (6, false));
    delay.set_gate(true, 2000);
    assert_eq!((count_of(&mut delay, 2005), delay.output(2005), delay.output(2006)), (1, false, true));
    // A rate begins again.
    let mut rate = counter(3, 10, false);
    assert!(rate.output(7), "high while it is held");
    rate.set_gate(true, 100);
    assert_eq!((count_of(&mut rate, 101), rate.output(104), rate.output(105)), (8, true, false));
}

#[test]
fn port_b_is_gate_and_output_of_counter_2() {
    let (pit, _) = pit();
    let pit = Arc::new(Mutex::new(pit));
    let mut speaker = Speaker::new(Arc::clone(&pit));
    let read = |speaker: &mut Speaker| {
        let mut byte = [0];
        speaker.read(0, &mut byte);
        byte[0]
    };
    // As Linux calibrates: the gate is raised, a delay is counted, and its end is a bit.
    let begun = Instant::now();
    speaker.write(0, &[GATE | 0xf0]);
    for (port, byte) in [(3, 2 << 6 | 3 << 4), (2, 0xff), (2, 0xff)] {
        pit.lock().unwrap().write(port, &[byte]);
    }
    assert_eq!(read(&mut speaker) & (GATE | SPEAKER), GATE);
    let (mut looks, mut refreshed) = ([0, 0], [false, false]);
    while read(&mut speaker) & OUTPUT == 0 {
        refreshed[usize::from(read(&mut speaker) & REFRESH != 0)] = true;
        looks[0] += 1;
        assert!(begun.elapsed() < PATIENCE);
    }
    // 65,535 ticks.
    assert!(begun.elapsed() >= Duration::from_millis(54), "{:?}, {looks:?}", begun.elapsed());
    assert_eq!(refreshed, [true, true]);
    speaker.write(0, &[SPEAKER]);
    assert_eq!(read(&mut speaker) & (GATE | SPEAKER), SPEAKER);
    // At another width there is nothing.
    let mut wide = [0; 2];
    speaker.read(0, &mut wide);
    speaker.write(0, &[0; 2]);
    assert_eq!((wide, read(&mut speaker) & SPEAKER), ([0xff; 2], SPEAKER));
}

#[test]
fn counter_0_interrupts_each_time_its_output_rises() {
    let (mut pit, seen) = pit();
    assert!(pit.alarm.is_silent(), "no thread before it is needed");
    let begun = Instant::now();
    // 1000 Hz.
    for (port, byte) in [(3, 3 << 4 | 2 << 1), (0, 0xa9), (0, 0x04)] {
        pit.write(port, &[byte]);
    }
    let last = [(); 50].map(|()| seen.recv_timeout(PATIENCE).unwrap())[49];
    assert!(last - begun >= Duration::from_millis(49), "{:?}", last - begun);
    // A mode without a count: nothing any more.
    pit.write(3, &[3 << 4]);
    assert!(pit.alarm.is_silent());
    let stopped = Instant::now();
    drop(pit);
    assert_eq!(seen.into_iter().filter(|raised| *raised > stopped).count(), 0);
}

#[test]
fn counter_0_interrupts_at_the_end_of_a_delay() {
    let (mut pit, seen) = pit();
    // Those of the others lead nowhere.
    for (port, byte) in [(3, 1 << 6 | 1 << 4), (1, 1), (3, 2 << 6 | 1 << 4), (2, 1), (3, 3 << 4), (0, 0)] {
        pit.write(port, &[byte]);
    }
    assert!(pit.alarm.is_silent());
    let begun = Instant::now();
    pit.write(0, &[0x10]);
    assert!(seen.recv_timeout(PATIENCE).unwrap() - begun >= Duration::from_micros(3432));
    drop(pit);
    assert_eq!(seen.into_iter().count(), 0, "once, and the thread has ended");
}

#[test]
fn a_guest_that_wants_more_interrupts_than_there_is_time_for_has_fewer() {
    let (mut pit, seen) = pit();
    for (port, byte) in [(3, 1 << 4 | 2 << 1), (0, 1)] {
        pit.write(port, &[byte]);
    }
    let begun = Instant::now();
    let last = [(); 100].map(|()| seen.recv_timeout(PATIENCE).unwrap())[99];
    assert!(last - begun >= Duration::from_micros(200) * 99, "{:?}", last - begun);
}

#[test]
fn counts_are_there_before_the_guest_writes_any() {
    let (mut pit, _) = pit();
    let read = |pit: &mut Pit| {
        let mut byte = [0];
        pit.read(0, &mut byte);
        byte[0]
    };
    // As Linux takes chance from counter 0: its status, which has to say that there is a count, and the count.
    pit.write(3, &[0xc2]);
    assert_eq!(read(&mut pit) & 0x40, 0);
    let first = [read(&mut pit), read(&mut pit)];
    let begun = Instant::now();
    while [read(&mut pit), read(&mut pit)] == first {
        assert!(begun.elapsed() < PATIENCE);
    }
    assert!(pit.alarm.is_silent());
}

#[test]
fn what_is_latched_is_read_from_its_low_byte_on() {
    let mut counter = counter(2, 0x1234, true);
    counter.read(0);
    counter.latch_count(0);
    assert_eq!(count_of(&mut counter, 100), 0x1234);
}

#[test]
fn read_back_latches_what_it_names() {
    let (mut pit, _) = pit();
    for counter in 0..3 {
        for (port, byte) in [(3, counter << 6 | 3 << 4 | 2 << 1), (counter.into(), 0), (counter.into(), 0)] {
            pit.write(port, &[byte]);
        }
    }
    let read = |pit: &mut Pit, port| {
        let mut byte = [0];
        pit.read(port, &mut byte);
        byte[0]
    };
    // The status of counters 0 and 2.
    pit.write(3, &[0xc0 | NO_COUNT | 1 << 1 | 1 << 3]);
    assert_eq!([0, 2].map(|port| read(&mut pit, port)), [1 << 7 | 3 << 4 | 2 << 1; 2]);
    // The control word itself cannot be read; nor is anything at another width.
    assert_eq!(read(&mut pit, 3), 0xff);
    for width in [2, 4, 8] {
        let mut data = vec![0; width];
        pit.read(0, &mut data);
        pit.write(3, &data);
        assert_eq!(data, vec![0xff; width]);
    }
}

proptest! {
    #[test]
    fn any_accesses_at_any_time_have_an_answer(steps in vec((0..6u8, any::<u8>(), any::<u32>()), 0..64)) {
        let (mut counter, mut now) = (Counter::new(true), u64::from(u32::MAX) << 20);
        for (kind, byte, later) in steps {
            now += u64::from(later) >> (byte % 32);
            match kind {
                0 => _ = counter.control(byte, now),
                1 => _ = counter.write(byte, now),
                2 => _ = (counter.read(now), counter.output(now)),
                3 => counter.latch_status(now),
                _ => counter.set_gate(byte & 1 != 0, now),
            }
            if let Some(Rises { first, period }) = counter.rises() {
                prop_assert!((1..=0x1_0001).contains(&first) && period.is_none_or(|period| period == first));
            }
        }
    }
}
