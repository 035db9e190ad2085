//! Error answers.

use bedplate_api::vmm;
use hyper::StatusCode;

/// An error answer: status and words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Fault {
    pub status: StatusCode,
    pub message: String,
}

impl Fault {
    /// 400, as Firecracker answers nearly everything.
    pub fn bad_request(message: impl ToString) -> Self {
        Self { status: StatusCode::BAD_REQUEST, message: message.to_string() }
    }

    pub fn body(&self) -> vmm::Fault {
        vmm::Fault { fault_message: self.message.clone() }
    }
}
