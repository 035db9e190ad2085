//! Samples of each side, and what is said of them.

use bedplate_tests::inside::figure;

use crate::sides::Side;

/// What one thing cost each side, each time.
pub struct Figure {
    what: &'static str,
    unit: &'static str,
    /// Of each side, in the order of the sides.
    samples: Vec<Vec<f64>>,
}

impl Figure {
    pub fn new(what: &'static str, unit: &'static str, sides: &[Side]) -> Self {
        Self { what, unit, samples: vec![Vec::new(); sides.len()] }
    }

    pub fn add(&mut self, side: usize, sample: f64) {
        self.samples[side].push(sample);
    }

    /// Says medians and spreads, and ours as a multiple of each other's.
    pub fn say(mut self, sides: &[Side]) {
        let mut ours = None;
        for (side, samples) in sides.iter().zip(&mut self.samples) {
            samples.sort_by(f64::total_cmp);
            let (Some(least), Some(most)) = (samples.first(), samples.last()) else { continue };
            let median = samples[samples.len() / 2];
            let ratio = ours.map_or_else(String::new, |ours: f64| format!(", ours is {:.2} x of that", ours / median));
            ours.get_or_insert(median);
            let unit = self.unit;
            figure(&format!("{}, {}: {median:.2} {unit} ({least:.2} to {most:.2}){ratio}", self.what, side.name));
        }
    }
}
