//! What nodes have said to this process: not remembered across restarts, because it would be old then.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bedplate_api::node::NodeStatus;

use crate::records::NodeNumber;

/// Last words of every machine.
#[derive(Debug)]
pub struct Observed {
    since: Instant,
    nodes: Mutex<BTreeMap<NodeNumber, Seen>>,
}

#[derive(Debug)]
struct Seen {
    at: Instant,
    report: Option<NodeStatus>,
}

impl Default for Observed {
    fn default() -> Self {
        Self { since: Instant::now(), nodes: Mutex::default() }
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

    /// A machine that has no agent yet gave a sign of life.
    pub fn heard(&self, node: NodeNumber) {
        let now = Instant::now();
        self.nodes().entry(node).or_insert(Seen { at: now, report: None }).at = now;
    }

    /// The last report of a node to this process.
    pub fn report(&self, node: NodeNumber) -> Option<NodeStatus> {
        self.nodes().get(&node)?.report.clone()
    }

    /// How long ago its last word was; counted from the start of this process where there was none.
    pub fn silent(&self, node: NodeNumber) -> Duration {
        self.nodes().get(&node).map_or(self.since, |seen| seen.at).elapsed()
    }
}
