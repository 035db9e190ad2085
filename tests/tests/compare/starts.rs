//! What a start costs.

use anyhow::{Result, ensure};
use bedplate_tests::inside::{figure, rounds};

use crate::figures::Figure;
use crate::guests::{self, DEBIAN, Guest, SMALL};
use crate::sides::{self, Extras, Side, Way};
use crate::trace::{self, Trace};

/// VMs that are started in a row.
const ROW: usize = 50;

/// Starts of the small guest in each round. Half of the time of one is a grace period of the kernel's, which ends with a tick of
/// the clock, so that one alone says at which phase of the clock it began.
const PHASES: usize = 9;

/// What one start cost.
struct Start {
    /// From the execution of the VMM to the first instruction of its guest, in ms.
    entered: f64,
    /// To the guest's word, in ms.
    there: f64,
    /// Of the guest, until that word.
    exits: f64,
    /// Of the VMM, at that time.
    private_kib: f64,
}

pub fn figures() -> Result<()> {
    guests::write_small()?;
    let mut sides = sides::all()?;
    sides.push(sides::ours("bedplate with pci=off", Way::NoPci));
    let trace = Trace::open()?;
    let new = |what, unit| Figure::new(what, unit, &sides);
    let mut small = new("exec to the first instruction of a guest of 2 KiB", "ms");
    let mut debian = new("exec to the first instruction of Debian's kernel", "ms");
    let mut init = new("exec to the guest's init", "ms");
    let mut exits = new("exits until init", "");
    let mut memory = new("private memory beside the guest's RAM", "KiB");
    let mut rate = new("starts of a guest of 2 KiB in a row", "per second");
    // Once before, so that the files of everybody are in the page cache.
    for side in &sides {
        start(side, SMALL, &trace)?;
        start(side, DEBIAN, &trace)?;
    }
    for _ in 0..rounds() {
        for (number, side) in sides.iter().enumerate() {
            for _ in 0..PHASES {
                small.add(number, start(side, SMALL, &trace)?.entered);
            }
            let whole = start(side, DEBIAN, &trace)?;
            // Also, so that whoever waits outside knows that it goes on.
            figure(&format!("{}, once: init after {:.2} ms", side.name, whole.there));
            ensure!(whole.entered > 0.0 && whole.exits > 0.0, "{}: nothing was measured", side.name);
            debian.add(number, whole.entered);
            init.add(number, whole.there);
            exits.add(number, whole.exits);
            memory.add(number, whole.private_kib);
            rate.add(number, in_a_row(side)?);
        }
    }
    for figure in [small, debian, init, exits, memory, rate] {
        figure.say(&sides);
    }
    Ok(())
}

fn start(side: &Side, guest: Guest, trace: &Trace) -> Result<Start> {
    trace.clear()?;
    let before = trace::exits()?;
    let mut vm = side.start(guest, Extras::default())?;
    vm.is_there()?;
    let there = trace::now();
    let exits = trace::exits()? - before;
    let private_kib = vm.private_kib()?;
    let (executed, entered) = trace.start_of(&side.program)?;
    vm.process.kill()?;
    Ok(Start { entered: (entered - executed) * 1e3, there: (there - executed) * 1e3, exits, private_kib })
}

/// Starts of one VM after the other, each killed when its guest has said its word; per second.
fn in_a_row(side: &Side) -> Result<f64> {
    let begun = trace::now();
    for _ in 0..ROW {
        let mut vm = side.start(SMALL, Extras::default())?;
        vm.is_there()?;
        vm.process.kill()?;
    }
    Ok(ROW as f64 / (trace::now() - begun))
}
