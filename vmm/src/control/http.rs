//! The API's socket: hyper's HTTP/1 over non-blocking Unix streams, driven by the control thread's `poll`.
//!
//! A connection is a future that is polled when its stream is ready, or when it has woken itself meanwhile. There is no
//! other waker and no timer.

use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::future::Future;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use bedplate_api::socket;
use bedplate_devices::door::Door;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Body, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::rt::ReadBufCursor;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use rustix::event::{PollFd, PollFlags};
use serde::Serialize;

use super::commands::Answer;
use super::fault::Fault;
use super::routes;
use super::session::Session;
use crate::files;

/// Bytes of a request's body, at most, unless another limit is asked for; Firecracker's default.
pub const DEFAULT_MAX_BODY: usize = 51_200;
/// Connections at once: with more, the oldest is closed.
const MAX_CONNECTIONS: usize = 16;
/// Turns of a connection before others, signals and the VM are looked at again.
const TURNS: usize = 4;

/// The API's socket cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("API socket {path} cannot be made: {source}; {}", files::remedy(.source))]
pub struct ListenError {
    path: PathBuf,
    source: io::Error,
}

/// The listening socket and its connections.
pub struct Server {
    door: Door,
    path: PathBuf,
    max_body: usize,
    connections: Vec<Connection>,
}

struct Connection {
    stream: Rc<Stream>,
    future: Pin<Box<dyn Future<Output = ()>>>,
    woken: Arc<Woken>,
}

/// A stream, and what its future waits for.
struct Stream {
    socket: UnixStream,
    wants_read: Cell<bool>,
    wants_write: Cell<bool>,
    /// What is read next begins a request, if the client waits for answers.
    request_due: Cell<bool>,
}

struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

impl Server {
    /// Listens at `path`; takes bodies of at most `max_body` bytes.
    ///
    /// # Errors
    /// Somebody else does, or the host refuses.
    pub fn listen(path: &Path, max_body: usize) -> Result<Self, ListenError> {
        let listener = socket::listen(path).map_err(|source| ListenError { path: path.into(), source })?;
        Ok(Self { door: Door::new(listener), path: path.into(), max_body, connections: Vec::new() })
    }

    /// What to wait for.
    pub(super) fn poll_fds<'a>(&'a self, fds: &mut Vec<PollFd<'a>>) {
        fds.push(PollFd::from_borrowed_fd(self.door.as_fd(), PollFlags::IN));
        for connection in &self.connections {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::IN, connection.stream.wants_read.get());
            flags.set(PollFlags::OUT, connection.stream.wants_write.get());
            fds.push(PollFd::from_borrowed_fd(connection.stream.socket.as_fd(), flags));
        }
    }

    /// Whether a connection goes on without anything to wait for.
    pub(super) fn is_busy(&self) -> bool {
        self.connections.iter().any(|connection| connection.woken.0.load(Ordering::SeqCst))
    }

    /// Accepts who waits and lets every connection go as far as it can.
    pub(super) fn serve(&mut self, session: &Rc<RefCell<Session>>) {
        while let Ok(socket) = self.door.accept() {
            if self.connections.len() == MAX_CONNECTIONS {
                self.connections.remove(0);
            }
            if socket.set_nonblocking(true).is_ok() {
                self.connections.push(Connection::new(socket, Rc::clone(session), self.max_body));
            }
        }
        self.connections.retain_mut(Connection::advance);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        socket::remove(&self.path);
    }
}

impl Connection {
    fn new(socket: UnixStream, session: Rc<RefCell<Session>>, max_body: usize) -> Self {
        let stream = Rc::new(Stream {
            socket,
            wants_read: Cell::new(false),
            wants_write: Cell::new(false),
            request_due: Cell::new(true),
        });
        let service = service_fn(move |request| answer(Rc::clone(&session), request, max_body));
        let mut http = http1::Builder::new();
        // Without a timer there must be no time limit on headers: hyper would panic. Firecracker says no date, and with one a
        // 204 would have 64 bytes: firecracker-rs-sdk reads so many at a time, and waits for more after as many.
        http.header_read_timeout(None).auto_date_header(false);
        let connection = http.serve_connection(Io(Rc::clone(&stream)), service);
        // A connection that breaks concerns only its client.
        let future = Box::pin(async move { drop(connection.await) });
        Self { stream, future, woken: Arc::new(Woken(AtomicBool::new(true))) }
    }

    /// True while the connection lives. One that always has a next request gets a few turns.
    fn advance(&mut self) -> bool {
        self.stream.wants_read.set(false);
        self.stream.wants_write.set(false);
        let waker = Waker::from(Arc::clone(&self.woken));
        for _ in 0..TURNS {
            self.woken.0.store(false, Ordering::SeqCst);
            if self.future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready() {
                return false;
            }
            if !self.woken.0.load(Ordering::SeqCst) {
                break;
            }
        }
        true
    }
}

