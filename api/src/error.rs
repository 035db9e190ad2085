//! The body of every error answer of the control node and the node agent.

use serde::{Deserialize, Serialize};

/// What went wrong, in words that name the thing, the cause and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// Machine-readable class; clients branch on this and never on `message`.
    pub kind: ErrorKind,
    /// For a person.
    pub message: String,
}

/// Classes of error, each with one HTTP status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// 400: the request cannot be understood or asks for something impossible.
    BadRequest,
    /// 401: no token, or the wrong one.
    Unauthorized,
    /// 404: the thing named does not exist.
    NotFound,
    /// 409: it exists already, or its state forbids this now.
    Conflict,
    /// 413: the body is larger than the limit of this path.
    TooLarge,
    /// 507: no room left on the disk.
    NoSpace,
    /// 503: a part that is needed is away; trying again later can help.
    Unavailable,
    /// 500: our bug or a broken host.
    Internal,
}

impl ErrorKind {
    /// The HTTP status code of this class.
    pub const fn status(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Unauthorized => 401,
            Self::NotFound => 404,
            Self::Conflict => 409,
            Self::TooLarge => 413,
            Self::NoSpace => 507,
            Self::Unavailable => 503,
            Self::Internal => 500,
        }
    }
}

impl ApiError {
    /// An error of class `kind` that says `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}
