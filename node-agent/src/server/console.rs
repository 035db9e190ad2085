//! A VM's console: an HTTP connection that becomes raw bytes, bridged to the VMM's socket.

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{CONNECTION, UPGRADE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use bedplate_api::node::CONSOLE_PROTOCOL;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

use super::error::{Refusal, bad_request, unavailable};
use crate::files;
use crate::vm::dir::VmDir;

/// Answers the upgrade and bridges from then on, until either side hangs up.
pub(super) async fn upgrade(dir: &VmDir, mut request: Request) -> Result<Response, Refusal> {
    if !wants_console(request.headers()) {
        return Err(bad_request(format!(
            "a console is an upgrade to {CONSOLE_PROTOCOL}; ask for it with the header Upgrade"
        )));
    }
    let socket = dir.serial();
    // A VMM that was taken over could lead us elsewhere.
    if !files::is_socket(&socket) {
        return Err(unavailable("the VM has no console now; is it running?".to_owned()));
    }
    let serial = UnixStream::connect(socket)
        .await
        .map_err(|e| unavailable(format!("the VM has no console now ({e}); is it running?")))?;
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgraded.await {
            Ok(connection) => {
                bridge(TokioIo::new(connection), serial).await;
            }
            Err(e) => tracing::debug!("a console connection was not upgraded: {e}"),
        }
    });
    let headers = [(CONNECTION, "upgrade"), (UPGRADE, CONSOLE_PROTOCOL)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers, Body::empty()).into_response())
}

/// Carries bytes both ways until either side hangs up, which is how every session ends. A person who has left is not
/// waited for until the guest says something.
async fn bridge(person: impl AsyncRead + AsyncWrite, guest: impl AsyncRead + AsyncWrite) {
    let (mut from_person, mut to_person) = tokio::io::split(person);
    let (mut from_guest, mut to_guest) = tokio::io::split(guest);
    let _end = tokio::select! {
        end = tokio::io::copy(&mut from_person, &mut to_guest) => end,
        end = tokio::io::copy(&mut from_guest, &mut to_person) => end,
    };
    let _gone = to_person.shutdown().await;
}

fn wants_console(headers: &HeaderMap) -> bool {
    headers.get(UPGRADE).is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(CONSOLE_PROTOCOL.as_bytes()))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, duplex};

    use super::*;

    #[tokio::test]
    async fn a_session_ends_when_either_side_hangs_up() {
        let ((mut me, person), (mut vm, guest)) = (duplex(64), duplex(64));
        let session = tokio::spawn(bridge(person, guest));
        me.write_all(b"ls").await.unwrap();
        let mut seen = [0; 2];
        vm.read_exact(&mut seen).await.unwrap();
        assert_eq!(&seen, b"ls");
        drop(me);
        // The guest says nothing.
        session.await.unwrap();

        let ((mut me, person), (mut vm, guest)) = (duplex(64), duplex(64));
        let session = tokio::spawn(bridge(person, guest));
        vm.write_all(b"the last words").await.unwrap();
        drop(vm);
        let mut seen = String::new();
        me.read_to_string(&mut seen).await.unwrap();
        assert_eq!(seen, "the last words");
        session.await.unwrap();
    }
}
