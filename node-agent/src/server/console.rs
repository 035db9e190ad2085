//! A VM's console: an HTTP connection that becomes raw bytes, bridged to the VMM's socket.

use axum::body::Body;
use axum::extract::Request;
use axum::http::header::{CONNECTION, UPGRADE};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use bedplate_api::node::CONSOLE_PROTOCOL;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use super::error::{Refusal, bad_request, unavailable};
use crate::vm::dir::VmDir;

/// Answers the upgrade and bridges from then on, until either side hangs up.
pub(super) async fn upgrade(dir: &VmDir, mut request: Request) -> Result<Response, Refusal> {
    if !wants_console(request.headers()) {
        return Err(bad_request(format!(
            "a console is an upgrade to {CONSOLE_PROTOCOL}; ask for it with the header Upgrade"
        )));
    }
    let socket = UnixStream::connect(dir.serial()).await;
    let mut serial = socket.map_err(|e| unavailable(format!("the VM has no console now ({e}); is it running?")))?;
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgraded.await {
            Ok(connection) => {
                // Either side hanging up is how every console session ends.
                let _end = tokio::io::copy_bidirectional(&mut TokioIo::new(connection), &mut serial).await;
            }
            Err(e) => tracing::debug!("a console connection was not upgraded: {e}"),
        }
    });
    let headers = [(CONNECTION, "upgrade"), (UPGRADE, CONSOLE_PROTOCOL)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers, Body::empty()).into_response())
}

fn wants_console(headers: &HeaderMap) -> bool {
    headers.get(UPGRADE).is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(CONSOLE_PROTOCOL.as_bytes()))
}
