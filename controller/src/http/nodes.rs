//! Nodes: what they say, and what people see of them.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use bedplate_api::NodeId;
use bedplate_api::control::{NodeView, PoolEntry};
use bedplate_api::error::ErrorKind;
use bedplate_api::node::{NodeStatus, Register, Registered};

use super::Shared;
use super::answer::{Body, Path, Refusal};
use super::views::View;
use crate::reports;
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
    let Some(node) = node else {
        return Err(Refusal::new(
            ErrorKind::NotFound,
            format!("node {id} is not known here; it has to register first"),
        ));
    };
    reports::accept(&control, node.number, status).await?;
    Ok(StatusCode::NO_CONTENT)
}
