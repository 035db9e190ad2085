//! What nodes say: how a registration and a report change what is remembered and observed.

mod changes;
mod register;

use std::sync::Arc;

use bedplate_api::control::NodeState;
use bedplate_api::node::{MAX_SLOTS, NodeStatus};

pub use register::{RegisterError, is_mac, register};

use crate::control::{Control, now};
use crate::records::NodeNumber;
use crate::store::{NODES, Read, StoreError};

/// Keeps a report: it is observed at once; what follows from it for the store is one transaction, made only where there
/// is something to write.
pub async fn accept(control: &Arc<Control>, node: NodeNumber, mut status: NodeStatus) -> Result<(), StoreError> {
    // Plans and pages look at every slot: a node's word alone must not make them endless.
    status.capacity.slots = status.capacity.slots.min(MAX_SLOTS);
    let before = control.observed.reported(node, status.clone());
    let lines = changes::between(node, before.as_ref(), &status);
    let record = control.read(move |s| Ok(s.all(&NODES)?.into_iter().find(|n| n.number == node))).await?;
    let Some(record) = record else { return Ok(()) };
    let generation = record.generation;
    let capacity = record.capacity.as_ref().map(|c| (c.cpus, c.memory_mib, c.slots));
    let resized = capacity != Some((status.capacity.cpus, status.capacity.memory_mib, status.capacity.slots));
    if record.state != NodeState::Ready || resized || !lines.is_empty() {
        let capacity = status.capacity.clone();
        control
            .change(move |change| {
                let Some(mut record) = change.node(node)? else { return Ok(()) };
                if record.state != NodeState::Ready {
                    change.event(now(), node, "reports again")?;
                }
                record.state = NodeState::Ready;
                record.booting_since = None;
                record.capacity = Some(capacity);
                for (subject, message) in lines {
                    change.event(now(), subject, message)?;
                }
                change.put_node(&record)
            })
            .await?;
    }
    if status.generation != generation {
        control.wake_pushes();
    }
    control.wake_planner();
    Ok(())
}
