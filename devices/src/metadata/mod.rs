//! A small web server for the guest, on an address behind its own network interface: how it asks for its metadata.
//!
//! ```text
//! net worker → Responder::wants? → take → smoltcp (ARP, IPv4, TCP) → http → Service → … → frame → net worker
//! ```
//!
//! It lives on the worker thread of one network device and has no descriptor of its own. All memory is bounded: frames
//! that wait in both directions, connections, and bytes of a request.
//!
//! | a hostile guest may | what happens |
//! | --- | --- |
//! | send frames that are cut, lie about lengths, overlap, come out of order, or are fragments | smoltcp checks and drops; fragments are not put together |
//! | open connections without end | eight at once; beyond them the one that has waited longest is reset |
//! | send half a request, or nothing | its connection is reset after ten seconds, or when its place is needed |
//! | send a request without end | 400, and the connection is closed when 4 KiB came without an end |
//! | not take an answer, or acknowledge what was not sent | answers wait in the connection, one for each; frames that its driver has no room for wait, sixteen at most |
//! | pretend to be many neighbours | eight are known, the oldest is forgotten |

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
