//! Calls of [`crate::control`], and of its half for nodes in [`crate::node`].

use reqwest::Method;

use super::{Client, ClientError, segment};
use crate::NodeId;
use crate::control::{
    Capture, CapturePhase, CaptureStep, Captured, Event, NodeView, PlanView, PoolEntry, TierSpec, TierView, VmView,
};
use crate::node::{NodeStatus, Register, Registered};
use crate::vmm::Inspection;

/// The last line of a capture lists the files that were removed.
const MAX_CAPTURE_LINE: usize = 64 << 20;

impl Client {
    /// Every physical machine that the control node knows.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn nodes(&self) -> Result<Vec<NodeView>, ClientError> {
        self.fetch("/v1/nodes").await
    }

    /// The free pool.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn pool(&self) -> Result<Vec<PoolEntry>, ClientError> {
        self.fetch("/v1/pool").await
    }

    /// Every tier.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn tiers(&self) -> Result<Vec<TierView>, ClientError> {
        self.fetch("/v1/tiers").await
    }

    /// One tier.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn tier(&self, name: &str) -> Result<TierView, ClientError> {
        self.fetch(&format!("/v1/tiers/{}", segment(name))).await
    }

    /// Creates a tier whose name must be new.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn create_tier(&self, spec: &TierSpec) -> Result<TierView, ClientError> {
        self.post("/v1/tiers", spec).await
    }

    /// Creates a tier or replaces the one of that name.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn put_tier(&self, spec: &TierSpec) -> Result<TierView, ClientError> {
        self.put(&format!("/v1/tiers/{}", segment(&spec.name)), spec).await
    }

    /// Removes a tier and stops its VMs.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn delete_tier(&self, name: &str) -> Result<(), ClientError> {
        self.delete(&format!("/v1/tiers/{}", segment(name))).await
    }

    /// Every VM.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn vms(&self) -> Result<Vec<VmView>, ClientError> {
        self.fetch("/v1/vms").await
    }

    /// The last 64 KiB of a VM's console, by the VM's name.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn vm_log(&self, name: &str) -> Result<String, ClientError> {
        self.text(&format!("/v1/vms/{}/log", segment(name))).await
    }

    /// What a VM does at this moment, by the VM's name.
    ///
    /// # Errors
    /// See [`ClientError`]; "unavailable" where it does not run.
    pub async fn vm_inspect(&self, name: &str) -> Result<Inspection, ClientError> {
        self.fetch(&format!("/v1/vms/{}/inspect", segment(name))).await
    }

    /// A VM's console, by the VM's name: raw bytes both ways.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn vm_console(&self, name: &str) -> Result<reqwest::Upgraded, ClientError> {
        self.console(&format!("/v1/vms/{}/console", segment(name))).await
    }

    /// Makes an image of a running VM's disk. `step` is told each step but the last.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn capture_vm(
        &self,
        name: &str,
        capture: &Capture,
        mut step: impl FnMut(CapturePhase, u64, u64),
    ) -> Result<Captured, ClientError> {
        let path = format!("/v1/vms/{}/capture", segment(name));
        let mut response = self.send(self.request(Method::POST, &path).json(capture)).await?;
        let bad = |cause: String| ClientError::Answer { endpoint: self.endpoint.clone(), what: path.clone(), cause };
        let (mut pending, mut seen) = (Vec::new(), 0);
        while let Some(bytes) = response.chunk().await.map_err(|e| self.answer_error(&path, &e))? {
            pending.extend_from_slice(&bytes);
            if pending.len() > MAX_CAPTURE_LINE {
                return Err(bad(format!("a line of more than {MAX_CAPTURE_LINE} bytes")));
            }
            while let Some(end) = pending[seen..].iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=seen + end).collect();
                seen = 0;
                match serde_json::from_slice(&line).map_err(|e| bad(e.to_string()))? {
                    CaptureStep::Progress { phase, done, total } => step(phase, done, total),
                    CaptureStep::Captured(captured) => return Ok(captured),
                    CaptureStep::Failed(error) => return Err(error.into()),
                }
            }
            seen = pending.len();
        }
        Err(bad("it ended before the capture did".to_owned()))
    }

    /// Events with a number greater than `after`, oldest first.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn events(&self, after: u64) -> Result<Vec<Event>, ClientError> {
        self.fetch(&format!("/v1/events?after={after}")).await
    }

    /// What the planner would do now.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn plan(&self) -> Result<PlanView, ClientError> {
        self.fetch("/v1/plan").await
    }

    /// A node introduces itself.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub async fn register(&self, register: &Register) -> Result<Registered, ClientError> {
        self.post("/v1/nodes/register", register).await
    }

    /// A node reports.
    ///
    /// # Errors
    /// See [`ClientError`]; "not found" means that the control node wants it to register again.
    pub async fn report(&self, id: NodeId, status: &NodeStatus) -> Result<(), ClientError> {
        self.send(self.request(Method::POST, &format!("/v1/nodes/{id}/status")).json(status)).await.map(drop)
    }
}
