//! `bedplate-node` with real guests, in an emulated node: what the control node would ask for is asked for here, and
//! everything that can die is killed.

mod agent;
mod cold;
mod eight;
mod lazy;
mod repository;

use std::process::ExitCode;
use std::time::Duration;

use bedplate_tests::suite::{self, NodeSpec, Scenario};

fn main() -> ExitCode {
    // A node without disks keeps half of its RAM for images and disks.
    let programs = &["bedplate-node", "bedplate-vmm", "bedplate-control"];
    let node = NodeSpec { memory_mib: 5120, programs, debian: &[], patience: Duration::from_secs(600) };
    let scenarios = [
        Scenario { name: "eight_guests_outlive_their_agent", run: eight::life },
        Scenario { name: "a_guest_boots_before_its_image_is_here", run: lazy::life },
        Scenario { name: "a_cold_start_and_a_warm_one", run: cold::figures },
    ];
    suite::main("agent", &node, &scenarios)
}