async fn answer(
    session: Rc<RefCell<Session>>,
    request: Request<Incoming>,
    max_body: usize,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let too_large = || Fault {
        status: StatusCode::PAYLOAD_TOO_LARGE,
        message: format!("The request's body is larger than {max_body} bytes."),
    };
    // What says beforehand that it is too long is not even read.
    let announced = body.size_hint().lower();
    if announced > max_body as u64 {
        let fault = too_large();
        return Ok(json(fault.status, &fault.body()));
    }
    let mut deprecated = false;
    let result = match Limited::new(body, max_body).collect().await {
        Ok(body) => routes::parse(&head.method, head.uri.path(), &body.to_bytes()).and_then(|command| {
            deprecated = command.deprecation().is_some();
            session.borrow_mut().execute(command)
        }),
        Err(error) if error.is::<LengthLimitError>() => Err(too_large()),
        Err(error) => Err(Fault::bad_request(format!("The request's body cannot be read: {error}."))),
    };
    let mut response = match result {
        Ok(Answer::Done) => empty(StatusCode::NO_CONTENT),
        Ok(Answer::Instance(body)) => json(StatusCode::OK, &body),
        Ok(Answer::Version(body)) => json(StatusCode::OK, &body),
        Ok(Answer::Config(body)) => json(StatusCode::OK, &body),
        Ok(Answer::Machine(body)) => json(StatusCode::OK, &body),
        Ok(Answer::Status(body)) => json(StatusCode::OK, &body),
        Ok(Answer::Inspection(body)) => json(StatusCode::OK, &body),
        Ok(Answer::Metadata(body)) => json(StatusCode::OK, &body),
        Ok(Answer::Balloon(body)) => json(StatusCode::OK, &body),
        Ok(Answer::BalloonStats(body)) => json(StatusCode::OK, &body),
        Ok(Answer::Hinting(body)) => json(StatusCode::OK, &body),
        Ok(Answer::Hotplug(body)) => json(StatusCode::OK, &body),
        Ok(Answer::Vcpus(body)) => json(StatusCode::OK, &body),
        Err(fault) => json(fault.status, &fault.body()),
    };
    if deprecated {
        response.headers_mut().insert("deprecation", HeaderValue::from_static("true"));
    }
    Ok(response)
}

fn empty(status: StatusCode) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = status;
    response
}

fn json(status: StatusCode, body: &impl Serialize) -> Response<Full<Bytes>> {
    let Ok(bytes) = serde_json::to_vec(body) else { return empty(StatusCode::INTERNAL_SERVER_ERROR) };
    let mut response = Response::new(Full::from(bytes));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// The stream as hyper wants it.
struct Io(Rc<Stream>);

impl hyper::rt::Read for Io {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, mut buf: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        let mut bytes = [0; 4096];
        let room = bytes.len().min(buf.remaining());
        match (&self.0.socket).read(&mut bytes[..room]) {
            Ok(len) => {
                if self.0.request_due.replace(false) {
                    as_http_1_1(&mut bytes[..len]);
                }
                buf.put_slice(&bytes[..len]);
                Poll::Ready(Ok(()))
            }
            Err(error) => not_yet(error, &self.0.wants_read),
        }
    }
}

impl hyper::rt::Write for Io {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match (&self.0.socket).write(bytes) {
            Ok(len) => {
                self.0.request_due.set(true);
                Poll::Ready(Ok(len))
            }
            Err(error) => not_yet(error, &self.0.wants_write),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.0.socket.shutdown(std::net::Shutdown::Write))
    }
}

/// Clients of Firecracker say that they speak HTTP/1.0 and send the next request over the same connection, without having
/// asked for that: Firecracker keeps every connection. hyper does so from 1.1 on.
fn as_http_1_1(bytes: &mut [u8]) {
    let line = bytes.windows(2).position(|pair| pair == b"\r\n").unwrap_or(0);
    if bytes[..line].ends_with(b" HTTP/1.0") {
        bytes[line - 1] = b'1';
    }
}

fn not_yet<T>(error: io::Error, wants: &Cell<bool>) -> Poll<io::Result<T>> {
    if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) {
        wants.set(true);
        return Poll::Pending;
    }
    Poll::Ready(Err(error))
}

#[cfg(test)]
mod tests {
    use super::as_http_1_1;

    #[test]
    fn only_the_version_of_a_request_changes() {
        for (sent, read) in [
            ("GET / HTTP/1.0\r\n\r\n", "GET / HTTP/1.1\r\n\r\n"),
            ("GET / HTTP/1.1\r\nX: HTTP/1.0\r\n\r\n", "GET / HTTP/1.1\r\nX: HTTP/1.0\r\n\r\n"),
            ("{} HTTP/1.0", "{} HTTP/1.0"),
            ("\r\n", "\r\n"),
            ("", ""),
        ] {
            let mut bytes = sent.as_bytes().to_vec();
            as_http_1_1(&mut bytes);
            assert_eq!(bytes, read.as_bytes());
        }
    }
}
