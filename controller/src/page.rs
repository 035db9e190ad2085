//! The page for people: rendered here, whole, at each request.

use axum::extract::State;
use maud::{DOCTYPE, Markup, html};

use crate::http::Shared;
use crate::http::answer::Refusal;

/// `GET /`.
pub async fn page(State(control): Shared) -> Result<Markup, Refusal> {
    let _ = control;
    Ok(html! { (DOCTYPE) })
}
