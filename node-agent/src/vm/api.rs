//! The agent's calls of a VMM, over its Unix socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bedplate_api::vmm::{Fault, RunState, Status};

use crate::files;

/// Longest wait for an answer: a VMM answers from a thread that does nothing else.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A VMM did not do as told.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// It does not answer.
    #[error("the VMM does not answer: {0}")]
    Silent(#[from] reqwest::Error),
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
    let response = client(socket)?.get("http://localhost/bedplate/status").send().await?;
    let status: Status = checked(response).await?.json().await?;
    Ok(status.state == RunState::Running)
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
    let said = response.json::<Fault>().await.map(|fault| fault.fault_message);
    Err(VmmError::Refused(said.unwrap_or_else(|_| status.to_string())))
}
