//! `bedplate-control`: the control node.

use std::io::IsTerminal;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use bedplate_api::Digest;
use bedplate_api::error::with_causes;
use bedplate_api::node::Ipv4Net;
use bedplate_controller::control::Options;
use bedplate_controller::serve::{Listen, Serving};
use bedplate_images::store::is_tag_name;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

/// Turns blank machines into nodes and images into running VMs, and keeps it so.
///
/// People reach it through a Unix socket that only the user who started it may open. Nodes reach it at --node-listen, on
/// a network that belongs to the cluster alone: whoever can boot from there can read the nodes' token.
#[derive(Debug, Parser)]
#[command(name = "bedplate-control", version)]
struct Args {
    /// Directory for everything that is to be remembered: its store, the image repository, files for netboot
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// Unix socket for people and the `bedplate` command
    #[arg(long, value_name = "PATH", default_value = "/run/bedplate/control.sock")]
    socket: PathBuf,
    /// Where nodes reach this control node, on the provisioning network
    #[arg(long, value_name = "IP:PORT")]
    node_listen: Option<SocketAddr>,
    /// Serve a page to look at, at a loopback address
    #[arg(long, value_name = "IP:PORT")]
    page: Option<SocketAddr>,
    /// Boot blank machines on this interface: DHCP, TFTP and HTTP; needs --node-listen with an address of it
    #[arg(long, value_name = "IFACE", requires = "node_listen")]
    netboot: Option<String>,
    /// Addresses for machines on the provisioning network
    #[arg(long, value_name = "CIDR", default_value = "10.77.0.0/24", value_parser = network)]
    node_network: Ipv4Net,
    /// Where the networks of the nodes' VMs are taken from, a /24 each
    #[arg(long, value_name = "CIDR", default_value = "10.78.0.0/16", value_parser = network)]
    vm_network: Ipv4Net,
    /// Name of the VMM image in the repository that blank machines boot
    #[arg(long, value_name = "NAME", default_value = "vmm")]
    vmm_image: String,
    /// How many VMs a machine booted from here provides
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1024))]
    slots_per_node: u32,
    /// Added to the kernel command line of machines booted from here
    #[arg(long, value_name = "TEXT", default_value = "")]
    node_cmdline: String,
    /// How long a machine may take from fetching its boot script to registering
    #[arg(long, value_name = "S", default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..))]
    boot_deadline_seconds: u64,
    /// How long a node may be silent before its VMs are started elsewhere
    #[arg(long, value_name = "S", default_value_t = 15, value_parser = clap::value_parser!(u64).range(2..))]
    lost_after_seconds: u64,
}

fn network(text: &str) -> Result<Ipv4Net, String> {
    let parsed = text.split_once('/').and_then(|(address, prefix)| {
        Some(Ipv4Net { address: address.parse().ok()?, prefix: prefix.parse().ok().filter(|p| (8..=24).contains(p))? })
    });
    let net = parsed.ok_or("expected an IPv4 network with a prefix of 8 to 24, such as 10.77.0.0/24")?;
    let mask = u32::MAX << (32 - u32::from(net.prefix));
    if u32::from(net.address) & !mask != 0 {
        let network = Ipv4Addr::from(u32::from(net.address) & mask);
        return Err(format!("{text} is an address within a network; the network is {network}/{}", net.prefix));
    }
    Ok(net)
}

fn main() -> ExitCode {
    let args = Args::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info,netlink=off".into());
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(colours)
        .with_target(false)
        .init();
    // Everything that this process makes is for its own user.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    if let Err(error) = bedplate_controller::listen::raise_file_limit() {
        tracing::warn!("the limit of open files stays as it is: {error}");
    }
    let outcome = tokio::runtime::Runtime::new().context("cannot start the async runtime").and_then(|runtime| {
        let outcome = runtime.block_on(run(args));
        // A thread that still writes to a disk that hangs must not keep the process.
        runtime.shutdown_timeout(std::time::Duration::from_secs(1));
        outcome
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bedplate-control: {}", with_causes(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

async fn run(args: Args) -> Result<()> {
    if overlap(args.node_network, args.vm_network) {
        bail!("--node-network and --vm-network overlap: give the VMs a network of their own");
    }
    if !is_tag_name(&args.vmm_image) && args.vmm_image.parse::<Digest>().is_err() {
        bail!(
            "--vmm-image {:?} is neither an image's name nor a digest; `bedplate image push` gives one",
            args.vmm_image
        );
    }
    let options = Options {
        state: args.state,
        node_listen: args.node_listen,
        netboot: args.netboot,
        node_network: args.node_network,
        vm_network: args.vm_network,
        vmm_image: args.vmm_image,
        slots_per_node: args.slots_per_node,
        node_cmdline: args.node_cmdline,
        boot_deadline: args.boot_deadline_seconds,
        lost_after: args.lost_after_seconds,
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut serving = Serving::start(options, Listen { socket: args.socket.clone(), page: args.page }).await?;
    tracing::info!("serving people at {}", args.socket.display());
    if let Some(address) = serving.node_address {
        tracing::info!("serving nodes at http://{address}");
    }
    if let Some(address) = serving.page_address {
        tracing::info!("a page to look at: http://{address}/");
    }
    let outcome = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        error = serving.failed() => Err(error.into()),
    };
    serving.stop().await;
    outcome
}

fn overlap(a: Ipv4Net, b: Ipv4Net) -> bool {
    let shift = 32 - u32::from(a.prefix.min(b.prefix));
    u32::from(a.address) >> shift == u32::from(b.address) >> shift
}
