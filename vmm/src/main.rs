//! `bedplate-vmm`: one VM.

use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use bedplate_api::error::with_causes;
use bedplate_api::vmm::{Exit, ExitReason, LogLevel, Logger, Metrics, VmConfig};
use bedplate_vmm::console::{Console, Target};
use bedplate_vmm::control::{self, Server, Session, Settings, Signals, StartTimes};
use bedplate_vmm::debugger::DebugSocket;
use bedplate_vmm::exit_file::ExitFile;
use bedplate_vmm::json;
use bedplate_vmm::kvm;
use bedplate_vmm::sandbox::{Access, Sandbox, Unlisted, User};
use clap::Parser;
use clap::builder::RangedU64ValueParser;

/// Run one virtual machine.
///
/// SIGTERM presses its power button, and ends it after a minute; a second one, or SIGINT, ends it at once, and so does
/// Ctrl-A X on a terminal.
#[derive(Parser)]
#[command(version, name = "bedplate-vmm")]
struct Args {
    /// Serve the HTTP API on this Unix socket; without --config-file, too: /run/firecracker.socket
    #[arg(long, value_name = "PATH")]
    api_sock: Option<PathBuf>,
    /// Boot at once what this JSON file describes
    #[arg(long, value_name = "PATH")]
    config_file: Option<PathBuf>,
    /// Serve no API, also where there is --api-sock
    #[arg(long, requires = "config_file")]
    no_api: bool,
    /// Name of this VM: 1 to 64 letters, digits and hyphens
    #[arg(long, default_value = "anonymous-instance", value_parser = instance_id)]
    id: String,
    /// Largest body of a request to the API
    #[arg(long, value_name = "BYTES", default_value_t = control::DEFAULT_MAX_BODY)]
    http_api_max_payload_size: usize,
    /// Where the guest's serial console goes: stdio, off, file:PATH or socket:PATH
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    serial: Target,
    /// Append the serial output to this file, too; it is moved to PATH.old at 1 MiB
    #[arg(long, value_name = "PATH")]
    serial_log: Option<PathBuf>,
    /// When the VM has ended, write how to this file
    #[arg(long, value_name = "PATH")]
    exit_file: Option<PathBuf>,
    /// Let the guest wait for a debugger, which gets full power over it, on this Unix socket (GDB's remote protocol)
    #[arg(long, value_name = "PATH")]
    gdb: Option<PathBuf>,
    /// Become this user before the guest runs (as root only)
    #[arg(long, value_name = "UID", requires = "gid", conflicts_with = "no_sandbox", value_parser = a_user())]
    uid: Option<u32>,
    /// Become this group before the guest runs (as root only)
    #[arg(long, value_name = "GID", requires = "uid", value_parser = a_user())]
    gid: Option<u32>,
    /// Leave this directory visible inside of the sandbox, for files that are named later; may be repeated
    #[arg(long, value_name = "DIR", conflicts_with = "no_sandbox")]
    visible: Vec<PathBuf>,
    /// Keep this tap for the VM, so that a network interface can have it while the VM runs; may be repeated
    #[arg(long, value_name = "NAME")]
    tap: Vec<String>,
    /// Let a guest that takes over this process do what you can do
    #[arg(long, visible_alias = "no-seccomp")]
    no_sandbox: bool,
    /// Log system calls that are not on the sandbox's list instead of ending: to find what the list lacks
    #[arg(long, conflicts_with = "no_sandbox")]
    log_system_calls: bool,
    /// Append messages of the VMM to this file or FIFO instead of stderr
    #[arg(long, value_name = "PATH")]
    log_path: Option<String>,
    /// Least severe level that is written: Off, Error, Warning, Info, Debug or Trace
    #[arg(long)]
    level: Option<LogLevel>,
    /// Write only messages of modules whose path begins so
    #[arg(long, value_name = "PATH")]
    module: Option<String>,
    /// Write the level with each message
    #[arg(long)]
    show_level: bool,
    /// Write the place in the source with each message
    #[arg(long)]
    show_log_origin: bool,
    /// Append counters to this file or FIFO
    #[arg(long, value_name = "PATH")]
    metrics_path: Option<String>,
    /// Let the guest's metadata (MMDS) begin with this JSON file
    #[arg(long, value_name = "PATH")]
    metadata: Option<PathBuf>,
    /// Most metadata, as JSON without spaces; unless given, as much as --http-api-max-payload-size says
    #[arg(long, value_name = "BYTES")]
    mmds_size_limit: Option<usize>,
    /// Give the guest a boot timer: a byte of 123, written to 0xc0000000, logs the time since the start
    #[arg(long)]
    boot_timer: bool,
    /// Reading of the monotonic clock when the process was asked for
    #[arg(long, value_name = "MICROSECONDS")]
    start_time_us: Option<u64>,
    /// Processor time of the process when this program was begun
    #[arg(long, value_name = "MICROSECONDS")]
    start_time_cpu_us: Option<u64>,
    /// Processor time that the parent has spent for the process
    #[arg(long, value_name = "MICROSECONDS")]
    parent_cpu_time_us: Option<u64>,
    /// Say which processors of the field cpu_baseline this host can give, and what it lacks for the others
    #[arg(long)]
    cpu_baselines: bool,
    /// Does nothing: devices are on PCI always
    #[arg(long)]
    enable_pci: bool,
    /// Refused: the sandbox has lists of its own, and cannot read Firecracker's
    #[arg(long, value_name = "PATH", conflicts_with = "no_sandbox")]
    seccomp_filter: Option<PathBuf>,
    /// Refused: this version has no snapshots
    #[arg(long)]
    snapshot_version: bool,
    /// Refused: this version has no snapshots
    #[arg(long, value_name = "PATH")]
    describe_snapshot: Option<PathBuf>,
}

