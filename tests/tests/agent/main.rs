//! `bedplate-node` with eight real guests, in an emulated node: what the control node would ask for is asked for here,
//! and everything that can die is killed.

mod agent;
mod eight;

use std::process::ExitCode;
use std::time::Duration;

use bedplate_tests::suite::{self, NodeSpec, Scenario};

fn main() -> ExitCode {
    // A node without disks keeps half of its RAM for images and disks.
    let programs = &["bedplate-node", "bedplate-vmm"];
    let node = NodeSpec { memory_mib: 5120, programs, patience: Duration::from_secs(600) };
    suite::main("agent", &node, &[Scenario { name: "eight_guests_outlive_their_agent", run: eight::life }])
}
