//! Virtual machines: the list, and the ways through to the node that has one.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bedplate_api::client::{Client, Endpoint};
use bedplate_api::control::VmView;
use bedplate_api::error::ErrorKind;
use bedplate_api::node::{CONSOLE_PROTOCOL, VmSpec};
use bedplate_api::vmm::Inspection;
use bedplate_api::{Digest, VmId};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

use super::Shared;
use super::answer::{Path, Refusal};
use super::views::View;
use crate::control::Control;
use crate::store::{NODES, Read, VMS};

/// `GET /v1/vms`.
pub async fn list(State(control): Shared) -> Result<Json<Vec<VmView>>, Refusal> {
    Ok(Json(View::take(&control).await?.vms))
}

/// `GET /v1/vms/{name}/log`.
pub async fn log(State(control): Shared, Path(name): Path<String>) -> Result<Response, Refusal> {
    let (client, id) = find(&control, name).await?.client(&control)?;
    let log = client.node_vm_log(id).await?;
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], log).into_response())
}

/// `GET /v1/vms/{name}/inspect`.
pub async fn inspect(State(control): Shared, Path(name): Path<String>) -> Result<Json<Inspection>, Refusal> {
    let (client, id) = find(&control, name).await?.client(&control)?;
    Ok(Json(client.node_vm_inspect(id).await?))
}

/// `GET /v1/vms/{name}/console`: once both sides have agreed, bytes are passed on until either closes.
pub async fn console(
    State(control): Shared,
    Path(name): Path<String>,
    mut request: Request,
) -> Result<Response, Refusal> {
    if !asks_for_console(request.headers()) {
        let message = format!("a console is an HTTP upgrade: send Connection: upgrade and Upgrade: {CONSOLE_PROTOCOL}");
        return Err(Refusal::new(ErrorKind::BadRequest, message));
    }
    let (client, id) = find(&control, name).await?.client(&control)?;
    let node = client.node_vm_console(id).await?;
    let person = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match person.await {
            Ok(person) => {
                pass_on(TokioIo::new(person), node).await;
            }
            Err(error) => tracing::debug!("a console was not taken up: {error}"),
        }
    });
    let headers = [(header::CONNECTION, "upgrade"), (header::UPGRADE, CONSOLE_PROTOCOL)];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

/// Passes bytes on until either side has no more: a person who has left must not be kept until the guest next prints.
async fn pass_on(person: impl AsyncRead + AsyncWrite, node: impl AsyncRead + AsyncWrite) {
    let (mut from_person, mut to_person) = tokio::io::split(person);
    let (mut from_node, mut to_node) = tokio::io::split(node);
    // Either side closing is the normal end of a console.
    tokio::select! {
        _ = tokio::io::copy(&mut from_person, &mut to_node) => {}
        _ = tokio::io::copy(&mut from_node, &mut to_person) => {}
    }
}

fn asks_for_console(headers: &HeaderMap) -> bool {
    headers.get(header::UPGRADE).is_some_and(|v| v.as_bytes().eq_ignore_ascii_case(CONSOLE_PROTOCOL.as_bytes()))
}

/// A VM, and the agent that has it.
pub(super) struct Found {
    /// The VM's name.
    pub name: String,
    /// This incarnation.
    pub id: VmId,
    /// The image that its disk is a child of.
    pub image: Digest,
    /// Its agent.
    pub endpoint: Endpoint,
}

impl Found {
    /// A client of the agent, and the VM's id.
    fn client(self, control: &Control) -> Result<(Client, VmId), Refusal> {
        Ok((Client::new(self.endpoint, Some(control.token.clone()))?, self.id))
    }
}

/// The VM called `name`, or with that id.
pub(super) async fn find(control: &Arc<Control>, name: String) -> Result<Found, Refusal> {
    let wanted = name.clone();
    let found: Option<(VmSpec, Option<SocketAddr>)> = control
        .read(move |snapshot| {
            let mut vms = snapshot.all(&VMS)?;
            vms.retain(|a| a.vm.name == wanted || a.vm.id.to_string() == wanted);
            // While a VM is being replaced there are two of one name: people mean the one that stays.
            vms.sort_by_key(|a| !a.wanted());
            let Some(first) = vms.into_iter().next() else { return Ok(None) };
            let node = snapshot.all(&NODES)?.into_iter().find(|n| n.number == first.node);
            Ok(Some((first.vm, node.and_then(|n| n.endpoint))))
        })
        .await?;
    let Some((vm, endpoint)) = found else {
        return Err(Refusal::new(ErrorKind::NotFound, format!("no VM is called {name:?}; see `bedplate vm ls`")));
    };
    let Some(endpoint) = endpoint else {
        return Err(Refusal::new(ErrorKind::Unavailable, format!("the node of {name} has no agent at the moment")));
    };
    Ok(Found { name: vm.name, id: vm.id, image: vm.image, endpoint: Endpoint::Http(endpoint.to_string()) })
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;

    #[tokio::test]
    async fn a_console_ends_when_the_person_has_left_and_the_guest_is_silent() {
        let (mut person, near) = tokio::io::duplex(64);
        let (far, _silent) = tokio::io::duplex(64);
        person.shutdown().await.unwrap();
        let ended = tokio::time::timeout(std::time::Duration::from_secs(60), pass_on(near, far));
        ended.await.expect("it goes on without anybody");
    }
}
