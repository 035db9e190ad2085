//! A control node as a real process on a private network, spoken to through the real command.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bedplate_lab::network::BRIDGE;
use bedplate_lab::{Accel, Console, Network, Process};
use serde_json::Value;

use crate::Artifacts;

/// For a process to open its store and its sockets, on a busy machine.
const STARTED: Duration = Duration::from_secs(60);

/// `bedplate-control`, with network boot on the network's bridge.
#[derive(Debug)]
pub struct ControlNode {
    process: Process,
    log: Console,
    programs: PathBuf,
    dir: PathBuf,
}

impl ControlNode {
    /// Address of the control node on its network; its agents and netboot port.
    pub const ADDRESS: &str = "10.77.0.1";
    /// Port for nodes.
    pub const NODE_PORT: u16 = 7070;
    /// The page, on the loopback interface inside the network.
    pub const PAGE: &str = "127.0.0.1:8470";

    /// Starts one that keeps its state in `dir`, and waits until it serves; `options` are added to its command line.
    pub fn start(artifacts: &Artifacts, network: &Network, dir: &Path, options: &[&str]) -> Result<Self> {
        let mut command = Command::new(artifacts.program("bedplate-control"));
        command.arg("--state").arg(dir.join("control")).arg("--socket").arg(dir.join("control.sock"));
        command.args(["--node-listen", &format!("{}:{}", Self::ADDRESS, Self::NODE_PORT)]);
        command.args(["--netboot", BRIDGE, "--page", Self::PAGE]).args(options);
        command.arg(format!("--node-cmdline={}", Accel::best().kernel_words()));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        network.enter(&mut command);
        // Ctrl-C on a terminal is for whoever owns this, who then stops it in order.
        command.process_group(0);
        let mut process = Process::start("the control node", command)?;
        let output = process.take_stderr().context("no pipe from the control node")?;
        std::fs::create_dir_all(&artifacts.logs)?;
        let log = Console::new("the control node", &artifacts.logs.join("control.log"), output, None)?;
        let control = Self { process, log, programs: artifacts.programs.clone(), dir: dir.to_owned() };
        control.log.wait_for("serving people at", STARTED)?;
        Ok(control)
    }

    /// Its Unix socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.join("control.sock")
    }

    /// What it logged.
    pub const fn log(&self) -> &Console {
        &self.log
    }

    /// Kills it, as a crash would.
    pub fn kill(mut self) -> Result<()> {
        self.process.kill()?;
        Ok(())
    }

    /// The command `bedplate`, for this control node and an image store beside its state.
    pub fn bedplate(&self, args: &[&str]) -> Command {
        let mut command = Command::new(self.programs.join("bedplate"));
        command.args(args).env("BEDPLATE_CONTROL", format!("unix:{}", self.socket().display()));
        command.env("BEDPLATE_STORE", self.dir.join("store"));
        command
    }

    /// Runs `bedplate`; its standard output, or an error with what it said.
    pub fn run(&self, args: &[&str]) -> Result<String> {
        let out = self.bedplate(args).stdin(Stdio::null()).output().context("run bedplate")?;
        if !out.status.success() {
            bail!("bedplate {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr).trim());
        }
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// Runs `bedplate … -o json`; the answer, an array.
    pub fn list(&self, args: &[&str]) -> Result<Vec<Value>> {
        let mut args = args.to_vec();
        args.extend(["-o", "json"]);
        let text = self.run(&args)?;
        serde_json::from_str(&text).with_context(|| format!("bedplate {}: not a JSON list: {text}", args.join(" ")))
    }
}
