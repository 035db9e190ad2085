//! Calls of [`crate::node`]: the control node's way into a node agent.

use super::{Client, ClientError};
use crate::VmId;
use crate::node::{Desired, NodeStatus};
use crate::vmm::Inspection;

impl Client {
    /// The node's state.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn node_status(&self) -> Result<NodeStatus, ClientError> {
        self.fetch("/v1/status").await
    }

    /// What the node was last asked for.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn desired(&self) -> Result<Desired, ClientError> {
        self.fetch("/v1/desired").await
    }

    /// Hands the node what shall run there.
    ///
    /// # Errors
    /// See [`ClientError`]; "conflict" means that the node has seen a newer generation.
    pub async fn put_desired(&self, desired: &Desired) -> Result<NodeStatus, ClientError> {
        self.put("/v1/desired", desired).await
    }

    /// The last 64 KiB of a VM's console.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn node_vm_log(&self, id: VmId) -> Result<String, ClientError> {
        self.text(&format!("/v1/vms/{id}/log")).await
    }

    /// What a VM does at this moment.
    ///
    /// # Errors
    /// See [`ClientError`]; "unavailable" where it does not run.
    pub async fn node_vm_inspect(&self, id: VmId) -> Result<Inspection, ClientError> {
        self.fetch(&format!("/v1/vms/{id}/inspect")).await
    }

    /// A VM's console: raw bytes both ways.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn node_vm_console(&self, id: VmId) -> Result<reqwest::Upgraded, ClientError> {
        self.console(&format!("/v1/vms/{id}/console")).await
    }
}
