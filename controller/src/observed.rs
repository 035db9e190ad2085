//! What nodes have said to this process: not remembered across restarts, because it would be old then.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bedplate_api::Digest;
use bedplate_api::node::NodeStatus;

use crate::records::NodeNumber;

/// Last words of every machine.
#[derive(Debug)]
pub struct Observed {
    since: Mutex<Instant>,
    /// When the executor last looked at the clocks.
    looked: Mutex<Instant>,
    nodes: Mutex<BTreeMap<NodeNumber, Seen>>,
}

#[derive(Debug)]
struct Seen {
    at: Instant,
    report: Option<NodeStatus>,
}

impl Default for Observed {
    fn default() -> Self {
        let now = Instant::now();
        Self { since: Mutex::new(now), looked: Mutex::new(now), nodes: Mutex::default() }
    }
}

impl Observed {
    // The map is whole after each single statement under the lock, so a panic elsewhere does not spoil it.
    fn nodes(&self) -> MutexGuard<'_, BTreeMap<NodeNumber, Seen>> {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a report; returns the one before.
    pub fn reported(&self, node: NodeNumber, report: NodeStatus) -> Option<NodeStatus> {
        self.nodes().insert(node, Seen { at: Instant::now(), report: Some(report) })?.report
    }

    /// To be called regularly. Where the last time is longer ago than `late`, this process did not run, and nobody's
    /// silence in the meantime says anything: all clocks start anew, and the answer is true.
    pub fn stalled(&self, now: Instant, late: Duration) -> bool {
        let before = std::mem::replace(&mut *lock(&self.looked), now);
        let stalled = now.saturating_duration_since(before) > late;
        if stalled {
            *lock(&self.since) = now;
            self.nodes().values_mut().for_each(|seen| seen.at = now);
        }
        stalled
    }

    /// A machine that has no agent yet gave a sign of life.
    pub fn heard(&self, node: NodeNumber) {
        let now = Instant::now();
        self.nodes().entry(node).or_insert(Seen { at: now, report: None }).at = now;
    }

    /// The last report of a node to this process.
    pub fn report(&self, node: NodeNumber) -> Option<NodeStatus> {
        self.nodes().get(&node)?.report.clone()
    }

    /// Whether the node has reported that it has the image `digest` whole.
    pub fn has_image(&self, node: NodeNumber, digest: &Digest) -> bool {
        let nodes = self.nodes();
        nodes.get(&node).and_then(|seen| seen.report.as_ref()).is_some_and(|report| report.images.contains(digest))
    }

    /// How long ago its last word was; counted from the start of this process where there was none.
    pub fn silent(&self, node: NodeNumber) -> Duration {
        self.nodes().get(&node).map_or_else(|| *lock(&self.since), |seen| seen.at).elapsed()
    }
}

fn lock(instant: &Mutex<Instant>) -> MutexGuard<'_, Instant> {
    instant.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_while_this_process_did_not_run_does_not_count() {
        let observed = Observed::default();
        let (heard, unheard) = (NodeNumber(1), NodeNumber(2));
        observed.heard(heard);
        let (start, minute) = (Instant::now(), Duration::from_secs(60));
        assert!(!observed.stalled(start, minute));
        let later = start + minute;
        assert!(!observed.stalled(later, minute));
        let at = |observed: &Observed| observed.nodes()[&heard].at;
        assert!(at(&observed) <= start, "in time: the clocks go on");
        let resumed = later + minute * 2;
        assert!(observed.stalled(resumed, minute));
        assert_eq!((at(&observed), *lock(&observed.since)), (resumed, resumed));
        assert_eq!((observed.silent(heard), observed.silent(unheard)), (Duration::ZERO, Duration::ZERO));
        assert!(!observed.stalled(resumed, minute));
    }
}
