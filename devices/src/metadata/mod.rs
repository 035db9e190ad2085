//! A small web server for the guest, on an address behind its own network interface: how it asks for its metadata.
//!
//! ```text
//! net worker → Destination::is_of? → take → smoltcp (ARP, IPv4, TCP) → http → Service → … → frame → net worker
//! ```
//!
//! It belongs to one network device, on whose worker threads it works, one at a time, and has no descriptor of its own. All memory is bounded: frames
//! that wait in both directions, connections, and bytes of a request; `docs/devices.md` has the table.

mod http;
mod responder;
#[cfg(test)]
mod tests;

pub use http::{Request, Response};
pub use responder::{Destination, HEAD_LEN, Responder};

/// What answers requests. Called on worker threads of a network device, one at a time: must not wait.
pub trait Service: Send {
    /// The answer to one request.
    fn answer(&mut self, request: &Request<'_>) -> Response;
}
