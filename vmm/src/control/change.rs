//! Commands that change the machine that runs, and the guest's metadata, which changes before and after the start.

use bedplate_api::vmm::{DrivePatch, NetworkInterfacePatch};
use hyper::StatusCode;
use serde_json::{Map, Value};

use super::fault::Fault;
use super::session::Session;
use crate::block;
use crate::config;
use crate::metadata::StoreError;

impl Session {
    pub(super) fn described_metadata(&self) -> Value {
        match self.metadata.lock().data() {
            Value::Null => Value::Object(Map::new()),
            data => data.clone(),
        }
    }

    pub(super) fn put_metadata(&mut self, data: Value) -> Result<(), Fault> {
        self.metadata.lock().put(data).map_err(refused)
    }

    pub(super) fn patch_metadata(&mut self, patch: Value) -> Result<(), Fault> {
        self.metadata.lock().patch(patch).map_err(refused)
    }

    /// Another file for a disk, or the same one after it has grown.
    pub(super) fn patch_drive(&mut self, patch: &DrivePatch) -> Result<(), Fault> {
        let id = &patch.drive_id;
        let at = self.spec.drives.iter().position(|drive| drive.drive_id == *id);
        let (Some(at), Some(vm)) = (at, &self.vm) else { return Err(unknown("drive", id)) };
        let Some(path) = &patch.path_on_host else { return Ok(()) };
        let mut drives = self.spec.drives.clone();
        drives[at].path_on_host.clone_from(path);
        let configs: Vec<_> = drives.iter().map(config::drive).collect::<Result<_, _>>().map_err(Fault::bad_request)?;
        config::separate(&configs).map_err(Fault::bad_request)?;
        let backend = block::open(&configs[at]).map_err(Fault::bad_request)?;
        vm.machine.disk(id).ok_or_else(|| unknown("drive", id))?.replace(backend);
        self.spec.drives = drives;
        self.warn_of_length(&configs[at]);
        Ok(())
    }

    pub(super) fn patch_network_interface(&mut self, patch: &NetworkInterfacePatch) -> Result<(), Fault> {
        let known = self.spec.network_interfaces.iter().any(|interface| interface.iface_id == patch.iface_id);
        if known { Ok(()) } else { Err(unknown("network interface", &patch.iface_id)) }
    }

    pub(super) fn unplug(&mut self, what: &str, id: &str) -> Result<(), Fault> {
        Err(Fault::bad_request(format!(
            "The {what} {id:?} cannot be taken from a VM that runs: hot-unplug is not offered."
        )))
    }

    pub(super) fn no_snapshots(&mut self, verb: &str) -> Result<(), Fault> {
        Err(Fault::bad_request(format!(
            "{verb} snapshot error: snapshots are not offered by this version: the state of vCPUs and devices cannot be \
             saved yet."
        )))
    }
}

fn refused(error: StoreError) -> Fault {
    match error {
        StoreError::TooLarge => {
            let message = format!("MMDS limit exceeded error: {error}");
            Fault { status: StatusCode::PAYLOAD_TOO_LARGE, message }
        }
        _ => Fault::bad_request(format!("MMDS error: {error}")),
    }
}

fn unknown(what: &str, id: &str) -> Fault {
    Fault::bad_request(format!("There is no {what} {id:?}."))
}
