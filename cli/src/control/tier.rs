//! `bedplate tier`: what shall run.

use bedplate_api::client::Client;
use bedplate_api::control::{TierSpec, TierView};
use bedplate_api::node::DiskMode;
use clap::Subcommand;
use comfy_table::Cell;

use super::{ControlArgs, Error, Session};
use crate::output::{self, Format, Health};
use crate::size::parse_mib;

/// `bedplate tier …`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  bedplate tier create web --image web --target 4 --memory 512M --active
  bedplate tier scale web 8
  bedplate tier deactivate web    # stops its VMs, keeps the tier
  bedplate tier ls

A change names the tier's image again, so a tag that was moved since then takes effect with it.")]
pub struct Args {
    #[command(flatten)]
    control: ControlArgs,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the tiers
    Ls,
    /// Show one tier
    Show {
        /// Its name
        name: String,
    },
    /// Create a tier
    Create(Create),
    /// Let the control node fill a tier
    Activate {
        /// Its name
        name: String,
    },
    /// Stop a tier's VMs and keep the tier
    Deactivate {
        /// Its name
        name: String,
    },
    /// Change how many VMs a tier has
    Scale {
        /// Its name
        name: String,
        /// How many VMs it shall have
        target: u32,
    },
    /// Remove a tier; its VMs are stopped
    Rm {
        /// Its name
        name: String,
    },
}

#[derive(Debug, clap::Args)]
struct Create {
    /// Its name: letters, digits and hyphens; its VMs are NAME-1, NAME-2, …
    name: String,
    /// Name or digest of a disk image in the repository (`bedplate image push` brings one there)
    #[arg(long)]
    image: String,
    /// How many VMs to keep running
    #[arg(long)]
    target: u32,
    /// vCPUs of each
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    cpus: u8,
    /// RAM of each, such as 512M or 2G
    #[arg(long, default_value = "512M", value_parser = parse_mib, value_name = "SIZE")]
    memory: u64,
    /// Keep the changes that a VM makes to its disk when it is started again
    #[arg(long)]
    persistent: bool,
    /// Fill it at once
    #[arg(long)]
    active: bool,
}

impl From<Create> for TierSpec {
    fn from(create: Create) -> Self {
        Self {
            name: create.name,
            image: create.image,
            target: create.target,
            cpus: create.cpus,
            memory_mib: create.memory,
            disk: if create.persistent { DiskMode::Persistent } else { DiskMode::NonPersistent },
            active: create.active,
        }
    }
}

/// Runs it.
///
/// # Errors
/// See [`Error`].
pub fn run(args: Args, format: Format) -> Result<(), Error> {
    let session = Session::open(&args.control.control)?;
    let client = &session.client;
    let tier = match args.action {
        Action::Ls => {
            let tiers = session.wait(client.tiers())?;
            return Ok(print(&tiers, format)?);
        }
        Action::Rm { name } => {
            session.wait(client.delete_tier(&name)).map_err(|e| unknown(e, &name))?;
            output::note(&format!("Tier {name} is gone; its VMs are being stopped."));
            return Ok(());
        }
        Action::Show { name } => session.wait(client.tier(&name)).map_err(|e| unknown(e, &name))?,
        Action::Create(create) => session.wait(client.create_tier(&create.into()))?,
        Action::Activate { name } => change(&session, &name, |spec| spec.active = true)?,
        Action::Deactivate { name } => change(&session, &name, |spec| spec.active = false)?,
        Action::Scale { name, target } => change(&session, &name, |spec| spec.target = target)?,
    };
    match format {
        Format::Json => output::json(&tier)?,
        Format::Table => print(&[tier], format)?,
    }
    Ok(())
}

fn change(session: &Session, name: &str, edit: impl FnOnce(&mut TierSpec)) -> Result<TierView, Error> {
    let mut spec = session.wait(session.client.tier(name)).map_err(|e| unknown(e, name))?.spec;
    edit(&mut spec);
    session.wait(session.client.put_tier(&spec))
}

/// The server says that there is no such tier; we can say how to see which there are.
fn unknown(error: Error, name: &str) -> Error {
    match error {
        Error::Refused(e) if Client::is_not_found(&e) => {
            Error::Unknown { kind: "tier", name: name.to_owned(), list: "tier ls" }
        }
        other => other,
    }
}

fn print(tiers: &[TierView], format: Format) -> Result<(), output::PrintError> {
    let header = ["NAME", "STATE", "RUNNING", "IMAGE", "CPUS", "MEMORY", "DISK", "DETAIL"];
    output::list(format, tiers, "There is no tier yet; `bedplate tier create` makes one.", &header, row)
}

fn row(tier: &TierView) -> Vec<Cell> {
    let spec = &tier.spec;
    let (state, health) = match (spec.active, tier.running >= spec.target) {
        (false, _) => ("inactive", Health::Off),
        (true, true) => ("full", Health::Good),
        (true, false) => ("filling", Health::Busy),
    };
    vec![
        Cell::new(&spec.name),
        output::state(state, health),
        Cell::new(format!("{}/{}", tier.running, spec.target)),
        Cell::new(&spec.image),
        Cell::new(spec.cpus),
        Cell::new(output::bytes(spec.memory_mib.saturating_mul(1 << 20))),
        Cell::new(output::word(&spec.disk)),
        Cell::new(tier.detail.as_deref().unwrap_or("")),
    ]
}
