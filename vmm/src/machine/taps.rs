//! Taps: those that were named at the start stay attached for as long as the VM runs, so that interfaces can have them
//! later, when the process reaches no other.

use std::collections::BTreeMap;
use std::ffi::CString;

use bedplate_devices::virtio::net::{Tap, TapError};

use super::DeviceError;

/// A tap that is kept (`--tap`) cannot be had.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum KeepError {
    #[error("--tap {0}: there is no such tap device: make it (`ip tuntap add {0} mode tap`)")]
    None(String),
    #[error("--tap {name}: {source}")]
    Tap { name: String, source: TapError },
}

/// Where interfaces get their taps from.
#[derive(Debug, Default)]
pub(super) struct Taps {
    kept: BTreeMap<String, Tap>,
    /// The process is inside of its sandbox: no other tap can be reached.
    sealed: bool,
}

impl Taps {
    /// Attaches to the taps of these names.
    ///
    /// # Errors
    /// One is not there, or cannot be used.
    pub fn keep(names: &[String]) -> Result<Self, KeepError> {
        let mut taps = Self::default();
        for name in names {
            if !interface_exists(name) {
                return Err(KeepError::None(name.clone()));
            }
            let tap = Tap::open(name).map_err(|source| KeepError::Tap { name: name.clone(), source })?;
            taps.kept.insert(name.clone(), tap);
        }
        Ok(taps)
    }

    /// From now on there are only those that are kept.
    pub const fn seal(&mut self) {
        self.sealed = true;
    }

    /// The tap `name` for the interface `id`. One that is kept forgets the frames that came while nobody had it.
    ///
    /// # Errors
    /// It is not there, cannot be used, or cannot be reached any more.
    pub fn open(&self, id: &str, name: &str) -> Result<Tap, DeviceError> {
        let failed = |source| DeviceError::Net { id: id.into(), source };
        if let Some(kept) = self.kept.get(name) {
            return kept.again().map_err(failed);
        }
        let (id, tap) = (id.to_owned(), name.to_owned());
        if self.sealed {
            return Err(DeviceError::SealedTap { id, tap });
        }
        // Opening a tap that is not there would make one that leads nowhere.
        if !interface_exists(name) {
            return Err(DeviceError::NoTap { id, tap });
        }
        Tap::open(name).map_err(failed)
    }
}

fn interface_exists(name: &str) -> bool {
    let Ok(name) = CString::new(name) else { return false };
    // SAFETY: a terminated string that lives through the call.
    unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
}
