//! Disk images as address spaces made of content-addressed chunks.
//!
//! The way of an image through this crate: [`import`] reads somebody's file and cuts it into chunks → [`store`] keeps
//! each chunk once, compressed, under the digest of its plain bytes → [`disk`] hands a VM a writable child whose
//! untouched parts are read from the store, every chunk verified. `docs/image-format.md` describes all that is on disk.
//!
//! Absences: no async runtime, no network, nothing that knows KVM. The VMM links this crate for [`disk`] alone.

pub mod boot;
pub mod capture;
pub mod digest;
pub mod disk;
pub mod export;
#[cfg(test)]
mod fixtures;
pub mod frame;
pub mod identity;
pub mod import;
pub mod index;
pub mod manifest;
pub mod pack;
pub mod store;
pub mod trust;

pub use digest::digest_of;
pub use frame::{CHUNK_SIZE, MAX_FRAME_LEN};
pub use store::{Store, StoreError};
