//! The guest's metadata: a JSON document that control writes and the guest reads, Firecracker's MMDS.
//!
//! ```text
//! control → Store ← GuestView (one per interface) ← devices::metadata ← guest
//! ```
//!
//! The store is locked for one request at a time, by the control thread and by the workers of the interfaces; nothing is
//! called under its lock.

mod service;
mod store;
mod token;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

pub use service::GuestView;
pub use store::{Format, Store, StoreError};

/// The store, as all share it.
#[derive(Clone)]
pub struct Metadata(Arc<Mutex<Store>>);

impl Metadata {
    /// An empty store of at most `limit` bytes of JSON.
    ///
    /// # Errors
    /// The host has no random numbers.
    pub fn new(limit: usize) -> io::Result<Self> {
        Ok(Self(Arc::new(Mutex::new(Store::new(limit)?))))
    }

    /// The store.
    pub fn lock(&self) -> MutexGuard<'_, Store> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}
