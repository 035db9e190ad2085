//! How a worker behaves beside others that want its processor.
//!
//! A thread that has slept takes the processor from one that has not, as soon as there is something for it. For a frame alone
//! that is right: somebody waits for it. In a stream it costs both sides a switch for each frame, where a moment later there
//! would be several. So while a worker carries streams its thread is one that waits for its turn (`SCHED_BATCH`); its share
//! of the processor stays the same. Where it has a processor to itself, nothing changes.

use crate::threads;

/// Bytes at one waking that are part of a stream: more than what one request is answered with.
const STREAM: usize = 32 << 10;
/// What such a waking counts, beside one for each other: a stream has answers, which are short.
const WEIGHT: u8 = 4;
/// Above this it is a stream, until the count is 0 again.
const ENOUGH: u8 = 32;
/// The count, at most.
const MOST: u8 = 64;

/// Of one worker, whose thread it changes.
#[derive(Debug)]
pub(super) struct Pace {
    count: u8,
    /// The thread shall wait for its turn.
    waits: bool,
    /// It does, because of us.
    is_set: bool,
}

impl Pace {
    /// Of a thread that does not wait.
    pub const fn new() -> Self {
        Self { count: 0, waits: false, is_set: false }
    }

    /// The thread that calls this was awake for so many bytes.
    pub fn carried(&mut self, bytes: usize) {
        match self.turn(bytes) {
            Some(true) => self.is_set = threads::wait_for_turns(),
            Some(false) if self.is_set => self.is_set = !threads::stop_waiting_for_turns(),
            _ => {}
        }
    }

    /// Counts; whether to wait for turns, where that changes.
    const fn turn(&mut self, bytes: usize) -> Option<bool> {
        if bytes >= STREAM {
            self.count = if self.count > MOST - WEIGHT { MOST } else { self.count + WEIGHT };
        } else {
            self.count = self.count.saturating_sub(1);
        }
        let waits = if self.waits { self.count > 0 } else { self.count > ENOUGH };
        if waits == self.waits {
            return None;
        }
        self.waits = waits;
        Some(waits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> i32 {
        // SAFETY: takes a number only.
        unsafe { libc::sched_getscheduler(0) }
    }

    #[test]
    fn a_stream_waits_for_its_turn_and_requests_do_not() {
        std::thread::spawn(|| {
            let (mut pace, before) = (Pace::new(), policy());
            assert_eq!(before, libc::SCHED_OTHER);
            // Requests and answers.
            (0..1000).for_each(|_| pace.carried(1500));
            (0..8).for_each(|_| pace.carried(STREAM));
            (0..32).for_each(|_| pace.carried(STREAM - 1));
            assert_eq!(policy(), before);
            // A stream, and what is said to it.
            for _ in 0..100 {
                pace.carried(STREAM);
                pace.carried(66);
            }
            assert_eq!(policy(), libc::SCHED_BATCH);
            let small = (0..100).take_while(|_| {
                pace.carried(66);
                policy() == libc::SCHED_BATCH
            });
            assert_eq!(small.count(), usize::from(MOST) - 2, "it has ended");
        })
        .join()
        .unwrap();
    }

    #[test]
    fn what_somebody_has_chosen_stays() {
        for chosen in [libc::SCHED_IDLE, libc::SCHED_BATCH] {
            std::thread::spawn(move || {
                let param = libc::sched_param { sched_priority: 0 };
                // SAFETY: reads the structure, which lives that long.
                assert_eq!(unsafe { libc::sched_setscheduler(0, chosen, &raw const param) }, 0);
                let mut pace = Pace::new();
                for bytes in [STREAM, 0, STREAM, 0] {
                    (0..100).for_each(|_| pace.carried(bytes));
                    assert_eq!(policy(), chosen);
                }
            })
            .join()
            .unwrap();
        }
    }
}
