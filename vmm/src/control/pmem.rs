//! `/pmem/{id}`.

use bedplate_api::vmm::{Pmem, PmemPatch};

use super::change::{changed, unknown};
use super::commands::Answer;
use super::configure::replace;
use super::fault::Fault;
use super::session::Session;
use crate::config;

/// What can be asked of files in the guest's address space.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum PmemCommand {
    /// After the start it is plugged.
    Put(Pmem),
    /// After the start.
    Patch(PmemPatch),
}

impl PmemCommand {
    /// The device in the body must be that of the path; the fault is in Firecracker's words.
    pub(super) fn of(self, in_path: &str) -> Result<Self, Fault> {
        let (Self::Put(Pmem { id, .. }) | Self::Patch(PmemPatch { id, .. })) = &self;
        if id == in_path {
            return Ok(self);
        }
        Err(Fault::bad_request("The id from the path does not match the id from the body!"))
    }
}

impl Session {
    pub(super) fn execute_pmem(&mut self, command: PmemCommand) -> Result<Answer, Fault> {
        match command {
            PmemCommand::Put(pmem) if self.vm.is_some() => self.plug_pmem(pmem)?,
            PmemCommand::Put(pmem) => self.put_pmem(pmem)?,
            PmemCommand::Patch(patch) => self.patch_pmem(&patch)?,
        }
        Ok(Answer::Done)
    }

    fn put_pmem(&mut self, pmem: Pmem) -> Result<(), Fault> {
        config::pmem(&pmem).map_err(Fault::bad_request)?;
        let root = pmem.root_device;
        let mut pmems = self.spec.pmem.clone();
        replace(&mut pmems, pmem, |pmem| &pmem.id);
        if root {
            config::root_device(&self.spec.drives, &pmems).map_err(Fault::bad_request)?;
        }
        self.spec.pmem = pmems;
        Ok(())
    }

    /// Other limits for flushes.
    fn patch_pmem(&mut self, patch: &PmemPatch) -> Result<(), Fault> {
        let id = &patch.id;
        let control = self.running()?.machine.devices().pmem(id).cloned();
        let pmem = self.spec.pmem.iter_mut().find(|pmem| pmem.id == *id);
        let (Some(pmem), Some(control)) = (pmem, control) else { return Err(unknown("pmem device", id)) };
        if let Some(limiter) = patch.rate_limiter {
            control.limit(config::limits_update(limiter));
            pmem.rate_limiter = changed(pmem.rate_limiter, limiter);
        }
        Ok(())
    }
}
