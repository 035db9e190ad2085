//! Commands that change the machine that runs, and the guest's metadata, which changes before and after the start.

use std::error::Error;
use std::io::{self, ErrorKind};
use std::iter::successors;

use bedplate_api::vmm::{DrivePatch, LogLevel, NetworkInterfacePatch, RateLimiter, TokenBucket};
use bedplate_devices::virtio::vhost_user::VhostUserBlockControl;
use hyper::StatusCode;
use serde_json::{Map, Value};

use super::configure::warning_of_length;
use super::fault::Fault;
use super::session::Session;
use crate::block;
use crate::config::{self, ConfigError};
use crate::machine::DeviceError;
use crate::metadata::StoreError;

/// Why a file that is there may not be found,
const ONLY_VISIBLE: &str = " (a VM that runs sees the files below the directories that --visible names)";
/// and one that root may open may not be opened.
const ONLY_OWN: &str =
    " (a VM that runs opens what the user that it runs as may open, without root's rights, and no block devices)";

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

    /// Another file for a disk, or the same one after it has grown; and other limits.
    pub(super) fn patch_drive(&mut self, patch: &DrivePatch) -> Result<(), Fault> {
        let id = &patch.drive_id;
        let at = self.spec.drives.iter().position(|drive| drive.drive_id == *id);
        if let Some(disk) = self.vm.as_ref().and_then(|vm| vm.machine.devices().backend_disk(id)) {
            return read_again(disk, patch);
        }
        let disk = self.vm.as_ref().and_then(|vm| vm.machine.devices().disk(id));
        let (Some(at), Some(disk)) = (at, disk) else { return Err(unknown("drive", id)) };
        if patch.path_on_host.is_none() && patch.rate_limiter.is_none() {
            // Of a backend it would be a request to look again.
            return Err(Fault::bad_request(format!(
                "Drive config error: drive {id:?} is a file: name a path_on_host or a rate_limiter"
            )));
        }
        let mut drives = self.spec.drives.clone();
        if let Some(path) = &patch.path_on_host {
            drives[at].path_on_host = Some(path.clone());
            let held = self.separate(&drives, &self.spec.pmem, (false, id))?;
            let config = config::disk(&drives[at]).map_err(Fault::bad_request)?;
            let Some(config) = config.file() else { return Err(unknown("drive", id)) };
            let (medium, warning) = block::open(config).map_err(|error| self.fault_of_file(&error))?;
            disk.replace(medium);
            self.held = held;
            for warning in warning.into_iter().chain(warning_of_length(config)) {
                self.log.write(LogLevel::Warning, &warning);
            }
        }
        if let Some(limiter) = patch.rate_limiter {
            disk.limit(config::limits_update(limiter));
            drives[at].rate_limiter = changed(drives[at].rate_limiter, limiter);
        }
        self.spec.drives = drives;
        Ok(())
    }

    /// Other limits for an interface.
    pub(super) fn patch_network_interface(&mut self, patch: &NetworkInterfacePatch) -> Result<(), Fault> {
        let id = &patch.iface_id;
        let interface = self.spec.network_interfaces.iter_mut().find(|interface| interface.iface_id == *id);
        let net = self.vm.as_ref().and_then(|vm| vm.machine.devices().net(id));
        let Some(interface) = interface else { return Err(unknown("network interface", id)) };
        if interface.vhost {
            return Err(Fault::bad_request(ConfigError::VhostLimits(id.clone())));
        }
        if interface.socket.is_some() {
            let error = ConfigError::SocketExcludes { id: id.clone(), what: "rate limiters" };
            return Err(Fault::bad_request(error));
        }
        let Some(net) = net else { return Err(unknown("network interface", id)) };
        let update = |limiter: Option<RateLimiter>| config::limits_update(limiter.unwrap_or_default());
        net.limit(update(patch.rx_rate_limiter), update(patch.tx_rate_limiter));
        if let Some(limiter) = patch.rx_rate_limiter {
            interface.rx_rate_limiter = changed(interface.rx_rate_limiter, limiter);
        }
        if let Some(limiter) = patch.tx_rate_limiter {
            interface.tx_rate_limiter = changed(interface.tx_rate_limiter, limiter);
        }
        Ok(())
    }

    /// What is wrong with a file that was named while the VM runs.
    pub(super) fn fault_of_file(&self, error: &(dyn Error + 'static)) -> Fault {
        let mut causes = successors(Some(error), |error| (*error).source());
        let host = causes.find_map(|cause| cause.downcast_ref::<io::Error>());
        let hint = match host.map(io::Error::kind) {
            Some(ErrorKind::NotFound) if self.sandbox.is_some() => ONLY_VISIBLE,
            Some(ErrorKind::PermissionDenied) if self.sandbox.is_some() => ONLY_OWN,
            _ => "",
        };
        Fault::bad_request(format!("{error}{hint}"))
    }

    pub(super) fn no_snapshots(&mut self, verb: &str) -> Result<(), Fault> {
        Err(Fault::bad_request(format!(
            "{verb} snapshot error: snapshots are not offered by this version: the state of vCPUs and devices cannot be \
             saved yet."
        )))
    }
}

/// Has the backend of a drive asked for the disk's configuration, which is all that can be asked of it.
fn read_again(disk: &VhostUserBlockControl, patch: &DrivePatch) -> Result<(), Fault> {
    let id = patch.drive_id.clone();
    let excluded = [(patch.path_on_host.is_some(), "path_on_host"), (patch.rate_limiter.is_some(), "rate_limiter")];
    if let Some((_, what)) = excluded.into_iter().find(|(is_there, _)| *is_there) {
        return Err(Fault::bad_request(config::VhostUserConfigError::Excluded { id, what }));
    }
    disk.read_again().map_err(|source| Fault::bad_request(DeviceError::VhostUser { what: "drive", id, source }))
}

/// What a limiter is after a change, which leaves the bucket as it is that it does not name.
pub(super) fn changed(limiter: Option<RateLimiter>, change: RateLimiter) -> Option<RateLimiter> {
    let RateLimiter { bandwidth, ops } = limiter.unwrap_or_default();
    // A bucket of no size is no limit.
    let now = |change: Option<TokenBucket>, was: Option<TokenBucket>| change.or(was).filter(|bucket| bucket.size != 0);
    Some(RateLimiter { bandwidth: now(change.bandwidth, bandwidth), ops: now(change.ops, ops) })
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

pub(super) fn unknown(what: &str, id: &str) -> Fault {
    Fault::bad_request(format!("There is no {what} {id:?}."))
}
