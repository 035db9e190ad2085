//! Calls of [`crate::node`]: the control node's way into a node agent.

use std::io;

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt};
use reqwest::Method;

use super::{Client, ClientError};
use crate::VmId;
use crate::node::{Desired, NodeStatus, UNFROZEN};
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

    /// The disk of a running VM as it is now: why its file systems were not brought to rest first, if they were not, and
    /// the disk as `bedplate_images::disk` sends it. Nothing is heard while it is being copied.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn node_vm_capture(
        &self,
        id: VmId,
    ) -> Result<(Option<String>, impl Stream<Item = io::Result<Bytes>> + Unpin + Send + use<>), ClientError> {
        let response = self.send(self.request(Method::POST, &format!("/v1/vms/{id}/capture"))).await?;
        // Part of it may be a guest's words.
        let plain = |why: &[u8]| String::from_utf8_lossy(why).chars().filter(|c| !c.is_control()).collect::<String>();
        let unfrozen = response.headers().get(UNFROZEN).map(|why| plain(why.as_bytes()));
        let disk = Box::pin(response.bytes_stream().map_err(io::Error::other));
        Ok((unfrozen.filter(|why| !why.is_empty()), disk))
    }

    /// A VM's console: raw bytes both ways.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn node_vm_console(&self, id: VmId) -> Result<reqwest::Upgraded, ClientError> {
        self.console(&format!("/v1/vms/{id}/console")).await
    }
}
