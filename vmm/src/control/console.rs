//! `/bedplate/console`.

use bedplate_api::vmm::{ConsoleSize, VirtioConsole};
use bedplate_devices::virtio::console::WindowSize;

use super::fault::Fault;
use super::session::Session;
use crate::config;

/// What can be asked of the virtio console.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum ConsoleCommand {
    /// Before the start.
    Set(VirtioConsole),
    /// After the start.
    Resize(ConsoleSize),
}

impl Session {
    pub(super) fn execute_console(&mut self, command: ConsoleCommand) -> Result<(), Fault> {
        match command {
            ConsoleCommand::Set(spec) => {
                let session = self.before_start()?;
                config::console(&spec).map_err(Fault::bad_request)?;
                session.spec.console = Some(spec);
            }
            ConsoleCommand::Resize(ConsoleSize { columns, rows }) => {
                let control = self.running()?.machine.devices().console();
                let control = control.ok_or_else(|| {
                    Fault::bad_request("There is no virtio console: put one before the start (PUT /bedplate/console).")
                })?;
                control.resize(WindowSize { columns, rows });
                if let Some(spec) = &mut self.spec.console {
                    (spec.columns, spec.rows) = (columns, rows);
                }
            }
        }
        Ok(())
    }
}
