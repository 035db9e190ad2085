//! Taps: those that were named at the start stay attached for as long as the VM runs, so that interfaces can have them
//! later, when the process reaches no other.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;

use bedplate_devices::virtio::net::{Link, MAX_PAIRS, Tap, TapError, TapQueues};

use super::DeviceError;
use crate::config::NetConfig;

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
#[derive(Debug)]
pub(super) struct Taps {
    /// All queues of each.
    kept: BTreeMap<String, Vec<Tap>>,
    /// Queues of an interface for which nobody says how many, where the tap has as many.
    usual: usize,
    /// The process is inside of its sandbox: no other tap can be reached.
    sealed: bool,
}

impl Taps {
    /// Attaches to the taps of these names, for a VM with so many vCPUs.
    ///
    /// # Errors
    /// One is not there, or cannot be used.
    pub fn keep(names: &[String], vcpus: u8) -> Result<Self, KeepError> {
        let usual = usize::from(vcpus).min(MAX_PAIRS);
        let mut kept = BTreeMap::new();
        // One that is named twice could not be attached to again.
        for name in BTreeSet::from_iter(names) {
            if !interface_exists(name) {
                return Err(KeepError::None(name.clone()));
            }
            let queues = Tap::open(name, TapQueues::UpTo(usual))
                .map_err(|source| KeepError::Tap { name: name.clone(), source })?;
            kept.insert(name.clone(), queues);
        }
        Ok(Self { kept, usual, sealed: false })
    }

    /// From now on there are only those that are kept.
    pub const fn seal(&mut self) {
        self.sealed = true;
    }

    /// `tap`, for `net`, queue by queue. One that is kept forgets the frames that came while nobody had it.
    ///
    /// # Errors
    /// It is not there, cannot be used, has too few queues, or cannot be reached any more.
    pub fn open(&self, net: &NetConfig, tap: &str) -> Result<Vec<Tap>, DeviceError> {
        let (id, tap) = (net.id.clone(), tap.to_owned());
        if let Some(kept) = self.kept.get(&tap) {
            let wanted = net.queue_pairs.unwrap_or(kept.len());
            if wanted > kept.len() {
                return Err(DeviceError::KeptQueues { id, tap, wanted, kept: kept.len() });
            }
            let again = || {
                // To those that the interface has not, or not yet, no frame may come.
                kept.iter().skip(1).try_for_each(|queue| queue.attach(false)).map_err(TapError::Setup)?;
                kept.iter().take(wanted).map(Tap::again).collect::<Result<Vec<_>, _>>()
            };
            return again().map_err(|source| DeviceError::Net { id, source });
        }
        if self.sealed {
            return Err(DeviceError::SealedTap { id, tap });
        }
        // Opening a tap that is not there would make one that leads nowhere.
        if !interface_exists(&tap) {
            return Err(DeviceError::NoTap { id, tap });
        }
        let queues = net.queue_pairs.map_or(TapQueues::UpTo(self.usual), TapQueues::Exactly);
        Tap::open(&tap, queues).map_err(|source| DeviceError::Net { id, source })
    }
}

fn interface_exists(name: &str) -> bool {
    let Ok(name) = CString::new(name) else { return false };
    // SAFETY: a terminated string that lives through the call.
    unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
}
