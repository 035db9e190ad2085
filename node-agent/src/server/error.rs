//! Every answer that is not a success is an [`ApiError`].

use axum::Json;
use axum::extract::rejection::BytesRejection;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use bedplate_api::ApiError;
use bedplate_api::error::ErrorKind;

/// A refusal with its status.
#[derive(Debug)]
pub(super) struct Refusal {
    error: ApiError,
    status: StatusCode,
}

impl From<ApiError> for Refusal {
    fn from(error: ApiError) -> Self {
        let status = StatusCode::from_u16(error.kind.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self { error, status }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.status, Json(self.error)).into_response()
    }
}

pub(super) fn refusal(kind: ErrorKind, message: impl Into<String>) -> Refusal {
    ApiError::new(kind, message).into()
}

pub(super) fn bad_request(message: impl Into<String>) -> Refusal {
    refusal(ErrorKind::BadRequest, message)
}

pub(super) fn no_such(message: impl Into<String>) -> Refusal {
    refusal(ErrorKind::NotFound, message)
}

pub(super) fn unavailable(message: impl Into<String>) -> Refusal {
    refusal(ErrorKind::Unavailable, message)
}

pub(super) fn internal(message: impl Into<String>) -> Refusal {
    refusal(ErrorKind::Internal, message)
}

pub(super) fn unauthorized() -> Refusal {
    refusal(ErrorKind::Unauthorized, "this node wants the cluster's token in the header Authorization: Bearer")
}

/// A body that could not be read.
pub(super) fn body(what: &str, rejection: &BytesRejection, limit: usize) -> Refusal {
    if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
        return refusal(ErrorKind::TooLarge, format!("the body of {what} is larger than {limit} bytes"));
    }
    bad_request(format!("the body of {what} could not be read: {}", rejection.body_text()))
}

pub(super) async fn not_found(uri: Uri) -> Refusal {
    no_such(format!("there is nothing at {}", uri.path()))
}

pub(super) async fn method_not_allowed(method: Method, uri: Uri) -> Refusal {
    let error = ApiError::new(ErrorKind::BadRequest, format!("{method} is not possible at {}", uri.path()));
    Refusal { error, status: StatusCode::METHOD_NOT_ALLOWED }
}
