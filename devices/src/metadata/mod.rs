//! A small web server for the guest, on an address behind its own network interface: how it asks for its metadata.
//!
//! ```text
//! net worker → Responder::wants? → take → smoltcp (ARP, IPv4, TCP) → http → Service → … → frame → net worker
//! ```
//!
//! It lives on the worker thread of one network device and has no descriptor of its own. All memory is bounded: frames
//! that wait in both directions, connections, and bytes of a request; `docs/devices.md` has the table.

mod http;
mod responder;
#[cfg(test)]
mod tests;

pub use http::{Request, Response};
pub use responder::{HEAD_LEN, Responder};

/// What answers requests. Called on the worker thread of a network device: must not wait.
pub trait Service: Send {
    /// The answer to one request.
    fn answer(&mut self, request: &Request<'_>) -> Response;
}
