//! The one HTTP client: of the control node and its repository, and of a node agent.
//!
//! It speaks over TCP (`http://host:port`, with a bearer token where the server asks for one) and over Unix sockets
//! (`unix:/path`). It has no proxy, no redirect and no cookie: both ends are ours.

mod control;
mod frames;
mod node;
mod repository;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use frames::{FrameError, Frames, append_frame, encode_frame};

use crate::error::ErrorKind;
use crate::{ApiError, Digest};

/// Longest wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest silence while an answer is being read. Not a limit on a whole transfer, which may take long.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Most bytes that are read of an answer that is an error.
const MAX_ERROR_LEN: usize = 64 << 10;
/// How long our servers wait for the head of a request; a connection on which no other one begins is closed then.
pub const HEAD_TIMEOUT: Duration = Duration::from_secs(10);

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// A Unix socket; who may open it is decided by the file's mode.
    Unix(PathBuf),
    /// `host:port`, without TLS.
    Http(String),
}

/// Text that is not an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an endpoint: expected unix:/path/to/socket or http://host:port")]
pub struct ParseEndpointError(String);

impl FromStr for Endpoint {
    type Err = ParseEndpointError;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        let bad = || ParseEndpointError(s.chars().take(200).collect());
        if let Some(path) = s.strip_prefix("unix:") {
            return if path.starts_with('/') { Ok(Self::Unix(path.into())) } else { Err(bad()) };
        }
        let authority = s.strip_prefix("http://").map(|a| a.trim_end_matches('/')).ok_or_else(bad)?;
        let (host, port) = authority.rsplit_once(':').ok_or_else(bad)?;
        if host.is_empty() || host.contains(['/', '@', ' ']) || port.parse::<u16>().is_err() {
            return Err(bad());
        }
        Ok(Self::Http(authority.to_owned()))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Http(authority) => write!(f, "http://{authority}"),
        }
    }
}

/// Why a call did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers there.
    #[error("cannot reach {endpoint}: {cause}")]
    Unreachable {
        /// Whom we called.
        endpoint: Endpoint,
        /// The deepest reason that the stack below gave.
        cause: String,
        /// The whole chain.
        #[source]
        source: reqwest::Error,
    },
    /// The server said no, in its own words.
    #[error("{0}")]
    Api(#[from] ApiError),
    /// The connection broke, or what came is not of the expected form.
    #[error("bad answer from {endpoint} to {what}: {cause}")]
    Answer {
        /// Whom we called.
        endpoint: Endpoint,
        /// Method and path.
        what: String,
        /// What is wrong with it.
        cause: String,
    },
    /// A frame of chunks is malformed.
    #[error("bad chunk stream from {endpoint}: {source}")]
    Frames {
        /// Whom we called.
        endpoint: Endpoint,
        /// What is wrong with it.
        source: FrameError,
    },
}

impl ClientError {
    /// The class of the server's refusal, if the server refused.
    pub fn kind(&self) -> Option<ErrorKind> {
        match self {
            Self::Api(error) => Some(error.kind),
            _ => None,
        }
    }
}

/// A client of one server. Cheap to clone; keeps connections alive.
#[derive(Debug, Clone)]
pub struct Client {
    endpoint: Endpoint,
    token: Option<String>,
    http: reqwest::Client,
}

/// The beginning of a client between programs of ours: no proxy, and no certificate is looked for.
///
/// `bedplate` speaks TLS with registries, and where the whole workspace is built at once, so does the HTTP library of
/// every program in it. It then wants a cryptography chosen before the first client is made, and would read the
/// certificates of this machine, of which a node in the VMM image has none.
pub fn plain_http() -> reqwest::ClientBuilder {
    // The second call finds the choice of the first, which is the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().tls_certs_only([])
}

impl Client {
    /// A client of the server at `endpoint` that shows `token` where there is one. Connects at the first call.
    ///
    /// # Errors
    /// The HTTP stack could not be set up.
    pub fn new(endpoint: Endpoint, token: Option<String>) -> Result<Self, ClientError> {
        Self::patient(endpoint, token, READ_TIMEOUT)
    }

    /// The same, which bears `silence` before and within an answer.
    ///
    /// # Errors
    /// The HTTP stack could not be set up.
    pub fn patient(endpoint: Endpoint, token: Option<String>, silence: Duration) -> Result<Self, ClientError> {
        let mut builder = plain_http()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(silence)
            // A caller that works for long between two calls would meet a connection that the server has closed.
            .pool_idle_timeout(HEAD_TIMEOUT / 2);
        if let Endpoint::Unix(path) = &endpoint {
            builder = builder.unix_socket(path.clone());
        }
        match builder.build() {
            Ok(http) => Ok(Self { endpoint, token, http }),
            Err(source) => Err(ClientError::Unreachable { endpoint, cause: deepest(&source), source }),
        }
    }

