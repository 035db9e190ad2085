//! The QEMU guest agent in a guest, if it has one that listens on vsock: asked to bring the file systems to rest while
//! the disk is copied.
//!
//! `qemu-ga --method=vsock-listen --path=4294967295:9100` in the guest is all that it takes. The guest is hostile: what it
//! says is read to a limit and within a time, and believed only where nothing but its own image depends on it.

use std::io;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::files;

/// Where a guest's agent listens.
pub const PORT: u32 = 9100;

/// Longest wait for an agent to answer at all: one that is there does so at once.
const HELLO: Duration = Duration::from_secs(3);
/// Longest wait for the file systems: everything that they have not written yet is written first.
const FREEZE: Duration = Duration::from_secs(20);
/// Longest answer that is read.
const MAX_ANSWER: u64 = 64 << 10;
/// Begins the answer to `guest-sync-delimited`, and nothing else: bytes that an earlier client left unread end there.
const SENTINEL: u8 = 0xff;

/// Why file systems were not frozen.
#[derive(Debug, thiserror::Error)]
pub enum GuestAgentError {
    /// No agent.
    #[error("no guest agent answers on vsock port {PORT}")]
    Absent,
    /// The connection broke.
    #[error("the guest agent was lost: {0}")]
    Lost(#[from] io::Error),
    /// It took too long.
    #[error("the guest agent did not answer in time")]
    Slow,
    /// It said no.
    #[error("the guest agent refused: {0}")]
    Refused(String),
    /// It did as told, and that was nothing.
    #[error("the guest agent found no file system to freeze")]
    Nothing,
    /// Not the protocol.
    #[error("the guest agent's answer is not understood")]
    Garbled,
}

/// An agent that answers.
#[derive(Debug)]
pub struct GuestAgent {
    stream: BufReader<UnixStream>,
}

#[derive(Deserialize)]
struct Answer {
    #[serde(rename = "return")]
    value: Option<Value>,
    error: Option<Fault>,
}

#[derive(Deserialize)]
struct Fault {
    #[serde(default)]
    desc: String,
}

impl GuestAgent {
    /// Connects to the agent of the guest whose vsock is at `socket`.
    ///
    /// # Errors
    /// See [`GuestAgentError`].
    pub async fn connect(socket: &Path) -> Result<Self, GuestAgentError> {
        // A VMM that was taken over could lead us elsewhere.
        if !files::is_socket(socket) {
            return Err(GuestAgentError::Absent);
        }
        timeout(HELLO, Self::greet(socket)).await.map_err(|_| GuestAgentError::Absent)?
    }

    async fn greet(socket: &Path) -> Result<Self, GuestAgentError> {
        let mut this = Self { stream: BufReader::new(UnixStream::connect(socket).await?) };
        this.stream.write_all(format!("CONNECT {PORT}\n").as_bytes()).await?;
        if !this.line().await?.starts_with(b"OK ") {
            return Err(GuestAgentError::Absent);
        }
        let id: u32 = std::process::id();
        let mut hello = vec![SENTINEL];
        hello.extend(request("guest-sync-delimited", &json!({ "id": id })));
        this.stream.write_all(&hello).await?;
        let mut before = Vec::new();
        (&mut this.stream).take(MAX_ANSWER).read_until(SENTINEL, &mut before).await?;
        match this.answer().await? {
            value if value == json!(id) => Ok(this),
            _ => Err(GuestAgentError::Garbled),
        }
    }

    /// Has all file systems written out and held still. They stay so until [`GuestAgent::thaw`].
    ///
    /// # Errors
    /// See [`GuestAgentError`]. They may be frozen all the same: thaw.
    pub async fn freeze(&mut self) -> Result<(), GuestAgentError> {
        match self.call("guest-fsfreeze-freeze", FREEZE).await?.as_u64() {
            Some(1..) => Ok(()),
            _ => Err(GuestAgentError::Nothing),
        }
    }

    /// Lets the file systems go on; harmless where they do.
    ///
    /// # Errors
    /// See [`GuestAgentError`].
    pub async fn thaw(&mut self) -> Result<(), GuestAgentError> {
        self.call("guest-fsfreeze-thaw", FREEZE).await.map(drop)
    }

    async fn call(&mut self, name: &str, patience: Duration) -> Result<Value, GuestAgentError> {
        let call = async {
            self.stream.write_all(&request(name, &json!({}))).await?;
            self.answer().await
        };
        timeout(patience, call).await.map_err(|_| GuestAgentError::Slow)?
    }

