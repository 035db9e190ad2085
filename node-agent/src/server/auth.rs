//! The cluster's token.

use std::fmt;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::AUTHORIZATION;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use subtle::ConstantTimeEq;

use super::error::unauthorized;

/// A secret that who calls must know. Never printed.
#[derive(Clone)]
pub struct Token(Arc<str>);

impl Token {
    /// The token `secret`; `None` where it is empty, which would let everybody in.
    pub fn new(secret: &str) -> Option<Self> {
        (!secret.is_empty()).then(|| Self(secret.into()))
    }

    /// The secret, to show it to the control node.
    pub fn reveal(&self) -> &str {
        &self.0
    }

    /// Compares without telling by its time where the first difference is.
    fn matches(&self, shown: &[u8]) -> bool {
        self.0.as_bytes().ct_eq(shown).into()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

pub(super) async fn require(State(token): State<Token>, request: Request, next: Next) -> Response {
    let shown = request.headers().get(AUTHORIZATION).and_then(|v| v.as_bytes().strip_prefix(b"Bearer "));
    if shown.is_some_and(|shown| token.matches(shown)) {
        next.run(request).await
    } else {
        unauthorized().into_response()
    }
}
