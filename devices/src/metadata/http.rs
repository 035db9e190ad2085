//! HTTP/1 as far as metadata needs it: requests that fit into one buffer, answers with a length.

/// Headers of a request, at most.
const MAX_HEADERS: usize = 32;

/// A request.
#[derive(Debug)]
pub struct Request<'a> {
    /// As sent, such as `GET`.
    pub method: &'a str,
    /// From the first slash on, whatever stands before it.
    pub path: &'a str,
    headers: Vec<(&'a str, &'a [u8])>,
    /// The connection goes on after the answer.
    pub(super) keep: bool,
    /// Bytes of the request, body included.
    pub(super) len: usize,
}

impl Request<'_> {
    /// The value of the first header of one of these names, which are given in lower case.
    pub fn header(&self, names: &[&str]) -> Option<&str> {
        let named = |name: &str| names.iter().any(|wanted| name.eq_ignore_ascii_case(wanted));
        let (_, value) = self.headers.iter().find(|(name, _)| named(name))?;
        std::str::from_utf8(value).ok().map(str::trim)
    }
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// More headers: names and values without line ends.
    pub headers: Vec<(&'static str, String)>,
    /// Media type of the body.
    pub content_type: &'static str,
    /// The body.
    pub body: Vec<u8>,
}

impl Response {
    /// An answer in plain words.
    pub fn text(status: u16, body: impl Into<String>) -> Self {
        Self { status, headers: Vec::new(), content_type: "text/plain", body: body.into().into_bytes() }
    }

    pub(super) fn to_bytes(&self, keep: bool) -> Vec<u8> {
        let reason = match self.status {
            200 => "OK",
            400 => "Bad Request",
            401 => "Unauthorized",
            404 => "Not Found",
            405 => "Method Not Allowed",
            501 => "Not Implemented",
            _ => "",
        };
        let mut head = format!("HTTP/1.1 {} {reason}\r\nServer: Bedplate\r\n", self.status);
        head += if keep { "Connection: keep-alive\r\n" } else { "Connection: close\r\n" };
        for (name, value) in &self.headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += &format!("Content-Type: {}\r\nContent-Length: {}\r\n\r\n", self.content_type, self.body.len());
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// What a buffer begins with.
#[derive(Debug)]
pub(super) enum Parsed<'a> {
    /// All of a request.
    Whole(Request<'a>),
    /// The beginning of one.
    Part,
    /// Something else; what, in words.
    Wrong(&'static str),
}

/// Looks for a request at the beginning of `bytes`.
pub(super) fn parse(bytes: &[u8]) -> Parsed<'_> {
    let mut room = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parser = httparse::Request::new(&mut room);
    let head_len = match parser.parse(bytes) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) => return Parsed::Part,
        Err(httparse::Error::TooManyHeaders) => return Parsed::Wrong("Too many headers."),
        Err(_) => return Parsed::Wrong("Invalid request."),
    };
    let (Some(method), Some(target), Some(version)) = (parser.method, parser.path, parser.version) else {
        return Parsed::Wrong("Invalid request.");
    };
    let headers = parser.headers.iter().map(|header| (header.name, header.value)).collect();
    let mut request = Request { method, path: path_of(target), headers, keep: true, len: head_len };
    if request.header(&["transfer-encoding"]).is_some() {
        return Parsed::Wrong("A transfer encoding is not offered.");
    }
    // What a body says does not matter; where it ends does.
    if let Some(len) = request.header(&["content-length"]) {
        let Some(end) = len.parse::<usize>().ok().and_then(|len| head_len.checked_add(len)) else {
            return Parsed::Wrong("Invalid content length.");
        };
        request.len = end;
    }
    let connection = request.header(&["connection"]).unwrap_or_default();
    request.keep = match version {
        0 => connection.eq_ignore_ascii_case("keep-alive"),
        _ => !connection.eq_ignore_ascii_case("close"),
    };
    if request.len > bytes.len() { Parsed::Part } else { Parsed::Whole(request) }
}

fn path_of(target: &str) -> &str {
    let Some((_, rest)) = target.split_once("://") else { return target };
    rest.find('/').map_or("/", |at| &rest[at..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(text: &str) -> Request<'_> {
        match parse(text.as_bytes()) {
            Parsed::Whole(request) => request,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn requests_are_found_with_their_ends() {
        let text = "GET /a/b HTTP/1.1\r\nHost: x\r\nX-Metadata-Token:  t \r\n\r\nGET";
        let request = whole(text);
        assert_eq!((request.method, request.path, request.keep), ("GET", "/a/b", true));
        assert_eq!((request.header(&["other", "x-metadata-token"]), request.len), (Some("t"), text.len() - 3));
        let body = whole("PUT http://169.254.169.254 HTTP/1.0\r\nContent-Length: 2\r\n\r\nab");
        assert_eq!((body.path, body.keep, body.len), ("/", false, 60));
        assert!(!whole("GET http://h/x HTTP/1.1\r\nConnection: Close\r\n\r\n").keep);
    }

    #[test]
    fn parts_and_nonsense_are_told_apart() {
        for part in ["", "GE", "GET / HTTP/1.1\r\nHost", "PUT / HTTP/1.1\r\nContent-Length: 9\r\n\r\nab"] {
            assert!(matches!(parse(part.as_bytes()), Parsed::Part), "{part}");
        }
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(MAX_HEADERS + 1));
        for wrong in [
            "\0",
            "GET / HTTP/9.9\r\n\r\n",
            "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
            "PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            "PUT / HTTP/1.1\r\nContent-Length: 18446744073709551615\r\n\r\n",
            many.as_str(),
        ] {
            assert!(matches!(parse(wrong.as_bytes()), Parsed::Wrong(_)), "{wrong}");
        }
    }
}
