//! Bodies: how a request's JSON is read within limits, and how a failure becomes an [`ApiError`].

use std::time::Duration;

use axum::Json;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
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
/// A body of which nothing arrives for this long is given up.
const SILENCE: Duration = Duration::from_secs(30);

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
    whole_within(request, limit, SILENCE).await
}

async fn whole_within(request: Request, limit: usize, silence: Duration) -> Result<Bytes, Refusal> {
    let broken = |why: String| Refusal::new(ErrorKind::BadRequest, format!("the body did not arrive whole: {why}"));
    let mut body = Limited::new(request.into_body(), limit);
    let mut bytes = Vec::new();
    loop {
        let frame = tokio::time::timeout(silence, body.frame()).await;
        match frame.map_err(|_| broken(format!("nothing came for {} s", silence.as_secs())))? {
            Some(Ok(frame)) => bytes.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data)),
            Some(Err(error)) if error.is::<LengthLimitError>() => {
                return Err(Refusal::new(ErrorKind::TooLarge, format!("the body is larger than {limit} bytes")));
            }
            Some(Err(error)) => return Err(broken(error.to_string())),
            None => return Ok(bytes.into()),
        }
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

#[cfg(test)]
mod tests {
    use axum::body::Body as Stream;
    use futures_util::{StreamExt, stream};

    use super::*;

    #[tokio::test]
    async fn a_body_that_stalls_is_given_up() {
        let start = stream::once(async { Ok::<_, std::io::Error>(Bytes::from_static(b"half")) });
        let request = Request::new(Stream::from_stream(start.chain(stream::pending())));
        let reading = whole_within(request, 64, Duration::from_millis(50));
        let outcome = tokio::time::timeout(Duration::from_secs(60), reading).await.expect("it waits for ever");
        assert!(outcome.unwrap_err().0.message.contains("nothing came"));
    }
}
