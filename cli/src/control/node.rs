//! `bedplate node`: machines.

use bedplate_api::control::{NodeState, NodeView, VmView};
use clap::Subcommand;
use comfy_table::Cell;

use super::{ControlArgs, Error, Session, vm};
use crate::output::{self, Format, Health};

/// `bedplate node …`
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  bedplate node ls\n  bedplate node show node-1\n  bedplate node ls -o json")]
pub struct Args {
    #[command(flatten)]
    control: ControlArgs,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the machines
    Ls,
    /// Show one machine and its VMs
    Show {
        /// Its name, or its id
        name: String,
    },
}

/// Runs it.
///
/// # Errors
/// See [`Error`].
pub fn run(args: Args, format: Format) -> Result<(), Error> {
    let session = Session::open(&args.control.control)?;
    let nodes = session.wait(session.client.nodes())?;
    match args.action {
        Action::Ls => {
            let header = ["NAME", "STATE", "ADDRESS", "CPUS", "MEMORY", "SLOTS", "SEEN", "MAC"];
            output::list(format, &nodes, "No machine has shown itself yet.", &header, row)?;
        }
        Action::Show { name } => {
            let wanted = |n: &&NodeView| n.name == name || n.id.is_some_and(|id| id.to_string() == name);
            let Some(node) = nodes.iter().find(wanted) else {
                return Err(Error::Unknown { kind: "node", name, list: "node ls" });
            };
            let mut vms = session.wait(session.client.vms())?;
            vms.retain(|vm| vm.node == node.name);
            show(node, &vms, format)?;
        }
    }
    Ok(())
}

fn row(node: &NodeView) -> Vec<Cell> {
    let capacity = node.capacity.as_ref();
    vec![
        Cell::new(&node.name),
        output::state(&output::word(&node.state), health(node.state)),
        Cell::new(output::or_dash(node.address)),
        Cell::new(output::or_dash(capacity.map(|c| c.cpus))),
        Cell::new(output::or_dash(capacity.map(|c| output::bytes(c.memory_mib.saturating_mul(1 << 20))))),
        Cell::new(output::or_dash(capacity.map(|c| format!("{}/{}", node.slots_used, c.slots)))),
        Cell::new(format!("{} ago", output::duration(node.last_seen_seconds))),
        Cell::new(output::or_dash(node.mac.as_ref())),
    ]
}

const fn health(state: NodeState) -> Health {
    match state {
        NodeState::Blank => Health::Off,
        NodeState::Booting => Health::Busy,
        NodeState::Ready => Health::Good,
        NodeState::Lost => Health::Bad,
    }
}

/// What `node show` prints as JSON.
#[derive(serde::Serialize)]
struct Shown<'a> {
    node: &'a NodeView,
    vms: &'a [VmView],
}

fn show(node: &NodeView, vms: &[VmView], format: Format) -> Result<(), Error> {
    if format == Format::Json {
        return Ok(output::json(&Shown { node, vms })?);
    }
    let mut text = format!(
        "name      {}\nstate     {}\nid        {}\naddress   {}\nmac       {}\nlast seen {} ago",
        node.name,
        output::word(&node.state),
        output::or_dash(node.id),
        output::or_dash(node.address),
        output::or_dash(node.mac.as_ref()),
        output::duration(node.last_seen_seconds),
    );
    if let Some(c) = &node.capacity {
        text += &format!(
            "\ncpus      {}\nmemory    {}\nslots     {} of {} used\ndisk free {}",
            c.cpus,
            output::bytes(c.memory_mib.saturating_mul(1 << 20)),
            node.slots_used,
            c.slots,
            output::bytes(c.disk_free)
        );
    }
    output::line(&text)?;
    if !vms.is_empty() {
        output::line("")?;
    }
    Ok(vm::print(vms, "It runs no VM.", format)?)
}
