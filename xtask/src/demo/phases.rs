//! How long each part took.

use std::time::{Duration, Instant};

/// A clock with laps.
pub struct Phases {
    begin: Instant,
    last: Instant,
    laps: Vec<(&'static str, Duration)>,
}

impl Phases {
    pub fn start() -> Self {
        let now = Instant::now();
        Self { begin: now, last: now, laps: Vec::new() }
    }

    /// What began at the end of the phase before has ended now.
    pub fn done(&mut self, phase: &'static str) {
        let now = Instant::now();
        self.laps.push((phase, now - self.last));
        self.last = now;
    }

    /// A table, with the sum at the end.
    pub fn table(&self) -> String {
        let row = |(name, time): &(&str, Duration)| format!("  {name:<22}{:>7.1} s\n", time.as_secs_f64());
        let mut table: String = self.laps.iter().map(row).collect();
        table.push_str(&row(&("in all", self.last - self.begin)));
        table
    }
}
