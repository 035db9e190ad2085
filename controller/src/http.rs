//! The control node's HTTP: one set of handlers, three routers. Who may do what is decided by which router a listener
//! serves, here and nowhere else:
//!
//! - [`people`]: everything, on the Unix socket that only the owner may open;
//! - [`nodes`]: registration, reports, the reading half of the repository and what boots of an image taught, with the
//!   nodes' token; what a blank machine fetches while it boots, without, but from the node network only; nothing at all
//!   for guests ([`peers`]);
//! - [`page`]: looking only, for a browser on the same machine.

pub mod answer;
mod boot;
mod capture;
#[cfg(test)]
mod capture_tests;
mod images;
mod nodes;
mod peers;
mod registry;
#[cfg(test)]
mod tests;
mod tiers;
pub mod views;
mod vms;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{Method, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, patch, post, put};
use bedplate_api::error::ErrorKind;
use subtle::ConstantTimeEq;
use tower_http::timeout::RequestBodyTimeoutLayer;

use crate::control::Control;
use answer::Refusal;

/// A body of which nothing arrives for this long is given up: who sent it has gone, or holds a place that others need.
const SILENCE: Duration = Duration::from_secs(30);

/// The handlers' state.
pub type Shared = State<Arc<Control>>;

/// For people: the whole API and the page.
pub fn people(control: Arc<Control>) -> Router {
    looking()
        .route("/v1/tiers", get(tiers::list).post(tiers::create))
        .route("/v1/tiers/{name}", get(tiers::show).put(tiers::put).delete(tiers::delete))
        .route("/v1/vms/{name}/console", get(vms::console))
        .route("/v1/vms/{name}/capture", post(capture::capture))
        .route("/v1/images", get(images::list))
        .route("/v1/images/{name}", get(images::show).put(images::tag).delete(images::untag))
        .route("/v1/signatures/{digest}", get(images::signature))
        .route("/v1/orders/{digest}", get(images::boot_order).put(images::put_boot_order))
        .route("/v1/blobs/{digest}", get(images::blob).put(images::put_blob))
        .route("/v1/chunks", post(images::put_chunks))
        .route("/v1/gc", post(images::gc))
        .route("/v1/chunks/fetch", post(images::fetch_chunks))
        .route("/v1/chunks/check", post(images::check_chunks))
        .route("/v1/chunks/missing", post(images::missing_chunks))
        .merge(pulling())
        .route("/v2/{name}/manifests/{reference}", put(registry::put_manifest))
        .route("/v2/{name}/blobs/uploads/", post(registry::begin))
        .route("/v2/{name}/blobs/uploads/{upload}", patch(registry::append).put(registry::finish))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(RequestBodyTimeoutLayer::new(SILENCE))
        .with_state(control)
}

/// For nodes, and for machines that are about to be.
pub fn nodes(control: Arc<Control>) -> Router {
    let with_token = Router::new()
        .route("/v1/nodes/register", post(nodes::register))
        .route("/v1/nodes/{id}/status", post(nodes::status))
        .route("/v1/images", get(images::list))
        .route("/v1/images/{name}", get(images::show))
        .route("/v1/signatures/{digest}", get(images::signature))
        .route("/v1/orders/{digest}", get(images::boot_order).put(images::put_boot_order))
        .route("/v1/blobs/{digest}", get(images::blob))
        .route("/v1/chunks/fetch", post(images::fetch_chunks))
        .route("/v1/chunks/check", post(images::check_chunks))
        .route("/v1/chunks/locate", post(nodes::locate))
        .merge(pulling())
        .route_layer(from_fn_with_state(Arc::clone(&control), token));
    let without = Router::new()
        .route("/boot/ipxe", get(boot::script))
        .route("/boot/{digest}/{part}", get(boot::part))
        .route_layer(from_fn_with_state(Arc::clone(&control), peers::machine));
    with_token
        .merge(without)
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(RequestBodyTimeoutLayer::new(SILENCE))
        .layer(from_fn_with_state(Arc::clone(&control), peers::no_guest))
        .with_state(control)
}

/// For a browser on this machine.
pub fn page(control: Arc<Control>) -> Router {
    looking()
        .route("/v1/tiers", get(tiers::list))
        .route("/v1/tiers/{name}", get(tiers::show))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(from_fn(local))
        .with_state(control)
}

/// The reading half of the OCI registry.
fn pulling() -> Router<Arc<Control>> {
    Router::new()
        .route("/v2/", get(registry::version))
        .route("/v2/_catalog", get(registry::catalog))
        .route("/v2/{name}/tags/list", get(registry::tags))
        .route("/v2/{name}/manifests/{reference}", get(registry::manifest))
        .route("/v2/{name}/blobs/{digest}", get(registry::blob))
}

fn looking() -> Router<Arc<Control>> {
    Router::new()
        .route("/", get(crate::page::page))
        .route("/v1/nodes", get(nodes::list))
        .route("/v1/pool", get(nodes::pool))
        .route("/v1/vms", get(vms::list))
        .route("/v1/vms/{name}/log", get(vms::log))
        .route("/v1/vms/{name}/inspect", get(vms::inspect))
        .route("/v1/events", get(views::events))
        .route("/v1/plan", get(views::dry_run))
}

async fn unknown(request: Request) -> Refusal {
    Refusal::new(ErrorKind::NotFound, format!("there is nothing at {}", request.uri().path()))
}

async fn wrong_method(request: Request) -> Response {
    let message = format!("{} does not take {}", request.uri().path(), request.method());
    // The one status that is no class of error of ours: the body says what the request got wrong.
    let mut response = Refusal::new(ErrorKind::BadRequest, message).into_response();
    *response.status_mut() = axum::http::StatusCode::METHOD_NOT_ALLOWED;
    response
}

async fn token(State(control): Shared, request: Request, next: Next) -> Response {
    let shown = request.headers().get(header::AUTHORIZATION).and_then(|v| v.as_bytes().strip_prefix(b"Bearer "));
    match shown {
        Some(shown) if bool::from(shown.ct_eq(control.token.as_bytes())) => next.run(request).await,
        Some(_) => Refusal::new(ErrorKind::Unauthorized, "that is not this control node's token").into_response(),
        None => Refusal::new(ErrorKind::Unauthorized, "nodes show the control node's token: Authorization: Bearer …")
            .into_response(),
    }
}

/// A page of another site in the same browser must not read this one by a name that it has pointed here.
async fn local(request: Request, next: Next) -> Response {
    let host = request.headers().get(header::HOST).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
    if !matches!(name, "localhost" | "127.0.0.1" | "[::1]") {
        let message = format!("this page is for a browser on the same machine, not for one that calls it {host:?}");
        return Refusal::new(ErrorKind::BadRequest, message).into_response();
    }
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return wrong_method(request).await;
    }
    next.run(request).await
}
