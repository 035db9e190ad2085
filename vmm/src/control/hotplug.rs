//! `/hotplug/memory`.

use bedplate_api::vmm::{MemoryHotplug, MemoryHotplugStatus, MemoryHotplugUpdate};

use super::commands::Answer;
use super::fault::Fault;
use super::session::Session;
use crate::config;

const NONE: &str = "No memory hotplug device found.";

/// What can be asked of memory that can be added.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum HotplugCommand {
    /// Before the start.
    Set(MemoryHotplug),
    /// After the start.
    Describe,
    /// After the start.
    Update(MemoryHotplugUpdate),
}

impl Session {
    pub(super) fn execute_hotplug(&mut self, command: HotplugCommand) -> Result<Answer, Fault> {
        if let HotplugCommand::Set(spec) = command {
            let session = self.before_start()?;
            config::memory_hotplug(&spec).map_err(Fault::bad_request)?;
            session.spec.memory_hotplug = Some(spec);
            return Ok(Answer::Done);
        }
        let spec = self.spec.memory_hotplug.clone();
        let control = self.running()?.machine.devices().mem();
        let (Some(control), Some(spec)) = (control, spec) else { return Err(Fault::bad_request(NONE)) };
        match command {
            HotplugCommand::Update(update) => {
                let mib = update.requested_size_mib;
                if mib > spec.total_size_mib || !mib.is_multiple_of(spec.block_size_mib) {
                    return Err(Fault::bad_request(format!(
                        "requested_size_mib {mib} is not offered: give up to {}, in steps of {}",
                        spec.total_size_mib, spec.block_size_mib
                    )));
                }
                control.request(mib << 20);
                Ok(Answer::Done)
            }
            _ => Ok(Answer::Hotplug(MemoryHotplugStatus {
                total_size_mib: spec.total_size_mib,
                block_size_mib: spec.block_size_mib,
                slot_size_mib: spec.slot_size_mib,
                plugged_size_mib: control.plugged() >> 20,
                requested_size_mib: control.requested() >> 20,
            })),
        }
    }
}