    async fn answer(&mut self) -> Result<Value, GuestAgentError> {
        let answer: Answer = serde_json::from_slice(&self.line().await?).map_err(|_| GuestAgentError::Garbled)?;
        match (answer.value, answer.error) {
            (Some(value), None) => Ok(value),
            (_, Some(fault)) => Err(GuestAgentError::Refused(
                fault.desc.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').take(200).collect(),
            )),
            (None, None) => Err(GuestAgentError::Garbled),
        }
    }

    /// One line; an end of the stream is one that is lost.
    async fn line(&mut self) -> Result<Vec<u8>, GuestAgentError> {
        let mut line = Vec::new();
        (&mut self.stream).take(MAX_ANSWER).read_until(b'\n', &mut line).await?;
        if line.last() == Some(&b'\n') { Ok(line) } else { Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()) }
    }
}

fn request(name: &str, arguments: &Value) -> Vec<u8> {
    let mut line = json!({ "execute": name, "arguments": arguments }).to_string().into_bytes();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use tokio::net::UnixListener;

    use super::*;

    /// A guest that says `says`, whatever it hears, and what it has heard at the end.
    async fn guest(says: &'static [u8]) -> (tempfile::TempDir, std::path::PathBuf, tokio::task::JoinHandle<Vec<u8>>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v");
        let listener = UnixListener::bind(&path).unwrap();
        let heard = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(says).await.unwrap();
            let mut heard = Vec::new();
            stream.read_to_end(&mut heard).await.unwrap();
            heard
        });
        (dir, path, heard)
    }

    #[tokio::test]
    async fn file_systems_are_frozen_and_thawed_after_what_an_earlier_client_left() {
        let id = std::process::id();
        let says =
            format!("OK 1073741824\nrest of before\n\u{1}{{\"return\": {id}}}\n{{\"return\": 2}}\n{{\"return\": 2}}\n");
        let says: Vec<u8> = says.into_bytes().into_iter().map(|b| if b == 1 { SENTINEL } else { b }).collect();
        let (_dir, path, heard) = guest(says.leak()).await;
        let mut agent = GuestAgent::connect(&path).await.unwrap();
        agent.freeze().await.unwrap();
        agent.thaw().await.unwrap();
        drop(agent);
        let heard = String::from_utf8_lossy(&heard.await.unwrap()).into_owned();
        assert!(heard.starts_with("CONNECT 9100\n"), "{heard}");
        assert!(heard.find("guest-fsfreeze-freeze") < heard.find("guest-fsfreeze-thaw"), "{heard}");
    }

    #[tokio::test]
    async fn a_freeze_of_nothing_is_none() {
        let id = std::process::id();
        let says = format!("OK 1\n\u{1}{{\"return\": {id}}}\n{{\"return\": 0}}\n");
        let says: Vec<u8> = says.into_bytes().into_iter().map(|b| if b == 1 { SENTINEL } else { b }).collect();
        let (_dir, path, _heard) = guest(says.leak()).await;
        let frozen = GuestAgent::connect(&path).await.unwrap().freeze().await;
        assert!(matches!(frozen, Err(GuestAgentError::Nothing)), "{frozen:?}");
    }

    #[tokio::test]
    async fn a_guest_that_says_something_else_is_an_error_in_words() {
        let connect = async |says: &'static [u8]| {
            let (_dir, path, _heard) = guest(says).await;
            GuestAgent::connect(&path).await.map(drop)
        };
        assert!(matches!(connect(b"\n").await, Err(GuestAgentError::Absent)));
        assert!(matches!(connect(b"OK 1\n\xff{\"return\": 0}\n").await, Err(GuestAgentError::Garbled)));
        assert!(matches!(connect(b"OK 1\n\xffnothing\n").await, Err(GuestAgentError::Garbled)));
        let refused = connect(b"OK 1\n\xff{\"error\": {\"class\": \"x\", \"desc\": \"dis\x1babled\"}}\n").await;
        assert!(matches!(refused, Err(GuestAgentError::Garbled)), "a control character is no JSON: {refused:?}");
        let refused = connect(b"OK 1\n\xff{\"error\": {\"class\": \"x\", \"desc\": \"disabled\"}}\n").await;
        assert_eq!(refused.unwrap_err().to_string(), "the guest agent refused: disabled");
        let (_dir, path, _heard) = guest(b"").await;
        assert!(matches!(GuestAgent::connect(&path).await, Err(GuestAgentError::Absent)), "silence");
    }
}
