//! What the guest may ask, and what it is answered: Firecracker's MMDS of version 1 and 2.

use bedplate_api::vmm::MmdsVersion;
use bedplate_devices::metadata::{Request, Response, Service};

use super::Metadata;
use super::store::{Format, Store, StoreError};
use super::token::TTL;

const TOKEN_PATH: &str = "/latest/api/token";
const TOKEN: [&str; 2] = ["x-metadata-token", "x-aws-ec2-metadata-token"];
const TOKEN_TTL: [&str; 2] = ["x-metadata-token-ttl-seconds", "x-aws-ec2-metadata-token-ttl-seconds"];

/// The store as the guest sees it, over one interface.
pub struct GuestView {
    metadata: Metadata,
}

impl GuestView {
    /// A view of `metadata`.
    pub const fn new(metadata: Metadata) -> Self {
        Self { metadata }
    }
}

impl Service for GuestView {
    fn answer(&mut self, request: &Request<'_>) -> Response {
        let mut store = self.metadata.lock();
        match request.method {
            "GET" => get(&store, request),
            "PUT" => put(&mut store, request),
            _ => {
                let mut response = Response::text(405, "Not allowed HTTP method.");
                response.headers.push(("Allow", "GET, PUT".into()));
                response
            }
        }
    }
}

fn get(store: &Store, request: &Request<'_>) -> Response {
    if store.version == MmdsVersion::V2 {
        match request.header(&TOKEN) {
            None => {
                let message = "No MMDS token provided. Use `X-metadata-token` or `X-aws-ec2-metadata-token` header to \
                               specify the session token.";
                return Response::text(401, message);
            }
            Some(token) if !store.tokens.is_good(token) => return Response::text(401, "MMDS token not valid."),
            Some(_) => {}
        }
    }
    let json =
        !store.imds_compat && request.header(&["accept"]).is_some_and(|accept| accept.contains("application/json"));
    match store.at(request.path, if json { Format::Json } else { Format::Imds }) {
        Ok(body) if json => Response { content_type: "application/json", ..Response::text(200, body) },
        Ok(body) => Response::text(200, body),
        Err(error @ StoreError::NoText) => Response::text(501, error.to_string()),
        Err(error) => Response::text(404, error.to_string()),
    }
}

fn put(store: &mut Store, request: &Request<'_>) -> Response {
    // Somebody stands between: the token would be somebody else's.
    if request.header(&["x-forwarded-for"]).is_some() {
        return Response::text(400, "Invalid header. Reason: Unsupported header name. Key: X-Forwarded-For");
    }
    if request.path != TOKEN_PATH {
        return Response::text(404, format!("Resource not found: {}.", request.path));
    }
    let Some(ttl) = request.header(&TOKEN_TTL) else {
        let message = "Token time to live value not found. Use `X-metadata-token-ttl-seconds` or \
                       `X-aws-ec2-metadata-token-ttl-seconds` header to specify the token's lifetime.";
        return Response::text(400, message);
    };
    let (first, last) = TTL.into_inner();
    let Some(seconds) = ttl.parse().ok().filter(|seconds| (first..=last).contains(seconds)) else {
        let message = format!(
            "Invalid time to live value provided for token: {ttl}. Please provide a value between {first} and {last}."
        );
        return Response::text(400, message);
    };
    let mut response = Response::text(200, store.tokens.make(seconds));
    let name = if request.header(&TOKEN_TTL[..1]).is_some() { TOKEN_TTL[0] } else { TOKEN_TTL[1] };
    response.headers.push((name, seconds.to_string()));
    response
}

#[cfg(test)]
mod tests {
    use bedplate_devices::metadata::Responder;
    use bedplate_devices::testing::{SERVER, WebClient};
    use serde_json::json;

    use super::*;

    /// A guest and its metadata, as on the wire.
    struct Guest {
        metadata: Metadata,
        server: Responder,
        client: WebClient,
    }

    impl Guest {
        fn new() -> Self {
            let metadata = Metadata::new(1000).unwrap();
            metadata.lock().put(json!({"latest": {"id": "i-1", "n": 5}})).unwrap();
            let server = Responder::new(SERVER, Box::new(GuestView::new(metadata.clone())));
            Self { metadata, server, client: WebClient::new(1000) }
        }

        /// Status and body.
        fn ask(&mut self, method: &str, path: &str, headers: &str) -> (u16, String) {
            let request = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n{headers}\r\n");
            let answer = self.client.ask(&mut self.server, request.as_bytes());
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
        }
    }

    #[test]
    fn version_1_answers_anybody_in_the_format_that_is_accepted() {
        let mut guest = Guest::new();
        assert_eq!(guest.ask("GET", "/latest", ""), (200, "id\nn".into()));
        assert_eq!(guest.ask("GET", "/latest/id", "Accept: */*\r\n"), (200, "i-1".into()));
        let json = "Accept: text/html, application/json\r\n";
        assert_eq!(guest.ask("GET", "/latest", json), (200, r#"{"id":"i-1","n":5}"#.into()));
        assert_eq!(guest.ask("GET", "/latest/n", "").0, 501);
        assert_eq!(guest.ask("GET", "/nowhere", ""), (404, "Resource not found: /nowhere.".into()));
        assert_eq!(guest.ask("DELETE", "/latest", "").0, 405);
        guest.metadata.lock().imds_compat = true;
        assert_eq!(guest.ask("GET", "/latest", json), (200, "id\nn".into()));
    }

    #[test]
    fn version_2_wants_a_token_under_either_name() {
        let mut guest = Guest::new();
        guest.metadata.lock().version = MmdsVersion::V2;
        assert_eq!(guest.ask("GET", "/latest/id", "").0, 401);
        assert_eq!(
            guest.ask("GET", "/latest/id", "X-metadata-token: stolen\r\n"),
            (401, "MMDS token not valid.".into())
        );
        for (ttl, token) in TOKEN_TTL.iter().zip(TOKEN) {
            let (status, made) = guest.ask("PUT", TOKEN_PATH, &format!("{ttl}: 60\r\n"));
            assert_eq!(status, 200, "{made}");
            assert_eq!(guest.ask("GET", "/latest/id", &format!("{token}: {made}\r\n")), (200, "i-1".into()));
        }
        let ttl = TOKEN_TTL[0];
        assert_eq!(guest.ask("PUT", TOKEN_PATH, "").0, 400);
        for wrong in ["0", "21601", "-1", "x", "99999999999999999999"] {
            let (status, said) = guest.ask("PUT", TOKEN_PATH, &format!("{ttl}: {wrong}\r\n"));
            assert!(status == 400 && said.contains("between 1 and 21600"), "{wrong}: {said}");
        }
        assert_eq!(guest.ask("PUT", TOKEN_PATH, &format!("{ttl}: 60\r\nX-Forwarded-For: a\r\n")).0, 400);
        assert_eq!(guest.ask("PUT", "/latest", &format!("{ttl}: 60\r\n")).0, 404);
    }
}