/// Where Firecracker serves its API if nobody says where.
const DEFAULT_API_SOCK: &str = "/run/firecracker.socket";

/// All ones are nobody's number: to the kernel they mean that nothing shall change.
fn a_user() -> RangedU64ValueParser<u32> {
    RangedU64ValueParser::new().range(..u64::from(u32::MAX))
}

fn instance_id(id: &str) -> Result<String, String> {
    // As Firecracker has it: the length in bytes, letters of any alphabet.
    let good = (1..=64).contains(&id.len()) && id.chars().all(|c| c == '-' || c.is_alphanumeric());
    if good { Ok(id.to_owned()) } else { Err("give 1 to 64 letters, digits and hyphens".to_owned()) }
}

fn main() -> ExitCode {
    one_heap();
    let args = Args::parse();
    if args.cpu_baselines {
        return say_baselines();
    }
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

/// Has all threads allocate from one heap. One for each is the C library's way to keep them from waiting for each other, and
/// costs each VM some memory and system calls for every thread; ours allocate while they start, and hardly after.
fn one_heap() {
    // SAFETY: it sets a number, and no other thread is there yet.
    // Refused, there are more heaps.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// One line for each.
fn say_baselines() -> ExitCode {
    let baselines = match kvm::baselines() {
        Ok(baselines) => baselines,
        Err(error) => {
            eprintln!("bedplate-vmm: {error}");
            return ExitCode::FAILURE;
        }
    };
    let line = |(baseline, missing): (_, Vec<String>)| match &missing[..] {
        [] => format!("{baseline}  yes\n"),
        missing => format!("{baseline}  no: this host lacks {}\n", missing.join(", ")),
    };
    let text: String = baselines.into_iter().map(line).collect();
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads it has read enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bedplate-vmm: stdout: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<Exit> {
    refuse_unoffered(args)?;
    let config = args.config_file.as_deref().map(read_config).transpose()?;
    // Before any thread: all of them inherit which signals are blocked.
    let signals = Signals::take_over().context("signals cannot be taken over")?;
    let console = Console::open(&args.serial, args.serial_log.as_deref())?;
    let start = StartTimes {
        monotonic_us: args.start_time_us,
        cpu_us: args.start_time_cpu_us,
        parent_cpu_us: args.parent_cpu_time_us,
    };
    let mmds_size_limit = args.mmds_size_limit.unwrap_or(args.http_api_max_payload_size);
    let (id, taps) = (args.id.clone(), args.tap.clone());
    let settings = Settings { id, boot_timer: args.boot_timer, start, mmds_size_limit, taps };
    let mut session = Session::new(settings, console, sandbox(args))?;
    session.set_logger(&logger(args))?;
    if let Some(path) = &args.metrics_path {
        session.set_metrics(&Metrics { metrics_path: path.clone(), emit_id: false, properties: None })?;
    }
    if let Some(path) = &args.metadata {
        session.load_metadata(path)?;
    }
    if let Some(path) = &args.gdb {
        session.set_debugger(DebugSocket::listen(path)?);
    }
    let default_sock = args.config_file.is_none().then_some(Path::new(DEFAULT_API_SOCK));
    let api_sock = args.api_sock.as_deref().or(default_sock).filter(|_| !args.no_api);
    let server = api_sock.map(|path| Server::listen(path, args.http_api_max_payload_size)).transpose()?;
    if let (Some(path), Some((config, unknown))) = (&args.config_file, config) {
        let file = path.display();
        session.warn(unknown.iter().map(|section| {
            format!("config file {file}: there is no section {section}, and what is in it has no effect")
        }));
        session.start_with(config)?;
        if matches!(args.serial, Target::Stdio) && std::io::stdin().is_terminal() {
            eprint!("Ctrl-A X ends the VM\r\n");
        }
    }
    Ok(control::run(session, server, &signals)?)
}

/// What cannot be had, or Firecracker has and this version has not: said, not ignored.
fn refuse_unoffered(args: &Args) -> Result<()> {
    if let Some(dir) = args.visible.iter().find(|dir| !dir.is_dir()) {
        bail!("--visible {}: there is no such directory; make it, or correct its name", dir.display());
    }
    if args.snapshot_version || args.describe_snapshot.is_some() {
        bail!("snapshots are not offered by this version: the state of vCPUs and devices cannot be saved yet");
    }
    if let Some(path) = &args.seccomp_filter {
        bail!(
            "the seccomp filter {} cannot be set: the sandbox has lists of its own, and cannot read Firecracker's; leave \
             --seccomp-filter out",
            path.display()
        );
    }
    Ok(())
}

fn logger(args: &Args) -> Logger {
    Logger {
        log_path: args.log_path.clone(),
        level: args.level,
        show_level: Some(args.show_level),
        show_log_origin: Some(args.show_log_origin),
        module: args.module.clone(),
    }
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
    // Not that of the API's default socket: it is everybody's. What is left of that socket, the next process replaces.
    let socket = if let Target::Socket(path) = &args.serial { Some(path) } else { None };
    let api = args.api_sock.as_ref().filter(|_| !args.no_api);
    if args.gdb.is_some() {
        sandbox.permit_debugger();
    }
    // A socket that cannot be removed at the end is replaced by the next process.
    let sockets = [args.gdb.as_ref(), api, socket];
    sockets.into_iter().flatten().for_each(|path| sandbox.keep_place_of(path, Access::Write));
    let files = [&args.exit_file, &args.serial_log];
    files.into_iter().flatten().for_each(|path| sandbox.keep_place_of(path, Access::MustWrite));
    Some(sandbox)
}

/// Bytes of a configuration file, at most: no VM has as many devices.
const CONFIG_LIMIT: u64 = 16 << 20;

/// And the names of sections that there are not.
fn read_config(path: &Path) -> Result<(VmConfig, Vec<String>)> {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut text = Vec::new();
        // Also from a pipe, as shells make them.
        let len = File::open(path)?.take(CONFIG_LIMIT + 1).read_to_end(&mut text)?;
        if len as u64 > CONFIG_LIMIT { Err(std::io::ErrorKind::FileTooLarge.into()) } else { Ok(text) }
    };
    let text = read().with_context(|| format!("config file {} cannot be read", path.display()))?;
    json::sections(&text)
        .with_context(|| format!("config file {} is not a VM's configuration; correct it", path.display()))
}
