//! Hands desired sets to nodes. Level-triggered: whatever a node's last report says decides whether it gets its set
//! again, so it does not matter which push was lost, or whether this process was killed in the middle of one.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bedplate_api::client::{Client, ClientError, Endpoint};
use bedplate_api::control::NodeState;
use bedplate_api::node::{Desired, NodeStatus};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::control::Control;
use crate::records::{Assignment, NodeNumber, NodeRecord};
use crate::reports;
use crate::store::{NODES, Read, StoreError, VMS};

/// Longest wait for a node to take its set: it only has to write it down.
const TIMEOUT: Duration = Duration::from_secs(10);
/// First and longest wait after a failure.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// Longest time until a node that is behind is looked at again.
const TICK: Duration = Duration::from_secs(1);

/// One node's set is on its way, or waits for its next try.
#[derive(Default)]
struct Course {
    in_flight: bool,
    failures: u32,
    next: Option<Instant>,
}

type Outcome = (NodeNumber, Result<NodeStatus, ClientError>);

/// Pushes until `stop`.
pub async fn run(control: Arc<Control>, stop: CancellationToken) {
    let mut courses = BTreeMap::<NodeNumber, Course>::new();
    let mut pushes = JoinSet::<Outcome>::new();
    loop {
        tokio::select! {
            // Pushes that are under way are dropped: a node that took its set is not told twice.
            () = stop.cancelled() => return,
            () = control.pushes_woken() => {}
            () = tokio::time::sleep(TICK) => {}
            Some(Ok((node, outcome))) = pushes.join_next() => {
                arrived(&control, node, courses.entry(node).or_default(), outcome).await;
            }
        }
        match behind(&control).await {
            Ok(behind) => {
                for (node, endpoint, desired) in behind {
                    let course = courses.entry(node).or_default();
                    if !course.in_flight && course.next.is_none_or(|next| next <= Instant::now()) {
                        course.in_flight = true;
                        pushes.spawn(push(node, endpoint, control.token.clone(), desired));
                    }
                }
            }
            Err(error) => tracing::error!("cannot tell which nodes are behind: {error}"),
        }
    }
}

/// Nodes that are up and whose last report does not show the generation that they should work on.
async fn behind(control: &Arc<Control>) -> Result<Vec<(NodeNumber, SocketAddr, Desired)>, StoreError> {
    let shared = Arc::clone(control);
    control
        .read(move |snapshot| {
            let behind = |node: &NodeRecord| {
                let reported = shared.observed.report(node.number).map(|report| report.generation);
                node.state == NodeState::Ready && reported != Some(node.generation)
            };
            let nodes: Vec<NodeRecord> = snapshot.all(&NODES)?.into_iter().filter(behind).collect();
            if nodes.is_empty() {
                return Ok(Vec::new());
            }
            let vms: Vec<Assignment> = snapshot.all(&VMS)?;
            let found = nodes.iter().filter_map(|n| Some((n.number, n.endpoint?, desired(n, &vms))));
            Ok(found.collect())
        })
        .await
}

/// What shall run on `node`.
fn desired(node: &NodeRecord, vms: &[Assignment]) -> Desired {
    let here = vms.iter().filter(|a| a.node == node.number && a.wanted());
    Desired { generation: node.generation, vms: here.map(|a| a.vm.clone()).collect() }
}

async fn push(node: NodeNumber, endpoint: SocketAddr, token: String, desired: Desired) -> Outcome {
    let put = async {
        let client = Client::new(Endpoint::Http(endpoint.to_string()), Some(token))?;
        client.put_desired(&desired).await
    };
    let late = || ClientError::Answer {
        endpoint: Endpoint::Http(endpoint.to_string()),
        what: "PUT /v1/desired".into(),
        cause: format!("no answer within {} s", TIMEOUT.as_secs()),
    };
    let outcome = tokio::time::timeout(TIMEOUT, put).await.unwrap_or_else(|_| Err(late()));
    (node, outcome)
}

async fn arrived(
    control: &Arc<Control>,
    node: NodeNumber,
    course: &mut Course,
    outcome: Result<NodeStatus, ClientError>,
) {
    course.in_flight = false;
    match outcome {
        Ok(status) => {
            if course.failures > 0 {
                control.event(node, "takes its desired set again").await;
            }
            *course = Course::default();
            if let Err(error) = reports::accept(control, node, status).await {
                tracing::error!("the report of {node} could not be kept: {error}");
            }
        }
        Err(error) => {
            if course.failures == 0 {
                let reason = format!("does not take its desired set ({error}); tried again until it does or is lost");
                control.event(node, reason).await;
            }
            course.failures = course.failures.saturating_add(1);
            let wait = BACK_OFF.0.saturating_mul(1 << course.failures.saturating_sub(1).min(10)).min(BACK_OFF.1);
            course.next = Some(Instant::now() + wait);
        }
    }
}
