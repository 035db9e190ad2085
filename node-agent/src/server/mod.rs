//! The agent's HTTP API: paths and bodies stand in [`bedplate_api::node`].
//!
//! Two listeners with the same routes: TCP, where every request shows the token, and a Unix socket for root alone.

mod auth;
mod capture;
mod chunks;
mod console;
mod error;
mod listen;
mod log;

use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::QueryRejection;
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Json, middleware};
use bedplate_api::VmId;
use bedplate_api::node::{Desired, NodeStatus};
use bedplate_api::vmm::Inspection;
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;
use tower_http::timeout::RequestBodyTimeoutLayer;

use crate::agent::{AgentHandle, Event};
use crate::image::Images;
use crate::vm;
use error::{Refusal, bad_request, unavailable};

pub use auth::Token;
pub use listen::{ListenError, bind_tcp, bind_unix, serve_tcp, serve_unix};

/// A body of which nothing arrives for this long is given up.
const SILENCE: Duration = Duration::from_secs(30);
/// Most bytes of a request's body.
const MAX_BODY: usize = 1 << 20;

/// What the routes work with.
#[derive(Debug, Clone)]
pub struct Node {
    /// The agent.
    pub agent: AgentHandle,
    /// The node's images, for peers.
    pub images: Images,
}

/// The routes; with a `token`, every request has to show it.
pub fn router(node: Node, token: Option<Token>) -> Router {
    let routes = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/desired", get(desired).put(put_desired))
        .route("/v1/vms/{id}/log", get(vm_log))
        .route("/v1/vms/{id}/console", get(vm_console))
        .route("/v1/vms/{id}/inspect", get(vm_inspect))
        .route("/v1/vms/{id}/capture", post(vm_capture))
        .route("/v1/chunks/fetch", post(fetch_chunks))
        .route("/v1/chunks/check", post(check_chunks))
        .fallback(error::not_found)
        .method_not_allowed_fallback(error::method_not_allowed)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(RequestBodyTimeoutLayer::new(SILENCE))
        .with_state(node);
    match token {
        Some(token) => routes.layer(middleware::from_fn_with_state(token, auth::require)),
        None => routes,
    }
}

async fn status(State(node): State<Node>) -> Json<NodeStatus> {
    Json((*node.agent.status()).clone())
}

async fn desired(State(node): State<Node>) -> Result<Json<Desired>, Refusal> {
    let (answer, answered) = oneshot::channel();
    node.agent.send(Event::Asked(answer)).await;
    answered.await.map(Json).map_err(|_| ending())
}

async fn put_desired(State(node): State<Node>, body: Body<Desired>) -> Result<Json<NodeStatus>, Refusal> {
    let (answer, answered) = oneshot::channel();
    node.agent.send(Event::Desired(body.0, answer)).await;
    Ok(Json(answered.await.map_err(|_| ending())??))
}

async fn vm_log(State(node): State<Node>, Id(id): Id) -> Result<Response, Refusal> {
    log::tail(known(&node, id)?).await
}

async fn vm_inspect(State(node): State<Node>, Id(id): Id) -> Result<Json<Inspection>, Refusal> {
    let vmm = known(&node, id)?.api();
    vm::api::inspect(&vmm).await.map(Json).map_err(|e| unavailable(format!("VM {id} cannot be looked into: {e}")))
}

async fn vm_console(State(node): State<Node>, Id(id): Id, request: Request) -> Result<Response, Refusal> {
    console::upgrade(&known(&node, id)?, request).await
}

async fn vm_capture(State(node): State<Node>, Id(id): Id) -> Result<Response, Refusal> {
    capture::send(known(&node, id)?).await
}

async fn fetch_chunks(
    State(node): State<Node>,
    patience: Result<Query<chunks::Patience>, QueryRejection>,
    body: Body<bedplate_api::image::ChunkList>,
) -> Result<Response, Refusal> {
    let Query(patience) = patience.map_err(|e| bad_request(e.body_text()))?;
    chunks::send(node.images, body.0, &patience)
}

async fn check_chunks(
    State(node): State<Node>,
    body: Body<bedplate_api::image::ChunkList>,
) -> Result<StatusCode, Refusal> {
    chunks::check(node.images, body.0).await
}

/// The directory of a VM that is on this node.
fn known(node: &Node, id: VmId) -> Result<vm::dir::VmDir, Refusal> {
    if node.agent.status().vms.iter().any(|vm| vm.id == id) {
        return Ok(node.agent.vm_dir(id));
    }
    Err(error::no_such(format!("this node has no VM {id}; list what it has at /v1/status")))
}

fn ending() -> Refusal {
    unavailable("the agent is ending; try again when it is back")
}

/// The id in a path.
struct Id(VmId);

impl<S: Send + Sync> axum::extract::FromRequestParts<S> for Id {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut axum::http::request::Parts, state: &S) -> Result<Self, Refusal> {
        let Path(text) =
            Path::<String>::from_request_parts(parts, state).await.map_err(|e| bad_request(e.body_text()))?;
        text.parse().map(Self).map_err(|_| bad_request(format!("{text:?} is not the id of a VM: expected a UUID")))
    }
}

/// A body of JSON, refused in the same form as everything else is.
struct Body<T>(T);

impl<S: Send + Sync, T: DeserializeOwned> axum::extract::FromRequest<S> for Body<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, state: &S) -> Result<Self, Refusal> {
        let what = format!("{} {}", request.method(), request.uri().path());
        let bytes = Bytes::from_request(request, state).await.map_err(|e| error::body(&what, &e, MAX_BODY))?;
        serde_json::from_slice(&bytes)
            .map(Self)
            .map_err(|e| bad_request(format!("the body of {what} is not understood: {e}")))
    }
}
