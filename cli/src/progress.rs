//! How far long work has come: a bar on a terminal, a plain line at the end elsewhere. Always on stderr.

use std::cell::Cell;
use std::io::{self, IsTerminal};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output::{bytes, note};

/// A piece of work that counts bytes.
#[derive(Debug)]
pub struct Progress {
    what: String,
    bar: ProgressBar,
    terminal: bool,
    start: Instant,
    /// Nobody knows the end, which the style says.
    endless: Cell<bool>,
}

impl Progress {
    /// Begins `what`, such as `import debian.qcow2`, whose end is at `total` bytes.
    pub fn new(what: impl Into<String>, total: u64) -> Self {
        let what = what.into();
        let terminal = io::stderr().is_terminal();
        let target = if terminal { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        let colour = std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
        let bar_style = if colour { "{bar:24.cyan/blue}" } else { "{bar:24}" };
        let template = format!(
            "{{msg}}  {bar_style}  {{binary_bytes}} of {{binary_total_bytes}}  {{binary_bytes_per_sec}}  {{eta}} left"
        );
        // A template that does not parse would be our bug; the default style does as well.
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style);
        }
        bar.set_message(what.clone());
        Self { what, bar, terminal, start: Instant::now(), endless: Cell::new(false) }
    }

    /// `done` bytes of `total` are done; a total of 0 means that nobody knows it.
    pub fn set(&self, done: u64, total: u64) {
        if total == 0 && !self.endless.replace(true) {
            self.bar.unset_length();
            if let Ok(style) = ProgressStyle::with_template("{msg}  {binary_bytes}  {binary_bytes_per_sec}  {elapsed}")
            {
                self.bar.set_style(style);
            }
        }
        if total > 0 && self.bar.length() != Some(total) {
            self.bar.set_length(total);
        }
        self.bar.set_position(done);
    }

    /// `n` bytes more are done.
    pub fn add(&self, n: u64) {
        self.bar.inc(n);
    }

    /// It is done; `result` says what came of it.
    pub fn finish(self, result: &str) {
        self.bar.finish_and_clear();
        let seconds = self.start.elapsed().as_secs_f64();
        // What took no time worth mentioning is not mentioned on a terminal.
        if !self.terminal || seconds >= 0.2 || !result.is_empty() {
            let result = if result.is_empty() { bytes(self.bar.position()) } else { result.to_owned() };
            note(&format!("{}: {result} in {seconds:.1} s", self.what));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        // The error message that follows begins on a line of its own.
        if !self.bar.is_finished() {
            self.bar.finish_and_clear();
        }
    }
}
