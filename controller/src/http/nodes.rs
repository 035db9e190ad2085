//! Nodes: what they say, and what people see of them.

use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use bedplate_api::NodeId;
use bedplate_api::control::{NodeState, NodeView, PoolEntry};
use bedplate_api::error::ErrorKind;
use bedplate_api::image::{Locate, Located};
use bedplate_api::node::{NodeStatus, Register, Registered};

use super::Shared;
use super::answer::{Body, Path, Refusal};
use super::images::check;
use super::views::View;
use crate::reports;
use crate::sharing::Peer;
use crate::store::{NODES, Read};

/// `GET /v1/nodes`.
pub async fn list(State(control): Shared) -> Result<Json<Vec<NodeView>>, Refusal> {
    Ok(Json(View::take(&control).await?.nodes))
}

/// `GET /v1/pool`.
pub async fn pool(State(control): Shared) -> Result<Json<Vec<PoolEntry>>, Refusal> {
    Ok(Json(View::take(&control).await?.pool))
}

/// `POST /v1/nodes/register`.
pub async fn register(State(control): Shared, Body(request): Body<Register>) -> Result<Json<Registered>, Refusal> {
    Ok(Json(reports::register(&control, request).await?))
}

/// `POST /v1/nodes/{id}/status`.
pub async fn status(
    State(control): Shared,
    Path(id): Path<String>,
    Body(status): Body<NodeStatus>,
) -> Result<StatusCode, Refusal> {
    let id: NodeId =
        id.parse().map_err(|_| Refusal::new(ErrorKind::BadRequest, format!("{id:?} is not the id of a node")))?;
    if status.id != id {
        let message = format!("the report is that of {}, the path says {id}", status.id);
        return Err(Refusal::new(ErrorKind::BadRequest, message));
    }
    let node = control.read(move |s| Ok(s.all(&NODES)?.into_iter().find(|n| n.id == Some(id)))).await?;
    let node = node.ok_or_else(|| unknown(id))?;
    reports::accept(&control, node.number, status).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /v1/chunks/locate`.
pub async fn locate(State(control): Shared, Body(ask): Body<Locate>) -> Result<Json<Located>, Refusal> {
    check(&ask.digests)?;
    let nodes = control.read(|s| s.all(&NODES)).await?;
    let asker = nodes.iter().find(|node| node.id == Some(ask.node)).ok_or_else(|| unknown(ask.node))?.number;
    let lost_after = Duration::from_secs(control.options.lost_after);
    let peers = nodes.into_iter().filter_map(|node| {
        let there = node.state == NodeState::Ready && control.observed.silent(node.number) <= lost_after;
        let address = node.endpoint.filter(|_| there)?;
        Some(Peer { node: node.number, address, whole: control.observed.has_image(node.number, &ask.image) })
    });
    let peers: Vec<Peer> = peers.collect();
    Ok(Json(control.sharing.locate(asker, &peers, &ask.digests, Instant::now())))
}

fn unknown(id: NodeId) -> Refusal {
    Refusal::new(ErrorKind::NotFound, format!("node {id} is not known here; it has to register first"))
}
