//! The agent's calls of a VMM, over its Unix socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bedplate_api::vmm::{Fault, Inspection, RunState, Status, TargetState, VmStateChange};
use serde::de::DeserializeOwned;

use crate::files;

/// Longest wait for an answer: a VMM answers from a thread that does nothing else.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Most bytes of an answer: a VMM that its guest has taken over may send anything, without end.
const MAX_ANSWER: usize = 1 << 20;

/// A VMM did not do as told.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// It does not answer.
    #[error("the VMM does not answer: {0}")]
    Silent(#[from] reqwest::Error),
    /// It answers something else than it should.
    #[error("the VMM's answer is not understood: {0}")]
    Garbled(#[from] serde_json::Error),
    /// Likewise.
    #[error("the VMM's answer has more than {MAX_ANSWER} bytes")]
    Endless,
    /// There is nothing to ask.
    #[error("the VMM has no socket at {0}")]
    NoSocket(PathBuf),
    /// It said no.
    #[error("the VMM refused: {0}")]
    Refused(String),
}

/// Whether the vCPUs run.
///
/// # Errors
/// See [`VmmError`].
pub async fn is_running(socket: &Path) -> Result<bool, VmmError> {
    Ok(state(socket).await? == RunState::Running)
}

/// Where the VM stands.
///
/// # Errors
/// See [`VmmError`].
pub async fn state(socket: &Path) -> Result<RunState, VmmError> {
    let status: Status = get(socket, "http://localhost/bedplate/status").await?;
    Ok(status.state)
}

/// What the VM does at this moment.
///
/// # Errors
/// See [`VmmError`].
pub async fn inspect(socket: &Path) -> Result<Inspection, VmmError> {
    get(socket, "http://localhost/bedplate/inspect").await
}

/// Stops the vCPUs; devices may go on with what they were asked for.
///
/// # Errors
/// See [`VmmError`].
pub async fn pause(socket: &Path) -> Result<(), VmmError> {
    change_state(socket, TargetState::Paused).await
}

/// Lets the vCPUs go on; harmless where they do.
///
/// # Errors
/// See [`VmmError`].
pub async fn resume(socket: &Path) -> Result<(), VmmError> {
    change_state(socket, TargetState::Resumed).await
}

/// Presses the power button.
///
/// # Errors
/// See [`VmmError`].
pub async fn power_button(socket: &Path) -> Result<(), VmmError> {
    put(socket, "http://localhost/bedplate/power-button").await
}

/// Ends the VM at once.
///
/// # Errors
/// See [`VmmError`].
pub async fn stop(socket: &Path) -> Result<(), VmmError> {
    put(socket, "http://localhost/bedplate/stop").await
}

async fn change_state(socket: &Path, state: TargetState) -> Result<(), VmmError> {
    let request = client(socket)?.patch("http://localhost/vm").json(&VmStateChange { state });
    checked(request.send().await?).await.map(drop)
}

async fn get<T: DeserializeOwned>(socket: &Path, url: &str) -> Result<T, VmmError> {
    let answer = checked(client(socket)?.get(url).send().await?).await?;
    Ok(serde_json::from_slice(&body(answer).await?)?)
}

async fn put(socket: &Path, url: &str) -> Result<(), VmmError> {
    checked(client(socket)?.put(url).send().await?).await.map(drop)
}

fn client(socket: &Path) -> Result<reqwest::Client, VmmError> {
    // A VMM that was taken over could lead us to another one's.
    if !files::is_socket(socket) {
        return Err(VmmError::NoSocket(socket.to_owned()));
    }
    Ok(bedplate_api::client::plain_http().timeout(TIMEOUT).unix_socket(socket.to_owned()).build()?)
}

async fn checked(response: reqwest::Response) -> Result<reqwest::Response, VmmError> {
    if response.status().is_success() {
        return Ok(response);
    }
    let status = response.status();
    let said = serde_json::from_slice::<Fault>(&body(response).await?).map(|fault| fault.fault_message);
    Err(VmmError::Refused(said.unwrap_or_else(|_| status.to_string())))
}

async fn body(mut response: reqwest::Response) -> Result<Vec<u8>, VmmError> {
    let mut body = Vec::new();
    while let Some(piece) = response.chunk().await? {
        if body.len() + piece.len() > MAX_ANSWER {
            return Err(VmmError::Endless);
        }
        body.extend_from_slice(&piece);
    }
    Ok(body)
}
