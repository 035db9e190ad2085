//! Commands that speak with a control node: each is one call or two, and a way to print the answer.

use std::future::Future;

use bedplate_api::client::{Client, ClientError, Endpoint, ParseEndpointError};
use tokio::runtime::{Builder, Runtime};

use crate::output::PrintError;

pub mod apply;
pub mod events;
mod inspect;
pub mod node;
pub mod plan;
pub mod pool;
pub mod tier;
pub mod vm;

/// Where a control node on this machine listens.
pub const DEFAULT_CONTROL: &str = "unix:/run/bedplate/control.sock";
/// The variable that says it for all commands.
pub const CONTROL_VARIABLE: &str = "BEDPLATE_CONTROL";

/// Which control node.
#[derive(Debug, Clone, clap::Args)]
pub struct ControlArgs {
    /// The control node: unix:/path or http://host:port
    #[arg(long, global = true, env = CONTROL_VARIABLE, default_value = DEFAULT_CONTROL, value_name = "ENDPOINT")]
    pub control: Endpoint,
}

/// Why a command about a cluster failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody answers.
    #[error(
        "no control node at {endpoint}: {cause}; start one with `bedplate-control`, or say where it is with --control \
         or {CONTROL_VARIABLE}"
    )]
    Unreachable {
        /// Where we looked.
        endpoint: Endpoint,
        /// Why not.
        cause: String,
    },
    /// It said no, or what it said was not understood.
    #[error("{0}")]
    Refused(ClientError),
    /// This process could not get what it needs to speak at all.
    #[error("cannot set up a connection: {0}")]
    Setup(std::io::Error),
    /// The environment names no endpoint.
    #[error("{CONTROL_VARIABLE}: {cause}")]
    Variable {
        /// What is wrong with it.
        cause: ParseEndpointError,
    },
    /// A name that the control node does not know.
    #[error("no {kind} named {name:?}; `bedplate {list}` shows those there are")]
    Unknown {
        /// Node, tier or VM.
        kind: &'static str,
        /// The name.
        name: String,
        /// The command that lists them.
        list: &'static str,
    },
    /// A file of tiers that is not one.
    #[error(transparent)]
    Apply(#[from] apply::FileError),
    /// A console that broke.
    #[error("the console of {name} broke: {source}")]
    Console {
        /// The VM.
        name: String,
        /// Why.
        source: std::io::Error,
    },
    /// The VM ended, or its node went away.
    #[error("the console of {name} was closed: the VM has ended or its node is away; `bedplate vm ls` shows which")]
    ConsoleClosed {
        /// The VM.
        name: String,
    },
    /// Stdout is gone.
    #[error(transparent)]
    Print(#[from] PrintError),
}

impl From<ClientError> for Error {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Unreachable { endpoint, cause, .. } => Self::Unreachable { endpoint, cause },
            other => Self::Refused(other),
        }
    }
}

/// A conversation with a control node. Commands are plain functions; only the calls are async, and run in here.
pub struct Session {
    /// The calls.
    pub client: Client,
    runtime: Runtime,
}

impl Session {
    /// With the node at `endpoint`. Connects at the first call.
    ///
    /// # Errors
    /// The process is out of descriptors or the like.
    pub fn open(endpoint: &Endpoint) -> Result<Self, Error> {
        let runtime = Builder::new_current_thread().enable_all().build().map_err(Error::Setup)?;
        Ok(Self { client: Client::new(endpoint.clone(), None)?, runtime })
    }

    /// Waits for a call's answer.
    ///
    /// # Errors
    /// Those of the call.
    pub fn wait<T, E>(&self, call: impl Future<Output = Result<T, E>>) -> Result<T, Error>
    where
        Error: From<E>,
    {
        Ok(self.runtime.block_on(call)?)
    }

    /// Does `work`, which is many calls.
    ///
    /// # Errors
    /// Those of the work.
    pub fn run<T, E>(&self, work: impl AsyncFnOnce(&Client) -> Result<T, E>) -> Result<T, E> {
        self.runtime.block_on(work(&self.client))
    }
}
