//! `/bedplate/filesystems/{tag}`.

use bedplate_api::vmm::FileSystem;

use super::configure::replace;
use super::fault::Fault;
use super::session::Session;
use crate::config;
use crate::machine::DeviceError;

impl Session {
    pub(super) fn put_file_system(&mut self, file_system: FileSystem) -> Result<(), Fault> {
        config::file_system(&file_system).map_err(Fault::bad_request)?;
        if self.vm.is_some() {
            let later = DeviceError::VhostUserLater { what: "file system", id: file_system.tag };
            return Err(Fault::bad_request(later));
        }
        replace(&mut self.spec.filesystems, file_system, |file_system| &file_system.tag);
        Ok(())
    }
}
