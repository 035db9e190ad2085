//! Wire types: everything that crosses a process boundary is a type here, and nothing else is.
//!
//! Three boundaries: people and the control node (`control`), the control node and a node agent (`node`), a node agent
//! and one VM process (`vmm`, Firecracker's paths and JSON). `image` describes what the repository serves over all of
//! them. Unknown fields are refused everywhere: a misspelt option must not be silently ignored.

#[cfg(feature = "client")]
pub mod client;
pub mod control;
pub mod digest;
pub mod error;
pub mod id;
pub mod image;
pub mod node;
pub mod socket;
pub mod vmm;

pub use digest::Digest;
pub use error::ApiError;
pub use id::{NodeId, VmId};
