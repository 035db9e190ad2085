//! Rows by what they are: the keys of the tables, and the few changes that must keep several rows in step.

use bedplate_api::control::Event;
use bedplate_api::{NodeId, VmId};
use serde_json::Value;

use super::{Change, EVENTS, KEPT_EVENTS, LEASES, NODES, Read, SETTINGS, StoreError, VMS};
use crate::records::{Assignment, Lease, NodeNumber, NodeRecord};

/// Zero-padded, so that the order of keys is the order of numbers.
fn node_key(number: NodeNumber) -> String {
    format!("{:010}", number.0)
}

/// Zero-padded likewise; also the bound of [`Read::after`] for events.
pub fn event_key(number: u64) -> String {
    format!("{number:020}")
}

impl Change {
    /// The machine `number`.
    pub fn node(&self, number: NodeNumber) -> Result<Option<NodeRecord>, StoreError> {
        self.one(&NODES, &node_key(number))
    }

    /// Keeps `node`.
    pub fn put_node(&self, node: &NodeRecord) -> Result<(), StoreError> {
        self.put(&NODES, &node_key(node.number), node)
    }

    /// Forgets a machine that never registered.
    pub fn remove_node(&self, number: NodeNumber) -> Result<(), StoreError> {
        self.remove(&NODES, &node_key(number)).map(drop)
    }

    /// The machine that registered as `id`.
    pub fn node_by_id(&self, id: NodeId) -> Result<Option<NodeRecord>, StoreError> {
        Ok(self.all(&NODES)?.into_iter().find(|n| n.id == Some(id)))
    }

    /// The machine that boots from `mac`.
    pub fn node_by_mac(&self, mac: &str) -> Result<Option<NodeRecord>, StoreError> {
        Ok(self.all(&NODES)?.into_iter().find(|n| n.mac.as_deref() == Some(mac)))
    }

    /// A machine not seen before, with the next number. It is not kept yet, its number is.
    pub fn new_node(&self) -> Result<NodeRecord, StoreError> {
        let last = self.setting("last_node")?.and_then(|n| n.as_u64()).and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
        let number = last.saturating_add(1);
        self.set("last_node", &number.into())?;
        Ok(NodeRecord::new(NodeNumber(number)))
    }

    /// Binds a VM to its slot, or changes how it is bound.
    pub fn put_vm(&self, assignment: &Assignment) -> Result<(), StoreError> {
        self.put(&VMS, &assignment.vm.id.to_string(), assignment)
    }

    /// Frees the slot of a VM.
    pub fn remove_vm(&self, id: VmId) -> Result<bool, StoreError> {
        self.remove(&VMS, &id.to_string())
    }

    /// Keeps a lease.
    pub fn put_lease(&self, lease: &Lease) -> Result<(), StoreError> {
        self.put(&LEASES, &lease.mac, lease)
    }

    /// A setting of the whole control node.
    pub fn setting(&self, name: &str) -> Result<Option<Value>, StoreError> {
        self.one(&SETTINGS, name)
    }

    /// Changes a setting.
    pub fn set(&self, name: &str, value: &Value) -> Result<(), StoreError> {
        self.put(&SETTINGS, name, value)
    }

    /// Appends to the log of decisions, and drops the oldest line when it is full. `now` in seconds since 1970.
    pub fn event(&self, now: u64, subject: impl ToString, message: impl Into<String>) -> Result<(), StoreError> {
        let last = self.last_key(&EVENTS)?.and_then(|key| key.parse::<u64>().ok()).unwrap_or(0);
        let number = last.saturating_add(1);
        let event = Event { number, time: now, subject: subject.to_string(), message: message.into() };
        tracing::info!(subject = event.subject, "{}", event.message);
        self.put(&EVENTS, &event_key(number), &event)?;
        if let Some(oldest) = number.checked_sub(KEPT_EVENTS) {
            self.remove(&EVENTS, &event_key(oldest))?;
        }
        Ok(())
    }
}
