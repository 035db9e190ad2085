//! `cargo xtask bench`: figures of whole nodes, from an emulated one whose clock counts instructions.
//!
//! What runs are scenarios of the test programs, which `cargo xtask test` runs, too, once and by the usual clock.

use anyhow::{Context, Result, bail};
use bedplate_lab::accel;
use bedplate_tests::suite::ROUNDS;

use crate::{images, setup, test};

/// What can be measured: its name here, the test program, and the scenario in it.
const BENCHES: [(&str, &str, &str); 1] = [("cold", "tests/agent", "a_cold_start_and_a_warm_one")];

/// How often each figure is taken unless told otherwise.
pub const A_FEW: u32 = 5;

/// Guests stand still in this kind of emulation now and then (docs/lab.md), which is no result.
const TRIES: u32 = 4;

/// Takes the figures whose names contain `filter`.
pub fn run(filter: Option<&str>, rounds: u32) -> Result<()> {
    let wanted = || BENCHES.iter().filter(|(name, ..)| filter.is_none_or(|wanted| name.contains(wanted)));
    if wanted().next().is_none() {
        let names: Vec<_> = BENCHES.iter().map(|(name, ..)| *name).collect();
        bail!("no measurement has {:?} in its name; there is {}", filter.unwrap_or_default(), names.join(", "));
    }
    setup::run()?;
    let suites = test::build_all()?;
    let artifacts = images::make(&|line| println!("{line}"))?;
    for (name, program, scenario) in wanted() {
        let suite = suites.iter().find(|suite| suite.name == *program);
        let suite = suite.with_context(|| format!("there is no test program {program}"))?;
        println!("\n     {name}: {rounds} times, clock: executed instructions of the node's one processor, 2 ns each");
        let mut lost = 0;
        loop {
            let mut command = suite.command(&artifacts);
            command.arg(scenario).env(accel::CHOICE, "counted").env(ROUNDS, rounds.to_string());
            let status = command.status().with_context(|| format!("run {program}"))?;
            if status.success() {
                break;
            }
            lost += 1;
            if lost == TRIES {
                bail!("{name}: none of {TRIES} tries came to its end; what the last one said is above");
            }
            println!("     {name}: a try was lost; the next one");
        }
        println!("     {name}: {lost} of {} tries were lost", lost + 1);
    }
    Ok(())
}
