//! `bedplate vm`: virtual machines of a cluster.

use bedplate_api::control::{Capture, VmView};
use bedplate_api::node::VmPhase;
use clap::Subcommand;
use comfy_table::Cell;

use super::{ControlArgs, Error, Session, inspect};
use crate::capture::{self, Bars};
use crate::console::{self, End, Keys};
use crate::output::{self, Format, Health, PrintError};
use crate::terminal;

const KEYS: Keys = Keys { leave: "leaves; the VM goes on", power_button: false };

/// `bedplate vm …`
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  bedplate vm ls\n  bedplate vm log web-1\n  bedplate vm capture web-1 web-golden\n  bedplate vm console web-1   # Ctrl-A X leaves\n  bedplate vm inspect web-1   # what its vCPUs and virtqueues do"
)]
pub struct Args {
    #[command(flatten)]
    control: ControlArgs,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the VMs
    Ls {
        /// Only those of this tier
        #[arg(long)]
        tier: Option<String>,
    },
    /// Print the last 64 KiB of a VM's console
    Log {
        /// Its name
        name: String,
    },
    /// Print what a VM does at this moment: registers, last exits, virtqueues
    Inspect {
        /// Its name
        name: String,
    },
    /// Make an image of a VM's disk as it is now, without what belongs to this one machine. The guest stands still while
    /// what it has written is copied; its file systems are brought to rest by the QEMU guest agent, if it has one on vsock
    /// port 9100
    Capture {
        /// The VM's name
        name: String,
        /// Name to give the image, which is taken from the image that has it
        image: String,
        /// Leave machine id, host keys, leases, logs and the like in it
        #[arg(long)]
        keep_identity: bool,
    },
    /// Connect this terminal to a VM's console; Ctrl-A X leaves, the VM goes on
    Console {
        /// Its name
        name: String,
    },
}

/// Runs it.
///
/// # Errors
/// See [`Error`].
pub fn run(args: Args, format: Format) -> Result<(), Error> {
    let session = Session::open(&args.control.control)?;
    match args.action {
        Action::Ls { tier } => {
            let mut vms = session.wait(session.client.vms())?;
            vms.retain(|vm| tier.as_ref().is_none_or(|tier| vm.tier == *tier));
            print(&vms, "No VM has a slot.", format)?;
        }
        Action::Log { name } => {
            let log = session.wait(session.client.vm_log(&name))?;
            match format {
                Format::Json => output::json(&serde_json::json!({ "name": name, "log": log }))?,
                Format::Table => output::line(log.trim_end_matches('\n'))?,
            }
        }
        Action::Inspect { name } => {
            let seen = session.wait(session.client.vm_inspect(&name))?;
            match format {
                Format::Json => output::json(&seen)?,
                Format::Table => inspect::print(&name, &seen)?,
            }
        }
        Action::Capture { name, image, keep_identity } => {
            let bars = Bars::default();
            let capture = Capture { image, keep_identity };
            let call = session.client.capture_vm(&name, &capture, |phase, done, total| bars.set(phase, done, total));
            let captured = session.wait(call)?;
            bars.finish();
            capture::print(&captured, &name, format)?;
        }
        Action::Console { name } => return attach(&session, name),
    }
    Ok(())
}

fn attach(session: &Session, name: String) -> Result<(), Error> {
    session.run(async |client| {
        let stream = client.vm_console(&name).await?;
        if terminal::is_interactive() {
            output::note(&format!("Console of {name}; Ctrl-A X leaves, Ctrl-A ? shows more."));
        }
        let end = console::attach(stream, KEYS, || {}).await;
        match end.map_err(|source| Error::Console { name: name.clone(), source })? {
            End::Closed => Err(Error::ConsoleClosed { name }),
            End::Left | End::Signal(_) => Ok(()),
        }
    })
}

/// Prints VMs; used by `node show` too.
pub(super) fn print(vms: &[VmView], empty: &str, format: Format) -> Result<(), PrintError> {
    output::list(format, vms, empty, &["NAME", "NODE", "PHASE", "ADDRESS", "RESTARTS", "DETAIL"], row)
}

fn row(vm: &VmView) -> Vec<Cell> {
    let mut detail = vm.detail.clone().unwrap_or_default();
    if let Some(copy) = vm.copy {
        let percent = copy.done.saturating_mul(100).checked_div(copy.total).unwrap_or(100);
        detail = format!("{percent} % of {} copied {detail}", output::bytes(copy.total)).trim_end().to_owned();
    }
    vec![
        Cell::new(&vm.name),
        Cell::new(format!("{}/{}", vm.node, vm.slot)),
        output::state(&output::word(&vm.phase), health(vm.phase)),
        Cell::new(output::or_dash(vm.address)),
        Cell::new(vm.restarts),
        Cell::new(detail),
    ]
}

const fn health(phase: VmPhase) -> Health {
    match phase {
        VmPhase::Running => Health::Good,
        VmPhase::Pending | VmPhase::Copying | VmPhase::Starting | VmPhase::Stopping => Health::Busy,
        VmPhase::Stopped => Health::Off,
        VmPhase::BackOff | VmPhase::Failed => Health::Bad,
    }
}
