//! `bedplate-node`: the node agent as a service, or PID 1 of the VMM image.

use std::process::ExitCode;

use bedplate_api::error::with_causes;
use bedplate_node::{init, service};
use clap::Parser;

/// Hosts VMs on one node.
#[derive(Debug, Parser)]
#[command(name = "bedplate-node", version, max_term_width = 100)]
enum Command {
    /// Run the agent; as PID 1 this happens by itself
    Agent(service::AgentArgs),
}

fn main() -> ExitCode {
    // Before anything else: PID 1 has no arguments of a person and no runtime.
    if std::process::id() == 1 {
        init::main();
    }
    let Command::Agent(args) = Command::parse();
    log_to_stderr();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return fail(&anyhow::Error::from(e)),
    };
    let done = runtime.block_on(service::run(args));
    // Tasks that wait for the network or a guest are not waited for.
    runtime.shutdown_background();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => fail(&e.into()),
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    eprintln!("bedplate-node: {}", with_causes(error.as_ref()));
    ExitCode::FAILURE
}

/// `RUST_LOG` chooses what is said; without it, what a person wants to know.
fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env();
    let filter = filter.unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    let plain = tracing_subscriber::fmt().with_writer(std::io::stderr).with_target(false).with_ansi(false);
    plain.with_env_filter(filter).init();
}
