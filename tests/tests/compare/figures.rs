//! Samples of each side, and what is said of them.

use bedplate_tests::inside::{data, figure};
use serde_json::json;

use crate::sides::Side;

/// What one thing cost each side, each time.
pub struct Figure {
    what: &'static str,
    unit: &'static str,
    /// Of each side, in the order of the sides.
    samples: Vec<Vec<f64>>,
    /// What is beside them without being a VMM: its name, and its own.
    limit: Option<(&'static str, Vec<f64>)>,
}

impl Figure {
    pub fn new(what: &'static str, unit: &'static str, sides: &[Side]) -> Self {
        Self { what, unit, samples: vec![Vec::new(); sides.len()], limit: None }
    }

    pub fn add(&mut self, side: usize, sample: f64) {
        self.samples[side].push(sample);
    }

    /// A sample of what no VMM can be better than.
    pub fn add_limit(&mut self, name: &'static str, sample: f64) {
        self.limit.get_or_insert((name, Vec::new())).1.push(sample);
    }

    /// Says medians and spreads, and ours as a multiple of each other's.
    pub fn say(self, sides: &[Side]) {
        let mut ours = None;
        let limit = self.limit.iter().map(|(name, samples)| (*name, samples.clone()));
        for (name, mut samples) in sides.iter().map(|side| side.name.as_str()).zip(self.samples).chain(limit) {
            samples.sort_by(f64::total_cmp);
            let (Some(least), Some(most)) = (samples.first(), samples.last()) else { continue };
            let median = samples[samples.len() / 2];
            let ratio = ours.map(|ours: f64| ours / median);
            ours.get_or_insert(median);
            let words = ratio.map_or_else(String::new, |ratio| format!(", ours is {ratio:.2} x of that"));
            let (what, unit) = (self.what, self.unit);
            figure(&format!("{what}, {name}: {median:.2} {unit} ({least:.2} to {most:.2}){words}"));
            data(&json!({"what": what, "of": name, "unit": unit, "median": median, "least": least, "most": most,
                "samples": samples, "ratio": ratio}));
        }
    }
}
