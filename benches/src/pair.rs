//! One piece of work, done by us and done in the least way.

use std::time::{Duration, Instant};

use criterion::{Criterion, SamplingMode, Throughput};

/// Rounds that a ratio is taken from, at most, and at least however long they are.
const ROUNDS: usize = 301;
const FEWEST_ROUNDS: usize = 11;
/// No more rounds after this time.
const ENOUGH: Duration = Duration::from_secs(4);
/// About how long each of them is: shorter than a scheduler's time slice, so that on a busy machine most rounds are not
/// interrupted and the median is of those.
const ROUND: Duration = Duration::from_millis(1);

/// What one operation moves.
#[derive(Debug, Clone, Copy)]
pub enum Unit {
    /// Operations are counted.
    Operations,
    /// Each moves so many bytes.
    Bytes(u64),
}

/// A comparison. Both sides do the given number of operations and say how long these took, so that what is only
/// preparation can be left out.
pub struct Pair<'a> {
    /// What is measured; the name of criterion's group.
    pub what: &'a str,
    /// The name of our side.
    pub ours: &'a str,
    /// The name of the side that it is compared with.
    pub bare: &'a str,
    /// Of one operation.
    pub unit: Unit,
}

/// Runs `work` and returns how long it took.
pub fn nanos(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

impl Pair<'_> {
    /// Measures both sides and prints their ratio.
    pub fn run(&self, c: &mut Criterion, ours: impl FnMut(u64) -> Duration, bare: impl FnMut(u64) -> Duration) {
        self.run_in_flight(c, 1, ours, bare);
    }

    /// The same for a side that keeps `depth` operations in flight: every round has several times as many.
    pub fn run_in_flight(
        &self,
        c: &mut Criterion,
        depth: u64,
        mut ours: impl FnMut(u64) -> Duration,
        mut bare: impl FnMut(u64) -> Duration,
    ) {
        let mut group = c.benchmark_group(self.what);
        group.sampling_mode(SamplingMode::Flat);
        if let Unit::Bytes(bytes) = self.unit {
            group.throughput(Throughput::Bytes(bytes));
        }
        let (mut ran_ours, mut ran_bare) = (false, false);
        group.bench_function(self.ours, |b| {
            ran_ours = true;
            b.iter_custom(&mut ours);
        });
        group.bench_function(self.bare, |b| {
            ran_bare = true;
            b.iter_custom(&mut bare);
        });
        group.finish();
        // Without `--bench` criterion only tries each side once; with a filter, one of them may be left out.
        if ran_ours && ran_bare && std::env::args().any(|argument| argument == "--bench") {
            // One at a time needs no minimum.
            let least = if depth > 1 { 4 * depth } else { 1 };
            self.print_ratio(least, &mut ours, &mut bare);
        }
    }

    fn print_ratio(&self, least: u64, ours: &mut dyn FnMut(u64) -> Duration, bare: &mut dyn FnMut(u64) -> Duration) {
        let (ours_count, bare_count) = (per_round(ours).max(least), per_round(bare).max(least));
        let (mut ours_times, mut bare_times) = (Vec::with_capacity(ROUNDS), Vec::with_capacity(ROUNDS));
        let start = Instant::now();
        for round in 0..ROUNDS {
            if round >= FEWEST_ROUNDS && start.elapsed() > ENOUGH {
                break;
            }
            let mut take_ours = || ours_times.push(one(ours, ours_count));
            if round % 2 == 0 {
                take_ours();
                bare_times.push(one(bare, bare_count));
            } else {
                bare_times.push(one(bare, bare_count));
                take_ours();
            }
        }
        let rounds = bare_times.len();
        let (ours_median, bare_median) = (median(&mut ours_times), median(&mut bare_times));
        println!(
            "ratio  {}: {:.2} x  ({} {}, {} {}; medians of {rounds} alternating rounds)\n",
            self.what,
            ours_median / bare_median,
            self.ours,
            text(ours_median),
            self.bare,
            text(bare_median),
        );
    }
}

/// How many operations fill a round.
fn per_round(side: &mut dyn FnMut(u64) -> Duration) -> u64 {
    let mut count = 1;
    loop {
        let took = side(count);
        if took >= ROUND / 4 {
            let wanted = ROUND.as_nanos() * u128::from(count) / took.as_nanos();
            return u64::try_from(wanted).unwrap_or(count).max(1);
        }
        count *= 2;
    }
}

/// Nanoseconds of one operation.
fn one(side: &mut dyn FnMut(u64) -> Duration, count: u64) -> f64 {
    side(count).as_nanos() as f64 / count as f64
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn text(nanoseconds: f64) -> String {
    match nanoseconds {
        n if n < 1e3 => format!("{n:.0} ns"),
        n if n < 1e6 => format!("{:.2} µs", n / 1e3),
        n => format!("{:.2} ms", n / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_is_filled_whatever_one_operation_takes() {
        for each in [Duration::from_nanos(3), Duration::from_micros(70), Duration::from_millis(50)] {
            let mut side = |count: u64| each * u32::try_from(count).unwrap();
            let count = u128::from(per_round(&mut side));
            assert_eq!(count, (ROUND.as_nanos() / each.as_nanos()).max(1));
            assert_eq!(one(&mut side, 4), each.as_nanos() as f64);
        }
    }

    #[test]
    fn the_median_is_the_middle_one_and_is_printed_with_its_unit() {
        assert_eq!(median(&mut [9.0, 1.0, 5.0]), 5.0);
        assert_eq!([9.6, 1234.0, 7_654_321.0].map(text), ["10 ns", "1.23 µs", "7.65 ms"]);
    }
}
