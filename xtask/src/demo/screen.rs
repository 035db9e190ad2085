//! What a person sees: lines that stay, and bars that move below them. Without a terminal there are only the lines.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// The terminal.
pub struct Screen {
    begin: Instant,
    bars: MultiProgress,
    rows: BTreeMap<String, ProgressBar>,
    is_terminal: bool,
}

impl Screen {
    pub fn new() -> Self {
        let bars = MultiProgress::new();
        let is_terminal = !bars.is_hidden();
        Self { begin: Instant::now(), bars, rows: BTreeMap::new(), is_terminal }
    }

    /// A line that stays, with the time since the story began.
    pub fn say(&self, line: impl AsRef<str>) {
        let line = format!("[{:>5.1} s] {}", self.begin.elapsed().as_secs_f64(), line.as_ref());
        if !self.is_terminal || self.bars.println(&line).is_err() {
            println!("{line}");
        }
    }

    /// Where `name` stands, in words; `progress` is how much of how much is done, where that is known.
    pub fn show(&mut self, name: &str, text: &str, progress: Option<(u64, u64)>) {
        let bars = &self.bars;
        let bar = self.rows.entry(name.to_owned()).or_insert_with(|| add(bars, name));
        match progress {
            Some((done, total)) => {
                bar.set_style(style("  {prefix:<12} {bar:24} {bytes}/{total_bytes} {msg}"));
                bar.set_length(total.max(1));
                bar.set_position(done);
            }
            None => bar.set_style(style("  {prefix:<12} {spinner} {msg}")),
        }
        bar.set_message(text.to_owned());
    }

    /// Takes the bars away.
    pub fn settle(&mut self) {
        for bar in std::mem::take(&mut self.rows).into_values() {
            bar.finish_and_clear();
        }
    }
}

fn add(bars: &MultiProgress, name: &str) -> ProgressBar {
    let bar = bars.add(ProgressBar::new_spinner()).with_prefix(name.to_owned());
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

/// A template that indicatif does not understand is our mistake; the default then still shows something.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_spinner())
}