    /// The same with connections of its own and the usual patience; where the HTTP stack cannot be set up once more, a copy.
    #[must_use]
    pub fn another(&self) -> Self {
        Self::new(self.endpoint.clone(), self.token.clone()).unwrap_or_else(|_| self.clone())
    }

    /// Whom this client calls.
    pub const fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let authority = match &self.endpoint {
            Endpoint::Unix(_) => "localhost",
            Endpoint::Http(authority) => authority,
        };
        let request = self.http.request(method, format!("http://{authority}{path}"));
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    /// Sends, and turns an answer that is not a success into the error it carries.
    async fn send(&self, request: RequestBuilder) -> Result<Response, ClientError> {
        let mut response = request.send().await.map_err(|source| ClientError::Unreachable {
            endpoint: self.endpoint.clone(),
            cause: deepest(&source),
            source,
        })?;
        let status = response.status();
        if status.is_success() || status == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let what = format!("{} ({status})", response.url().path());
        let mut body = Vec::new();
        while let Some(bytes) = response.chunk().await.map_err(|e| self.answer_error(&what, &e))? {
            body.extend_from_slice(&bytes);
            // No error of ours is so long; who sends more may be another node that has gone bad.
            if body.len() > MAX_ERROR_LEN {
                break;
            }
        }
        match serde_json::from_slice::<ApiError>(&body) {
            Ok(error) => Err(error.into()),
            Err(_) => Err(ClientError::Answer {
                endpoint: self.endpoint.clone(),
                what,
                cause: String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned(),
            }),
        }
    }

    async fn json<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, ClientError> {
        let response = self.send(request).await?;
        let what = response.url().path().to_owned();
        response.json().await.map_err(|e| self.answer_error(&what, &e))
    }

    async fn fetch<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.json(self.request(Method::GET, path)).await
    }

    async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.json(self.request(Method::POST, path).json(body)).await
    }

    async fn put<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        self.json(self.request(Method::PUT, path).json(body)).await
    }

    async fn delete(&self, path: &str) -> Result<(), ClientError> {
        self.send(self.request(Method::DELETE, path)).await.map(drop)
    }

    async fn text(&self, path: &str) -> Result<String, ClientError> {
        let response = self.send(self.request(Method::GET, path)).await?;
        let bytes = response.bytes().await.map_err(|e| self.answer_error(path, &e))?;
        // A guest's console can hold any bytes.
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Upgrades a connection to the raw bytes of a console.
    async fn console(&self, path: &str) -> Result<reqwest::Upgraded, ClientError> {
        let request = self
            .request(Method::GET, path)
            .header("connection", "upgrade")
            .header("upgrade", crate::node::CONSOLE_PROTOCOL);
        let response = self.send(request).await?;
        response.upgrade().await.map_err(|e| self.answer_error(path, &e))
    }

    fn answer_error(&self, what: &str, error: &reqwest::Error) -> ClientError {
        ClientError::Answer { endpoint: self.endpoint.clone(), what: what.to_owned(), cause: deepest(error) }
    }
}

/// The last error of a chain: the outer ones of an HTTP stack repeat the URL and say little.
fn deepest(error: &dyn std::error::Error) -> String {
    let mut last = error;
    while let Some(source) = last.source() {
        last = source;
    }
    last.to_string()
}

/// A name for use as one segment of a path. Names with anything to escape are no names of ours; escaping keeps them from
/// meaning another path until the server refuses them.
fn segment(name: &str) -> String {
    use std::fmt::Write;
    name.bytes().fold(String::new(), |mut path, b| {
        match b {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'~' => path.push(char::from(b)),
            b'.' if !name.trim_matches('.').is_empty() => path.push('.'),
            // Writing to a String cannot fail.
            _ => drop(write!(path, "%{b:02X}")),
        }
        path
    })
}

/// The path of a blob.
fn blob_path(digest: &Digest) -> String {
    format!("/v1/blobs/{}", segment(&digest.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_parse_and_print() {
        for good in ["unix:/run/x.sock", "http://10.0.0.1:7070", "http://[::1]:80"] {
            assert_eq!(good.parse::<Endpoint>().unwrap().to_string(), good);
        }
        for bad in ["", "unix:", "unix:rel", "https://a:1", "http://a", "http://a:b", "http://:1", "http://a/b:1"] {
            assert!(bad.parse::<Endpoint>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_segment_never_holds_a_separator() {
        assert_eq!(segment("web-1.2"), "web-1.2");
        assert_eq!(segment("blake3:00"), "blake3%3A00");
        assert_eq!(segment("../x"), "..%2Fx");
        assert_eq!(segment(".."), "%2E%2E");
    }
}
