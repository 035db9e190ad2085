//! An agent in the node, asked and told over its socket.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bedplate_api::VmId;
use bedplate_api::node::{Desired, NodeStatus, VmSpec, VmStatus};
use bedplate_lab::Process;
use bedplate_node::vm::dir::VmDir;
use bedplate_tests::inside::unix_http;
use bedplate_tests::patience::until;

/// For eight guests to boot at once in an emulated node.
pub const PATIENCE: Duration = Duration::from_secs(300);
/// For one answer of a guest.
const TIMEOUT: Duration = Duration::from_secs(60);
/// The network of its VMs.
const NETWORK: &str = "10.78.1.0/24";

/// A running agent.
pub struct Agent {
    state: PathBuf,
    process: Process,
}

impl Agent {
    /// Starts one over `state`, and waits until it answers.
    pub fn start(state: &Path) -> Result<Self> {
        Self::start_with(state, &[])
    }

    /// The same, with images from the control node on the Unix socket `control`, and more `options`.
    pub fn start_from(state: &Path, control: &str, options: &[&str]) -> Result<Self> {
        let control = format!("unix:{control}");
        let from = ["--control", &control, "--listen", "127.0.0.1:7071", "--token", "00ff"];
        Self::start_with(state, &[&from, options].concat())
    }

    fn start_with(state: &Path, options: &[&str]) -> Result<Self> {
        let mut command = Command::new("/bin/bedplate-node");
        command.args(["agent", "--vm-network", NETWORK, "--state"]).arg(state).args(options).stdin(Stdio::null());
        let process = Process::start("agent", command)?;
        let agent = Self { state: state.to_owned(), process };
        until("the agent's answer", TIMEOUT, || Ok(agent.status().ok()))?;
        Ok(agent)
    }

    /// Ends it as hard as can be.
    pub fn kill(mut self) -> Result<()> {
        self.process.kill()?;
        Ok(())
    }

    pub fn status(&self) -> Result<NodeStatus> {
        self.ask("GET", "/v1/status", "")
    }

    /// Asks for these VMs and no others.
    pub fn put(&self, generation: u64, vms: &[VmSpec]) -> Result<NodeStatus> {
        let desired = Desired { generation, vms: vms.to_vec() };
        self.ask("PUT", "/v1/desired", &serde_json::to_string(&desired)?)
    }

    /// Waits until every VM is as it should be.
    pub fn until_all(&self, what: &str, is_so: impl Fn(&VmStatus) -> bool) -> Result<NodeStatus> {
        let mut last = None;
        let outcome = until(what, PATIENCE, || {
            let status = self.status()?;
            let all = status.vms.iter().all(&is_so);
            last = Some(status);
            Ok(all.then(|| last.take()).flatten())
        });
        outcome.with_context(|| format!("last seen: {last:?}"))
    }

    /// Runs a command on a guest's console; what it printed.
    pub fn type_to(&self, id: VmId, command: &str) -> Result<String> {
        self.begin(id, command)?.finish()
    }

    /// Types a command on a guest's console and does not wait.
    pub fn begin(&self, id: VmId, command: &str) -> Result<Typed> {
        let socket = VmDir::new(&self.state, id).serial();
        let mut console = UnixStream::connect(&socket).with_context(|| format!("connect to {}", socket.display()))?;
        console.set_read_timeout(Some(TIMEOUT))?;
        // The console says first what it said before; only what follows this word counts.
        let word = format!("begin-{}", VmId::random());
        console.write_all(format!("echo {word}; {command}\n").as_bytes())?;
        Ok(Typed { console, word, command: command.to_owned() })
    }

    fn ask<T: serde::de::DeserializeOwned>(&self, method: &str, path: &str, body: &str) -> Result<T> {
        let (status, answer) = unix_http::request(&self.state.join("node.sock"), method, path, body)?;
        ensure!(status == 200, "{method} {path}: {status}: {answer}");
        serde_json::from_str(&answer).with_context(|| format!("{method} {path}: {answer}"))
    }
}

/// A command that was typed on a guest's console.
pub struct Typed {
    console: UnixStream,
    word: String,
    command: String,
}

impl Typed {
    /// Waits for its end; what it printed.
    pub fn finish(&mut self) -> Result<String> {
        let (mut heard, mut buffer) = (String::new(), [0; 4096]);
        loop {
            let n = self.console.read(&mut buffer);
            let n = n.with_context(|| format!("{:?} on the console; heard {heard:?}", self.command))?;
            ensure!(n > 0, "the console was closed after {heard:?}");
            heard.push_str(&String::from_utf8_lossy(&buffer[..n]));
            let answer =
                heard.split_once(&format!("{}\n", self.word)).and_then(|(_, rest)| rest.split_once("TINY end "));
            if let Some((printed, _)) = answer {
                return Ok(printed.trim_end().to_owned());
            }
        }
    }
}

/// The page that a guest serves, asked for by the node.
pub fn page(address: Ipv4Addr) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((address, 80)), TIMEOUT)
        .with_context(|| format!("connect to the guest at {address}"))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    write!(stream, "GET / HTTP/1.0\r\nHost: {address}\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").with_context(|| format!("{address} answered {answer:?}"))?;
    Ok(body.trim().to_owned())
}
