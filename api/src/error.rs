//! The body of every error answer of the control node and the node agent.

use std::error::Error;

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

/// `error` and its causes as one line, for a program's last words. A cause that the line tells already is left out: our
/// messages name their cause themselves, those of others mostly do not.
pub fn with_causes(error: &dyn Error) -> String {
    let mut line = error.to_string();
    for cause in std::iter::successors(error.source(), |&cause| cause.source()) {
        let cause = cause.to_string();
        if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    in_one_line(&line)
}

/// What others say, a registry for one, may have several lines, or mean to paint on the reader's terminal.
fn in_one_line(text: &str) -> String {
    let words = text.split(|c: char| c.is_control()).map(str::trim).filter(|part| !part.is_empty());
    words.collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Failure {
        #[error("no kernel at k: {0}")]
        Told(#[source] io::Error),
        #[error("no kernel")]
        Untold(#[source] io::Error),
    }

    #[test]
    fn each_cause_is_told_once() {
        let io = || io::Error::other("no such file");
        assert_eq!(with_causes(&Failure::Told(io())), "no kernel at k: no such file");
        assert_eq!(with_causes(&Failure::Untold(io())), "no kernel: no such file");
        let foreign = Failure::Untold(io::Error::other("{\"errors\": 1}\n\x1b[31mred\r\n"));
        assert_eq!(with_causes(&foreign), "no kernel: {\"errors\": 1} [31mred");
    }
}
