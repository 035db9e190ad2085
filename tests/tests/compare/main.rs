//! VMMs side by side on the same work in one emulated node: ours, and those that `cargo xtask bench compare --peer` brought.
//!
//! As a test it shows that everything can be measured; figures worth keeping want the clock that counts instructions.

mod bare;
mod data;
mod exits;
mod figures;
mod guests;
mod sides;
mod starts;
mod trace;

use std::process::ExitCode;
use std::time::Duration;

use bedplate_tests::suite::{self, NodeSpec, Scenario};

fn main() -> ExitCode {
    let node =
        NodeSpec { memory_mib: 3072, programs: &["bedplate-vmm"], debian: &[], patience: Duration::from_secs(240) };
    let scenarios = [
        Scenario { name: "vmms_start_side_by_side", run: starts::figures },
        Scenario { name: "vmms_handle_exits_side_by_side", run: exits::figures },
        Scenario { name: "vmms_move_blocks_side_by_side", run: data::blocks },
        Scenario { name: "vmms_move_frames_side_by_side", run: data::frames },
    ];
    suite::main("compare", &node, &scenarios)
}
