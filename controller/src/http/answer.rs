//! Bodies: how a request's JSON is read within limits, and how a failure becomes an [`ApiError`].

use axum::Json;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use bedplate_api::ApiError;
use bedplate_api::client::ClientError;
use bedplate_api::error::ErrorKind;
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;

use crate::reports::RegisterError;
use crate::store::StoreError;

/// Largest JSON body: a report of a thousand VMs has about 300 KiB.
const MAX_JSON: usize = 2 << 20;

/// An error as an answer.
#[derive(Debug)]
pub struct Refusal(pub ApiError);

impl Refusal {
    /// A refusal of class `kind` that says `message`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(ApiError::new(kind, message))
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        if self.0.kind == ErrorKind::Internal {
            tracing::error!("{}", self.0);
        }
        let status = StatusCode::from_u16(self.0.kind.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self.0)).into_response()
    }
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        Self::new(ErrorKind::Internal, error.to_string())
    }
}

impl From<RegisterError> for Refusal {
    fn from(error: RegisterError) -> Self {
        let kind = match &error {
            RegisterError::Invalid(_) => ErrorKind::BadRequest,
            RegisterError::NetworksUsedUp { .. } => ErrorKind::Conflict,
            RegisterError::Store(_) => ErrorKind::Internal,
        };
        Self::new(kind, error.to_string())
    }
}

impl From<ClientError> for Refusal {
    /// A node's own refusal is passed on as it is; a node that cannot be reached is away.
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Api(error) => Self(error),
            other => Self::new(ErrorKind::Unavailable, other.to_string()),
        }
    }
}

/// A whole body, `limit` bytes at most.
pub async fn whole(request: Request, limit: usize) -> Result<Bytes, Refusal> {
    match Limited::new(request.into_body(), limit).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => {
            Err(Refusal::new(ErrorKind::TooLarge, format!("the body is larger than {limit} bytes")))
        }
        Err(error) => Err(Refusal::new(ErrorKind::BadRequest, format!("the body did not arrive whole: {error}"))),
    }
}

/// A JSON body of type `T`. Unknown fields are refused by the types themselves.
pub struct Body<T>(pub T);

impl<S: Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, _: &S) -> Result<Self, Refusal> {
        let bytes = whole(request, MAX_JSON).await?;
        serde_json::from_slice(&bytes)
            .map(Self)
            .map_err(|e| Refusal::new(ErrorKind::BadRequest, format!("the body is not what this path takes: {e}")))
    }
}

/// What stands in the path, percent-decoded.
pub struct Path<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Path<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Refusal> {
        let path = axum::extract::Path::from_request_parts(parts, state).await;
        path.map(|axum::extract::Path(path)| Self(path)).map_err(|e| Refusal::new(ErrorKind::BadRequest, e.body_text()))
    }
}
