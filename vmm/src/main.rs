//! `bedplate-vmm`: one VM.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use bedplate_api::error::with_causes;
use bedplate_api::vmm::{Exit, ExitReason, VmConfig};
use bedplate_vmm::console::{Console, Target};
use bedplate_vmm::control::{self, Server, Session, Signals};
use bedplate_vmm::exit_file::ExitFile;
use bedplate_vmm::json;
use bedplate_vmm::sandbox::{Access, Sandbox, Unlisted, User};
use clap::Parser;

/// Run one virtual machine.
///
/// SIGTERM presses its power button; SIGINT ends it at once. On a terminal, Ctrl-A X does, too.
#[derive(Parser)]
#[command(version, name = "bedplate-vmm")]
struct Args {
    /// Serve the HTTP API on this Unix socket
    #[arg(long, value_name = "PATH")]
    api_sock: Option<PathBuf>,
    /// Boot at once what this JSON file describes
    #[arg(long, value_name = "PATH")]
    config_file: Option<PathBuf>,
    /// Serve no API
    #[arg(long, requires = "config_file", conflicts_with = "api_sock")]
    no_api: bool,
    /// Name of this VM
    #[arg(long, default_value = "anonymous-instance")]
    id: String,
    /// Where the guest's serial console goes: stdio, off, file:PATH or socket:PATH
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    serial: Target,
    /// Append the serial output to this file, too; it is moved to PATH.old at 1 MiB
    #[arg(long, value_name = "PATH")]
    serial_log: Option<PathBuf>,
    /// When the VM has ended, write how to this file
    #[arg(long, value_name = "PATH")]
    exit_file: Option<PathBuf>,
    /// Become this user before the guest runs (as root only)
    #[arg(long, value_name = "UID", requires = "gid", conflicts_with = "no_sandbox")]
    uid: Option<u32>,
    /// Become this group before the guest runs (as root only)
    #[arg(long, value_name = "GID", requires = "uid")]
    gid: Option<u32>,
    /// Leave this directory visible inside of the sandbox, for files that are named later; may be repeated
    #[arg(long, value_name = "DIR", conflicts_with = "no_sandbox")]
    visible: Vec<PathBuf>,
    /// Let a guest that takes over this process do what you can do
    #[arg(long)]
    no_sandbox: bool,
    /// Log system calls that are not on the sandbox's list instead of ending: to find what the list lacks
    #[arg(long, conflicts_with = "no_sandbox")]
    log_system_calls: bool,
}

fn main() -> ExitCode {
    let args = Args::parse();
    // First of all: a VM whose end cannot be told is not started.
    let exit_file = match args.exit_file.as_deref().map(ExitFile::prepare).transpose() {
        Ok(exit_file) => exit_file,
        Err(error) => {
            eprintln!("bedplate-vmm: {error}");
            return ExitCode::FAILURE;
        }
    };
    let exit =
        run(&args).unwrap_or_else(|error| Exit { reason: ExitReason::HostFault, detail: with_causes(error.as_ref()) });
    let mut code = exit.reason.code();
    // One line, for whoever reads logs; the exit file says the same.
    match exit.reason {
        ExitReason::GuestFault => eprintln!("bedplate-vmm: the guest cannot go on: {}", exit.detail),
        ExitReason::HostFault => eprintln!("bedplate-vmm: {}", exit.detail),
        ExitReason::GuestPowerOff | ExitReason::GuestReset | ExitReason::Stopped => {}
    }
    if let Some(Err(error)) = exit_file.map(|file| file.write(&exit)) {
        eprintln!("bedplate-vmm: {error}");
        code = 1;
    }
    ExitCode::from(code)
}

fn run(args: &Args) -> Result<Exit> {
    // Before any thread: all of them inherit which signals are blocked.
    let signals = Signals::take_over().context("signals cannot be taken over")?;
    if args.api_sock.is_none() && args.config_file.is_none() {
        bail!("nothing to run: give --config-file, or --api-sock to be configured through the API");
    }
    let console = Console::open(&args.serial, args.serial_log.as_deref())?;
    let mut session = Session::new(args.id.clone(), console, sandbox(args))?;
    let server = args.api_sock.as_deref().map(Server::listen).transpose()?;
    if let Some(path) = &args.config_file {
        session.start_with(read_config(path)?)?;
        if matches!(args.serial, Target::Stdio) && std::io::stdin().is_terminal() {
            eprint!("Ctrl-A X ends the VM\r\n");
        }
    }
    Ok(control::run(session, server, &signals)?)
}

/// What the process goes into before the guest runs, with the places that are needed until its end.
fn sandbox(args: &Args) -> Option<Sandbox> {
    if args.no_sandbox {
        eprintln!("bedplate-vmm: --no-sandbox: a guest that takes over this process can do what you can do");
        return None;
    }
    let unlisted = if args.log_system_calls { Unlisted::Logged } else { Unlisted::Ends };
    let user = args.uid.zip(args.gid).map(|(uid, gid)| User { uid, gid });
    let mut sandbox = Sandbox::new(unlisted, user);
    args.visible.iter().for_each(|dir| sandbox.keep(dir, Access::Write));
    let socket = if let Target::Socket(path) = &args.serial { Some(path) } else { None };
    let places = [args.api_sock.as_ref(), args.exit_file.as_ref(), args.serial_log.as_ref(), socket];
    places.into_iter().flatten().for_each(|file| sandbox.keep_place_of(file));
    Some(sandbox)
}

fn read_config(path: &Path) -> Result<VmConfig> {
    let text = std::fs::read(path).with_context(|| format!("config file {} cannot be read", path.display()))?;
    json::object(&text)
        .with_context(|| format!("config file {} is not a VM's configuration; correct it", path.display()))
}
